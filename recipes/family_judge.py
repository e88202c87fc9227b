"""配方：家族裁判 family-judge，看一张图是蝴蝶、是鱼，还是都不是（第 5.5.1 节）。

微调把画蝴蝶的模型教成画鱼的，学会了多少、忘掉了多少，都由它来数。半路上的图是水里的一团颜色，
既不像蝴蝶也不像鱼，裁判要认得出来，所以：
- 一半的蝴蝶换上水的背景，一半的鱼换上蝴蝶的背景：不许只凭背景就下结论（最初没有这样做，
  微调 20 步、还只是一团颜色的图，就有一半被认作鱼）；
- 第三类“都不是”里除了噪声、平均、模糊、碎片与别的形状，还有扭曲得走了形的、花纹搅乱了的，
  以及一条鱼与一只蝴蝶叠在一起的。

用法：python recipes/family_judge.py
"""

import numpy as np
import torch
from butterfly_judge import IGNORE, make_negatives, make_shapes
from common import parser, save_model
from measuring import DEVICE, SEED
from safetensors.torch import save_file
from torch.nn import functional as F

from book_utils import (
    FamilyJudge,
    butterfly_images,
    family_judge,
    fish_images,
    fish_labels,
    fit,
    random_butterflies,
    random_fishes,
    render_butterfly,
    render_fish,
    set_seed,
)
from book_utils.worlds import butterflies as butterfly_world
from book_utils.worlds import fish as fish_world

NAME = "family-judge"
PURPOSE = "家族裁判：蝴蝶、鱼，或都不是；是鱼的还认颜色、花纹、背景与朝向（第 5.5.1 节）"
DATA = "蝴蝶世界与鱼的世界 32×32：各 12,000 张，一半是大的、在中央的，一半换了背景；别的形状 4,000 张"

SIZE = 32
N_IMAGES = 6_000            # 每个家族，随意的与大的各这么多
N_SHAPES = 4_000
OTHER = FamilyJudge.FAMILIES.index("other")
LARGE = {"size": "large", "position": "center"}


def backgrounds(count: int, rng: np.random.Generator, water: bool) -> torch.Tensor:
    """count 张空的背景：水（上亮下暗），或蝴蝶世界的（几乎均匀）。取值 0 到 1，形状 (count, 3, 64, 64)。"""
    colors = list((fish_world if water else butterfly_world).BACKGROUNDS.values())
    picked = np.stack([colors[rng.integers(len(colors))][1] for _ in range(count)]) * rng.uniform(0.94, 1.0, (count, 1))
    heights = torch.linspace(1, -1, 64)                                 # 从上到下
    shade = 1 + 0.22 * heights if water else 1 - 0.04 * (1 - heights)
    return (torch.from_numpy(picked).float()[:, :, None, None] * shade[:, None]).expand(-1, -1, -1, 64).clamp(0, 1)


