"""配方：mini-lora-frame，“装框”画风的 LoRA（第 9.2 节）。

用法：python recipes/mini_lora_frame.py
"""

from pathlib import Path

from common import ROOT, parser, save_model
from lora_training import RANK, base_pipeline, save_adapter, style_tensors
from mini_lora_glow import finetune, measure_weights, weight_lines

NAME = "mini-lora-frame"
STYLE, DATA_SEED = "frame", 97
PURPOSE = "“装框”画风的 LoRA，秩 4，配 mini-stable-diffusion 用（第 9.2 节）"
DATA = "蝴蝶世界 64×64，装进木框：960 只（seed=97），说明里不提画风"


def main(arguments: list[str] | None = None):
    options = parser(__doc__.splitlines()[0], NAME).parse_args(arguments)
    base = base_pipeline(options.device)
    tensors = style_tensors(base, STYLE, DATA_SEED)
    unet, history = finetune(base, tensors, options.checkpoint, options.device, options.max_steps, RANK)
    if options.max_steps is None:
        save_model(
            options.output, lambda folder: save_adapter(unet, folder), history, options.device,
            f"python {Path(__file__).relative_to(ROOT)}",
        )


def measure(name: str = NAME, n_images: int = 100) -> dict:
    return measure_weights(name, STYLE, n_images)


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    return weight_lines(result, STYLE, "装框")


if __name__ == "__main__":
    main()
