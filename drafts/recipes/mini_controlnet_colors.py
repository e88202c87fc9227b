"""配方：mini-controlnet-colors，照着 4 × 4 的色块画的 ControlNet（第 9.1 节）。

与照着边缘画的那一个一起用：一个说形状，一个说颜色。存的是与基础模型的编码器的权重之差，
抄来的部分用 8 位浮点，新添的部分（读控制图的小网络、零卷积）用半精度。

用法：python recipes/mini_controlnet_colors.py
"""

from pathlib import Path

import torch
from common import ROOT, parser, save_model
from controlnet_training import (
    BATCH_SIZE,
    HIGH,
    LOW,
    N_IMAGES,
    N_STEPS,
    ControlLoss,
    base_pipeline,
    draw,
    new_controlnet,
    rates,
    training_tensors,
)
from diffusers import ControlNetModel
from measuring import DEVICE, NAMES, SEED, write_prompts
from safetensors.torch import save_file
from torch.nn import functional as F

from book_utils import (
    add_difference,
    blank_controlnet,
    butterfly_images,
    canny_edges,
    color_blocks,
    fit,
    resolve,
    set_seed,
    weight_difference,
)
from book_utils.models import DIFFERENCE_SCALE

NAME = "mini-controlnet-colors"
EDGES = "mini-controlnet-edges"
PURPOSE = "照着 4×4 的色块画：ControlNetModel，与照着边缘画的一起用（第 9.1 节）"
DATA = "蝴蝶世界 64×64：16,000 只（seed=92）与它们的 4×4 色块，不含留作检验的颜色 × 花纹组合；一半的提示词是空的"
PRECISION = (
    "与 mini-stable-diffusion 的编码器的权重之差，8 位浮点，新添的部分半精度，safetensors；"
    "用 `book_utils.add_difference` 加到 `book_utils.blank_controlnet` 上"
)

N_EPOCHS = 4                    # 2,000 步：色块比边缘好学


def block_control(images: torch.Tensor) -> torch.Tensor:
    """存盘用的控制图：4 × 4 个平均颜色，uint8。"""
    return (color_blocks(images)[:, :, 8::16, 8::16] * 255).round().to(torch.uint8)


def expand(controls: torch.Tensor) -> torch.Tensor:
    return F.interpolate(controls.float() / 255, size=(64, 64), mode="nearest")


def difference(base_unet, controlnet: ControlNetModel) -> dict[str, torch.Tensor]:
    """与 blank_controlnet 的权重之差；新添的层从零算起，差就是权重本身，用半精度。"""
    before = blank_controlnet(base_unet)
    tensors = weight_difference(before, controlnet)
    new = before.state_dict()
    for name, weight in controlnet.state_dict().items():
        if name.startswith("controlnet_"):
            tensors[name] = ((weight - new[name]) * DIFFERENCE_SCALE).half()
    return tensors


def main(arguments: list[str] | None = None):
    options = parser(__doc__.splitlines()[0], NAME).parse_args(arguments)
    base = base_pipeline(options.device)
    tensors = training_tensors(
        base, options.checkpoint.with_stem(options.checkpoint.stem + "-data"), N_IMAGES, 92, block_control
    )
    set_seed(0)
    controlnet = new_controlnet(base.unet)
    history = fit(
        controlnet, tensors, ControlLoss(base, expand), n_epochs=N_EPOCHS, batch_size=BATCH_SIZE, lr=5e-4, lr_decay=True,
        ema_decay=0.998, device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        save_model(
            options.output,
            lambda folder: save_file(difference(base.unet.cpu(), controlnet.cpu()), folder / "difference.safetensors"),
            history, options.device, f"python {Path(__file__).relative_to(ROOT)}",
        )


# —— 测量 ——

def block_error(images: torch.Tensor, wanted: torch.Tensor) -> float:
    """色块的颜色与所要的之差的绝对值的平均，取值 0 到 1。"""
    return (color_blocks(images) - wanted).abs().mean().item()


def measure(name: str = NAME, n_images: int = 100) -> dict:
    base = base_pipeline()
    colors = add_difference(blank_controlnet(base.unet), resolve(name)).to(DEVICE)
    edges_net = ControlNetModel.from_pretrained(resolve(EDGES)).to(DEVICE).eval()
    real, butterflies = butterfly_images(n_images, 64, seed=SEED + 3)
    edges, blocks = canny_edges(real / 255, LOW, HIGH), color_blocks(real / 255)
    prompts = write_prompts(butterflies, SEED + 3)
    by_colors, by_edges = (colors, blocks, 1.0), (edges_net, edges, 1.0)
    result = {"n_images": n_images, "n_steps": N_STEPS, "table": {}}
    for key, controls, texts in (
        ("prompt", [], prompts), ("colors", [by_colors], [""] * n_images), ("edges", [by_edges], [""] * n_images),
        ("both", [by_edges, by_colors], [""] * n_images), ("both_and_prompt", [by_edges, by_colors], prompts),
    ):
        images = draw(base, controls, texts, key)
        result["table"][key] = rates(images, edges, butterflies) | {"block_error": block_error(images, blocks)}
    return result


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    titles = {
        "prompt": "只有提示词", "colors": "只有色块", "edges": "只有边缘", "both": "边缘与色块，没有提示词",
        "both_and_prompt": "边缘、色块与提示词",
    }
    return [
        f"{result['n_images']} 张新图的边缘与色块：",
        "",
        "| | F1 | 色块的误差 | " + " | ".join(NAMES.values()) + " |",
        "|---|---|---|" + "---|" * len(NAMES),
        *(
            f"| {titles[key]} | {row['f1']:.3f} | {row['block_error']:.3f} | " + " | ".join(f"{row[c]:.1%}" for c in NAMES) + " |"
            for key, row in result["table"].items()
        ),
    ]


if __name__ == "__main__":
    main()
