"""配方：audio-ddpm-frog，由 audio-ddpm 微调而来，改学蛙鸣（第 8.2.4 节）。

用 100 段蛙鸣。为了看清“多少段才够”，同样的设置再用 40 段、10 段各训练一遍，只留记录、不留权重。
随书只存权重与原来之差，用 8 位浮点；装入时加回到 audio-ddpm 上。

用法：python recipes/audio_ddpm_frog.py
"""

import copy
import json
from pathlib import Path

import torch
from audio_ddpm import batch_loss, noise_scheduler
from common import parser, save_model
from diffusers import DDIMScheduler, UNet2DModel
from measuring import DEVICE, SEED, draw
from safetensors.torch import load_file, save_file
from sound_judge import as_batch, judge_sounds

from book_utils import (
    SoundJudge,
    add_difference,
    fit,
    mel_picture,
    picture_to_wave,
    resolve,
    set_seed,
    sound_pictures,
    weight_difference,
)
from book_utils.training import written_whole
from book_utils.worlds.sounds import KINDS, NEW_KIND, PITCHES, TEMPOS

NAME = "audio-ddpm-frog"
PURPOSE = "由 audio-ddpm 微调而来，生成蛙鸣；存的是权重与原来之差（第 8.2.4 节）"
DATA = "声音世界：100 段蛙鸣（seed=81）"
PRECISION = "与 audio-ddpm 的权重之差，8 位浮点，safetensors；用 `book_utils.add_difference` 加回去"

SIZES = (100, 40, 10)                               # 用多少段；第一个是随书的
BATCH_SIZE = 10
N_STEPS = 1000
STOPS = (0, 25, 50, 100, 200, 400, 1000)            # 停下来听一听的步数；都是 CHECKPOINT_EVERY 的倍数
CHECKPOINT_EVERY = 25
N_COURSE, COURSE_STEPS = 40, 20                     # 每次停下来生成多少段，各走多少步
N_KEPT = 4                                          # 每次留下几张图，供书里播放
N_FINAL_STEPS = 50


def training_pictures(n_sounds: int = SIZES[0]) -> torch.Tensor:
    """训练用的蛙鸣，uint8，形状 (n_sounds, 1, 64, 64)。"""
    return sound_pictures(n_sounds, seed=81, kind=NEW_KIND)[0]


def base_unet() -> UNet2DModel:
    """微调的起点。"""
    return UNet2DModel.from_pretrained(resolve("audio-ddpm"), subfolder="unet")


def sample(unet: UNet2DModel, n_steps: int, n_samples: int) -> torch.Tensor:
    """用 DDIM 生成 n_samples 张梅尔图，取值 0 到 1；起点的噪声总是同样的。"""
    scheduler = DDIMScheduler.from_config(noise_scheduler.config, timestep_spacing="trailing")
    return draw(unet, scheduler, n_steps, n_samples)


def finetune(n_sounds: int, checkpoint: Path, device: str, max_steps: int | None) -> tuple:
    """用 n_sounds 段蛙鸣微调，返回（网络，训练记录，{步数: 生成的图}）；中断后再运行就接着走。

    途中生成的图用的是当时的权重，最后一次用的是滑动平均的权重。
    """
    set_seed(0)
    unet, history, course = base_unet(), None, {}
    for stop in STOPS:
        if max_steps is not None and stop > max_steps:
            break
        if stop:
            history = fit(
                unet, (training_pictures(n_sounds),), batch_loss, n_epochs=N_STEPS * BATCH_SIZE // n_sounds,
                batch_size=BATCH_SIZE, lr=5e-4, lr_decay=True, ema_decay=0.995, device=device,
                checkpoint=checkpoint, checkpoint_every=CHECKPOINT_EVERY, max_steps=stop,
            )
        drawn = checkpoint.with_name(f"{checkpoint.stem}-{stop}.safetensors")       # 生成过的不必再生成
        if not drawn.exists():
            pictures = (sample(unet.to(DEVICE).eval(), COURSE_STEPS, N_COURSE) * 255).round().byte()
            drawn.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(drawn) as partial:
                save_file({"pictures": pictures}, partial)
        course[stop] = load_file(drawn)["pictures"]
    return unet, history, course


def shares(pictures: torch.Tensor) -> dict[str, float]:
    """裁判认作蛙鸣、认作原来五种、都不是的比例；pictures 取值 0 到 1。"""
    kinds = judge_sounds(pictures * 2 - 1)[0]
    new, other = tuple(KINDS).index(NEW_KIND), SoundJudge.OTHER
    is_new, is_other = (kinds == new).float().mean().item(), (kinds == other).float().mean().item()
    return {"new": is_new, "base": 1 - is_new - is_other, "other": is_other}


