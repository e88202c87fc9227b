"""配方：mini-lora-glow，“发光”画风的 LoRA（第 9.2 节）。

除了随书的秩 4，还训练秩 1、2、8、16 与整个 UNet 的微调，只留测量的结果：
秩与画风的关系，以及微调前后权重之差的奇异值。

用法：python recipes/mini_lora_glow.py
"""

import copy
import json
from pathlib import Path

import torch
from adapter_judge import judge_rates, through_autoencoder
from common import ROOT, parser, save_model
from lora_training import (
    BATCH_SIZE,
    LR,
    N_EPOCHS,
    N_STEPS,
    RANK,
    AdapterLoss,
    Trainable,
    add_lora,
    base_pipeline,
    measure_style,
    n_trainable,
    save_adapter,
    style_tensors,
)
from measuring import NAMES, SEED, write_prompts
from mini_stable_diffusion_inpaint import encode_images

from book_utils import draw_prompts, fit, load_adapter, mix_adapters, random_butterflies, resolve, set_seed
from book_utils.training import load_state, save_state
from book_utils.worlds.styles import styled_images

NAME = "mini-lora-glow"
STYLE, DATA_SEED = "glow", 96
PURPOSE = "“发光”画风的 LoRA，秩 4，配 mini-stable-diffusion 用（第 9.2 节）"
DATA = "蝴蝶世界 64×64，改画成发光的：960 只（seed=96），说明里不提画风"

RANKS = (1, 2, 4, 8, 16)
N_COURSE = 50                   # 每种秩画多少张来数
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MIXES = ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0))
PARTNER = "mini-lora-frame"


