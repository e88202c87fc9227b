"""训练与测量 ControlNet 的共用部分：数据、损失、画图、量边缘（第 9.1 节）。

自己不是配方；mini_controlnet_edges.py、mini_controlnet_colors.py 与 controlnet_ablation.py 都用它。
"""

from pathlib import Path

import torch
from butterfly_clip import encode, write_captions
from diffusers import ControlNetModel, StableDiffusionPipeline
from measuring import DEVICE, SEED, agreement
from mini_stable_diffusion import UNetLoss
from mini_stable_diffusion_inpaint import encode_images
from tqdm import tqdm

from book_utils import butterfly_images, canny_edges, edge_f1, random_butterflies, resolve, sample_controlled
from book_utils.training import load_state, save_state

BASE = "mini-stable-diffusion"
N_IMAGES, BATCH_SIZE, N_CAPTIONS = 16_000, 32, 8
EMBEDDING_CHANNELS = (16, 32, 64)       # 两次减半：控制图 64 × 64 → 16 × 16，潜变量的大小
EMPTY_PROMPTS = 0.5                     # 论文把一半的提示词换成空的，逼它自己去读控制图
LOW, HIGH = 100, 200                    # Canny 的两个阈值
N_STEPS, GUIDANCE_SCALE, PER_CALL = 25, 2.0, 25


def base_pipeline(device=DEVICE) -> StableDiffusionPipeline:
    """基础模型，全部冻结。"""
    base = StableDiffusionPipeline.from_pretrained(resolve(BASE)).to(device)
    for part in (base.unet, base.vae, base.text_encoder):
        part.requires_grad_(False)
    return base


def new_controlnet(unet) -> ControlNetModel:
    """可训练的副本：权重抄自 unet 的编码器，零卷积是零。"""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING_CHANNELS).requires_grad_(True)


def training_tensors(base: StableDiffusionPipeline, cache: Path, count: int, seed: int, make_control) -> tuple[torch.Tensor, ...]:
    """（潜变量，控制图 uint8 (N, C, h, w)，词元编号），存在 cache 里；make_control 由图 (B, 3, 64, 64) 得出控制图。"""
    made_from = {"count": count, "seed": seed, "control": make_control.__name__, "scaling_factor": base.vae.config.scaling_factor}
    tensors, notes = load_state(cache) if cache.exists() else ({}, None)
    if notes != made_from:
        images = butterfly_images(count, 64, seed)[0]
        tensors = {
            "latents": encode_images(base.vae, images / 127.5 - 1, "编码"),
            "controls": torch.cat([make_control(part / 255) for part in tqdm(images.split(500), desc="控制图", unit="批")]),
        }
        save_state(cache, tensors, made_from)
    texts, _ = write_captions(random_butterflies(count, seed), N_CAPTIONS, seed)
    tokens = encode(base.tokenizer, texts).view(count, N_CAPTIONS, -1).to(torch.int16)
    return tensors["latents"], tensors["controls"], tokens


class ControlLoss(UNetLoss):
    """与基础模型的损失相同，只是 UNet 冻结着，训练的是给它加修正的 ControlNet。

    参数：
        base:        :func:`base_pipeline`。
        expand:      把存着的控制图换成 ControlNet 要的 (B, 3, 64, 64)、取值 0 到 1。
    """

    def __init__(self, base: StableDiffusionPipeline, expand):
        super().__init__(base.text_encoder, encode(base.tokenizer, [""]), base.scheduler)
        self.unet, self.expand = base.unet, expand

    def __call__(self, controlnet, latents, controls, tokens, generator):
        # UNetLoss 自己还要换掉一成，所以这里换掉的比例使总数恰好是 EMPTY_PROMPTS
        share = 1 - (1 - EMPTY_PROMPTS) / 0.9
        hide = (torch.rand(len(latents), 1, 1, generator=generator) < share).to(tokens.device)
        tokens = torch.where(hide, self.empty.to(tokens), tokens)
        control = self.expand(controls)

        def controlled(x, t, text):
            down, mid = controlnet(x, t, encoder_hidden_states=text, controlnet_cond=control, return_dict=False)
            return self.unet(x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid)

        return super().__call__(controlled, latents, tokens, generator)


def draw(base, controls: list[tuple], prompts: list[str], title: str, seed: int = SEED, **options) -> torch.Tensor:
    """照着控制图画，取值 0 到 1；controls 是（网络，全部控制图，强度）的列表；第 i 张的种子是 seed + i。"""
    options = {"n_steps": N_STEPS, "guidance_scale": GUIDANCE_SCALE} | options
    images = []
    for start in tqdm(range(0, len(prompts), PER_CALL), desc=title, unit="批"):
        part = slice(start, start + PER_CALL)
        count = len(prompts[part])
        latents = torch.cat([
            torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed + start + i)) for i in range(count)
        ])
        images.append(sample_controlled(
            base, [(net, image[part], scale) for net, image, scale in controls], prompts[part], latents, **options
        ))
    return torch.cat(images)


def edge_rates(images: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """画出的图的边缘与所要的边缘：F1，容许差一个像素，以及一个像素也不许差。"""
    edges = canny_edges(images, LOW, HIGH)
    return {"f1": edge_f1(edges, wanted).mean().item(), "f1_exact": edge_f1(edges, wanted, 0).mean().item()}


def rates(images: torch.Tensor, wanted: torch.Tensor, butterflies) -> dict[str, float]:
    """边缘合不合，属性是不是所要的。"""
    return edge_rates(images, wanted) | agreement(images, butterflies)
