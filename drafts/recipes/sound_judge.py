"""配方：声音裁判 sound-judge，给生成的声音打分（第 8.2.2 节）。

它认六种声音、八个音高、三种快慢，还要认出“都不是”：噪声、静音、打乱的、许多段的平均、模糊的。
由梅尔图还原的声音听起来差一些，但仍然算数，所以有一部分训练图是还原之后再画的。

用法：python recipes/sound_judge.py
"""

import numpy as np
import torch
from common import parser, save_model
from measuring import DEVICE, SEED
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from book_utils import (
    SoundJudge,
    fit,
    mel_picture,
    picture_to_wave,
    set_seed,
    sound_judge,
    sound_labels,
    sound_pictures,
    sound_waves,
)
from book_utils.worlds.sounds import KINDS, N_SAMPLES, to_bytes

NAME = "sound-judge"
PURPOSE = "声音裁判，由梅尔图认出六种声音、音高与快慢，也认得出都不是的（第 8.2.2 节）"
DATA = (
    "声音世界 9,000 段（seed=71），另有还原之后的 1,500 段（seed=72）、打乱的 1,500 段（seed=73）、"
    "噪声与单调的长音 1,500 段"
)

ALL_KINDS = tuple(KINDS)
N_SOUNDS, N_REBUILT, N_SHUFFLED, N_NOISES = 9_000, 1_500, 1_500, 1_500
IGNORE = -100               # 都不是的没有音高与快慢，交叉熵跳过它们


