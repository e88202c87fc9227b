"""第 9.2 节的两种画风，与 DreamBooth 要学的那一只蝴蝶：都由蝴蝶世界的图改画而来。"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageFilter

from .butterflies import Butterfly, render_butterfly
from .common import DARK, shrink

STYLES = {"glow": "发光", "frame": "装框"}
GOLD = np.array((1.0, 0.86, 0.35), dtype=np.float32)        # 光晕的颜色
WOOD = np.array((0.42, 0.26, 0.12), dtype=np.float32)       # 画框的颜色

# 要学的那一只：左右两半不同，（颜色，花纹）。蝴蝶世界里没有这样的蝴蝶
SUBJECT = (("orange", "spotted"), ("blue", "plain"))
# 五张“照片”：只见过三种背景
SUBJECT_PHOTOS = (
    Butterfly(background="white", size="large", position="center", rotation=0),
    Butterfly(background="gray", size="large", position="center", rotation=-14),
    Butterfly(background="sky blue", size="medium", position="left", rotation=9),
    Butterfly(background="white", size="medium", position="right", rotation=18),
    Butterfly(background="sky blue", size="large", position="center", rotation=-6),
)


def render_styled(butterfly: Butterfly, styles: Sequence[str] = (), image_size: int = 64, seed: int = 0) -> np.ndarray:
    """按画风画一只蝴蝶；不给画风，就与 :func:`render_butterfly` 画的是同一只，只是边缘略有出入。

    参数：
        butterfly:  属性。
        styles:     STYLES 的键，可以同时用几种。
        image_size: 边长，像素，16 到 256。
        seed:       非负整数。
    返回：
        uint8，(image_size, image_size, 3)。
    异常：
        ValueError: 没有这样的画风，或边长、种子超出范围。
    来源：第 9.2 节。
    """
    unknown = [style for style in styles if style not in STYLES]
    if unknown:
        raise ValueError(f"画风应是 {'、'.join(STYLES)} 中的几种，收到的还有 {'、'.join(map(str, unknown))}。")
    render = render_butterfly(butterfly, 2 * image_size, seed)          # 画大一倍，改完再缩小
    return _apply(render.image, render.mask, styles)


def render_subject(
    butterfly: Butterfly, image_size: int = 64, seed: int = 0, styles: Sequence[str] = (), halves=SUBJECT
) -> np.ndarray:
    """画左右两半不同的蝴蝶；背景、大小、位置、角度照 butterfly，颜色与花纹照 halves（左，右）。

    返回：
        uint8，(image_size, image_size, 3)。
    来源：第 9.3 节。
    """
    # 种子相同，两次画的形状就相同，只有颜色与花纹不同
    left, right = (
        render_butterfly(replace(butterfly, wing_color=color, pattern=pattern), 2 * image_size, seed)
        for color, pattern in halves
    )
    # 蝴蝶左右对称，所以掩膜的重心落在身体的轴线上，轴线的方向由角度给出
    rows, columns = left.mask.nonzero()
    y, x = np.mgrid[: left.mask.shape[0], : left.mask.shape[1]]
    angle = np.deg2rad(butterfly.rotation)
    across = (x - columns.mean()) * np.cos(angle) - (y - rows.mean()) * np.sin(angle)
    image = np.where((across < 0)[:, :, None], left.image, right.image)
    return _apply(image, left.mask, styles)


def subject_images(image_size: int = 64) -> torch.Tensor:
    """DreamBooth 的五张“照片”，uint8，(5, 3, image_size, image_size)。

    来源：第 9.3 节。
    """
    pictures = [render_subject(photo, image_size, 94 * 10_000_000 + i) for i, photo in enumerate(SUBJECT_PHOTOS)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def styled_images(butterflies: Sequence[Butterfly], styles: Sequence[str], image_size: int = 64, seed: int = 0) -> torch.Tensor:
    """逐张照画风画好：uint8，(N, 3, image_size, image_size)。不同的 seed，各张的种子不重复。

    来源：第 9.2 节。
    """
    pictures = [render_styled(b, styles, image_size, seed * 10_000_000 + i) for i, b in enumerate(butterflies)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _apply(image: np.ndarray, mask: np.ndarray, styles: Sequence[str]) -> np.ndarray:
    """在 uint8 的 image 上加画风，再缩小一半。"""
    image = image.astype(np.float32) / 255
    side = len(image)
    if "glow" in styles:                        # 蝴蝶之外，越近越金黄
        blurred = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(side * 5 / 64))
        amount = np.clip(1.7 * np.asarray(blurred, dtype=np.float32) / 255, 0, 0.85) * ~mask
        image += amount[:, :, None] * (GOLD - image)
    if "frame" in styles:                       # 四边一圈木框，里面一条深线
        width, line = round(side * 6 / 64), round(side / 64)
        inner = np.zeros(mask.shape, dtype=bool)
        inner[width:-width, width:-width] = True
        outer = np.zeros(mask.shape, dtype=bool)
        outer[width - line : line - width, width - line : line - width] = True
        image[~outer] = WOOD
        image[outer & ~inner] = DARK
    return (shrink(image, 2).clip(0, 1) * 255).round().astype(np.uint8)
