"""配方：mini-controlnet-edges，照着边缘画的 ControlNet（第 9.1 节）。

基础模型 mini-stable-diffusion 一点不动，只训练它的编码器的一份副本与零卷积。
训练途中停下来画图，量边缘合得怎样，看有没有“突然收敛”。

用法：python recipes/mini_controlnet_edges.py
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
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
    edge_rates,
    new_controlnet,
    rates,
    training_tensors,
)
from diffusers import ControlNetModel
from measuring import DEVICE, NAMES, SEED, agreement, judge_butterflies, write_prompts
from mini_stable_diffusion import reconstruct

from book_utils import butterfly_images, canny_edges, fit, resolve, set_seed
from book_utils.training import load_state, save_state
from book_utils.worlds.butterflies import POSITIONS, SIZES

NAME = "mini-controlnet-edges"
PURPOSE = "照着边缘画：mini-stable-diffusion 的 ControlNetModel（第 9.1 节）"
DATA = "蝴蝶世界 64×64：16,000 只（seed=91）与它们的 Canny 边缘，不含留作检验的颜色 × 花纹组合；一半的提示词是空的"

N_EPOCHS = 8
TOTAL = N_EPOCHS * N_IMAGES // BATCH_SIZE                # 4,000 步
STOPS = (0, 50, 100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400, 3200, TOTAL)
CHECKPOINT_EVERY = 50
N_COURSE, COURSE_STEPS = 48, 10                         # 每次停下来画多少张，各走多少步

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
RANGES = ((0.0, 0.2), (0.0, 0.4), (0.0, 0.6), (0.0, 0.8), (0.2, 1.0), (0.4, 1.0), (0.6, 1.0), (0.8, 1.0))


def edge_control(images: torch.Tensor) -> torch.Tensor:
    """存盘用的控制图：边缘只存一个通道，uint8，0 或 1。"""
    return canny_edges(images, LOW, HIGH)[:, :1].to(torch.uint8)


def expand(controls: torch.Tensor) -> torch.Tensor:
    return controls.float().expand(-1, 3, -1, -1)


def course_examples() -> tuple[list[str], torch.Tensor, list]:
    """训练途中画的：提示词、边缘、属性；与测量的不是同一批。"""
    images, butterflies = butterfly_images(N_COURSE, 64, seed=SEED + 7)
    return write_prompts(butterflies, SEED + 7), canny_edges(images / 255, LOW, HIGH), butterflies


def train(
    base, controlnet, tensors, checkpoint: Path, device: str, stops: tuple[int, ...], n_epochs: int, max_steps: int | None
) -> tuple:
    """走到各个 stops 停下来量一次，返回（训练记录，[{step, f1, …}]）；中断后再运行就接着走，量过的不必再量。"""
    loss, examples = ControlLoss(base, expand), course_examples()
    history, course = None, []
    for stop in stops:
        if max_steps is not None and stop > max_steps:
            break
        if stop:
            history = fit(
                controlnet, tensors, loss, n_epochs=n_epochs, batch_size=BATCH_SIZE, lr=5e-4, lr_decay=True,
                ema_decay=0.998, device=device, checkpoint=checkpoint, checkpoint_every=CHECKPOINT_EVERY, max_steps=stop,
            )
        measured = checkpoint.with_name(f"{checkpoint.stem}-at-{stop}.safetensors")
        if not measured.exists():
            prompts, edges, butterflies = examples
            images = draw(
                base, [(controlnet.eval(), edges, 1.0)], prompts, f"第 {stop} 步", seed=SEED + 700_000, n_steps=COURSE_STEPS
            )
            save_state(measured, {"images": (images[:8] * 255).round().byte()}, rates(images, edges, butterflies))
        course.append({"step": stop} | load_state(measured)[1])
    return history, course


def main(arguments: list[str] | None = None):
    options = parser(__doc__.splitlines()[0], NAME).parse_args(arguments)
    base = base_pipeline(options.device)
    tensors = training_tensors(
        base, options.checkpoint.with_stem(options.checkpoint.stem + "-data"), N_IMAGES, 91, edge_control
    )
    set_seed(0)
    controlnet = new_controlnet(base.unet)
    history, course = train(
        base, controlnet.to(options.device), tensors, options.checkpoint, options.device, STOPS, N_EPOCHS, options.max_steps
    )
    if options.max_steps is not None:
        return

    def save(folder: Path) -> None:
        controlnet.cpu().half().save_pretrained(folder)
        (folder / "course.json").write_text(json.dumps({
            "n_images": N_COURSE, "n_steps": COURSE_STEPS, "course": course,
        }, indent=1), encoding="utf-8")

    save_model(options.output, save, history, options.device, f"python {Path(__file__).relative_to(ROOT)}")


# —— 测量 ——

def conflicting_prompts(butterflies, seed: int) -> tuple[list[str], list]:
    """与边缘矛盾的提示词：颜色、花纹、背景照旧，大小与位置说成别的；同时返回照提示词说的那些蝴蝶。"""
    rng, told = np.random.default_rng(seed), []
    for butterfly in butterflies:
        sizes = [name for name in SIZES if name != butterfly.size]
        positions = [name for name in POSITIONS if name != butterfly.position]
        told.append(replace(
            butterfly, size=sizes[rng.integers(len(sizes))], position=positions[rng.integers(len(positions))]
        ))
    return write_prompts(told, seed), told


def place_rate(images: torch.Tensor, butterflies) -> float:
    """大小与位置都与 butterflies 相同的比例。"""
    is_butterfly, found = judge_butterflies(images)
    same = [
        keep and seen["size"] == b.size and seen["position"] == b.position
        for keep, seen, b in zip(is_butterfly.tolist(), found, butterflies, strict=True)
    ]
    return float(np.mean(same))


def measure(name: str = NAME, n_images: int = 100) -> dict:
    base = base_pipeline()
    controlnet = ControlNetModel.from_pretrained(resolve(name)).to(DEVICE).eval()
    real, butterflies = butterfly_images(n_images, 64, seed=SEED)
    edges, prompts = canny_edges(real / 255, LOW, HIGH), write_prompts(butterflies, SEED)
    result = {"n_images": n_images, "n_steps": N_STEPS, "scales": {}, "ranges": {}, "prompts": {}}

    # 尺子的两头：自编码器还原的真图（上限），别的图的边缘（下限）
    result["reconstructions"] = edge_rates(reconstruct(base.vae, real), edges)
    result["unrelated"] = edge_rates(real / 255, edges.roll(1, dims=0))

    for scale in SCALES:
        images = draw(base, [(controlnet, edges, scale)] if scale else [], prompts, f"强度 {scale:g}")
        result["scales"][f"{scale:g}"] = rates(images, edges, butterflies)
        if scale == 1:
            place = place_rate(images, butterflies)     # 提示词与边缘说的是同一件事
            result["prompts"]["perfect"] = result["scales"]["1"] | {"place_of_edges": place, "place_of_prompt": place}
    for start, end in RANGES:
        images = draw(base, [(controlnet, edges, 1.0)], prompts, f"{start:g} 到 {end:g}", start=start, end=end)
        result["ranges"][f"{start:g}-{end:g}"] = rates(images, edges, butterflies)

    conflicting, told = conflicting_prompts(butterflies, SEED)
    for key, texts, said in (
        ("none", [""] * n_images, butterflies), ("insufficient", ["一只蝴蝶"] * n_images, butterflies),
        ("conflicting", conflicting, told),
    ):
        images = draw(base, [(controlnet, edges, 1.0)], texts, key)
        result["prompts"][key] = rates(images, edges, butterflies) | {
            "place_of_edges": place_rate(images, butterflies), "place_of_prompt": place_rate(images, said),
        }
    result["conflicting_without"] = place_rate(draw(base, [], conflicting, "不控制"), told)

    unseen, held_out = butterfly_images(n_images, 64, seed=SEED + 1, held_out=True)
    new_edges = canny_edges(unseen / 255, LOW, HIGH)
    images = draw(base, [(controlnet, new_edges, 1.0)], write_prompts(held_out, SEED + 1), "没见过的组合")
    result["held_out"] = rates(images, new_edges, held_out)
    result["base"] = agreement(draw(base, [], prompts, "基础模型"), butterflies)
    return result


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    columns = {"f1": "F1", "f1_exact": "F1，一个像素也不差"} | NAMES
    rows = {f"强度 {scale}": row for scale, row in result["scales"].items()}
    rows |= {f"全程的 {key.replace('-', ' 到 ')}": row for key, row in result["ranges"].items()}
    titles = {"none": "没有提示词", "insufficient": "提示词不足", "conflicting": "提示词矛盾", "perfect": "提示词完整"}
    rows |= {titles[key]: row for key, row in result["prompts"].items()}
    rows |= {"留作检验的组合": result["held_out"]}
    ratio = result["scales"]["1"]["f1"] / result["scales"]["0"]["f1"]
    return [
        f"- {result['n_images']} 张新的边缘图，强度 1 的 F1 是不控制时的 {ratio:.2f} 倍（要求 2 倍）；"
        f"一个像素也不许差，是 {result['scales']['1']['f1_exact'] / result['scales']['0']['f1_exact']:.2f} 倍",
        f"- 真图经自编码器还原，F1 {result['reconstructions']['f1']:.3f}（上限）；别的图的边缘 {result['unrelated']['f1']:.3f}（下限）",
        *(
            f"- {titles[key]}：大小与位置照边缘的 {row['place_of_edges']:.1%}，照提示词的 {row['place_of_prompt']:.1%}"
            for key, row in result["prompts"].items()
        ),
        "",
        "| | " + " | ".join(columns.values()) + " |",
        "|---|" + "---|" * len(columns),
        *(
            f"| {title} | {row['f1']:.3f} | {row['f1_exact']:.3f} | " + " | ".join(f"{row[c]:.1%}" for c in NAMES) + " |"
            for title, row in rows.items()
        ),
    ]


if __name__ == "__main__":
    main()
