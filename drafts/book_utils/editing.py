"""改一张图之前的两件事：图生图走几步，图像修补的图与掩膜（第 6.5 节）。"""

import numpy as np
from PIL import Image

from .images import open_rgb


def steps_taken(strength: float, n_steps: int) -> int:
    """图生图真正走的步数：n_steps 步里最后的 ⌊strength × n_steps⌋ 步。

    参数：
        strength: 0 到 1，1 是走满全程。
        n_steps:  采样排成多少步（``num_inference_steps``），正整数。
    异常：
        ValueError: strength 不在 0 与 1 之间，或小得一步也走不了。
    来源：第 6.5.1 节。
    """
    if not (0 <= strength <= 1 and int(n_steps * strength) >= 1):
        raise ValueError(
            f"strength 应在 0 与 1 之间，并且乘上步数 {n_steps} 之后至少有一步可走，收到的是 {strength}。"
        )
    return int(n_steps * strength)


def prepare_edit(picture, mask, size: int) -> tuple[Image.Image, Image.Image]:
    """整理要改的图与掩膜，都缩放到 size × size；掩膜里 1（白）是要重画的。

    参数：
        picture: 正方形的 PIL 图像，任何模式；透明处衬上白色（见 :func:`book_utils.open_rgb`）。
        mask:    与图一样大：PIL 图像（彩色的转成灰度），或数组 (H, W)。取值 0 到 1、布尔或 0 到 255，
                 过半的算白；最大的不超过 1，就当作 0 到 1 的。
        size:    缩放到的边长，像素。
    返回：
        （RGB 的图，L 的掩膜，掩膜里只有 0 与 255）。
    异常：
        ValueError: 不是图像，不是正方形，掩膜大小不合，没有要重画的地方，或 size 不是正数。
    来源：第 6.5.2 节。
    """
    if not isinstance(picture, Image.Image):
        raise ValueError(f"picture 应是 PIL 图像，收到的是 {type(picture).__name__}。")
    if size < 1:
        raise ValueError(f"size 应是正整数，收到的是 {size}。")
    if picture.width != picture.height:
        raise ValueError(f"picture 应是正方形，收到的是 {picture.width}×{picture.height}。请先裁剪，免得被压扁。")
    pixels = np.asarray(mask.convert("L") if isinstance(mask, Image.Image) else mask)
    if pixels.shape != (picture.height, picture.width):
        raise ValueError(
            f"mask 应与图一样大，是高 {picture.height}、宽 {picture.width} 的一张，收到的形状是 {pixels.shape}。"
        )
    painted = pixels > (127 if pixels.max() > 1 else 0.5)                  # 0 到 255 的，与 0 到 1 的
    if not painted.any():
        raise ValueError("mask 里没有要重画的地方：1（白）是重画，0（黑）是保留，是不是给反了？")
    white = Image.fromarray(painted.astype(np.uint8) * 255)
    return (
        open_rgb(picture).resize((size, size), Image.Resampling.LANCZOS),
        white.resize((size, size), Image.Resampling.NEAREST),
    )
