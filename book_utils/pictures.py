"""画图：图像网格、逐行对照、损失曲线，以及中文字体（第 3.2 节）。"""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import mplfonts
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid

FONT = "Noto Sans CJK SC"       # 由 mplfonts 自带，读者的电脑上不必装中文字体


def use_book_style() -> None:
    """让 matplotlib 用自带的中文字体，并统一图的大小与清晰度。

    来源：第 3.2.1 节。
    """
    for path in (Path(mplfonts.__file__).parent / "fonts").glob("NotoSansCJKsc-*.otf"):
        font_manager.fontManager.addfont(path)
    plt.rcParams.update({
        "font.family": FONT,
        "axes.unicode_minus": False,            # 用 ASCII 减号，避免缺字
        "figure.figsize": (7, 3),
        "figure.dpi": 96,
        "axes.grid": True,
        "grid.alpha": 0.3,
    })


def grid_image(
    images: torch.Tensor, nrow: int = 8, value_range: tuple[float, float] = (0, 1), scale: int = 1
) -> Image.Image:
    """把一批图像拼成网格。单通道画成白纸黑字，三通道照原样；超出范围的值先截断。

    参数：
        images: 形状 (B, 1, H, W) 或 (B, 3, H, W)。
        nrow:   每行几张。
        value_range: 图像取值的范围 (低, 高)，低对应白（单通道）或黑（三通道）。
        scale:  整数放大倍数，保持像素。
    返回：
        PIL 图像；单通道为灰度（模式 L），三通道为 RGB。
    异常：
        ValueError: 形状、取值范围、nrow 或 scale 不合，或图像里有 NaN 或无穷。
    来源：第 3.2.2 节。
    """
    if nrow < 1 or scale < 1:
        raise ValueError(f"nrow 与 scale 都应是正整数，收到的是 {nrow} 和 {scale}。")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images 的形状应是 (B, 1, H, W) 或 (B, 3, H, W)，收到的是 {tuple(images.shape)}。")
    if not bool(images.isfinite().all()):
        raise ValueError("images 里有 NaN 或无穷，画不成图：多半是训练或采样出了错。")
    low, high = value_range
    if low >= high:
        raise ValueError(f"value_range 应是（低, 高）且低小于高，收到的是 {value_range}。")
    scaled = ((images.detach().float().cpu() - low) / (high - low)).clamp(0, 1)
    is_gray = images.shape[1] == 1
    if is_gray:
        scaled = 1 - scaled
    grid = make_grid(scaled, nrow=nrow, padding=2, pad_value=1)
    pixels = (grid * 255).round().byte().permute(1, 2, 0).numpy()
    # make_grid 会把单通道复制成三个相同的通道，取其一即可
    picture = Image.fromarray(pixels[:, :, 0] if is_gray else pixels)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def show_rows(
    rows: Mapping[str, torch.Tensor], nrow: int = 8, value_range: tuple[float, float] = (0, 1)
) -> Figure:
    """逐行对照几批图像，每行上方写标题。

    参数：
        rows:  标题 → 图像批，形状同 :func:`grid_image`。
        nrow, value_range: 同 :func:`grid_image`。
    返回：
        matplotlib 的 Figure。
    异常：
        ValueError: rows 是空的，或同 :func:`grid_image`。
    来源：第 3.3 节。
    """
    if not rows:
        raise ValueError("rows 是空的，至少要有一行图像。")
    pictures = [grid_image(images, nrow, value_range) for images in rows.values()]
    # 每个像素放大整数倍：看得清，PNG 也小得多
    scale = max(1, round(760 / max(picture.width for picture in pictures)))
    title_height = 24
    width = max(picture.width for picture in pictures) * scale
    height = sum(picture.height * scale + title_height for picture in pictures)
    dpi = plt.rcParams["figure.dpi"]
    figure = plt.figure(figsize=(width / dpi, height / dpi))
    top = height
    for title, picture in zip(rows, pictures, strict=True):
        figure.text(0.5, (top - title_height / 2) / height, title, ha="center", va="center", fontsize=10)
        top -= title_height + picture.height * scale
        size = (picture.width * scale / width, picture.height * scale / height)
        axis = figure.add_axes([0, top / height, *size])
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
        axis.set_axis_off()
    return figure


def plot_losses(losses: Mapping[str, list[float]], window: int = 20) -> Figure:
    """画损失曲线：浅色是每一步，深色是 window 步的滑动平均。

    参数：
        losses: 名称 → 逐步损失。
        window: 滑动平均的步数，正整数。
    返回：
        matplotlib 的 Figure。
    来源：第 3.4.2 节。
    """
    if window < 1:
        raise ValueError(f"window 应是正整数，收到的是 {window}。")
    figure, axis = plt.subplots()
    for index, (name, values) in enumerate(losses.items()):
        values = torch.tensor(values)
        axis.plot(values, color=f"C{index}", alpha=0.25, linewidth=0.8)
        if len(values) >= window:
            smooth = values.unfold(0, window, 1).mean(dim=1)
            axis.plot(range(window - 1, len(values)), smooth, color=f"C{index}", label=name)
    axis.set(xlabel="训练步", ylabel="损失")
    axis.legend()
    return figure