def held_out_loss(base, unet, style: str) -> float:
    """没有用来训练的图上的损失；时间步与噪声固定，好比较。"""
    butterflies = random_butterflies(64, SEED + 4)
    latents = encode_images(base.vae, styled_images(butterflies, [style], 64, SEED + 4) / 127.5 - 1, "编码")
    tokens = base.tokenizer(
        write_prompts(butterflies, SEED + 4), padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids[:, None]
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        return AdapterLoss(base, unet)(None, latents.to(unet.device), tokens.to(unet.device), generator).item()


def finetune(base, tensors, checkpoint: Path, device: str, max_steps: int | None, rank: int | None) -> tuple:
    """从基础模型出发微调一份，rank 是 None 就微调整个 UNet；返回（UNet，训练记录）。"""
    unet = copy.deepcopy(base.unet).to(device)
    if rank is None:
        set_seed(0)
        unet.requires_grad_(True)
    else:
        add_lora(unet, rank)
    history = fit(
        Trainable(unet), tensors, AdapterLoss(base, unet), n_epochs=N_EPOCHS, batch_size=BATCH_SIZE,
        lr=2e-4 if rank is None else LR, lr_decay=True, device=device, checkpoint=checkpoint, max_steps=max_steps,
    )
    return unet.eval(), history


def singular_values(before, after) -> dict[str, list[float]]:
    """各个注意力矩阵在微调前后之差的奇异值，从大到小。"""
    old, result = before.state_dict(), {}
    for name, weight in after.state_dict().items():
        if ".attn" in name and name.endswith("weight"):
            result[name.removesuffix(".weight")] = [
                round(value, 6) for value in torch.linalg.svdvals((weight - old[name]).float()).tolist()
            ]
    return result


def study(base, tensors, options) -> dict:
    """各种秩与整个微调各训练一遍、量一遍；量过的写在断点旁边，不必再量。"""
    butterflies = random_butterflies(N_COURSE, SEED + 2)
    prompts = write_prompts(butterflies, SEED + 2)
    result = {"n_images": N_COURSE, "n_steps": N_STEPS, "base_loss": held_out_loss(base, base.unet, STYLE), "ranks": {}}
    for rank in (*RANKS, None):
        key = "full" if rank is None else str(rank)
        checkpoint = options.checkpoint.with_stem(f"{options.checkpoint.stem}-{key}")
        measured = checkpoint.with_stem(checkpoint.stem + "-measured")
        if not measured.exists():
            unet, history = finetune(base, tensors, checkpoint, options.device, None, rank)
            pipeline = type(base)(**(base.components | {"unet": unet}), requires_safety_checker=False)
            pipeline.set_progress_bar_config(disable=True)
            row = {
                "n_parameters": n_trainable(unet), "seconds": round(history.seconds),
                "loss": held_out_loss(base, unet, STYLE),
            } | measure_style(pipeline, prompts, butterflies)
            if rank is None:
                row["singular_values"] = singular_values(base.unet, unet)
            save_state(measured, {"done": torch.ones(1)}, row)
        result["ranks"][key] = load_state(measured)[1]
    return result


def main(arguments: list[str] | None = None):
    options = parser(__doc__.splitlines()[0], NAME).parse_args(arguments)
    base = base_pipeline(options.device)
    tensors = style_tensors(base, STYLE, DATA_SEED)
    checkpoint = options.checkpoint.with_stem(f"{options.checkpoint.stem}-{RANK}")      # study() 还要用它
    unet, history = finetune(base, tensors, checkpoint, options.device, options.max_steps, RANK)
    if options.max_steps is not None:
        return
    course = study(base, tensors, options)

    def save(folder: Path) -> None:
        save_adapter(unet, folder)
        (folder / "course.json").write_text(json.dumps(course, indent=1), encoding="utf-8")

    save_model(options.output, save, history, options.device, f"python {Path(__file__).relative_to(ROOT)}")


# —— 测量 ——

def measure_weights(name: str, style: str, n_images: int) -> dict:
    """一个适配器：各种强度下画风与属性的比例，强度 0 与基础模型是否逐位相同，裁判的上下限。"""
    base = base_pipeline()
    butterflies = random_butterflies(n_images, SEED)
    prompts = write_prompts(butterflies, SEED)
    n_base = sum(p.numel() for p in base.unet.parameters())
    plain = draw_prompts(base, prompts, seeds=SEED, n_steps=N_STEPS, guidance_scale=2.0)
    load_adapter(base, resolve(name), style)
    n_adapter = sum(p.numel() for n, p in base.unet.named_parameters() if "lora_" in n)
    mix_adapters(base, {style: 0.0})
    off = draw_prompts(base, prompts, seeds=SEED, n_steps=N_STEPS, guidance_scale=2.0)
    result = {
        "n_images": n_images, "n_steps": N_STEPS, "n_parameters": n_adapter, "share": n_adapter / n_base,
        "off_is_identical": torch.equal(plain, off), "base": judge_rates(plain), "weights": {},
        # 真的照这种画风画的图，经自编码器还原之后，裁判认得出的比例：上限
        "reconstructions": judge_rates(through_autoencoder(styled_images(butterflies, [style], 64, SEED)) / 255),
    }
    for weight in WEIGHTS:
        mix_adapters(base, {style: weight})
        result["weights"][f"{weight:g}"] = measure_style(base, prompts, butterflies)
    mix_adapters(base, {style: 1.0})
    new = random_butterflies(n_images, SEED + 1, held_out=True)
    result["held_out"] = measure_style(base, write_prompts(new, SEED + 1), new)
    return result


def weight_lines(result: dict, style: str, title: str) -> list[str]:
    """:func:`measure_weights` 的结果，写进模型卡。"""
    return [
        f"- {result['n_parameters']:,} 个参数，是 UNet 的 {result['share']:.2%}（要求 3% 以内）",
        f"- 强度 0 时与基础模型逐位相同：{'是' if result['off_is_identical'] else '否'}",
        f"- 真的照这种画风画的图，还原之后认得出 {result['reconstructions'][style]:.1%}；"
        f"基础模型画的错认 {result['base'][style]:.1%}",
        "",
        f"{result['n_images']} 句提示词（要求：强度 1 时画风 90%，颜色与花纹各 85%）：",
        "",
        f"| 强度 | {title} | " + " | ".join(NAMES.values()) + " |",
        "|---|---|" + "---|" * len(NAMES),
        *(
            f"| {weight} | {row[style]:.1%} | " + " | ".join(f"{row[c]:.1%}" for c in NAMES) + " |"
            for weight, row in (result["weights"] | {"1，留作检验的组合": result["held_out"]}).items()
        ),
    ]


def measure(name: str = NAME, n_images: int = 100) -> dict:
    result = measure_weights(name, STYLE, n_images)
    base = base_pipeline()
    butterflies = random_butterflies(n_images, SEED)
    prompts = write_prompts(butterflies, SEED)
    load_adapter(base, resolve(name), "glow")
    load_adapter(base, resolve(PARTNER), "frame")
    result["mixes"] = {}
    for glow, frame in MIXES:
        mix_adapters(base, {"glow": glow, "frame": frame})
        result["mixes"][f"{glow:g}+{frame:g}"] = measure_style(base, prompts, butterflies)
    return result


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    course = json.loads((Path(resolve(NAME)) / "course.json").read_text(encoding="utf-8"))
    return [
        *weight_lines(result, STYLE, "发光"),
        "",
        "与 mini-lora-frame 一起用（发光的强度 + 装框的强度）：",
        "",
        "| 强度 | 发光 | 装框 | 颜色 | 花纹 |",
        "|---|---|---|---|---|",
        *(
            f"| {key} | {row['glow']:.1%} | {row['frame']:.1%} | {row['wing_color']:.1%} | {row['pattern']:.1%} |"
            for key, row in result["mixes"].items()
        ),
        "",
        f"各种秩，走同样的步数，{course['n_images']} 张：",
        "",
        "| 秩 | 参数 | 秒 | 新图的损失 | 发光 | 颜色 | 花纹 |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {'整个微调' if rank == 'full' else rank} | {row['n_parameters']:,} | {row['seconds']} | {row['loss']:.4f} | "
            f"{row['glow']:.1%} | {row['wing_color']:.1%} | {row['pattern']:.1%} |"
            for rank, row in course["ranks"].items()
        ),
    ]


if __name__ == "__main__":
    main()
