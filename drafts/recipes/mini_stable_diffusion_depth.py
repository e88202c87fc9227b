"""配方：mini-stable-diffusion-depth，照着深度图与提示词画（第 6.5.3 节）。

由 mini-stable-diffusion 的 UNet 微调而来，输入多一个通道：潜变量那么大的深度图。
训练用的深度是 mini-depth-estimator 估计的，不是真的：采样时能得到的也只有估计的。
自编码器、文本编码器与调度器都不变，随书只存权重之差。先要有 mini-depth-estimator。

measure() 的题目：一张新画的图，估计它的深度，照着这份深度与另一句提示词（位置、大小不变，颜色、花纹、背景都换）画一张，
再估计画出的图的深度，与给它的那一份比较。强度取 1：原图的像素一点也没有用到，形状只能来自深度。
秩相关要有尺子：别的图的深度、不看深度的基础模型是下限，形状相同的真图是上限。

用法：python recipes/mini_stable_diffusion_depth.py
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from butterfly_clip import encode, write_captions
from common import ROOT, parser, save_model
from diffusers import StableDiffusionDepth2ImgPipeline, StableDiffusionPipeline
from measuring import DEVICE, NAMES, SEED, agreement, rank_correlation, write_prompts
from mini_depth_estimator import build_processor, estimate, load_model
from mini_stable_diffusion import UNetLoss
from mini_stable_diffusion_inpaint import GUIDANCE_SCALE, N_STEPS, draw, encode_images, other_look
from safetensors.torch import save_file
from torch.nn import functional as F

from book_utils import (
    Butterfly,
    add_difference,
    butterfly_images,
    fit,
    random_butterflies,
    render_butterfly,
    resolve,
    set_seed,
    weight_difference,
    widen_input,
)
from book_utils.training import load_state, save_state
from book_utils.worlds.butterflies import BACKGROUNDS

NAME = "mini-stable-diffusion-depth"
BASE = "mini-stable-diffusion"
PURPOSE = "照着深度图与提示词画：StableDiffusionDepth2ImgPipeline 的 UNet，5 个输入通道（第 6.5.3 节）"
DATA = "蝴蝶世界 64×64：16,000 只（seed=63），深度由 mini-depth-estimator 估计，不含留作检验的颜色 × 花纹组合"
PRECISION = "与 mini-stable-diffusion 的 UNet 的权重之差，8 位浮点，safetensors；用 `book_utils.add_difference` 加回去"

N_IMAGES, N_EPOCHS, BATCH_SIZE, N_CAPTIONS = 16_000, 6, 32, 8
IN_CHANNELS = 5                 # 潜变量 4，深度 1：StableDiffusionDepth2ImgPipeline 的次序
FARTHEST_BODY = 0.41            # 画图的程序里，背景的深度最多 0.40；比这近的是蝴蝶


# —— 数据 ——

def depth_channel(depths: torch.Tensor) -> torch.Tensor:
    """深度 (N, H, W) → UNet 的第五个通道 (N, 1, 16, 16)：缩小，再逐张拉到 −1 到 1，与管线里的做法相同。"""
    small = F.interpolate(depths[:, None].float(), size=(16, 16), mode="bicubic", align_corners=False)
    low, high = small.amin(dim=(1, 2, 3), keepdim=True), small.amax(dim=(1, 2, 3), keepdim=True)
    return 2 * (small - low) / (high - low) - 1


def training_tensors(vae, cache: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """（图的潜变量，深度通道），float16；存在 cache 里。"""
    made_from = {"n_images": N_IMAGES, "scaling_factor": vae.config.scaling_factor}
    if cache.exists():
        tensors, notes = load_state(cache)
        if notes == made_from:
            return tensors["latents"], tensors["depths"]
    images = butterfly_images(N_IMAGES, 64, seed=63)[0] / 255
    depths = depth_channel(estimate(load_model().to(vae.device), images)).half()
    latents = encode_images(vae, images * 2 - 1, "编码")
    save_state(cache, {"latents": latents, "depths": depths}, made_from)
    return latents, depths


class DepthLoss(UNetLoss):
    """与基础模型的损失相同，只是网络还看得到深度。"""

    def __call__(self, unet, latents, depths, tokens, generator):
        return super().__call__(
            lambda x, t, text: unet(torch.cat([x, depths.float()], dim=1), t, text), latents, tokens, generator
        )


# —— 训练 ——

def build_unet(base: StableDiffusionPipeline):
    """基础模型的 UNet，输入加宽到 5 个通道，新的通道从 0 开始。"""
    return widen_input(base.unet, IN_CHANNELS)


def main(arguments: list[str] | None = None):
    options = parser(__doc__.splitlines()[0], NAME).parse_args(arguments)
    base = StableDiffusionPipeline.from_pretrained(resolve(BASE)).to(options.device)
    tensors = training_tensors(base.vae, options.checkpoint.with_stem(options.checkpoint.stem + "-data"))
    texts, _ = write_captions(random_butterflies(N_IMAGES, seed=63), N_CAPTIONS, seed=63)
    tokens = encode(base.tokenizer, texts).view(N_IMAGES, N_CAPTIONS, -1).to(torch.int16)
    base.text_encoder.requires_grad_(False)
    loss = DepthLoss(base.text_encoder, encode(base.tokenizer, [""]), base.scheduler)

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

def other_coat(butterfly: Butterfly, rng: np.random.Generator, held_out: bool = False) -> Butterfly:
    """形状、位置、大小、角度都不变，颜色、花纹、背景都换掉；held_out 时只换成留作检验的组合，否则避开它们。"""
    backgrounds = [name for name in BACKGROUNDS if name != butterfly.background]
    return replace(other_look(butterfly, rng, held_out), background=backgrounds[rng.integers(len(backgrounds))])


def render_all(butterflies: list[Butterfly], seed: int) -> torch.Tensor:
    """各画一张，取值 0 到 1，(N, 3, 64, 64)；种子相同，形状与位置就相同，与颜色、花纹、背景无关。"""
    images = [render_butterfly(b, 64, seed * 10_000_000 + i).image for i, b in enumerate(butterflies)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """两份深度里蝴蝶的轮廓的交并比，逐张计算再平均。"""
    first, second = a > FARTHEST_BODY, b > FARTHEST_BODY
    both, either = (first & second).sum(dim=(1, 2)), (first | second).sum(dim=(1, 2))
    return (both / either.clamp(min=1)).mean().item()


# —— 测量：给它的深度与画出的深度 ——

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
        images, prompts = render_all(sources, seed), write_prompts(wanted, seed)
        depths = estimate(estimator, images)
        results = draw(
            pipeline, prompts, key, image=images, depth_map=depths, strength=1.0, guidance_scale=GUIDANCE_SCALE
        )
        result[key] = {"attributes": agreement(results, wanted)} | against(depths, estimate(estimator, results))
        if not held_out:
            plain = draw(base, prompts, "不看深度", guidance_scale=GUIDANCE_SCALE)
            result["plain"] = {"attributes": agreement(plain, wanted)} | against(depths, estimate(estimator, plain))
            result["unrelated"] = against(depths, depths.roll(1, dims=0))
            result["renders"] = against(depths, estimate(estimator, render_all(wanted, seed)))
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


if __name__ == "__main__":
    main()
