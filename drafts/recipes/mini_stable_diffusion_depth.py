"""配方：mini-stable-diffusion-depth，照着深度图与提示词画（第 6.5.3 节）。

由 mini-stable-diffusion 的 UNet 微调而来，输入多一个通道：潜变量那么大的深度图。
训练用的深度是 mini-depth-estimator 估计的，不是真的：采样时能得到的也只有估计的。
自编码器、文字编码器与调度器都不变，随书只存权重之差。先要有 mini-depth-estimator。

用法：python recipes/mini_stable_diffusion_depth.py
"""

from pathlib import Path

import torch
from butterfly_clip import encode, write_captions
from common import ROOT, parser, save_model
from diffusers import StableDiffusionPipeline
from mini_depth_estimator import estimate, load_model
from mini_stable_diffusion import UNetLoss
from mini_stable_diffusion_inpaint import encode_images
from safetensors.torch import save_file
from torch.nn import functional as F

from book_utils import butterfly_images, fit, random_butterflies, resolve, set_seed, weight_difference, widen_input
from book_utils.training import load_state, save_state

NAME = "mini-stable-diffusion-depth"
BASE = "mini-stable-diffusion"
PURPOSE = "照着深度图与提示词画：StableDiffusionDepth2ImgPipeline 的 UNet，5 个输入通道（第 6.5.3 节）"
DATA = "蝴蝶世界 64×64：16,000 只（seed=63），深度由 mini-depth-estimator 估计，不含留作检验的颜色 × 花纹组合"
PRECISION = "与 mini-stable-diffusion 的 UNet 的权重之差，8 位浮点，safetensors；用 `book_utils.add_difference` 加回去"

N_IMAGES, N_EPOCHS, BATCH_SIZE, N_CAPTIONS = 16_000, 6, 32, 8
IN_CHANNELS = 5                 # 潜变量 4，深度 1：StableDiffusionDepth2ImgPipeline 的次序


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


if __name__ == "__main__":
    main()
