"""配方：audio-ddpm，生成一秒钟声音的梅尔图的 DDPM 管线（第八章）。

网络、噪声计划与第四章的蝴蝶相同，只是图变成单通道、64 × 64：纵轴 64 个梅尔带，横轴 64 帧。

用法：python recipes/audio_ddpm.py
"""

import numpy as np
import torch
from common import parser, save_model
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from measuring import DEVICE, SEED, draw, nearest, samplers, sharpness
from sound_judge import accuracy, as_batch, features_and_logits, judge_sounds
from torch.nn import functional as F
from tqdm import tqdm

from book_utils import (
    SoundJudge,
    fit,
    frechet_distance,
    inception_score,
    mel_picture,
    picture_to_wave,
    resolve,
    set_seed,
    sound_labels,
    sound_pictures,
    sound_waves,
    waves_apart,
)
from book_utils.audio import griffin_lim, picture_to_amplitude
from book_utils.worlds.sounds import BASE_KINDS, KINDS, N_SAMPLES, PITCHES, TEMPOS

NAME = "audio-ddpm"
PURPOSE = "DDPM 管线，生成 64×64 的梅尔图，还原成 1.024 秒的声音（第八章）"
DATA = "声音世界 8,000 段：拨弦、钟声、琶音、鸟鸣、鼓点（seed=61），不含留给微调的蛙鸣"

N_SOUNDS = 8_000
BATCH_SIZE = 16
ITERATIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128)       # Griffin–Lim 迭代多少次
BANDS = (8, 16, 32, 64, 128)                        # 多少个梅尔带
noise_scheduler = DDPMScheduler(
    num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
)


def training_pictures() -> torch.Tensor:
    """训练用的梅尔图，uint8，形状 (N_SOUNDS, 1, 64, 64)；测量时也用它来查有没有背下训练集。"""
    return sound_pictures(N_SOUNDS, seed=61)[0]


