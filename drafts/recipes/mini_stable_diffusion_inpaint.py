"""配方：mini-stable-diffusion-inpaint，按提示词把图上盖住的一块重新画好（第 6.5.2 节）。

由 mini-stable-diffusion 的 UNet 微调而来，输入多 5 个通道：潜变量那么大的掩膜（1 为要画的），
和盖住之后的图的潜变量（4 个通道）。自编码器、文字编码器与调度器都不变，随书只存权重之差。

用法：python recipes/mini_stable_diffusion_inpaint.py
"""

from pathlib import Path

import numpy as np
import torch
from butterfly_clip import encode, write_captions
from common import ROOT, parser, save_model
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from measuring import DEVICE, NAMES, SEED, agreement, write_prompts
from mini_stable_diffusion import UNetLoss
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from book_utils import (
    add_difference,
    fit,
    random_butterflies,
    render_butterfly,
    resolve,
    set_seed,
    weight_difference,
    widen_input,
)
from book_utils.training import load_state, save_state

NAME = "mini-stable-diffusion-inpaint"
BASE = "mini-stable-diffusion"
PURPOSE = "把图上盖住的一块按提示词重画：StableDiffusionInpaintPipeline 的 UNet，9 个输入通道（第 6.5.2 节）"
DATA = "蝴蝶世界 64×64：16,000 只（seed=62），每只两张掩膜、八句说明，不含留作检验的颜色 × 花纹组合"
PRECISION = "与 mini-stable-diffusion 的 UNet 的权重之差，8 位浮点，safetensors；用 `book_utils.add_difference` 加回去"

N_IMAGES, N_EPOCHS, BATCH_SIZE = 16_000, 8, 32
N_MASKS, N_CAPTIONS = 2, 8
IN_CHANNELS = 9                 # 潜变量 4，掩膜 1，盖住之后的图的潜变量 4：StableDiffusionInpaintPipeline 的次序
GUIDANCE_SCALE, N_STEPS = 2.0, 25


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


if __name__ == "__main__":
    main()
