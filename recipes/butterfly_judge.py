"""配方：蝴蝶裁判 butterfly-judge，给生成的蝴蝶打分（第 4.3.5 节）。

它要认出五种属性，还要认出“不是蝴蝶”的图像：噪声、许多蝴蝶的平均、模糊的影子、
打乱的碎片、别的形状。否则它对一团色块也会很有把握地说出颜色，分数就失去了意义。

用法：python recipes/butterfly_judge.py
"""

import math

import numpy as np
import torch
from common import parser, save_model
from measuring import NAMES, SEED, judge_butterflies
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from book_utils import ButterflyJudge, attribute_labels, butterfly_images, fit, set_seed
from book_utils.metrics import has_label
from book_utils.worlds.butterflies import BACKGROUNDS, WING_COLORS

NAME = "butterfly-judge"
PURPOSE = "蝴蝶裁判，认五种属性，也认得出不是蝴蝶的图像（第 4.3.5 节）"
DATA = "蝴蝶世界 64×64：24,000 只，另有留作检验的组合 4,000 只、别的形状 6,000 张"

SIZE = 64
N_IMAGES = 24_000           # 训练用的组合
N_HELD_OUT = 4_000          # 留作检验的组合：裁判要认得它们，只是生成模型不能见到
N_SHAPES = 6_000
IGNORE = -100               # 不是蝴蝶的图像没有属性，交叉熵跳过它们


def render_shape(rng: np.random.Generator) -> np.ndarray:
    """画一个不是蝴蝶的东西，颜色、描边与蝴蝶相同：uint8，形状 (64, 64, 3)。"""
    def pick(colors):
        rgb = np.array(list(colors.values())[rng.integers(len(colors))][1])
        return tuple((rgb * 255).astype(int))

    big = SIZE * 3          # 画大三倍再缩小，边缘才平滑
    picture = Image.new("RGB", (big, big), pick(BACKGROUNDS))
    draw = ImageDraw.Draw(picture)
    fill, line = pick(WING_COLORS), (26, 18, 15)
    for _ in range(rng.integers(1, 5)):
        x, y = rng.uniform(0.25, 0.75, 2) * big
        radius = rng.uniform(0.12, 0.4) * big
        kind = rng.integers(5)
        if kind == 0:
            flat = radius * rng.uniform(0.3, 1)
            draw.ellipse((x - radius, y - flat, x + radius, y + flat), fill, line, 6)
            if rng.random() < 0.5:                      # 身体一样的竖线，但没有翅膀的形状
                draw.line((x, y - flat, x, y + flat), line, 12)
        elif kind == 1:
            draw.rectangle((x - radius, y - radius * 0.6, x + radius, y + radius * 0.6), fill, line, 6)
        else:
            corners = {2: 3, 3: 5, 4: 10}[int(kind)]    # 三角形、五边形、五角星
            turn = rng.uniform(0, 2 * math.pi)
            points = []
            for i in range(corners):
                r = radius * (0.45 if kind == 4 and i % 2 else 1)
                angle = turn + 2 * math.pi * i / corners
                points.append((x + r * math.cos(angle), y + r * math.sin(angle)))
            draw.polygon(points, fill, line, 6)
        for _ in range(rng.integers(0, 6)):             # 也有斑点
            dx, dy = rng.normal(0, radius / 2.5, 2)
            draw.ellipse((x + dx - 7, y + dy - 7, x + dx + 7, y + dy + 7), line)
        if rng.random() < 0.5:
            fill = pick(WING_COLORS)
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX))


def make_shapes(count: int, seed: int) -> torch.Tensor:
    """count 张不是蝴蝶的图：uint8，形状 (count, 3, 64, 64)。"""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([render_shape(rng) for _ in range(count)])).permute(0, 3, 1, 2)


def shuffle_patches(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """把每张图切成 4 × 4 块再打乱，所有图用同一个次序。"""
    blocks = images.unflatten(3, (4, 16)).unflatten(2, (4, 16))          # (B, 3, 4, 16, 4, 16)
    blocks = blocks.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)              # (B, 16, 3, 16, 16)
    blocks = blocks[:, torch.randperm(16, generator=generator)].unflatten(1, (4, 4))
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def make_negatives(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """由一批蝴蝶 (B, 3, 64, 64) 造出“不是蝴蝶”的图像，四种各 B//12 张。images 取值 0 到 1。"""
    count = len(images) // 12
    parts = images[: 4 * count].split(count)

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator).to(images.device)

    noise = torch.randn(parts[0].shape, generator=generator).to(images.device) * 0.35 + 0.5
    noisy = torch.lerp(parts[0], noise, uniform(0.6, 1.0)).clamp(0, 1)
    picks = torch.randint(len(images), (count, 8), generator=generator)
    averages = images[picks].mean(dim=1)
    blurred = gaussian_blur(parts[2], kernel_size=31, sigma=8.0)
    return torch.cat([noisy, averages, blurred, shuffle_patches(parts[3], generator)])


