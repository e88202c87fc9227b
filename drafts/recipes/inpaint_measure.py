"""mini-stable-diffusion-inpaint 的测量，并入 recipes/mini_stable_diffusion_inpaint.py（第 6.5.1、6.5.2 节）。

measure() 量三件事，都用没有训练过的种子：
1. 重画：蝴蝶的轮廓扩大几圈作掩膜，要它换一种颜色与花纹；九通道的 UNet，与不训练、每步贴回原图的掩膜混合；
2. 掩膜之外变了多少：离掩膜 RIM 个像素以外，各像素之差的平均；自编码器自己的误差是下限；
3. img2img：随书的基础模型，只说颜色，强度从 0.1 到 1.0。
"""

from dataclasses import replace

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from measuring import DEVICE, NAMES, SEED, agreement, judge_butterflies, write_prompts
from mini_stable_diffusion import reconstruct
from mini_stable_diffusion_inpaint import BASE, GUIDANCE_SCALE, N_STEPS, NAME, build_unet, grow
from tqdm import tqdm

from book_utils import (
    Butterfly,
    add_difference,
    random_butterflies,
    random_caption,
    render_butterfly,
    resolve,
)
from book_utils.worlds.butterflies import HELD_OUT, PATTERNS, WING_COLORS

PER_CALL = 50                   # 一次画这么多张
RIM = 4                         # 自编码器与潜变量的格子会在掩膜边上渗出这么多像素
STRENGTHS = tuple(round(0.1 * i, 1) for i in range(1, 11))
IMG2IMG_SCALES = (2.0, 5.0)     # img2img 用这两种引导强度


# —— 题目 ——

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


def edit(pipeline, prompts: list[str], title: str, **inputs) -> torch.Tensor:
    """用 pipeline 逐批改图，取值 0 到 1；inputs 里的张量按批切开，其余原样传入；第 i 张的种子是 SEED + i。"""
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


# —— 测量 ——

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
            results = edit(
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
    """引导强度 → 强度 → 各项比例。提示词只说颜色，一半中文，一半英文：位置、大小只能来自原图。"""
    seed = SEED + 2
    rng, sources = np.random.default_rng(seed), random_butterflies(n, seed)
    wanted = [other_color(butterfly, rng) for butterfly in sources]
    images, _ = pictures_and_masks(sources, seed)
    prompts = [random_caption(b, rng, ("zh", "en")[i % 2], ("wing_color",)) for i, b in enumerate(wanted)]
    pipeline = StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    return {
        f"{scale:g}": {
            f"{strength:g}": img2img_rates(
                edit(pipeline, prompts, f"img2img {strength:g}", image=images, strength=strength, guidance_scale=scale),
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
    half = result["img2img"]
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
        f"img2img：随书的基础模型，{result['n_img2img']} 张，提示词只说颜色"
        "（要求：强度 0.5 时位置与大小都保持 85%，颜色如所要 70%）：",
        "",
        "| 引导 | 强度 | 颜色如所要 | 还是原来的颜色 | 位置与大小都保持 | 花纹保持 | 背景保持 | 是蝴蝶 |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {scale} | {strength} | " + " | ".join(
                f"{row[c]:.1%}" for c in ("as_asked", "old_color", "place_and_size", "pattern", "background", "is_butterfly")
            ) + " |"
            for scale, rows in half.items() for strength, row in rows.items()
        ),
    ]
