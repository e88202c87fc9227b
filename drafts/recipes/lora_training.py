"""训练与测量 LoRA 的共用部分（第 9.2、9.3 节）。

自己不是配方；mini_lora_glow.py、mini_lora_frame.py 与 mini_dreambooth.py 都用它。
"""

from pathlib import Path

import torch
from adapter_judge import judge_rates
from butterfly_clip import encode, write_captions
from controlnet_training import BASE
from diffusers import StableDiffusionPipeline
from measuring import DEVICE, SEED, agreement
from mini_stable_diffusion import UNetLoss
from mini_stable_diffusion_inpaint import encode_images
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from book_utils import draw_prompts, random_butterflies, resolve, set_seed
from book_utils.lora import ATTENTION_LAYERS
from book_utils.worlds.styles import styled_images

N_IMAGES, N_CAPTIONS, BATCH_SIZE, N_EPOCHS = 960, 8, 16, 8     # 480 步
RANK, LR = 4, 2e-3
N_STEPS, GUIDANCE_SCALE = 25, 2.0


def base_pipeline(device=DEVICE) -> StableDiffusionPipeline:
    """基础模型，全部冻结。"""
    base = StableDiffusionPipeline.from_pretrained(resolve(BASE)).to(device)
    base.set_progress_bar_config(disable=True)
    for part in (base.unet, base.vae, base.text_encoder):
        part.requires_grad_(False)
    return base


def add_lora(unet, rank: int, seed: int = 0) -> None:
    """在 unet 的注意力旁边添上秩为 rank 的 LoRA，只有它可训练；alpha 等于秩，缩放就是 1。"""
    set_seed(seed)
    unet.add_adapter(LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(ATTENTION_LAYERS)
    ))


class Trainable(nn.Module):
    """只把 unet 里要训练的参数交给 ``fit``：冻结的不必存进断点，也不必作滑动平均。

    参数与 unet 共用，更新它们就是更新 unet；所以先把 unet 搬到设备上，再造它。
    """

    def __init__(self, unet):
        super().__init__()
        self.weights = nn.ParameterList(p for p in unet.parameters() if p.requires_grad)


class AdapterLoss(UNetLoss):
    """与基础模型的损失相同；unet 里可训练的那些参数由 ``fit`` 更新。"""

    def __init__(self, base, unet):
        super().__init__(base.text_encoder, encode(base.tokenizer, [""]), base.scheduler)
        self.unet = unet

    def __call__(self, trainable, latents, tokens, generator):
        return super().__call__(self.unet, latents, tokens, generator)


def style_tensors(base, style: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """一种画风的训练集：（潜变量，词元编号）；说明照旧，一个字不提画风。"""
    butterflies = random_butterflies(N_IMAGES, seed)
    latents = encode_images(base.vae, styled_images(butterflies, [style], 64, seed) / 127.5 - 1, "编码")
    texts, _ = write_captions(butterflies, N_CAPTIONS, seed)
    return latents, encode(base.tokenizer, texts).view(N_IMAGES, N_CAPTIONS, -1).to(torch.int16)


def save_adapter(unet, folder: Path) -> None:
    """照 diffusers 的格式存成 pytorch_lora_weights.safetensors，半精度。"""
    layers = {name: matrix.detach().cpu().half().contiguous() for name, matrix in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def n_trainable(unet) -> int:
    return sum(p.numel() for p in unet.parameters() if p.requires_grad)


def measure_style(pipeline, prompts: list[str], butterflies) -> dict[str, float]:
    """画风认出的比例，属性还对的比例；第 i 张的种子是 SEED + i。"""
    images = draw_prompts(pipeline, prompts, seeds=SEED, n_steps=N_STEPS, guidance_scale=GUIDANCE_SCALE)
    return judge_rates(images) | agreement(images, butterflies)