def nearest(pictures: torch.Tensor, training: torch.Tensor) -> float:
    """各张到最近的训练图的距离，取中位数；取值都是 0 到 1。"""
    return torch.cdist(pictures.flatten(1), training.flatten(1)).min(dim=1).values.median().item()


def main():
    options = parser(__doc__.splitlines()[0], NAME).parse_args()
    unets, histories, courses = {}, {}, {}
    for n_sounds in SIZES:
        checkpoint = options.checkpoint.with_name(f"{options.checkpoint.stem}-{n_sounds}-sounds.safetensors")
        unets[n_sounds], histories[n_sounds], courses[n_sounds] = finetune(
            n_sounds, checkpoint, options.device, options.max_steps
        )
    if options.max_steps is not None:
        return
    fresh = sound_pictures(200, seed=SEED, kind=NEW_KIND)[0] / 255
    first = SIZES[0]

    def save(folder: Path) -> None:
        save_file(weight_difference(base_unet(), unets[first].cpu()), folder / "difference.safetensors")
        save_file(
            {str(stop): pictures[:N_KEPT].clone() for stop, pictures in courses[first].items()},
            folder / "course.safetensors",
        )
        (folder / "course.json").write_text(json.dumps({
            "n_samples": N_COURSE, "n_steps": COURSE_STEPS,
            **{
                str(n_sounds): {
                    "course": [
                        {"step": stop} | shares(pictures / 255)
                        | {"nearest": nearest(pictures / 255, training_pictures(n_sounds) / 255)}
                        for stop, pictures in courses[n_sounds].items()
                    ],
                    "nearest_of_new_sounds": nearest(fresh, training_pictures(n_sounds) / 255),
                }
                for n_sounds in SIZES
            },
        }, indent=1), encoding="utf-8")

    save_model(
        options.output, save, histories[first], options.device, "python recipes/audio_ddpm_frog.py",
        **{f"few_{n_sounds}": histories[n_sounds] for n_sounds in SIZES[1:]},
    )


def measure(n_samples: int = 300) -> dict:
    """生成 n_samples 段：认作蛙鸣的比例（看图、还原成声音再看），音高与快慢；到最近的训练声音的距离。"""
    unet = add_difference(copy.deepcopy(base_unet()), resolve(NAME)).to(DEVICE)
    pictures = sample(unet, N_FINAL_STEPS, n_samples)
    heard = [
        mel_picture(picture_to_wave(part.numpy())) for part in (pictures[:, 0] * 2 - 1).split(10)
    ]
    heard = torch.cat([as_batch(part) for part in heard]) / 2 + 0.5
    kinds, found = judge_sounds(pictures * 2 - 1)
    frogs = [a for a, kind in zip(found, kinds.tolist(), strict=True) if kind == tuple(KINDS).index(NEW_KIND)]
    training = training_pictures() / 255
    fresh = sound_pictures(n_samples, seed=SEED, kind=NEW_KIND)[0] / 255
    return {
        "n_samples": n_samples,
        "n_steps": N_FINAL_STEPS,
        "shares": shares(pictures),
        "shares_heard": shares(heard),
        "pitches": {pitch: sum(a["pitch"] == pitch for a in frogs) for pitch in PITCHES},
        "tempos": {tempo: sum(a["tempo"] == tempo for a in frogs) for tempo in TEMPOS},
        "nearest": nearest(pictures, training),
        "nearest_of_new_sounds": nearest(fresh, training),
    }


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    course = json.loads((Path(resolve(NAME)) / "course.json").read_text(encoding="utf-8"))
    stops = [row["step"] for row in course[str(SIZES[0])]["course"]]
    return [
        f"- {result['n_samples']} 段（DDIM，{result['n_steps']} 步）里，裁判认作蛙鸣的占 {result['shares']['new']:.1%}"
        f"（要求不低于 80%），还原成声音之后 {result['shares_heard']['new']:.1%}",
        "- 音高：" + "，".join(f"{p} {n}" for p, n in result["pitches"].items())
        + "；快慢：" + "，".join(f"{TEMPOS[t][0]} {n}" for t, n in result["tempos"].items()),
        f"- 到最近的训练声音的距离（中位数）：生成的 {result['nearest']:.2f}，新合成的 {result['nearest_of_new_sounds']:.2f}",
        "",
        f"训练途中，每次生成 {course['n_samples']} 段（{course['n_steps']} 步）；认作蛙鸣的比例 / 到最近的训练声音的距离：",
        "",
        "| 用多少段 | " + " | ".join(f"{stop} 步" for stop in stops) + " | 新合成的声音的距离 |",
        "|---|" + "---|" * (len(stops) + 1),
        *(
            f"| {n} | " + " | ".join(f"{row['new']:.0%} / {row['nearest']:.1f}" for row in course[str(n)]["course"])
            + f" | {course[str(n)]['nearest_of_new_sounds']:.1f} |"
            for n in SIZES
        ),
    ]


if __name__ == "__main__":
    main()
