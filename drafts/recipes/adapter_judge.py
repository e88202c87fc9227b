"""配方：适配器裁判 adapter-judge，看得出两种画风与 DreamBooth 要学的那一只（第 9.2、9.3 节）。

生成的图都经过解码器，比程序画的略糊；所以一半的训练图先压缩再还原，免得它凭清不清楚来分辨。

用法：python recipes/adapter_judge.py
"""

import numpy as np
import torch
from common import parser, save_model
from diffusers import AutoencoderKL
from measuring import DEVICE, SEED
from mini_stable_diffusion import reconstruct
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from book_utils import AdapterJudge, adapter_judge, fit, resolve, set_seed
from book_utils.training import load_state, save_state
from book_utils.worlds.butterflies import PATTERNS, WING_COLORS, random_butterfly
from book_utils.worlds.styles import STYLES, SUBJECT, render_styled, render_subject

NAME = "adapter-judge"
PURPOSE = "适配器裁判，认两种画风（发光、装框），认左橙右蓝的那一只蝴蝶（第 9.2、9.3 节）"
DATA = "蝴蝶世界 64×64，改画之后：12,000 只（seed=95），一半经过自编码器"

N_IMAGES = 12_000
TITLES = {"glow": "发光", "frame": "装框", "subject": "要学的那一只"}


def other_halves(rng: np.random.Generator) -> tuple:
    """也是左右两半不同的蝴蝶，但不是要学的那一只：三成是它的镜像，三成只错一边，其余两边都随机。"""
    def pick():
        return list(WING_COLORS)[rng.integers(len(WING_COLORS))], list(PATTERNS)[rng.integers(len(PATTERNS))]

    left, right = SUBJECT
    while True:
        kind = rng.random()
        if kind < 0.3:
            halves = (right, left)
        elif kind < 0.6:
            halves = (left, pick()) if rng.random() < 0.5 else (pick(), right)
        else:
            halves = (pick(), pick())
        if halves[0][0] != left[0] or halves[1][0] != right[0]:         # 颜色都对的不算“不是”
            return halves


def draw_one(rng: np.random.Generator, seed: int) -> tuple[np.ndarray, list[float]]:
    """一张图与它的三个答案；三成是要学的那一只，两成是别的两半不同的蝴蝶，其余是普通的蝴蝶。"""
    butterfly = random_butterfly(rng, held_out=bool(rng.random() < 0.15))
    styles = [name for name in STYLES if rng.random() < 0.4]
    kind = rng.random()
    if kind < 0.3:
        image = render_subject(butterfly, 64, seed, styles)
    elif kind < 0.5:
        image = render_subject(butterfly, 64, seed, styles, other_halves(rng))
    else:
        image = render_styled(butterfly, styles, 64, seed)
    return image, [*(float(name in styles) for name in STYLES), float(kind < 0.3)]


def make_images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """（uint8 的图 (count, 3, 64, 64)，答案 (count, 3)）。"""
    rng = np.random.default_rng(seed)
    drawn = [draw_one(rng, seed * 10_000_000 + i) for i in tqdm(range(count), desc="画图", unit="张")]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2)
    return images.contiguous(), torch.tensor([answers for _, answers in drawn])


def through_autoencoder(images: torch.Tensor) -> torch.Tensor:
    """压缩再还原，uint8 → uint8。"""
    vae = AutoencoderKL.from_pretrained(resolve("mini-stable-diffusion"), subfolder="vae").to(DEVICE)
    return (reconstruct(vae, images) * 255).round().to(torch.uint8)


def batch_loss(model, images, answers, generator):
    """images：uint8 (B, 3, 64, 64)；answers：(B, 3)。加一点点噪声与明暗的变化，免得它太挑剔。"""
    x = images / 255
    amount = 0.04 * torch.rand(len(x), 1, 1, 1, generator=generator)
    brightness = 1 + 0.1 * (torch.rand(len(x), 1, 1, 1, generator=generator) - 0.5)
    noise = amount * torch.randn(x.shape, generator=generator)
    x = (x * brightness.to(x.device) + noise.to(x.device)).clamp(0, 1)
    return F.binary_cross_entropy_with_logits(model(x), answers)


def main():
    options = parser(__doc__.splitlines()[0], NAME).parse_args()
    cache = options.checkpoint.with_stem(options.checkpoint.stem + "-data")
    made_from = {"n_images": N_IMAGES}
    tensors, notes = load_state(cache) if cache.exists() else ({}, None)
    if notes != made_from:
        images, answers = make_images(N_IMAGES, seed=95)
        images[::2] = through_autoencoder(images[::2])
        tensors = {"images": images, "answers": answers}
        save_state(cache, tensors, made_from)
    set_seed(0)
    model = AdapterJudge()
    history = fit(
        model, (tensors["images"], tensors["answers"]), batch_loss, n_epochs=10, batch_size=64, lr=2e-3, lr_decay=True,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        save_model(
            options.output,
            lambda folder: save_file(model.cpu().half().state_dict(), folder / "model.safetensors"),
            history, options.device, "python recipes/adapter_judge.py",
        )


# —— 测量 ——

def judge_rates(images: torch.Tensor) -> dict[str, float]:
    """裁判在各项上认出的比例；images 取值 0 到 1。"""
    judge = adapter_judge().to(DEVICE)
    found = torch.cat([judge(part.to(DEVICE)).cpu() > 0 for part in images.split(500)]).float().mean(dim=0)
    return dict(zip(AdapterJudge.HEADS, found.tolist(), strict=True))


def measure(name: str = NAME, n_images: int = 1000) -> dict:
    images, answers = make_images(n_images, seed=SEED)
    judge = adapter_judge().to(DEVICE)
    result = {"n_images": n_images, "accuracy": {}, "misses": {}, "false_alarms": {}}
    for key, pictures in (("renders", images), ("reconstructions", through_autoencoder(images))):
        with torch.no_grad():
            found = torch.cat([judge(part.to(DEVICE) / 255).cpu() > 0 for part in pictures.split(500)])
        right = found == answers.bool()
        columns = list(zip(AdapterJudge.HEADS, range(3), strict=True))
        result["accuracy"][key] = {head: right[:, i].float().mean().item() for head, i in columns}
        result["misses"][key] = {head: 1 - right[answers[:, i] == 1, i].float().mean().item() for head, i in columns}
        result["false_alarms"][key] = {head: 1 - right[answers[:, i] == 0, i].float().mean().item() for head, i in columns}
    return result


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    return [
        f"{result['n_images']} 张新画的图，与它们经自编码器还原之后：",
        "",
        "| | " + " | ".join(TITLES.values()) + " |",
        "|---|" + "---|" * len(TITLES),
        *(
            f"| {title}，{kind} | " + " | ".join(f"{result[key][part][head]:.1%}" for head in TITLES) + " |"
            for key, title in (("accuracy", "正确率"), ("misses", "漏认"), ("false_alarms", "错认"))
            for part, kind in (("renders", "新画的图"), ("reconstructions", "还原之后"))
        ),
    ]


if __name__ == "__main__":
    main()
