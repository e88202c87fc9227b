"""配方：mini-dreambooth，用五张“照片”教会模型画左橙右蓝的那一只蝴蝶（第 9.3、4.2.2 节）。

随书只存带先验保持损失的 LoRA。另外训练三份，只留测量的结果：不带先验保持的 LoRA，
以及微调整个 UNet 的两份，带与不带先验保持。

用法：python recipes/mini_dreambooth.py
"""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from adapter_judge import judge_rates, through_autoencoder
from butterfly_clip import encode
from common import ROOT, parser, save_model
from lora_training import (
    GUIDANCE_SCALE,
    N_STEPS,
    AdapterLoss,
    Trainable,
    add_lora,
    base_pipeline,
    n_trainable,
    save_adapter,
)
from measuring import NAMES, SEED, agreement, judge_butterflies, write_prompts
from mini_stable_diffusion_inpaint import encode_images

from book_utils import draw_prompts, fit, load_adapter, random_butterflies, random_caption, resolve, set_seed
from book_utils.training import load_state, save_state
from book_utils.worlds.butterflies import BACKGROUNDS
from book_utils.worlds.styles import SUBJECT_PHOTOS, render_subject, subject_images

NAME = "mini-dreambooth"
PURPOSE = "左橙右蓝的那一只蝴蝶，标识词 sks：DreamBooth 的 LoRA，秩 8，配 mini-stable-diffusion 用（第 9.3 节）"
DATA = "五张“照片”（`book_utils.worlds.styles.SUBJECT_PHOTOS`），与基础模型自己画的 200 只蝴蝶（先验保持）"

TOKEN = "sks"
RANK = 8
N_PRIOR = 200
BATCH_SIZE, N_EPOCHS = 4, 8             # 每步 4 张照片、4 张旧图；400 步
PRIOR_WEIGHT = 1.0
VARIANTS = {"lora": (RANK, True), "lora_without_prior": (RANK, False), "full": (None, True), "full_without_prior": (None, False)}
N_COURSE = 60


def subject_prompts() -> list[list[str]]:
    """五张照片各自的说法：标识词加类别，有的说背景，有的不说；中英文都有。"""
    return [
        [
            f"一只{TOKEN}蝴蝶", f"{BACKGROUNDS[photo.background][0]}背景上的{TOKEN}蝴蝶",
            f"a {TOKEN} butterfly", f"a {TOKEN} butterfly on a {photo.background} background",
        ]
        for photo in SUBJECT_PHOTOS
    ]