def rebuilt_pictures(waves: np.ndarray, n_iterations: int = 16) -> np.ndarray:
    """波形 → 梅尔图 → 波形 → 梅尔图：(N, 16384) → (N, 64, 64)；十段一组地算，省内存。"""
    parts = np.array_split(waves, max(1, len(waves) // 10))
    return np.concatenate([
        mel_picture(picture_to_wave(mel_picture(part), n_iterations)) for part in tqdm(parts, desc="还原", unit="组")
    ])


def shuffled(waves: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """每段切成 32 份（各 32 毫秒）再打乱。"""
    pieces = waves.reshape(len(waves), 32, -1)
    order = rng.permuted(np.tile(np.arange(32), (len(waves), 1)), axis=1)
    return np.take_along_axis(pieces, order[:, :, None], axis=1).reshape(waves.shape)


def noises(count: int, rng: np.random.Generator) -> np.ndarray:
    """count 段噪声或单调的长音，从刺耳到几乎听不见；一成是静音。"""
    waves = np.empty((count, N_SAMPLES), dtype=np.float32)
    times = np.arange(N_SAMPLES) / N_SAMPLES
    for index in range(count):
        if rng.random() < 0.25:
            wave = np.sin(2 * np.pi * rng.uniform(100, 6000) * times * N_SAMPLES / 16_000)
        else:                                                   # 频谱有平有斜：白噪声、粉红噪声、隆隆声
            spectrum = np.fft.rfft(rng.normal(size=N_SAMPLES))
            wave = np.fft.irfft(spectrum * (np.arange(len(spectrum)) + 10.0) ** -rng.uniform(0, 1.5), n=N_SAMPLES)
        wave = wave * (1 + rng.uniform(0, 1) * np.sin(2 * np.pi * rng.uniform(0.5, 3) * times + rng.uniform(0, 6)))
        level = 0.0 if rng.random() < 0.1 else 10 ** (rng.uniform(-60, 0) / 20)
        waves[index] = wave / np.abs(wave).max() * level
    return waves


def make_negatives(pictures: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """由一批梅尔图 (B, 1, 64, 64)（取值 −1 到 1）造出四种“都不是”的图，各 B // 12 张。"""
    count = max(1, len(pictures) // 12)
    parts = pictures[: 4 * count].split(count)
    noise = torch.randn(parts[0].shape, generator=generator).to(pictures.device) * 0.6 - 0.4
    share = 0.6 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator).to(pictures.device)
    picks = torch.randint(len(pictures), (count, 6), generator=generator).to(pictures.device)
    blocks = parts[3].unflatten(3, (4, 16)).unflatten(2, (4, 16)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    blocks = blocks[:, torch.randperm(16, generator=generator)].unflatten(1, (4, 4))
    return {
        "noisy": torch.lerp(parts[0], noise, share).clamp(-1, 1),
        "averages": pictures[picks].mean(dim=1),
        "blurred": gaussian_blur(parts[2], kernel_size=31, sigma=8.0),
        "patches": blocks.permute(0, 3, 1, 4, 2, 5).reshape(parts[3].shape),
    }


def batch_loss(model, pictures, labels, generator):
    """pictures 是 uint8，形状 (B, 1, 64, 64)；labels 形状 (B, 3)：种类、音高、快慢（都不是的，后两列为 IGNORE）。"""
    pictures = pictures / 127.5 - 1
    negatives = torch.cat(list(make_negatives(pictures[labels[:, 0] != model.OTHER], generator).values()))
    pictures = torch.cat([pictures, negatives])
    labels = F.pad(labels, (0, 0, 0, len(negatives)), value=IGNORE)
    labels[-len(negatives):, 0] = model.OTHER
    # 加一点点噪声，免得它只凭像素是否绝对干净来分辨；响一点、轻一点都算数
    amount = 0.04 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    noise = amount * torch.randn(pictures.shape, generator=generator)
    gain = 0.1 * torch.rand(len(pictures), 1, 1, 1, generator=generator) - 0.05
    gain = gain.to(pictures.device) * (pictures > -1)
    outputs = model((pictures + gain + noise.to(pictures.device)).clamp(-1, 1))
    return sum(
        F.cross_entropy(output, labels[:, column], ignore_index=IGNORE) for column, output in enumerate(outputs.values())
    )


def main():
    options = parser(__doc__.splitlines()[0], NAME).parse_args()
    set_seed(0)
    clean, clean_sounds = sound_pictures(N_SOUNDS, seed=71, kinds=ALL_KINDS)
    waves, rebuilt_sounds = sound_waves(N_REBUILT, seed=72, kinds=ALL_KINDS)
    rng = np.random.default_rng(73)
    others = np.concatenate([
        mel_picture(shuffled(sound_waves(N_SHUFFLED, seed=73, kinds=ALL_KINDS)[0], rng)), mel_picture(noises(N_NOISES, rng)),
    ])
    pictures = torch.cat([clean, to_bytes(rebuilt_pictures(waves)), to_bytes(others)])
    labels = F.pad(sound_labels(clean_sounds + rebuilt_sounds), (0, 0, 0, len(others)), value=IGNORE)
    labels[-len(others):, 0] = SoundJudge.OTHER

    model = SoundJudge()
    history = fit(
        model, (pictures, labels), batch_loss, n_epochs=10, batch_size=125, lr=2e-3, lr_decay=True,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        save_model(
            options.output,
            lambda folder: save_file(model.cpu().half().state_dict(), folder / "model.safetensors"),
            history, options.device, "python recipes/sound_judge.py",
        )


@torch.no_grad()
def judge_sounds(pictures: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """（各段的种类：九成以上把握才算，否则是 SoundJudge.OTHER；音高与快慢）；pictures 取值 −1 到 1。"""
    judge = sound_judge().to(DEVICE)
    parts = [judge.describe(part.to(DEVICE)) for part in pictures.split(500)]
    return torch.cat([part[0].cpu() for part in parts]), [item for part in parts for item in part[1]]


@torch.no_grad()
def features_and_logits(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """裁判的 96 维特征 (N, 96)，与六种声音的对数几率 (N, 6)。"""
    judge = sound_judge().to(DEVICE)
    features = torch.cat([judge.features(part.to(DEVICE)) for part in pictures.split(500)])
    return features.cpu(), judge.heads["kind"](features)[:, : SoundJudge.OTHER].cpu()


def as_batch(pictures: np.ndarray) -> torch.Tensor:
    """(N, 64, 64) 的数组 → (N, 1, 64, 64) 的张量。"""
    return torch.from_numpy(pictures)[:, None]


def accuracy(pictures: torch.Tensor, sounds: list) -> dict[str, float]:
    """种类（有九成以上把握）、音高、快慢认对的比例。"""
    kinds, found = judge_sounds(pictures)
    wanted = sound_labels(sounds)[:, 0]
    return {"kind": (kinds == wanted).float().mean().item()} | {
        name: sum(a[name] == getattr(b, name) for a, b in zip(found, sounds, strict=True)) / len(sounds)
        for name in SoundJudge.ATTRIBUTES
    }


def measure(n_sounds: int = 1200) -> dict:
    """新合成的声音、还原之后的声音上的正确率；各种都不是的被认作某一种的比例。"""
    waves, sounds = sound_waves(n_sounds, seed=SEED, kinds=ALL_KINDS)
    pictures = as_batch(mel_picture(waves))
    rng = np.random.default_rng(SEED)
    loud = noises(400, rng)
    negatives = {
        "noise": as_batch(mel_picture(loud[np.abs(loud).max(axis=1) > 0])),
        "silence": -torch.ones(50, 1, 64, 64),
        "shuffled": as_batch(mel_picture(shuffled(waves[:400], rng))),
    } | make_negatives(pictures, torch.Generator().manual_seed(SEED))
    return {
        "n_sounds": n_sounds,
        "n_rebuilt": 240,
        "accuracy": accuracy(pictures, sounds),
        "accuracy_rebuilt": accuracy(as_batch(rebuilt_pictures(waves[:240], 32)), sounds[:240]),
        "wrongly_recognized": {
            kind: (judge_sounds(batch)[0] != SoundJudge.OTHER).float().mean().item() for kind, batch in negatives.items()
        },
    }


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    titles = {"kind": "种类", "pitch": "音高", "tempo": "快慢"}
    kinds = {
        "noise": "噪声与长音", "silence": "静音", "shuffled": "打乱的波形", "noisy": "盖满噪声的图", "averages": "六段的平均",
        "blurred": "模糊的图", "patches": "打乱的图",
    }
    return [
        "种类有九成以上把握才算认得：",
        "",
        "| | " + " | ".join(titles.values()) + " |",
        "|---|" + "---|" * len(titles),
        *(
            f"| {title} | " + " | ".join(f"{result[key][n]:.1%}" for n in titles) + " |"
            for key, title in (
                ("accuracy", f"新合成的 {result['n_sounds']} 段"), ("accuracy_rebuilt", f"其中 {result['n_rebuilt']} 段由梅尔图还原之后"),
            )
        ),
        "",
        "都不是的被认作某一种声音的比例："
        + "，".join(f"{title} {result['wrongly_recognized'][kind]:.1%}" for kind, title in kinds.items()) + "。",
    ]


if __name__ == "__main__":
    main()