def build_model() -> UNet2DModel:
    """第 8.2.4 节的网络，1,965,513 个参数；只在 8 × 8 上用注意力。"""
    return UNet2DModel(
        sample_size=64,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(24, 48, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def batch_loss(model, pictures, generator):
    """pictures 是 uint8，形状 (B, 1, 64, 64)；返回预测速度 √ᾱ·eps − √(1−ᾱ)·x0 的均方误差。

    不翻转：上下颠倒就换了音高，左右颠倒就成了倒放。
    """
    x0 = pictures / 127.5 - 1                                                    # 0 … 255 → (−1, 1)
    timesteps = torch.randint(1000, (len(x0),), generator=generator).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    noisy = noise_scheduler.add_noise(x0, noise, timesteps)
    velocity = noise_scheduler.get_velocity(x0, noise, timesteps)
    return F.mse_loss(model(noisy, timesteps).sample, velocity)


def main():
    options = parser(__doc__.splitlines()[0], NAME).parse_args()
    set_seed(0)
    model = build_model()
    history = fit(
        model, (training_pictures(),), batch_loss, n_epochs=10, batch_size=BATCH_SIZE,
        lr=8e-4, lr_decay=True, ema_decay=0.999,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        pipeline = DDPMPipeline(unet=model.cpu().half(), scheduler=noise_scheduler)
        save_model(
            options.output, pipeline.save_pretrained, history, options.device,
            "python recipes/audio_ddpm.py",
        )


# —— 梅尔图最多能留住多少 ——

def rebuild(pictures: np.ndarray, n_iterations: int = 32) -> np.ndarray:
    """梅尔图 (N, n_mels, 64) → 波形 (N, 16384)；十段一组地算，省内存。"""
    parts = np.array_split(pictures, max(1, len(pictures) // 10))
    return np.concatenate([picture_to_wave(part, n_iterations) for part in parts])


def measure_floor(n_sounds: int = 300) -> dict:
    """新合成的声音，画成图、还原、再画：各种声音相差多少分贝，裁判还认得多少。"""
    waves, sounds = sound_waves(n_sounds, seed=SEED)
    pictures = mel_picture(waves)
    rebuilt = mel_picture(rebuild(pictures))
    apart = waves_apart(rebuilt, pictures)
    kinds = np.array([sound.kind for sound in sounds])
    wanted, found = sound_labels(sounds)[:, 0], judge_sounds(as_batch(rebuilt))[0]
    some = {kind: np.flatnonzero(kinds == kind)[:6] for kind in BASE_KINDS}
    by_iterations = {
        kind: [
            waves_apart(mel_picture(_griffin_lim_of(pictures[picks], n)), pictures[picks]).mean().item()
            for n in tqdm(ITERATIONS, desc=f"{kind}：迭代次数")
        ]
        for kind, picks in some.items()
    }
    few = np.concatenate(list(some.values()))
    by_bands = {}
    for n_mels in tqdm(BANDS, desc="梅尔带"):
        again = mel_picture(rebuild(mel_picture(waves[few], n_mels)))
        by_bands[str(n_mels)] = {"apart": waves_apart(again, pictures[few]).mean().item()} | accuracy(
            as_batch(again), [sounds[i] for i in few]
        )
    return {
        "n_sounds": n_sounds,
        "apart": {kind: apart[kinds == kind].mean().item() for kind in BASE_KINDS},
        "kept": {
            kind: (found == wanted)[torch.from_numpy(kinds == kind)].float().mean().item() for kind in BASE_KINDS
        },
        "accuracy": accuracy(as_batch(pictures), sounds),
        "accuracy_rebuilt": accuracy(as_batch(rebuilt), sounds),
        "iterations": list(ITERATIONS),
        "by_iterations": by_iterations,
        "by_bands": by_bands,
        "n_bands": len(few),
    }


def _griffin_lim_of(pictures: np.ndarray, n_iterations: int) -> np.ndarray:
    return griffin_lim(picture_to_amplitude(pictures), N_SAMPLES, n_iterations)


# —— 生成的声音 ——

def band_levels(pictures: torch.Tensor) -> list[float]:
    """各梅尔带的平均功率，分贝；pictures 取值 −1 到 1，形状 (N, 1, 64, 64)。"""
    power = 10 ** ((pictures - 1) * 4)                          # (−1, 1) → (−80, 0) 分贝 → 功率
    return (10 * power.mean(dim=(0, 1, 3)).log10()).tolist()


def compare(pictures: torch.Tensor, real_features: torch.Tensor, training: torch.Tensor) -> dict:
    """一批梅尔图（取值 −1 到 1）的各项指标；training 是缩成 32 × 32、摊平的训练集（取值 0 到 1）。"""
    kinds, found = judge_sounds(pictures)
    features, logits = features_and_logits(pictures)
    kept = [a for a, kind in zip(found, kinds.tolist(), strict=True) if kind != SoundJudge.OTHER]
    return {
        "recognized": (kinds != SoundJudge.OTHER).float().mean().item(),
        "right_kind": torch.isin(kinds, torch.arange(len(BASE_KINDS))).float().mean().item(),
        "kinds": {kind: (kinds == i).sum().item() for i, kind in enumerate(KINDS)},
        "pitches": {pitch: sum(a["pitch"] == pitch for a in kept) for pitch in PITCHES},
        "tempos": {tempo: sum(a["tempo"] == tempo for a in kept) for tempo in TEMPOS},
        "inception_score": inception_score(logits),
        "distance": frechet_distance(features, real_features),
        "nearest": nearest(pictures / 2 + 0.5, training),
        "sharpness": sharpness(pictures),
        "band_levels": band_levels(pictures),
    }


@torch.no_grad()
def measure(name: str = NAME, n_samples: int = 300, n_steps: int = 50) -> dict:
    """还原的底线；生成的图与还原成的声音；步数；到最近的训练声音的距离。"""
    unet = UNet2DModel.from_pretrained(resolve(name), subfolder="unet").to(DEVICE).eval()
    training = training_pictures()
    values = training[:1000] / 127.5 - 1
    training = F.interpolate(training / 255, size=(32, 32), mode="area").flatten(1)
    fresh, more = (as_batch(mel_picture(sound_waves(n_samples, seed=SEED + i)[0])) for i in (1, 2))
    reference = features_and_logits(more)[0]

    choices = samplers(noise_scheduler.config)
    pictures = draw(unet, choices["DDPM"][0], n_steps, n_samples) * 2 - 1
    heard = as_batch(mel_picture(rebuild(pictures[:, 0].numpy())))
    few_steps = {}
    for method, key in (("DDPM", "DDPM"), ("DDIM", "DDIM（η = 0）"), ("DPM-Solver++", "DPM-Solver++")):
        scheduler, options = choices[key]
        few_steps[method] = {}
        for count in tqdm((5, 10, 25, 50), desc=f"{name}：{method}"):
            drawn = draw(unet, scheduler, count, n_samples, **options) * 2 - 1
            few_steps[method][str(count)] = {
                "recognized": (judge_sounds(drawn)[0] != SoundJudge.OTHER).float().mean().item(),
                "distance": frechet_distance(features_and_logits(drawn)[0], reference),
            }
    return {
        "n_samples": n_samples,
        "n_steps": n_steps,
        "floor": measure_floor(),
        "generated": compare(pictures, reference, training),
        "generated_heard": compare(heard, reference, training),
        "fresh": compare(fresh, reference, training),
        "fresh_heard": compare(as_batch(mel_picture(rebuild(fresh[:, 0].numpy()))), reference, training),
        "few_steps": few_steps,
        "values": {"mean": values.mean().item(), "std": values.std().item(), "floor": (values == -1).float().mean().item()},
    }


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    floor = result["floor"]
    rows = {
        "fresh": "新合成的", "fresh_heard": "新合成的，还原之后", "generated": "生成的图", "generated_heard": "生成的，还原成声音之后",
    }
    return [
        f"底线：{floor['n_sounds']} 段新合成的声音，画成梅尔图、还原成声音、再画成图，相差的分贝数（两边都听不见的地方不算）："
        + "，".join(f"{KINDS[kind]} {value:.1f}" for kind, value in floor["apart"].items())
        + f"。还原之后裁判认对种类 {floor['accuracy_rebuilt']['kind']:.1%}，音高 {floor['accuracy_rebuilt']['pitch']:.1%}，"
        f"快慢 {floor['accuracy_rebuilt']['tempo']:.1%}。",
        "",
        f"各 {result['n_samples']} 段，生成的走 {result['n_steps']} 步；要求认得出的不低于 90%，五种都有：",
        "",
        "| | 认得出 | 是训练过的五种 | Inception 分数 | Fréchet 距离 | 到最近的训练声音 |",
        "|---|---|---|---|---|---|",
        *(
            f"| {title} | {row['recognized']:.1%} | {row['right_kind']:.1%} | {row['inception_score']:.2f} | "
            f"{row['distance']:.1f} | {row['nearest']:.2f} |"
            for title, row in ((title, result[key]) for key, title in rows.items())
        ),
        "",
        "- 生成的各种声音的段数：" + "，".join(f"{KINDS[k]} {n}" for k, n in result["generated"]["kinds"].items()),
        "- 音高：" + "，".join(f"{p} {n}" for p, n in result["generated"]["pitches"].items())
        + "；快慢：" + "，".join(f"{TEMPOS[t][0]} {n}" for t, n in result["generated"]["tempos"].items()),
        "",
        "步数少时，认得出的比例 / Fréchet 距离：",
        "",
        "| 方法 | " + " | ".join(f"{n} 步" for n in result["few_steps"]["DDPM"]) + " |",
        "|---|" + "---|" * len(result["few_steps"]["DDPM"]),
        *(
            f"| {method} | " + " | ".join(f"{c['recognized']:.1%} / {c['distance']:.1f}" for c in row.values()) + " |"
            for method, row in result["few_steps"].items()
        ),
    ]


if __name__ == "__main__":
    main()
