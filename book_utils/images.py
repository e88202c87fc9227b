"""读者自己的图像：找出一个文件夹里的图像文件，读成 8 位、不透明的 RGB（第 4.3.1 节）。

各种来源的图像并不都是 8 位、不透明的：16 位的扫描图、浮点的科学图像、背景透明的图标。
Pillow 的 ``convert("RGB")`` 遇到它们不报错，却把 16 位截断成一片白、把浮点变成一片黑、让透明处藏着的颜色露出来，
所以书里凡是读图像的地方都用这里的 :func:`open_rgb`。
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import datasets


def image_files(folder: str | Path) -> list[Path]:
    """一个文件夹（包括子文件夹）里的图像文件，按名字排好；以点开头的不算。

    按扩展名找，再逐个看一眼文件头，所以不是图像的文件和太大的图在这里就会说出来，不会等到训练的途中。
    路径里有方括号、星号也不要紧。
    异常：
        ValueError: 没有这个文件夹，里面没有图像，或有的图像打不开、太大。
    来源：第 4.3.1 节。
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"没有文件夹 {folder}。请检查路径。")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(
        path for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise ValueError(f"文件夹 {folder} 里没有图像。")
    for path in files:
        _open(path).close()
    return files


def image_folder(folder: str | Path) -> "datasets.Dataset":
    """把一个文件夹的图像做成 ``datasets.Dataset``，只有一列 ``image``；每个文件都算，不按名字分训练与测试。

    返回：
        ``datasets.Dataset``，``image`` 列是 PIL 图像，取用时才解码；再交给 :func:`open_rgb`。
    异常：
        ValueError: 同 :func:`image_files`。
    来源：第 4.3.1 节。
    """
    import datasets  # 导入它要两秒，只在这里用到

    files = image_files(folder)
    return datasets.Dataset.from_dict({"image": [str(path) for path in files]}).cast_column("image", datasets.Image())


def open_rgb(picture: str | Path | Image.Image) -> Image.Image:
    """读成 8 位、不透明的 RGB 图像。

    - 16 位的灰度图（0 到 65535）与浮点图（0 到 1，或 0 到 255）按比例换到 0 到 255；
    - 透明的地方衬上白色；
    - 照片里写着该怎样转正，就先转正。

    参数：
        picture: 文件的路径，或已经打开的 PIL 图像。
    返回：
        模式为 RGB 的 PIL 图像。
    异常：
        ValueError: 文件打不开、已损坏；像素太多（超过 Pillow 的 ``MAX_IMAGE_PIXELS``，约 8,900 万）；
                    浮点图里有 NaN 或取值超出上述范围。
    来源：第 4.3.1 节。
    """
    if isinstance(picture, Image.Image):
        return _to_rgb(picture, getattr(picture, "filename", "") or "（没有文件名）")
    with _open(Path(picture)) as image:
        return _to_rgb(image, picture)


def _open(path: Path) -> Image.Image:
    """打开图像文件，只读文件头；打不开或太大就抛出 ValueError。"""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(path)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(
                f"图像 {path} 太大，超过 {Image.MAX_IMAGE_PIXELS:,} 个像素，展开后会占满内存。请先把它缩小。"
            ) from error
        except OSError as error:
            raise ValueError(f"图像 {path} 读不出来：{error}") from error


def _to_rgb(image: Image.Image, name: str | Path) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(image)      # 它会解码全部像素
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(_to_bytes(np.asarray(image, dtype=np.float64), image.mode, name))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, SyntaxError) as error:         # 截断的 PNG 有时抛出 SyntaxError
        raise ValueError(f"图像 {name} 读不出来：{error}") from error


def _to_bytes(values: np.ndarray, mode: str, name: str | Path) -> np.ndarray:
    """16 位整数或浮点的灰度图 → uint8。"""
    low, high = values.min(), values.max()
    ranges = (1, 255) if mode == "F" else (65535,)
    full = next((full for full in ranges if 0 <= low and high <= full), None)
    if full is None:            # NaN 与任何数比较都不成立，也到这里
        allowed = "0 到 1（或 0 到 255）" if mode == "F" else "0 到 65535 "
        raise ValueError(f"图像 {name} 的取值应在 {allowed}之间，它却是 {low:g} 到 {high:g}。")
    return (values * (255 / full)).round().astype(np.uint8)