def batch_loss(model, images, labels, generator):
    """images 是 uint8，形状 (B, 3, 64, 64)；labels 形状 (B, 5)，不是蝴蝶的全为 IGNORE。"""
    images = images / 255
    is_butterfly = (labels[:, 0] != IGNORE).long()
    # 一半大的蝴蝶缩到 32 × 32 再放大：第四章的模型生成的就是这么大的图
    large = has_label(labels, "size", "large") & (torch.rand(len(labels), generator=generator) < 0.5).to(labels.device)
    small = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
    small = F.interpolate(small, size=(64, 64), mode="bilinear", antialias=True)
    images = torch.where(large[:, None, None, None], small, images)

    negatives = make_negatives(images[is_butterfly == 1], generator)
    images = torch.cat([images, negatives])
    is_butterfly = F.pad(is_butterfly, (0, len(negatives)))
    labels = F.pad(labels, (0, 0, 0, len(negatives)), value=IGNORE)
    # 加一点点噪声，免得它只凭像素是否绝对干净来分辨
    amount = 0.03 * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = amount * torch.randn(images.shape, generator=generator)
    outputs = model((images + noise.to(images.device)).clamp(0, 1))
    loss = F.cross_entropy(outputs["is_butterfly"], is_butterfly)
    for column, name in enumerate(model.ATTRIBUTES):
        loss = loss + F.cross_entropy(outputs[name], labels[:, column], ignore_index=IGNORE)
    return loss


def main():
    options = parser(__doc__.splitlines()[0], NAME).parse_args()
    set_seed(0)
    seen, seen_attributes = butterfly_images(N_IMAGES, SIZE, seed=11)
    held_out, held_out_attributes = butterfly_images(N_HELD_OUT, SIZE, seed=12, held_out=True)
    shapes = make_shapes(N_SHAPES, seed=13)
    images = torch.cat([seen, held_out, shapes])
    labels = attribute_labels(seen_attributes + held_out_attributes)
    labels = F.pad(labels, (0, 0, 0, len(shapes)), value=IGNORE)

    model = ButterflyJudge()
    history = fit(
        model, (images, labels), batch_loss, n_epochs=12, batch_size=128, lr=2e-3, lr_decay=True,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        save_model(
            options.output,
            lambda folder: save_file(model.cpu().half().state_dict(), folder / "model.safetensors"),
            history, options.device, "python recipes/butterfly_judge.py",
        )


def measure(name: str = NAME, n_images: int = 2000) -> dict:
    """新画的蝴蝶（含留作检验的组合）上各属性的正确率；各种不是蝴蝶的图像被认作蝴蝶的比例。"""
    result = {"n_images": n_images}
    for size, key, options in (
        (64, "accuracy_64", {}),
        (64, "accuracy_held_out", {"held_out": True}),
        (32, "accuracy_32_large", {"size": "large"}),
    ):
        images, butterflies = butterfly_images(n_images, size, seed=SEED, **options)
        is_butterfly, found = judge_butterflies(images / 255)
        result[key] = {"is_butterfly": is_butterfly.float().mean().item()} | {
            attribute: sum(a[attribute] == getattr(b, attribute) for a, b in zip(found, butterflies, strict=True))
            / n_images
            for attribute in found[0]
        }
    images, _ = butterfly_images(n_images, 64, seed=SEED + 1)
    generator = torch.Generator().manual_seed(SEED)
    # make_negatives 依次给出噪声、平均、模糊、打乱，各占十二分之一
    kinds = zip(("noise", "averages", "blurred", "shuffled"), make_negatives(images / 255, generator).chunk(4), strict=True)
    negatives = dict(kinds) | {"other_shapes": make_shapes(1000, SEED) / 255}
    result["wrongly_recognized"] = {
        kind: judge_butterflies(batch)[0].float().mean().item() for kind, batch in negatives.items()
    }
    return result


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    titles = {
        "accuracy_64": "训练用的组合，64×64", "accuracy_held_out": "留作检验的组合，64×64",
        "accuracy_32_large": "大的，32×32",
    }
    names = {"is_butterfly": "认得是蝴蝶"} | NAMES
    return [
        f"新画的蝴蝶各 {result['n_images']} 只：",
        "",
        "| | " + " | ".join(names.values()) + " |",
        "|---|" + "---|" * len(names),
        *(f"| {title} | " + " | ".join(f"{result[key][n]:.1%}" for n in names) + " |" for key, title in titles.items()),
        "",
        "不是蝴蝶的图像被认作蝴蝶的比例：" + "，".join(
            f"{title} {result['wrongly_recognized'][key]:.1%}" for key, title in (
                ("noise", "噪声"), ("averages", "八只的平均"), ("blurred", "模糊的影子"),
                ("shuffled", "打乱的碎片"), ("other_shapes", "别的形状"))
        ) + "。",
    ]


if __name__ == "__main__":
    main()
