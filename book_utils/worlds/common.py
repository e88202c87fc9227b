"""几个世界（蝴蝶、鱼）共用的部分：画好的一张图、检查参数、缩小去锯齿、包成数据集。"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    import datasets

DARK = np.array((0.10, 0.07, 0.06), dtype=np.float32)
LIGHT = np.array((0.98, 0.96, 0.88), dtype=np.float32)


@dataclass(frozen=True)
class Render:
    """画好的一张图：``image`` uint8 (H, W, 3)；``mask`` bool (H, W)，主体所在的像素；
    ``depth`` float32 (H, W)，取值 0（最远）到 1（最近）。"""

    image: np.ndarray
    mask: np.ndarray
    depth: np.ndarray


def check_attributes(thing: Any, choices: Mapping[str, Mapping], angle: str, limit: float) -> None:
    """thing 的各属性应在 choices 里，名为 angle 的角度应在 ±limit 度之内，否则抛出 ValueError。"""
    for name, allowed in choices.items():
        value = getattr(thing, name)
        if value not in allowed:
            raise ValueError(f"{name} 应是 {'、'.join(allowed)} 之一，收到的是 {value!r}。")
    value = getattr(thing, angle)
    if not -limit <= value <= limit:
        raise ValueError(f"{angle} 应在 −{limit:g} 到 {limit:g} 度之间，收到的是 {value}。")


def check_names(kind: type, title: str, fixed: Mapping[str, Any]) -> None:
    """fixed 的名字都应是 kind 的属性；title 是报错时的称呼。"""
    names = [field.name for field in fields(kind)]
    unknown = sorted(set(fixed) - set(names))
    if unknown:
        raise ValueError(f"{title}没有属性 {'、'.join(unknown)}；可以固定的有 {'、'.join(names)}。")


def check_counts(n_images: int, seed: int) -> None:
    """张数应是正整数，种子应是非负整数。"""
    if n_images < 1 or seed < 0:
        raise ValueError(f"n_images 应是正整数，seed 应是非负整数，收到的是 {n_images} 和 {seed}。")


def canvas(image_size: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """画布上各像素的坐标 x（形状 (1, n)）与 y（形状 (n, 1)，朝上），取值 (−1, 1)，以及放大的倍数。

    先画得大些，最后由 :func:`shrink` 把每 factor × factor 个像素平均成一个，边缘就没有锯齿。
    异常：
        ValueError: image_size 不在 16 到 512 之间，或 seed 是负数。
    """
    if not 16 <= image_size <= 512:
        raise ValueError(f"image_size 应在 16 到 512 之间，收到的是 {image_size}。")
    if seed < 0:
        raise ValueError(f"seed 应是非负整数，收到的是 {seed}。")
    factor = max(2, round(128 / image_size))
    n_pixels = image_size * factor
    axis = ((np.arange(n_pixels, dtype=np.float32) + 0.5) / n_pixels) * 2 - 1
    return axis[None, :], -axis[:, None], factor


def shrink(array: np.ndarray, factor: int) -> np.ndarray:
    """把每 factor × factor 个像素平均成一个。"""
    height, width = array.shape[0] // factor, array.shape[1] // factor
    blocks = array.reshape(height, factor, width, factor, *array.shape[2:])
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def finished(image: np.ndarray, mask: np.ndarray, depth: np.ndarray, factor: int) -> Render:
    """把放大了 factor 倍的图、掩膜与深度缩成 :class:`Render`。"""
    return Render(
        image=(shrink(image, factor).clip(0, 1) * 255).round().astype(np.uint8),
        mask=shrink(mask, factor) >= 0.5,
        depth=shrink(depth, factor),
    )


def draw_images(render: Callable[..., Render], things: Sequence, image_size: int, seed: int) -> torch.Tensor:
    """逐张画好 things：uint8，形状 (N, 3, image_size, image_size)。不同的 seed，各张的种子不重复。"""
    images = torch.empty(len(things), 3, image_size, image_size, dtype=torch.uint8)
    for index, thing in enumerate(things):
        drawn = render(thing, image_size, seed * 10_000_000 + index)
        images[index] = torch.from_numpy(drawn.image).permute(2, 0, 1)
    return images


def as_dataset(images: torch.Tensor, things: Sequence, caption: Callable[..., str]) -> "datasets.Dataset":
    """包成 ``datasets.Dataset``，列为 image（PIL 图像）、caption_zh、caption_en、attributes（字典）。"""
    import datasets  # 导入它要两秒，只在这里用到

    return datasets.Dataset.from_dict(
        {
            "image": [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images],
            "caption_zh": [caption(thing, "zh") for thing in things],
            "caption_en": [caption(thing, "en") for thing in things],
            "attributes": [asdict(thing) for thing in things],
        }
    ).cast_column("image", datasets.Image())
