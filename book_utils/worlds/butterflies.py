"""第 4.3.1 节的蝴蝶世界：由属性画出蝴蝶，同时给出中英文说明、掩膜与深度。

每张图像的真相都是已知的，所以生成的图像可以测量：颜色对不对、花纹对不对、位置对不对。
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..images import open_rgb
from ..training import written_whole
from .common import (
    DARK,
    LIGHT,
    Render,
    as_dataset,
    canvas,
    check_attributes,
    check_counts,
    check_names,
    draw_images,
    finished,
)

if TYPE_CHECKING:
    import datasets

# 各属性的取值：英文名 →（中文，其余是画图用的数）。颜色是 0 到 1 的 RGB
WING_COLORS = {
    "red": ("红色", (0.84, 0.13, 0.12)),
    "orange": ("橙色", (0.95, 0.52, 0.08)),
    "yellow": ("黄色", (0.97, 0.87, 0.20)),
    "green": ("绿色", (0.17, 0.58, 0.24)),
    "blue": ("蓝色", (0.13, 0.33, 0.85)),
    "purple": ("紫色", (0.50, 0.19, 0.68)),
    "pink": ("粉色", (0.97, 0.55, 0.72)),
    "white": ("白色", (0.95, 0.95, 0.93)),
}
PATTERNS = {"plain": "素面", "spotted": "斑点", "striped": "条纹", "eyespot": "眼斑"}
BACKGROUNDS = {
    "white": ("白色", (1.00, 1.00, 1.00)),
    "black": ("黑色", (0.07, 0.07, 0.08)),
    "gray": ("灰色", (0.58, 0.58, 0.60)),
    "sky blue": ("天蓝色", (0.60, 0.81, 0.95)),
    "grass green": ("草绿色", (0.62, 0.78, 0.38)),
    "sand": ("沙色", (0.88, 0.78, 0.58)),
}
# 半翅展，以半个图宽为 1
SIZES = {"small": ("小", 0.37), "medium": ("中等", 0.50), "large": ("大", 0.65)}
# 中心的 (x, y)，以半个图宽为 1，y 朝上
POSITIONS = {
    "left": ("左边", (-0.34, 0.0)),
    "right": ("右边", (0.34, 0.0)),
    "top": ("上方", (0.0, 0.34)),
    "bottom": ("下方", (0.0, -0.34)),
    "center": ("中央", (0.0, 0.0)),
}
# 前翅与后翅的椭圆：中心 x、y，长半轴，短半轴，倾角（度）。只写右半边，左半边是它的镜像
WING_SHAPES = {
    "round": ((0.47, 0.33, 0.50, 0.38, 32), (0.40, -0.38, 0.44, 0.36, -40)),
    "pointed": ((0.52, 0.36, 0.60, 0.29, 38), (0.36, -0.34, 0.40, 0.30, -48)),
    "swallowtail": ((0.49, 0.34, 0.54, 0.33, 30), (0.34, -0.45, 0.56, 0.25, -64)),
}
ROTATION_LIMIT = 30.0           # 度
# 这些颜色 × 花纹的组合从不用于训练，留着检验模型会不会把学过的颜色与花纹重新组合
HELD_OUT = frozenset({("blue", "spotted"), ("red", "striped"), ("yellow", "eyespot"), ("purple", "plain")})

CHOICES = {
    "wing_color": WING_COLORS, "pattern": PATTERNS, "background": BACKGROUNDS,
    "size": SIZES, "position": POSITIONS, "wing_shape": WING_SHAPES,
}
# 说明文字会提到、裁判也会认的属性；裁判各输出的次序就是它
ATTRIBUTES = ("wing_color", "pattern", "background", "size", "position")


@dataclass(frozen=True)
class Butterfly:
    """一只蝴蝶的属性。

    属性：
        wing_color: 翅膀颜色，WING_COLORS 的键之一。
        pattern:    花纹，PATTERNS 的键之一。
        background: 背景颜色，BACKGROUNDS 的键之一。
        size:       大小，SIZES 的键之一。
        position:   位置，POSITIONS 的键之一。
        wing_shape: 翅形，WING_SHAPES 的键之一；说明文字里不提它。
        rotation:   逆时针转过的角度，−30 到 30 度；说明文字里不提它。
    异常：
        ValueError: 取值不在允许的范围里。
    来源：第 4.3.1 节。
    """

    wing_color: str = "orange"
    pattern: str = "plain"
    background: str = "white"
    size: str = "medium"
    position: str = "center"
    wing_shape: str = "round"
    rotation: float = 0.0

    def __post_init__(self):
        check_attributes(self, CHOICES, "rotation", ROTATION_LIMIT)


def random_butterfly(rng: np.random.Generator, held_out: bool = False, **fixed) -> Butterfly:
    """随机抽一只蝴蝶：颜色与花纹的组合均匀，其余属性各自均匀，互相独立。

    参数：
        rng:      NumPy 随机数生成器。
        held_out: False 时避开 HELD_OUT 里的颜色 × 花纹组合（训练用），True 时只取它们（检验用）。
        fixed:    固定不变的属性，如 ``size="large"``，名字与取值见 :class:`Butterfly`。
    异常：
        ValueError: 属性的名字或取值不对，或固定之后没有符合 held_out 的组合。
    来源：第 4.3.1 节。
    """
    check_names(Butterfly, "蝴蝶", fixed)
    Butterfly(**fixed)              # 取值不对时在这里报错
    combinations = [
        (color, pattern) for color in WING_COLORS for pattern in PATTERNS
        if ((color, pattern) in HELD_OUT) == held_out
        and fixed.get("wing_color", color) == color and fixed.get("pattern", pattern) == pattern
    ]
    if not combinations:
        raise ValueError(f"{fixed} 里的颜色与花纹的组合{'不' if held_out else ''}在留作检验的 HELD_OUT 之中，抽不到。")
    color, pattern = combinations[rng.integers(len(combinations))]
    chosen = {
        name: choices[rng.integers(len(choices))]
        for name, choices in ((name, tuple(CHOICES[name])) for name in ("background", "size", "position", "wing_shape"))
    }
    chosen["rotation"] = float(rng.uniform(-ROTATION_LIMIT, ROTATION_LIMIT))
    return Butterfly(**{"wing_color": color, "pattern": pattern} | chosen | fixed)


def render_butterfly(butterfly: Butterfly, image_size: int = 64, seed: int = 0) -> Render:
    """按属性画一只蝴蝶；颜色深浅、大小与位置有少许随 seed 而定的变化。

    参数：
        butterfly:  属性。
        image_size: 图像边长，像素，16 到 512。
        seed:       非负整数；属性、边长、种子都相同，画出的每个像素就相同。
    返回：
        :class:`Render`。
    异常：
        ValueError: image_size 或 seed 超出范围。
    来源：第 4.3.1 节。
    """
    x, y, factor = canvas(image_size, seed)
    rng = np.random.default_rng(seed)
    wing_color = np.array(WING_COLORS[butterfly.wing_color][1]) + rng.uniform(-0.04, 0.04, 3)
    background = np.array(BACKGROUNDS[butterfly.background][1]) * rng.uniform(0.96, 1.0)
    scale = SIZES[butterfly.size][1] * rng.uniform(0.95, 1.05)
    center = np.array(POSITIONS[butterfly.position][1]) + rng.uniform(-0.05, 0.05, 2)
    frequency = rng.uniform(0.92, 1.08)         # 花纹疏密
    phase = rng.uniform(0, 2 * np.pi)

    # 换到蝴蝶自己的坐标：中心为原点，身体朝上，半翅展约为 1；|u| 使左右对称
    angle = np.deg2rad(butterfly.rotation)
    u = ((x - center[0]) * np.cos(angle) + (y - center[1]) * np.sin(angle)) / scale
    v = (-(x - center[0]) * np.sin(angle) + (y - center[1]) * np.cos(angle)) / scale
    u, v = np.abs(u).astype(np.float32), v.astype(np.float32)

    image = np.empty((*u.shape, 3), dtype=np.float32)
    image[:] = background * (1 - 0.04 * (1 - y[:, :, None]))            # 背景从上到下略微变暗
    wings = np.zeros(u.shape, dtype=bool)
    for wing in (WING_SHAPES[butterfly.wing_shape][1], WING_SHAPES[butterfly.wing_shape][0]):
        inside = _draw_wing(image, u, v, wing, butterfly.pattern, wing_color, frequency, phase)
        wings |= inside

    body = (u / 0.07) ** 2 + ((v + 0.02) / 0.42) ** 2 < 1
    # 触角：从头顶向外弯的两条细线，末端一个小圆
    curve = np.abs(u - 0.10 - 0.5 * (v - 0.38)) < 0.028
    antennae = (curve & (v > 0.36) & (v < 0.80)) | ((u - 0.32) ** 2 + (v - 0.81) ** 2 < 0.045**2)
    # 黑色背景上深色的身体看不见，改画浅色
    line_color = LIGHT * 0.75 if butterfly.background == "black" else DARK
    image[antennae & ~wings] = line_color
    image[body] = DARK if butterfly.background != "black" else DARK + 0.18

    mask = wings | body | antennae
    # 深度：背景下近上远；蝴蝶越大越近，翅膀向两侧略微后掠
    depth = np.broadcast_to(0.10 + 0.15 * (1 - y), mask.shape).astype(np.float32)
    nearness = {"small": 0.55, "medium": 0.72, "large": 0.90}[butterfly.size]
    depth = np.where(mask, nearness - 0.15 * np.minimum(u, 1) + 0.08 * body, depth)
    return finished(image, mask, depth, factor)


CAPTIONS = {
    # 前三种说出全部五个属性，后三种只说一部分：读者写提示词时不会总是面面俱到
    "zh": (
        "一只{size}个头的{color}{pattern}蝴蝶，在画面{position}，{background}背景",
        "{background}背景上，画面{position}有一只{size}个头的{color}{pattern}蝴蝶",
        "画面{position}停着一只{color}{pattern}蝴蝶，个头{size}，背景是{background}",
        "{color}{pattern}蝴蝶，{background}背景",
        "一只{color}的{pattern}蝴蝶",
        "{background}背景前的{color}蝴蝶",
    ),
    "en": (
        "a {size} {color} {pattern} butterfly {position}, {background} background",
        "on a {background} background, a {size} {color} {pattern} butterfly {position}",
        "{position}, a {pattern} butterfly with {color} wings, {size}, the background is {background}",
        "{color} {pattern} butterfly, {background} background",
        "a {color} {pattern} butterfly",
        "a {color} butterfly on a {background} background",
    ),
}
ENGLISH_POSITIONS = {
    "left": "on the left", "right": "on the right", "top": "at the top",
    "bottom": "at the bottom", "center": "in the center",
}


def caption(butterfly: Butterfly, language: str = "zh", variant: int = 0) -> str:
    """蝴蝶的说明文字。

    参数：
        language: "zh" 或 "en"。
        variant:  0 到 5：前三种说法含全部五个属性，后三种只含一部分。
    异常：
        ValueError: 语言或说法不在上述范围。
    来源：第 4.3.1 节。
    """
    if language not in CAPTIONS:
        raise ValueError(f"language 应是 zh 或 en，收到的是 {language!r}。")
    if not 0 <= variant < len(CAPTIONS[language]):
        raise ValueError(f"variant 应是 0 到 {len(CAPTIONS[language]) - 1}，收到的是 {variant}。")
    if language == "en":
        words = {
            "color": butterfly.wing_color, "pattern": butterfly.pattern, "size": butterfly.size,
            "background": butterfly.background, "position": ENGLISH_POSITIONS[butterfly.position],
        }
    else:
        words = {
            "color": WING_COLORS[butterfly.wing_color][0], "pattern": PATTERNS[butterfly.pattern],
            "size": SIZES[butterfly.size][0], "background": BACKGROUNDS[butterfly.background][0],
            "position": POSITIONS[butterfly.position][0],
        }
    return CAPTIONS[language][variant].format(**words)


def random_butterflies(n_images: int, seed: int = 0, held_out: bool = False, **fixed) -> list[Butterfly]:
    """随机抽 n_images 只蝴蝶；同一个 seed 总是同样的蝴蝶，见 :func:`random_butterfly`。

    异常：
        ValueError: n_images 不是正整数，或 seed 是负数。
    来源：第 4.3.1 节。
    """
    check_counts(n_images, seed)
    rng = np.random.default_rng(seed)
    return [random_butterfly(rng, held_out, **fixed) for _ in range(n_images)]


def butterfly_images(
    n_images: int, image_size: int = 64, seed: int = 0, held_out: bool = False, **fixed
) -> tuple[torch.Tensor, list[Butterfly]]:
    """一次画好许多蝴蝶，省去 PNG 的编码与解码，供训练用。

    返回：
        images: uint8，形状 (n_images, 3, image_size, image_size)，取值 0 到 255；
        butterflies: 各张图像的属性。与同样参数的 :func:`butterfly_dataset` 逐张相同。
    来源：第 4.3.1 节。
    """
    butterflies = random_butterflies(n_images, seed, held_out, **fixed)
    return draw_images(render_butterfly, butterflies, image_size, seed), butterflies


def butterfly_dataset(
    n_images: int = 1000, image_size: int = 64, seed: int = 0, held_out: bool = False, **fixed
) -> "datasets.Dataset":
    """蝴蝶世界的数据集，用法与 ``datasets.load_dataset`` 得到的相同。

    参数：
        n_images:   张数，正整数。
        image_size: 边长，像素，16 到 512。
        seed:       非负整数；不同的 seed 是互不重复的数据集。
        held_out:   False 时不含 HELD_OUT 里的组合，True 时只含它们。
        fixed:      固定不变的属性，如 ``size="large", position="center"``。
    返回：
        ``datasets.Dataset``，列为 image（PIL 图像）、caption_zh、caption_en、attributes（字典）。
    异常：
        ValueError: 参数超出范围。
    来源：第 4.3.1 节。
    """
    images, butterflies = butterfly_images(n_images, image_size, seed, held_out, **fixed)
    return as_dataset(images, butterflies, caption)


def export_imagefolder(dataset: "datasets.Dataset", folder: str | Path) -> Path:
    """把数据集存成 ``imagefolder``：一个文件夹的 PNG，加一份 metadata.jsonl。

    之后用 ``load_dataset("imagefolder", data_dir=folder)`` 读回；用自己的照片时也是同样的布局。

    参数：
        dataset: :func:`butterfly_dataset` 的返回值。
        folder:  要写到的文件夹，不能已经存在。
    返回：
        写好的文件夹。
    异常：
        FileExistsError: folder 已经存在。
    来源：第 4.3.1 节。
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} 已经存在。请换一个名字，或先删去它。")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(folder) as partial:      # 中断时不会留下半个数据集
        partial.mkdir()
        with open(partial / "metadata.jsonl", "w", encoding="utf-8") as metadata:
            for index, row in enumerate(dataset):
                name = f"{index:05d}.png"
                open_rgb(row.pop("image")).save(partial / name)
                metadata.write(json.dumps({"file_name": name} | row, ensure_ascii=False) + "\n")
    return folder