def new_scene_prompts(count: int) -> tuple[list[str], list[str]]:
    """带标识词、换背景的提示词，中文与英文交替；同时返回各句的背景，一半是照片里没有的。"""
    names = list(BACKGROUNDS)
    backgrounds = [names[i // 2 % len(names)] for i in range(count)]
    return [
        f"一只{TOKEN}蝴蝶，{BACKGROUNDS[b][0]}背景" if i % 2 == 0 else f"a {TOKEN} butterfly on a {b} background"
        for i, b in enumerate(backgrounds)
    ], backgrounds


def prior_set(base, cache: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """先验保持用的旧图：基础模型照随机的说明自己画的，（潜变量，词元编号 (N, 1, L)）；存在 cache 里。"""
    rng = np.random.default_rng(98)
    prompts = [
        random_caption(b, rng, ("zh", "en")[i % 2], ("wing_color", "pattern", "background"))
        for i, b in enumerate(random_butterflies(N_PRIOR, seed=98))
    ]
    tensors, notes = load_state(cache) if cache.exists() else ({}, None)
    if notes != {"count": N_PRIOR}:
        images = draw_prompts(base, prompts, seeds=98_000, n_steps=N_STEPS, guidance_scale=GUIDANCE_SCALE)
        tensors = {"latents": encode_images(base.vae, images * 2 - 1, "编码")}
        save_state(cache, tensors, {"count": N_PRIOR})
    return tensors["latents"], encode(base.tokenizer, prompts)[:, None].to(torch.int16)


class DreamBoothLoss(AdapterLoss):
    """照片上的损失，加上（若要）旧图上的损失：先验保持。"""

    def __init__(self, base, unet, device, with_prior: bool):
        super().__init__(base, unet)
        self.photos = encode_images(base.vae, subject_images() / 127.5 - 1, "照片").to(device)
        texts = [text for texts in subject_prompts() for text in texts]
        self.photo_tokens = encode(base.tokenizer, texts).view(len(self.photos), 4, -1).to(device)
        self.with_prior = with_prior

    def photo_loss(self, count, generator):
        """抽 count 张照片的损失。照片的提示词从不换成空的：否则空提示词也会画成那一只，引导就乱了。"""
        picks = torch.randint(len(self.photos), (count,), generator=generator).to(self.photos.device)
        which = torch.randint(self.photo_tokens.shape[1], (count,), generator=generator).to(self.photos.device)
        captions = self.photo_tokens[picks, which]
        keep, self.empty = self.empty, captions         # UNetLoss 要把一成“换成空的”，让它换成自己
        try:
            return super().__call__(None, self.photos[picks], captions[:, None], generator)
        finally:
            self.empty = keep

    def __call__(self, trainable, latents, tokens, generator):
        loss = self.photo_loss(len(latents), generator)
        if self.with_prior:
            loss = loss + PRIOR_WEIGHT * super().__call__(trainable, latents, tokens, generator)
        return loss


def finetune(base, prior, checkpoint: Path, device: str, max_steps: int | None, rank: int | None, with_prior: bool) -> tuple:
    """微调一份；rank 是 None 就微调整个 UNet。返回（UNet，训练记录）。"""
    unet = copy.deepcopy(base.unet).to(device)
    if rank is None:
        set_seed(0)
        unet.requires_grad_(True)
    else:
        add_lora(unet, rank)
    history = fit(
        Trainable(unet), prior, DreamBoothLoss(base, unet, device, with_prior), n_epochs=N_EPOCHS, batch_size=BATCH_SIZE,
        lr=1e-4 if rank is None else 1e-3, lr_decay=True, device=device, checkpoint=checkpoint, max_steps=max_steps,
    )
    return unet.eval(), history


def background_rate(images: torch.Tensor, backgrounds: list[str]) -> dict[str, float]:
    """背景画对的比例：照片里有的，照片里没有的。"""
    _, found = judge_butterflies(images)
    seen_in_photos = {photo.background for photo in SUBJECT_PHOTOS}
    right = {True: [], False: []}
    for seen, wanted in zip(found, backgrounds, strict=True):
        right[wanted in seen_in_photos].append(seen["background"] == wanted)
    return {"old_backgrounds": float(np.mean(right[True])), "new_backgrounds": float(np.mean(right[False]))}


def measure_subject(pipeline, n_images: int, seed: int) -> dict:
    """带标识词的、不带标识词的、别的蝴蝶，各画 n_images 张。"""
    def draw(prompts, offset):
        return draw_prompts(pipeline, prompts, seeds=seed + offset, n_steps=N_STEPS, guidance_scale=GUIDANCE_SCALE)

    prompts, backgrounds = new_scene_prompts(n_images)
    with_token = draw(prompts, 0)
    without_token = draw(["一只蝴蝶", "a butterfly"] * (n_images // 2), 2000)
    butterflies = random_butterflies(n_images, seed + 4)
    others = draw(write_prompts(butterflies, seed + 4), 4000)
    return {
        "subject": judge_rates(with_token)["subject"],
        "leak": judge_rates(without_token)["subject"],          # 没说标识词，也画成了那一只
        "leak_in_others": judge_rates(others)["subject"],
        "others": agreement(others, butterflies),
    } | background_rate(with_token, backgrounds)


def main(arguments: list[str] | None = None):
    options = parser(__doc__.splitlines()[0], NAME).parse_args(arguments)
    base = base_pipeline(options.device)
    prior = prior_set(base, options.checkpoint.with_stem(options.checkpoint.stem + "-prior"))
    course, kept = {"n_images": N_COURSE, "base": None, "variants": {}}, None
    for key, (rank, with_prior) in VARIANTS.items():
        checkpoint = options.checkpoint.with_stem(f"{options.checkpoint.stem}-{key}")
        unet, history = finetune(base, prior, checkpoint, options.device, options.max_steps, rank, with_prior)
        if key == "lora":
            kept = unet, history
        if options.max_steps is not None:
            continue
        measured = checkpoint.with_stem(checkpoint.stem + "-measured")
        if not measured.exists():
            pipeline = type(base)(**(base.components | {"unet": unet}), requires_safety_checker=False)
            pipeline.set_progress_bar_config(disable=True)
            row = {"n_parameters": n_trainable(unet), "seconds": round(history.seconds)}
            save_state(measured, {"done": torch.ones(1)}, row | measure_subject(pipeline, N_COURSE, SEED + 10_000))
        course["variants"][key] = load_state(measured)[1]
    if options.max_steps is not None:
        return
    course["base"] = measure_subject(base, N_COURSE, SEED + 10_000)

    def save(folder: Path) -> None:
        save_adapter(kept[0], folder)
        (folder / "course.json").write_text(json.dumps(course, indent=1), encoding="utf-8")

    save_model(options.output, save, kept[1], options.device, f"python {Path(__file__).relative_to(ROOT)}")


# —— 测量 ——

def measure(name: str = NAME, n_images: int = 100) -> dict:
    base = base_pipeline()
    result = {"n_images": n_images, "n_steps": N_STEPS, "base": measure_subject(base, n_images, SEED)}
    butterflies = random_butterflies(n_images, SEED + 6)
    real = torch.from_numpy(np.stack([render_subject(b, 64, SEED + i) for i, b in enumerate(butterflies)])).permute(0, 3, 1, 2)
    result["reconstructions"] = judge_rates(through_autoencoder(real.contiguous()) / 255)["subject"]
    load_adapter(base, resolve(name), "subject")
    result["adapter"] = measure_subject(base, n_images, SEED)
    return result


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    course = json.loads((Path(resolve(NAME)) / "course.json").read_text(encoding="utf-8"))
    titles = {
        "lora": "LoRA，先验保持（随书的）", "lora_without_prior": "LoRA，没有先验保持",
        "full": "整个微调，先验保持", "full_without_prior": "整个微调，没有先验保持",
    }
    rows = {"随书的，另一批种子": result["adapter"], "基础模型，另一批种子": result["base"], "基础模型": course["base"]}
    rows |= {titles[key]: row for key, row in course["variants"].items()}
    return [
        f"- 提示词带标识词 {TOKEN}，认得出是那一只：{result['adapter']['subject']:.1%}（要求 80%）；"
        f"真的那一只，还原之后认得出 {result['reconstructions']:.1%}",
        "- 别的蝴蝶，颜色、花纹、背景画对的，与基础模型相差（要求 5 个百分点以内）："
        + "，".join(
            f"{NAMES[c]} {100 * (result['adapter']['others'][c] - result['base']['others'][c]):+.1f}"
            for c in ("wing_color", "pattern", "background")
        ),
        "",
        "| | 带标识词，是那一只 | 不带，也是那一只 | 别的蝴蝶画成那一只 | 背景，照片里有的 | 照片里没有的 | 别的蝴蝶，颜色 | 花纹 | 背景 |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {title} | {row['subject']:.1%} | {row['leak']:.1%} | {row['leak_in_others']:.1%} | {row['old_backgrounds']:.1%} | "
            f"{row['new_backgrounds']:.1%} | {row['others']['wing_color']:.1%} | {row['others']['pattern']:.1%} | "
            f"{row['others']['background']:.1%} |"
            for title, row in rows.items()
        ),
    ]


if __name__ == "__main__":
    main()
