"""配方：mini-stable-diffusion-inpaint，按提示词把图上盖住的一块重新画好（第 6.5.2 节）。

由 mini-stable-diffusion 的 UNet 微调而来，输入多 5 个通道：潜变量那么大的掩膜（1 为要画的），
和盖住之后的图的潜变量（4 个通道）。自编码器、文本编码器与调度器都不变，随书只存权重之差。

measure() 用没有训练过的种子量三件事：
1. 重画：掩膜取蝴蝶的轮廓扩大几圈，要它换一种颜色与花纹；九通道的 UNet，与不训练、每步贴回原图的掩膜混合；
2. 掩膜之外变了多少：离掩膜 RIM 个像素以外，各像素之差的平均；自编码器自己的误差是下限；
3. 图生图（第 6.5.1 节）：随书的基础模型，提示词只说颜色，强度从 0.1 到 1.0。

用法：python recipes/mini_stable_diffusion_inpaint.py
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from butterfly_clip import encode, write_captions
from common import ROOT, parser, save_model
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from measuring import DEVICE, NAMES, SEED, agreement, judge_butterflies, write_prompts
from mini_stable_diffusion import UNetLoss, reconstruct
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from book_utils import (
    Butterfly,
    add_difference,
    fit,
    random_butterflies,
    random_caption,
    render_butterfly,
    resolve,
    set_seed,
    weight_difference,
    widen_input,
)
from book_utils.training import load_state, save_state
from book_utils.worlds.butterflies import HELD_OUT, PATTERNS, WING_COLORS

NAME = "mini-stable-diffusion-inpaint"
BASE = "mini-stable-diffusion"
PURPOSE = "把图上盖住的一块按提示词重画：StableDiffusionInpaintPipeline 的 UNet，9 个输入通道（第 6.5.2 节）"
DATA = "蝴蝶世界 64×64：16,000 只（seed=62），每只两张掩膜、八句说明，不含留作检验的颜色 × 花纹组合"
PRECISION = "与 mini-stable-diffusion 的 UNet 的权重之差，8 位浮点，safetensors；用 `book_utils.add_difference` 加回去"

N_IMAGES, N_EPOCHS, BATCH_SIZE = 16_000, 8, 32
N_MASKS, N_CAPTIONS = 2, 8
IN_CHANNELS = 9                 # 潜变量 4，掩膜 1，盖住之后的图的潜变量 4：StableDiffusionInpaintPipeline 的次序

# 测量
GUIDANCE_SCALE, N_STEPS = 2.0, 25
PER_CALL = 50                   # 一次画这么多张
RIM = 4                         # 自编码器与潜变量的格子会在掩膜边上渗出这么多像素
STRENGTHS = tuple(round(0.1 * i, 1) for i in range(1, 11))
IMG2IMG_SCALES = (2.0, 5.0)     # 图生图用这两种引导强度


# —— 数据 ——

def grow(masks: torch.Tensor, pixels: int) -> torch.Tensor:
    """把掩膜 (N, 1, H, W) 里是 1 的地方向四周扩 pixels 个像素。"""
    return F.max_pool2d(masks.float(), 2 * pixels + 1, stride=1, padding=pixels)


def random_mask(butterfly: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """一张掩膜 (64, 64)，1 为要重画的。butterfly：蝴蝶的轮廓，(64, 64)，布尔。

    三成半是蝴蝶的轮廓扩大几圈，两成是它的外框，两成是随意的方块，一成半是几个圆叠成的一片，
    一成是整张图：读者盖住什么，训练时就要见过什么。
    """
    size = butterfly.shape[-1]
    kind = rng.choice(5, p=(0.35, 0.20, 0.20, 0.15, 0.10))
    if kind == 0:
        return grow(butterfly[None, None], int(rng.integers(2, 8)))[0, 0]
    mask = torch.zeros(size, size)
    if kind == 1:
        rows, columns = butterfly.any(dim=1).nonzero(), butterfly.any(dim=0).nonzero()
        edge = int(rng.integers(1, 8))
        top, left = max(0, rows.min().item() - edge), max(0, columns.min().item() - edge)
        mask[top : rows.max().item() + edge + 1, left : columns.max().item() + edge + 1] = 1
    elif kind == 2:
        height, width = rng.integers(16, 49, 2)
        top, left = rng.integers(0, size - height + 1), rng.integers(0, size - width + 1)
        mask[top : top + height, left : left + width] = 1
    elif kind == 3:
        grid = torch.arange(size)
        for _ in range(rng.integers(2, 6)):
            y, x, radius = rng.uniform(8, size - 8), rng.uniform(8, size - 8), rng.uniform(6, 16)
            mask[(grid[:, None] - y) ** 2 + (grid - x) ** 2 < radius**2] = 1
    else:
        mask[:] = 1
    return mask


@torch.no_grad()
def encode_images(vae, images: torch.Tensor, title: str) -> torch.Tensor:
    """images：(N, 3, 64, 64)，取值 −1 到 1 → 潜变量，乘过 scaling_factor，float16。"""
    parts = (vae.encode(part.to(vae.device)).latent_dist.mean.half().cpu() for part in tqdm(images.split(64), desc=title, unit="批"))
    return torch.cat([*parts]) * vae.config.scaling_factor


def training_tensors(vae, cache: Path) -> tuple[torch.Tensor, ...]:
    """（图的潜变量，掩膜，盖住之后的潜变量），都是潜变量的大小；存在 cache 里。"""
    made_from = {"n_images": N_IMAGES, "n_masks": N_MASKS, "scaling_factor": vae.config.scaling_factor}
    names = ("latents", "masks", "masked")
    if cache.exists():
        tensors, notes = load_state(cache)
        if notes == made_from:
            return tuple(tensors[name] for name in names)
    rng, images, masks = np.random.default_rng(62), [], []
    for index, butterfly in enumerate(random_butterflies(N_IMAGES, seed=62)):
        render = render_butterfly(butterfly, 64, 62 * 10_000_000 + index)
        images.append(torch.from_numpy(render.image).permute(2, 0, 1))
        outline = torch.from_numpy(render.mask)
        masks.append(torch.stack([random_mask(outline, rng) for _ in range(N_MASKS)]))
    images, masks = torch.stack(images) / 127.5 - 1, torch.stack(masks)[:, :, None]     # (N, K, 1, 64, 64)
    latents = encode_images(vae, images, "编码")
    masked = torch.stack([
        encode_images(vae, images * (masks[:, k] < 0.5), f"编码盖住的图 {k + 1}") for k in range(N_MASKS)
    ], dim=1)
    small = masks[..., ::4, ::4].to(torch.uint8)        # 与管线相同：最近邻缩到潜变量的大小
    save_state(cache, dict(zip(names, (latents, small, masked), strict=True)), made_from)
    return latents, small, masked


class InpaintLoss(UNetLoss):
    """与基础模型的损失相同，只是网络还看得到掩膜与盖住之后的图。"""

    def __call__(self, unet, latents, masks, masked, tokens, generator):
        picks = torch.randint(masks.shape[1], (len(latents),), generator=generator).to(latents.device)
        rows = torch.arange(len(latents), device=latents.device)
        shown = torch.cat([masks[rows, picks].float(), masked[rows, picks].float()], dim=1)
        return super().__call__(
            lambda x, t, text: unet(torch.cat([x, shown], dim=1), t, text), latents, tokens, generator
        )


# —— 训练 ——

def build_unet(base: StableDiffusionPipeline):
    """基础模型的 UNet，输入加宽到 9 个通道，新的通道从 0 开始。"""
    return widen_input(base.unet, IN_CHANNELS)


def main(arguments: list[str] | None = None):
    options = parser(__doc__.splitlines()[0], NAME).parse_args(arguments)
    base = StableDiffusionPipeline.from_pretrained(resolve(BASE)).to(options.device)
    tensors = training_tensors(base.vae, options.checkpoint.with_stem(options.checkpoint.stem + "-data"))
    texts, _ = write_captions(random_butterflies(N_IMAGES, seed=62), N_CAPTIONS, seed=62)
    tokens = encode(base.tokenizer, texts).view(N_IMAGES, N_CAPTIONS, -1).to(torch.int16)
    base.text_encoder.requires_grad_(False)
    loss = InpaintLoss(base.text_encoder, encode(base.tokenizer, [""]), base.scheduler)

    set_seed(0)
    unet = build_unet(base)
    history = fit(
        unet, (*tensors, tokens), loss, n_epochs=N_EPOCHS, batch_size=BATCH_SIZE, lr=3e-4, lr_decay=True,
        ema_decay=0.999, device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        save_model(
            options.output,
            lambda folder: save_file(weight_difference(build_unet(base.to("cpu")), unet.cpu()), folder / "difference.safetensors"),
            history, options.device, f"python {Path(__file__).relative_to(ROOT)}",
        )


# —— 测量：题目 ——

def other_look(butterfly: Butterfly, rng: np.random.Generator, held_out: bool = False) -> Butterfly:
    """同一只蝴蝶，颜色与花纹都换掉；held_out 时只换成留作检验的组合，否则避开它们。"""
    looks = [
        (color, pattern) for color in WING_COLORS for pattern in PATTERNS
        if color != butterfly.wing_color and pattern != butterfly.pattern and ((color, pattern) in HELD_OUT) == held_out
    ]
    color, pattern = looks[rng.integers(len(looks))]
    return replace(butterfly, wing_color=color, pattern=pattern)


def other_color(butterfly: Butterfly, rng: np.random.Generator) -> Butterfly:
    """同一只蝴蝶，只换颜色；避开留作检验的组合。"""
    colors = [c for c in WING_COLORS if c != butterfly.wing_color and (c, butterfly.pattern) not in HELD_OUT]
    return replace(butterfly, wing_color=colors[rng.integers(len(colors))])


def pictures_and_masks(butterflies: list[Butterfly], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """（图，取值 0 到 1，(N, 3, 64, 64)；掩膜，轮廓扩大 4 到 7 个像素，1 为要重画的，(N, 1, 64, 64)）。"""
    rng, images, masks = np.random.default_rng(seed), [], []
    for index, butterfly in enumerate(butterflies):
        render = render_butterfly(butterfly, 64, seed * 10_000_000 + index)
        images.append(torch.from_numpy(render.image).permute(2, 0, 1))
        masks.append(grow(torch.from_numpy(render.mask)[None, None], int(rng.integers(4, 8)))[0])
    return torch.stack(images) / 255, torch.stack(masks)


def draw(pipeline, prompts: list[str], title: str, **inputs) -> torch.Tensor:
    """每句提示词一张图，逐批地画，取值 0 到 1；inputs 里的张量按批切开，其余原样传入；第 i 张的种子是 SEED + i。"""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(prompts), PER_CALL), desc=title, unit="批"):
        part = slice(start, start + PER_CALL)
        count = len(prompts[part])
        images.append(pipeline(
            prompts[part], num_inference_steps=N_STEPS, output_type="pt",
            generator=[torch.Generator().manual_seed(SEED + start + i) for i in range(count)],
            **{name: value[part] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()},
        ).images.cpu())
    return torch.cat(images)


def change_outside(results: torch.Tensor, images: torch.Tensor, masks: torch.Tensor) -> float:
    """离掩膜 RIM 个像素以外，各像素、各通道之差的绝对值的平均。"""
    outside = (grow(masks, RIM) < 0.5).expand_as(images)
    return (results - images).abs()[outside].mean().item()


# —— 测量：重画与图生图 ——

def repaint_rates(results: torch.Tensor, images: torch.Tensor, masks: torch.Tensor, wanted: list[Butterfly]) -> dict:
    """重画的结果：属性与所要的相同的比例，掩膜之外变了多少；贴回原图前后各一份。"""
    pasted = torch.where(masks > 0.5, results, images)
    return {
        "attributes": agreement(results, wanted),
        "attributes_pasted": agreement(pasted, wanted),
        "outside": change_outside(results, images, masks),
        "outside_pasted": change_outside(pasted, images, masks),
    }


def measure_repaint(base: StableDiffusionPipeline, n: int) -> dict:
    """九通道的 UNet，与四通道的掩膜混合，题目相同。"""
    unet = add_difference(build_unet(base), resolve(NAME))
    pipelines = {
        "inpaint": StableDiffusionInpaintPipeline(**(base.components | {"unet": unet}), requires_safety_checker=False),
        "blend": StableDiffusionInpaintPipeline(**base.components, requires_safety_checker=False),
    }
    result = {}
    for key, held_out, count in (("", False, n), ("_held_out", True, n // 2)):
        seed = SEED + held_out
        rng, sources = np.random.default_rng(seed), random_butterflies(count, seed)
        wanted = [other_look(butterfly, rng, held_out) for butterfly in sources]
        images, masks = pictures_and_masks(sources, seed)
        prompts = write_prompts(wanted, seed)
        for name, pipeline in pipelines.items():
            results = draw(
                pipeline, prompts, name + key, image=images, mask_image=masks, guidance_scale=GUIDANCE_SCALE,
            )
            result[name + key] = repaint_rates(results, images, masks, wanted)
        if not held_out:
            result["mask_share"] = masks.mean().item()
            decoded = reconstruct(base.vae, (images * 255).round().to(torch.uint8))
            result["outside_of_reconstructions"] = change_outside(decoded, images, masks)
    return result


def img2img_rates(results: torch.Tensor, sources: list[Butterfly], wanted: list[Butterfly]) -> dict[str, float]:
    """as_asked：颜色与所要的相同；old_color：还是原来的颜色；其余是与原图相同的比例。认不出是蝴蝶的都算错。"""
    is_butterfly, found = judge_butterflies(results)
    rows = [
        {"as_asked": seen["wing_color"] == asked.wing_color, "old_color": seen["wing_color"] == source.wing_color}
        | {name: seen[name] == getattr(source, name) for name in NAMES if name != "wing_color"}
        | {"place_and_size": seen["position"] == source.position and seen["size"] == source.size}
        for seen, source, asked in zip(found, sources, wanted, strict=True)
    ]
    kept = is_butterfly.tolist()
    rates = {
        name: sum(keep and row[name] for keep, row in zip(kept, rows, strict=True)) / len(rows) for name in rows[0]
    }
    return {"is_butterfly": sum(kept) / len(kept)} | rates


def measure_img2img(base: StableDiffusionPipeline, n: int) -> dict:
    """图生图：引导强度 → 强度 → 各项比例。提示词只说颜色，一半中文，一半英文：位置、大小只能来自原图。"""
    seed = SEED + 2
    rng, sources = np.random.default_rng(seed), random_butterflies(n, seed)
    wanted = [other_color(butterfly, rng) for butterfly in sources]
    images, _ = pictures_and_masks(sources, seed)
    prompts = [random_caption(b, rng, ("zh", "en")[i % 2], ("wing_color",)) for i, b in enumerate(wanted)]
    pipeline = StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    return {
        f"{scale:g}": {
            f"{strength:g}": img2img_rates(
                draw(pipeline, prompts, f"图生图 {strength:g}", image=images, strength=strength, guidance_scale=scale),
                sources, wanted,
            )
            for strength in STRENGTHS
        }
        for scale in IMG2IMG_SCALES
    }


def measure(n: int = 300) -> dict:
    base = StableDiffusionPipeline.from_pretrained(resolve(BASE)).to(DEVICE)
    return {
        "n_images": n, "n_img2img": n // 2, "n_steps": N_STEPS, "guidance_scale": GUIDANCE_SCALE, "rim": RIM,
    } | measure_repaint(base, n) | {"img2img": measure_img2img(base, n // 2)}


# —— 模型卡 ——

def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    columns = NAMES | {"color_and_pattern": "颜色与花纹都对"}
    titles = {
        "inpaint": "九通道", "blend": "掩膜混合（基础模型，四通道）",
        "inpaint_held_out": "九通道，留作检验的组合", "blend_held_out": "掩膜混合，留作检验的组合",
    }
    return [
        f"{result['n_images']} 张新画的图（留作检验的组合减半），蝴蝶的轮廓扩大 4 到 7 个像素作掩膜，"
        f"平均盖住 {result['mask_share']:.0%}，要换成别的颜色与花纹；{result['n_steps']} 步，"
        f"引导 {result['guidance_scale']:g}（要求：颜色、花纹 90%，掩膜 {result['rim']} 个像素以外平均变化小于 0.02）：",
        "",
        "| | " + " | ".join(columns.values()) + " | 掩膜之外的变化 | 贴回原图后 |",
        "|---|" + "---|" * (len(columns) + 2),
        *(
            f"| {title} | " + " | ".join(f"{result[key]['attributes'][c]:.1%}" for c in columns)
            + f" | {result[key]['outside']:.4f} | {result[key]['outside_pasted']:.4f} |"
            for key, title in titles.items()
        ),
        "",
        f"- 原图只经自编码器压缩再还原，掩膜之外的变化：{result['outside_of_reconstructions']:.4f}",
        "- 贴回原图之后再请裁判看，颜色与花纹都对："
        + "，".join(f"{titles[key]} {result[key]['attributes_pasted']['color_and_pattern']:.1%}" for key in ("inpaint", "blend")),
        "",
        f"图生图：随书的基础模型，{result['n_img2img']} 张，提示词只说颜色"
        "（要求：强度 0.5 时位置与大小都保持 85%，颜色如所要 70%）：",
        "",
        "| 引导 | 强度 | 颜色如所要 | 还是原来的颜色 | 位置与大小都保持 | 花纹保持 | 背景保持 | 是蝴蝶 |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {scale} | {strength} | " + " | ".join(
                f"{row[c]:.1%}" for c in ("as_asked", "old_color", "place_and_size", "pattern", "background", "is_butterfly")
            ) + " |"
            for scale, rows in result["img2img"].items() for strength, row in rows.items()
        ),
    ]


if __name__ == "__main__":
    main()
