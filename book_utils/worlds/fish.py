"""第 5.5.1 节的鱼的世界：由属性画出水里的鱼，同时给出中英文说明、掩膜与深度。

它与蝴蝶世界平行，每张图像的真相也都已知；样子却一眼就不同：鱼是侧面的，头尾不对称，背景是上亮下暗的水。
微调拿它当“新的、很少的图像”。
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

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
BODY_COLORS = {
    "red": ("红色", (0.86, 0.16, 0.13)),
    "orange": ("橙色", (0.97, 0.52, 0.10)),
    "yellow": ("黄色", (0.98, 0.87, 0.22)),
    "blue": ("蓝色", (0.16, 0.36, 0.86)),
    "pink": ("粉色", (0.97, 0.58, 0.72)),
    "white": ("白色", (0.96, 0.96, 0.94)),
}
PATTERNS = {"plain": "素面", "spotted": "斑点", "striped": "条纹", "scaled": "鳞纹"}
BACKGROUNDS = {
    "sea blue": ("海蓝色", (0.13, 0.47, 0.72)),
    "aqua": ("湖绿色", (0.45, 0.80, 0.80)),
    "seaweed green": ("海藻绿色", (0.20, 0.45, 0.30)),
    "midnight blue": ("午夜蓝色", (0.06, 0.09, 0.20)),
}
# 半个身长（不含尾鳍），以半个图宽为 1
SIZES = {"small": ("小", 0.42), "medium": ("中等", 0.55), "large": ("大", 0.66)}
# 中心的 (x, y)，以半个图宽为 1，y 朝上
POSITIONS = {
    "left": ("左边", (-0.22, 0.0)),
    "right": ("右边", (0.22, 0.0)),
    "top": ("上方", (0.0, 0.34)),
    "bottom": ("下方", (0.0, -0.34)),
    "center": ("中央", (0.0, 0.0)),
}
FACINGS = {"left": ("左", -1), "right": ("右", 1)}
# 半个身高、尾鳍的半宽、背鳍的高，以半个身长为 1
BODY_SHAPES = {"slim": (0.34, 0.40, 0.20), "round": (0.56, 0.46, 0.24), "tall": (0.46, 0.52, 0.42)}
TILT_LIMIT = 20.0               # 度
CHOICES = {
    "body_color": BODY_COLORS, "pattern": PATTERNS, "background": BACKGROUNDS, "size": SIZES,
    "position": POSITIONS, "facing": FACINGS, "body_shape": BODY_SHAPES,
}

# 身体的轮廓：从尾柄（0）到吻（1），半个身高的几分之几；画的时候按它插值
_ALONG = np.linspace(0, 1, 129, dtype=np.float32)
_OUTLINE = 0.92 * np.sin(np.pi * _ALONG**0.85).clip(0) ** 0.75 + 0.10 * (1 - _ALONG)
_ARCH = np.sin(np.pi * _ALONG).clip(0) ** 0.6                # 背鳍与臀鳍的弧


@dataclass(frozen=True)
class Fish:
    """一条鱼的属性。

    属性：
        body_color: 身体颜色，BODY_COLORS 的键之一。
        pattern:    花纹，PATTERNS 的键之一。
        background: 水的颜色，BACKGROUNDS 的键之一。
        size:       大小，SIZES 的键之一。
        position:   位置，POSITIONS 的键之一。
        facing:     头朝哪边，FACINGS 的键之一。
        body_shape: 体形，BODY_SHAPES 的键之一；说明文字里不提它。
        tilt:       逆时针转过的角度，−20 到 20 度；说明文字里不提它。
    异常：
        ValueError: 取值不在允许的范围里。
    来源：第 5.5.1 节。
    """

    body_color: str = "orange"
    pattern: str = "plain"
    background: str = "sea blue"
    size: str = "medium"
    position: str = "center"
    facing: str = "left"
    body_shape: str = "round"
    tilt: float = 0.0

    def __post_init__(self):
        check_attributes(self, CHOICES, "tilt", TILT_LIMIT)


def random_fish(rng: np.random.Generator, **fixed) -> Fish:
    """随机抽一条鱼：各属性均匀，互相独立。

    参数：
        rng:   NumPy 随机数生成器。
        fixed: 固定不变的属性，如 ``size="large"``，名字与取值见 :class:`Fish`。
    异常：
        ValueError: 属性的名字或取值不对。
    来源：第 5.5.1 节。
    """
    check_names(Fish, "鱼", fixed)
    chosen = {name: tuple(allowed)[rng.integers(len(allowed))] for name, allowed in CHOICES.items()}
    return Fish(**chosen | {"tilt": float(rng.uniform(-TILT_LIMIT, TILT_LIMIT))} | fixed)


def random_fishes(n_images: int, seed: int = 0, **fixed) -> list[Fish]:
    """随机抽 n_images 条鱼；同一个 seed 总是同样的鱼，见 :func:`random_fish`。

    异常：
        ValueError: n_images 不是正整数，seed 是负数，或属性不对。
    来源：第 5.5.1 节。
    """
    check_counts(n_images, seed)
    rng = np.random.default_rng(seed)
    return [random_fish(rng, **fixed) for _ in range(n_images)]


def render_fish(fish: Fish, image_size: int = 64, seed: int = 0) -> Render:
    """按属性画一条鱼；颜色深浅、大小、位置与气泡有少许随 seed 而定的变化。

    参数：
        fish:       属性。
        image_size: 图像边长，像素，16 到 512。
        seed:       非负整数；属性、边长、种子都相同，画出的每个像素就相同。
    返回：
        :class:`Render`。
    异常：
        ValueError: image_size 或 seed 超出范围。
    来源：第 5.5.1 节。
    """
    x, y, factor = canvas(image_size, seed)
    rng = np.random.default_rng(seed)
    color = (np.array(BODY_COLORS[fish.body_color][1]) + rng.uniform(-0.04, 0.04, 3)).astype(np.float32)
    water = (np.array(BACKGROUNDS[fish.background][1]) * rng.uniform(0.94, 1.0)).astype(np.float32)
    scale = SIZES[fish.size][1] * rng.uniform(0.95, 1.05)
    center = np.array(POSITIONS[fish.position][1]) + rng.uniform(-0.05, 0.05, 2)
    frequency = rng.uniform(0.92, 1.08)         # 花纹疏密
    phase = rng.uniform(0, 2 * np.pi)

    image = np.repeat((water * (1 + 0.22 * y))[:, None, :], x.shape[1], axis=1)      # 水面亮，水底暗
    for bubble_x, bubble_y, radius in rng.uniform((-0.9, -0.9, 0.03), (0.9, 0.9, 0.07), (3, 3)):
        ring = np.hypot(x - bubble_x, y - bubble_y) / radius
        image[ring < 1] += 0.12
        image[(ring < 1) & (ring > 0.62)] += 0.18

    # 换到鱼自己的坐标：吻在 u = 0.95，尾柄在 −0.95，尾鳍到 −1.4；平移 0.22，使连同尾鳍的整条鱼居中
    angle, side = np.deg2rad(fish.tilt), FACINGS[fish.facing][1]
    u = side * ((x - center[0]) * np.cos(angle) + (y - center[1]) * np.sin(angle)) / scale - 0.22
    v = (-(x - center[0]) * np.sin(angle) + (y - center[1]) * np.cos(angle)) / scale
    u, v = u.astype(np.float32), v.astype(np.float32)
    half, tail_spread, fin_height = BODY_SHAPES[fish.body_shape]
    outline = half * np.interp((u + 0.95) / 1.9, _ALONG, _OUTLINE, left=1e-6, right=1e-6).astype(np.float32)
    body = np.abs(v) < outline

    fins = _draw_fins(image, u, v, outline, tail_spread, fin_height, color) | body
    _draw_body(image, u, v, outline, body, fish, color, frequency, phase)
    _draw_face(image, u, v, body, half, color)

    # 深度：背景下近上远；鱼越大越近，鳍比身体略远
    nearness = {"small": 0.55, "medium": 0.72, "large": 0.90}[fish.size]
    depth = np.where(fins, nearness + 0.08 * body, 0.10 + 0.15 * (1 - y)).astype(np.float32)
    return finished(image, fins, depth, factor)


def _draw_fins(image, u, v, outline, tail_spread, fin_height, color) -> np.ndarray:
    """画尾鳍、背鳍与臀鳍，返回它们覆盖的像素；身体之后再画，会盖住鳍的根。"""
    reach = (-0.78 - u) / 0.62                  # 尾鳍上从根（0）到梢（1）
    tail_edge = np.maximum(tail_spread * (0.22 + 0.95 * reach), 1e-6)
    tail_end = 0.65 + 0.35 * np.abs(v) / tail_edge                      # 中间凹进去，成叉形
    tail = (reach > 0) & (reach < tail_end) & (np.abs(v) < tail_edge)

    along = (u + 0.50) / 0.95
    back_edge = outline + fin_height * np.interp(along, _ALONG, _ARCH) * (1.15 - 0.6 * along)
    back = (along > 0) & (along < 1) & (v > 0) & (v < back_edge)
    along = (u + 0.50) / 0.50
    belly_edge = outline + 0.6 * fin_height * np.interp(along, _ALONG, _ARCH)
    belly = (along > 0) & (along < 1) & (v < 0) & (-v < belly_edge)

    fins = tail | back | belly
    rays = np.where(tail, np.sin(34 * v / (0.4 + reach.clip(0))), np.sin(30 * u)) > 0       # 鳍条
    image[fins] = (0.78 * color) * (0.93 + 0.12 * rays[fins, None])
    rim = (tail & ((np.abs(v) > tail_edge - 0.05) | (reach > tail_end - 0.09)))
    rim |= (back & (v > back_edge - 0.05)) | (belly & (-v > belly_edge - 0.05))
    image[rim] = DARK
    return fins


def _draw_body(image, u, v, outline, body, fish, color, frequency, phase) -> None:
    """画身体：背深腹浅，花纹，深色的边。"""
    a, b, height = u[body], v[body], v[body] / outline[body]         # height：腹 −1，背 1
    pixels = color * (0.98 - 0.16 * height)[:, None]
    paleness = 0.55 * (-height - 0.35).clip(0, 1)[:, None]
    pixels += paleness * (LIGHT - pixels)
    trunk = a < 0.45                                                    # 头上没有花纹
    if fish.pattern == "spotted":               # 两个方向的正弦相乘，峰顶是圆点
        marks = np.sin(13 * frequency * a + phase) * np.sin(13 * frequency * b + phase) > 0.45
        pixels[marks & trunk] = DARK
    elif fish.pattern == "striped":             # 镶黑边的竖条，像小丑鱼；白鱼的竖条是黑的
        bands = np.sin(9.5 * frequency * (a + 0.12 * np.cos(3 * b)) + 0.9)
        pixels[(bands > 0.13) & trunk] = DARK
        if fish.body_color != "white":
            pixels[(bands > 0.57) & trunk] = LIGHT
    elif fish.pattern == "scaled":              # 一排排错开的圆弧
        column = np.floor(b * 5 * frequency)
        across = (a * 4 * frequency + 0.5 * (column % 2)) % 1 - 0.5
        arc = np.hypot(across + 0.25, 0.9 * ((b * 5 * frequency) % 1 - 0.5))
        pixels[(np.abs(arc - 0.48) < 0.11) & trunk] = DARK
    pixels[np.abs(height) > 0.90] = DARK
    image[body] = pixels


def _draw_face(image, u, v, body, half, color) -> None:
    """画鳃盖、胸鳍与眼睛。"""
    gill = (np.abs(np.hypot(u - 0.78, 0.8 * v) - 0.34) < 0.028) & (u < 0.6)
    image[gill & body] = DARK
    p, q = u - 0.18, v + 0.32 * half
    pectoral = ((0.85 * p + 0.5 * q + 0.1) / 0.24) ** 2 + ((0.85 * q - 0.5 * p) / 0.12) ** 2
    image[(pectoral < 1) & body] = 0.74 * color
    image[(pectoral < 1) & (pectoral > 0.66) & body] = DARK
    eye = np.hypot(u - 0.66, v - 0.32 * half)
    image[eye < 0.135] = DARK
    image[eye < 0.105] = (1, 1, 1)
    image[np.hypot(u - 0.69, v - 0.32 * half) < 0.062] = DARK


CAPTIONS = {
    # 与蝴蝶的一样：前三种说出全部六个属性，后三种只说一部分
    "zh": (
        "一条{size}个头的{color}{pattern}鱼，在画面{position}，头朝{facing}，{background}的水",
        "{background}的水里，画面{position}有一条{size}个头的{color}{pattern}鱼，朝{facing}游",
        "画面{position}游着一条{color}{pattern}鱼，头朝{facing}，个头{size}，水是{background}",
        "{color}{pattern}鱼，{background}的水",
        "一条{color}的{pattern}鱼",
        "{background}的水里的{color}鱼",
    ),
    "en": (
        "a {size} {color} {pattern} fish {position}, facing {facing}, {background} water",
        "in {background} water, a {size} {color} {pattern} fish {position}, facing {facing}",
        "{position}, a {pattern} fish with a {color} body, facing {facing}, {size}, the water is {background}",
        "{color} {pattern} fish, {background} water",
        "a {color} {pattern} fish",
        "a {color} fish in {background} water",
    ),
}
ENGLISH_POSITIONS = {
    "left": "on the left", "right": "on the right", "top": "at the top",
    "bottom": "at the bottom", "center": "in the center",
}


def fish_caption(fish: Fish, language: str = "zh", variant: int = 0) -> str:
    """鱼的说明文字。

    参数：
        language: "zh" 或 "en"。
        variant:  0 到 5：前三种说法含全部六个属性，后三种只含一部分。
    异常：
        ValueError: 语言或说法不在上述范围。
    来源：第 5.5.1 节。
    """
    if language not in CAPTIONS:
        raise ValueError(f"language 应是 zh 或 en，收到的是 {language!r}。")
    if not 0 <= variant < len(CAPTIONS[language]):
        raise ValueError(f"variant 应是 0 到 {len(CAPTIONS[language]) - 1}，收到的是 {variant}。")
    if language == "en":
        words = {
            "color": fish.body_color, "pattern": fish.pattern, "size": fish.size, "facing": fish.facing,
            "background": fish.background, "position": ENGLISH_POSITIONS[fish.position],
        }
    else:
        words = {
            "color": BODY_COLORS[fish.body_color][0], "pattern": PATTERNS[fish.pattern],
            "size": SIZES[fish.size][0], "facing": FACINGS[fish.facing][0],
            "background": BACKGROUNDS[fish.background][0], "position": POSITIONS[fish.position][0],
        }
    return CAPTIONS[language][variant].format(**words)


def fish_images(n_images: int, image_size: int = 64, seed: int = 0, **fixed) -> tuple[torch.Tensor, list[Fish]]:
    """一次画好许多鱼，供训练用。

    返回：
        images: uint8，形状 (n_images, 3, image_size, image_size)，取值 0 到 255；
        fishes: 各张图像的属性。与同样参数的 :func:`fish_dataset` 逐张相同。
    来源：第 5.5.1 节。
    """
    fishes = random_fishes(n_images, seed, **fixed)
    return draw_images(render_fish, fishes, image_size, seed), fishes


def fish_dataset(n_images: int = 200, image_size: int = 64, seed: int = 0, **fixed) -> "datasets.Dataset":
    """鱼的数据集，列与 :func:`book_utils.butterfly_dataset` 的相同。

    参数：
        n_images:   张数，正整数。
        image_size: 边长，像素，16 到 512。
        seed:       非负整数；不同的 seed 是互不重复的数据集。
        fixed:      固定不变的属性，如 ``size="large", position="center"``。
    返回：
        ``datasets.Dataset``，列为 image（PIL 图像）、caption_zh、caption_en、attributes（字典）。
    异常：
        ValueError: 参数超出范围。
    来源：第 5.5.1 节。
    """
    images, fishes = fish_images(n_images, image_size, seed, **fixed)
    return as_dataset(images, fishes, fish_caption)