def _draw_wing(image, u, v, wing, pattern, color, frequency, phase):
    """在 image 上画一对翅膀（一个椭圆及其镜像），返回它覆盖的像素。"""
    center_u, center_v, long_axis, short_axis, tilt = wing
    tilt = np.deg2rad(tilt)
    along = (u - center_u) * np.cos(tilt) + (v - center_v) * np.sin(tilt)
    across = -(u - center_u) * np.sin(tilt) + (v - center_v) * np.cos(tilt)
    radius = (along / long_axis) ** 2 + (across / short_axis) ** 2      # 1 是翅膀的边缘
    inside = radius < 1
    shade = 1.06 - 0.16 * radius[inside]                               # 中间略亮
    pixels = color.astype(np.float32) * shade[:, None]

    marks = np.zeros(len(pixels), dtype=bool)
    a, b, r = along[inside], across[inside], radius[inside]
    if pattern == "spotted":                    # 两个方向的正弦相乘，峰顶是圆点
        marks = np.sin(15 * frequency * a + phase) * np.sin(15 * frequency * b + phase) > 0.45
    elif pattern == "striped":                  # 横过翅膀、略微弯曲的条纹
        marks = np.sin(19 * frequency * (a + 0.5 * b**2) + phase) > 0.2
    elif pattern == "eyespot":                  # 浅色圆环，深色的心
        spot = np.hypot(a - 0.10 * long_axis, b) / short_axis
        pixels[spot < 0.52] = LIGHT
        marks = spot < 0.30
    pixels[marks | (r > 0.84)] = DARK           # 花纹与翅缘同是深色
    image[inside] = pixels
    return inside