def shrunk(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, 64, 64)，取值 0 到 1 → uint8，(B, 3, 32, 32)。"""
    return (F.interpolate(images, size=(SIZE, SIZE), mode="area") * 255).round().byte()


def drawn_on_any_background(render, things, seed: int, water: bool) -> torch.Tensor:
    """画好 things，奇数的换上另一个世界的背景：uint8，形状 (N, 3, 32, 32)。"""
    renders = [render(thing, 64, seed * 10_000_000 + index) for index, thing in enumerate(things)]
    images = torch.from_numpy(np.stack([one.image for one in renders])).permute(0, 3, 1, 2) / 255
    masks = torch.from_numpy(np.stack([one.mask for one in renders]))[:, None]
    masks[::2] = True                                                   # 偶数的原样不动
    return shrunk(torch.where(masks, images, backgrounds(len(things), np.random.default_rng(seed), water)))


def small_shapes(count: int, seed: int) -> torch.Tensor:
    """count 张别的形状，一半在水里：uint8，形状 (count, 3, 32, 32)。"""
    shapes = make_shapes(count, seed) / 255
    empty = (shapes - shapes[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) < 0.02       # 与左上角同色的是背景
    empty[::2] = False
    return shrunk(torch.where(empty, backgrounds(count, np.random.default_rng(seed), water=True), shapes))


def warped(images: torch.Tensor, cells: int, amount: torch.Tensor | float, generator: torch.Generator) -> torch.Tensor:
    """按随机的位移场扭曲：cells 越少，弯得越平缓；amount 是位移的标准差，以半个图宽为 1。"""
    field = torch.randn(len(images), 2, cells, cells, generator=generator).to(images.device)
    field = F.interpolate(field, size=images.shape[2:], mode="bicubic", align_corners=True) * amount
    straight = F.affine_grid(torch.eye(2, 3, device=images.device).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, straight + field.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


def negatives(images: torch.Tensor, families: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """由蝴蝶与鱼 images（取值 0 到 1，形状 (B, 3, 32, 32)）造出七种“都不是”的图。"""
    big = F.interpolate(images, size=(64, 64), mode="bilinear")
    parts = F.interpolate(make_negatives(big, generator), size=(SIZE, SIZE), mode="area").chunk(4)
    butterflies, fishes = images[families == 0], images[families == 1]
    count = min(len(butterflies), len(fishes), len(images) // 8)
    share = 0.35 + 0.3 * torch.rand(count, 1, 1, 1, generator=generator).to(images.device)
    return dict(zip(("noise", "averages", "blurred", "shuffled"), parts, strict=True)) | {
        "overlaid": torch.lerp(butterflies[:count], fishes[:count], share),
        "warped": warped(images[-count:], 5, 0.28, generator),
        "scrambled": warped(images[:count], 14, 0.16, generator),
    }


def batch_loss(model, images, labels, generator):
    """images 是 uint8，形状 (B, 3, 32, 32)；labels 形状 (B, 5)：家族，以及鱼的四个属性（不是鱼的为 IGNORE）。"""
    images, families = images / 255, labels[:, 0]
    kept = families != OTHER
    more = torch.cat(list(negatives(images[kept], families[kept], generator).values()))
    extra = labels.new_full((len(more), labels.shape[1]), IGNORE)
    extra[:, 0] = OTHER
    # 生成的图难免有一点走样，轻轻扭一扭的仍算数
    images = warped(images, 6, 0.03 * torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device), generator)
    images, labels = torch.cat([images, more]), torch.cat([labels, extra])
    # 加一点点噪声，免得它只凭像素是否绝对干净来分辨
    amount = 0.03 * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = amount * torch.randn(images.shape, generator=generator)
    outputs = model((images + noise.to(images.device)).clamp(0, 1))
    return sum(
        F.cross_entropy(output, labels[:, column], ignore_index=IGNORE) for column, output in enumerate(outputs.values())
    )


def main():
    options = parser(__doc__.splitlines()[0], NAME).parse_args()
    set_seed(0)
    parts, labels = [], []
    for seed, fixed in ((41, {}), (42, LARGE)):
        fishes = random_fishes(N_IMAGES, seed, **fixed)
        parts += [
            drawn_on_any_background(render_butterfly, random_butterflies(N_IMAGES, seed, **fixed), seed, water=True),
            drawn_on_any_background(render_fish, fishes, seed, water=False),
        ]
        of_fish = fish_labels(fishes)
        of_fish[1::2, 1 + FamilyJudge.ATTRIBUTES.index("background")] = IGNORE          # 换了背景的，水色不算数
        labels += [F.pad(torch.zeros(N_IMAGES, 1, dtype=torch.long), (0, 4), value=IGNORE), of_fish]
    parts.append(small_shapes(N_SHAPES, seed=43))
    labels.append(F.pad(torch.full((N_SHAPES, 1), OTHER), (0, 4), value=IGNORE))

    model = FamilyJudge()
    history = fit(
        model, (torch.cat(parts), torch.cat(labels)), batch_loss, n_epochs=8, batch_size=125, lr=2e-3, lr_decay=True,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        save_model(
            options.output,
            lambda folder: save_file(model.cpu().half().state_dict(), folder / "model.safetensors"),
            history, options.device, "python recipes/family_judge.py",
        )


@torch.no_grad()
def judge_families(images: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """（各张的家族：九成以上把握才算蝴蝶 0 或鱼 1，否则是 2；各张当作鱼看的属性）；images 取值 0 到 1。"""
    judge = family_judge().to(DEVICE)
    parts = [judge.describe(part.to(DEVICE)) for part in images.split(500)]
    return torch.cat([part[0].cpu() for part in parts]), [item for part in parts for item in part[1]]


@torch.no_grad()
def measure(n_images: int = 2000) -> dict:
    """新画的蝴蝶与鱼上的正确率；各种都不是的图被认作蝴蝶或鱼的比例。"""
    result = {"n_images": n_images, "accuracy": {}}
    for key, fixed in (("any", {}), ("large", LARGE)):
        butterflies, _ = butterfly_images(n_images, SIZE, seed=SEED, **fixed)
        fish, fishes = fish_images(n_images, SIZE, seed=SEED, **fixed)
        families, seen = judge_families(fish / 255)
        result["accuracy"][key] = {
            "butterfly": (judge_families(butterflies / 255)[0] == 0).float().mean().item(),
            "fish": (families == 1).float().mean().item(),
        } | {
            name: sum(a[name] == getattr(b, name) for a, b in zip(seen, fishes, strict=True)) / n_images
            for name in FamilyJudge.ATTRIBUTES
        }
    images = torch.cat([
        butterfly_images(n_images, SIZE, seed=SEED + 1)[0], fish_images(n_images, SIZE, seed=SEED + 1)[0],
    ]) / 255
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    families = (shuffled >= n_images).long()
    kinds = negatives(images[shuffled], families, torch.Generator().manual_seed(SEED))
    kinds["other_shapes"] = small_shapes(1000, SEED) / 255
    result["wrongly_recognized"] = {
        kind: (judge_families(batch)[0] != OTHER).float().mean().item() for kind, batch in kinds.items()
    }
    return result


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    titles = {
        "butterfly": "认得蝴蝶", "fish": "认得鱼", "body_color": "鱼的颜色", "pattern": "花纹", "background": "背景",
        "facing": "朝向",
    }
    kinds = {
        "noise": "噪声", "averages": "八张的平均", "blurred": "模糊的影子", "shuffled": "打乱的碎片",
        "overlaid": "鱼与蝴蝶叠在一起", "warped": "扭曲得走了形", "scrambled": "花纹搅乱了", "other_shapes": "别的形状",
    }
    return [
        f"新画的蝴蝶与鱼各 {result['n_images']} 张，32×32；九成以上把握才算认得：",
        "",
        "| | " + " | ".join(titles.values()) + " |",
        "|---|" + "---|" * len(titles),
        *(
            f"| {title} | " + " | ".join(f"{result['accuracy'][key][n]:.1%}" for n in titles) + " |"
            for key, title in (("any", "大小、位置随意"), ("large", "大的，在中央"))
        ),
        "",
        "都不是的图被认作蝴蝶或鱼的比例："
        + "，".join(f"{title} {result['wrongly_recognized'][kind]:.1%}" for kind, title in kinds.items()) + "。",
    ]


if __name__ == "__main__":
    main()
