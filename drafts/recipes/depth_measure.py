"""mini-stable-diffusion-depth 的测量，并入 recipes/mini_stable_diffusion_depth.py（第 6.5.3 节）。

题目：一张新画的图，估计它的深度，照着这份深度与另一句提示词（位置、大小不变，颜色、花纹、背景都换）画一张，
再估计画出的图的深度，与给它的那一份比较。强度取 1：原图的像素一点也没有用到，形状只能来自深度。
秩相关要有尺子：别的图的深度、不看深度的基础模型是下限，形状相同的真图是上限。
"""

from dataclasses import replace

import numpy as np
import torch
from diffusers import StableDiffusionDepth2ImgPipeline, StableDiffusionPipeline
from measuring import DEVICE, NAMES, SEED, agreement, rank_correlation, write_prompts
from mini_depth_estimator import build_processor, estimate, load_model
from mini_stable_diffusion_depth import BASE, NAME, build_unet
from tqdm import tqdm

from book_utils import Butterfly, add_difference, random_butterflies, render_butterfly, resolve
from book_utils.worlds.butterflies import BACKGROUNDS, HELD_OUT, PATTERNS, WING_COLORS

PER_CALL = 50                   # 一次画这么多张
GUIDANCE_SCALE, N_STEPS = 2.0, 25
FARTHEST_BODY = 0.41            # 画图的程序里，背景的深度最多 0.40；比这近的是蝴蝶


# —— 题目 ——

def other_coat(butterfly: Butterfly, rng: np.random.Generator, held_out: bool = False) -> Butterfly:
    """形状、位置、大小、角度都不变，颜色、花纹、背景都换掉；held_out 时只换成留作检验的组合，否则避开它们。"""
    looks = [
        (color, pattern) for color in WING_COLORS for pattern in PATTERNS
        if color != butterfly.wing_color and pattern != butterfly.pattern and ((color, pattern) in HELD_OUT) == held_out
    ]
    color, pattern = looks[rng.integers(len(looks))]
    backgrounds = [name for name in BACKGROUNDS if name != butterfly.background]
    background = backgrounds[rng.integers(len(backgrounds))]
    return replace(butterfly, wing_color=color, pattern=pattern, background=background)


def draw(butterflies: list[Butterfly], seed: int) -> torch.Tensor:
    """各画一张，取值 0 到 1，(N, 3, 64, 64)；种子相同，形状与位置就相同，与颜色、花纹、背景无关。"""
    images = [render_butterfly(b, 64, seed * 10_000_000 + i).image for i, b in enumerate(butterflies)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


def generate(pipeline, prompts: list[str], title: str, **inputs) -> torch.Tensor:
    """每句提示词一张图，取值 0 到 1；inputs 里的张量按批切开，其余原样传入；第 i 张的种子是 SEED + i。"""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(prompts), PER_CALL), desc=title, unit="批"):
        part = slice(start, start + PER_CALL)
        count = len(prompts[part])
        images.append(pipeline(
            prompts[part], num_inference_steps=N_STEPS, guidance_scale=GUIDANCE_SCALE, output_type="pt",
            generator=[torch.Generator().manual_seed(SEED + start + i) for i in range(count)],
            **{name: value[part] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()},
        ).images.cpu())
    return torch.cat(images)


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """两份深度里蝴蝶的轮廓的交并比，逐张计算再平均。"""
    first, second = a > FARTHEST_BODY, b > FARTHEST_BODY
    both, either = (first & second).sum(dim=(1, 2)), (first | second).sum(dim=(1, 2))
    return (both / either.clamp(min=1)).mean().item()


# —— 测量 ——

def against(depths_in: torch.Tensor, depths_out: torch.Tensor) -> dict[str, float]:
    """给它的深度，与由结果估计的深度，形状都是 (N, 64, 64)。"""
    correlations = rank_correlation(depths_in, depths_out)
    return {
        "rank_correlation": correlations.mean().item(),
        "worst_rank_correlation": correlations.min().item(),
        "outline_overlap": overlap(depths_in, depths_out),
    }


def measure(n: int = 300) -> dict:
    base = StableDiffusionPipeline.from_pretrained(resolve(BASE)).to(DEVICE)
    estimator = load_model().to(DEVICE)
    shared = {name: base.components[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    pipeline = StableDiffusionDepth2ImgPipeline(
        **shared, unet=add_difference(build_unet(base), resolve(NAME)),
        depth_estimator=estimator, feature_extractor=build_processor(),
    )
    result = {"n_images": n, "n_steps": N_STEPS, "guidance_scale": GUIDANCE_SCALE}
    for key, held_out, count in (("depth", False, n), ("depth_held_out", True, n // 2)):
        seed = SEED + held_out
        rng, sources = np.random.default_rng(seed), random_butterflies(count, seed)
        wanted = [other_coat(butterfly, rng, held_out) for butterfly in sources]
        images, prompts = draw(sources, seed), write_prompts(wanted, seed)
        depths = estimate(estimator, images)
        results = generate(pipeline, prompts, key, image=images, depth_map=depths, strength=1.0)
        result[key] = {"attributes": agreement(results, wanted)} | against(depths, estimate(estimator, results))
        if not held_out:
            plain = generate(base, prompts, "不看深度")
            result["plain"] = {"attributes": agreement(plain, wanted)} | against(depths, estimate(estimator, plain))
            result["unrelated"] = against(depths, depths.roll(1, dims=0))
            result["renders"] = against(depths, estimate(estimator, draw(wanted, seed)))
    return result


# —— 模型卡 ——

def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    columns = NAMES | {"color_and_pattern": "颜色与花纹都对"}
    drawn = {"depth": "照着深度画", "depth_held_out": "照着深度画，留作检验的组合", "plain": "基础模型，不看深度"}
    rulers = {"renders": "形状相同的真图（上限）", "unrelated": "别的图的深度（下限）"}
    return [
        f"{result['n_images']} 张新画的图（留作检验的组合减半），{result['n_steps']} 步，引导 {result['guidance_scale']:g}，"
        "强度 1，提示词换了颜色、花纹与背景（要求：秩相关 0.8，颜色、花纹、背景 90%）：",
        "",
        "| | " + " | ".join(columns.values()) + " | 深度的秩相关，平均 | 最低 | 轮廓的交并比 |",
        "|---|" + "---|" * (len(columns) + 3),
        *(
            f"| {title} | " + " | ".join(
                f"{result[key]['attributes'][c]:.1%}" if key in drawn else "" for c in columns
            )
            + f" | {result[key]['rank_correlation']:.3f} | {result[key]['worst_rank_correlation']:.3f}"
            + f" | {result[key]['outline_overlap']:.3f} |"
            for key, title in (drawn | rulers).items()
        ),
    ]
