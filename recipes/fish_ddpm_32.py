"""配方：fish-ddpm-32，由 butterflies-ddpm-32 微调而来，改画 32 × 32 的鱼（第 5.5.1 节）。

只用 200 条鱼。为了看清过拟合，再用 20 条鱼训练一遍，只走一半的步数，只留记录、不留权重。
随书只存权重与原来之差，用 8 位浮点，是整个模型的一半大；装入时加回到蝴蝶模型上。

用法：python recipes/fish_ddpm_32.py
"""

import copy
import json
from itertools import zip_longest
from pathlib import Path

import torch
from butterflies_ddpm_32 import IMAGE_SIZE, batch_loss, noise_scheduler
from common import parser, save_model
from diffusers import DDIMScheduler, UNet2DModel
from family_judge import LARGE, judge_families
from measuring import DEVICE, SEED, draw
from safetensors.torch import load_file, save_file

from book_utils import add_difference, fish_images, fit, grid_image, resolve, set_seed, weight_difference
from book_utils.training import written_whole
from book_utils.worlds.fish import BODY_COLORS

NAME = "fish-ddpm-32"
PURPOSE = "由 butterflies-ddpm-32 微调而来，画 32×32 的鱼；存的是权重与原来之差（第 5.5.1 节）"
DATA = "鱼的世界 32×32：200 条大的、在中央的鱼（seed=50）"
PRECISION = "与 butterflies-ddpm-32 的权重之差，8 位浮点，safetensors；用 `book_utils.add_difference` 加回去"

N_IMAGES, N_FEW = 200, 20
BATCH_SIZE = 20
N_STEPS, N_FEW_STEPS = 4000, 2000
STOPS = (0, 50, 100, 200, 500, 1000, 2000, 4000)    # 停下来画图的步数；都是 CHECKPOINT_EVERY 的倍数
CHECKPOINT_EVERY = 50
N_COURSE, COURSE_STEPS = 60, 10                     # 每次停下来画多少张，各走多少步
N_FINAL_STEPS = 20


def training_images(n_images: int = N_IMAGES) -> torch.Tensor:
    """训练用的鱼，uint8，形状 (n_images, 3, 32, 32)。"""
    return fish_images(n_images, IMAGE_SIZE, seed=50, **LARGE)[0]


def butterfly_unet() -> UNet2DModel:
    """微调的起点。"""
    return UNet2DModel.from_pretrained(resolve("butterflies-ddpm-32"), subfolder="unet")


def sample(unet: UNet2DModel, n_steps: int, n_samples: int) -> torch.Tensor:
    """用 DDIM 画 n_samples 张，取值 0 到 1；起点的噪声总是同样的。"""
    scheduler = DDIMScheduler.from_config(noise_scheduler.config, timestep_spacing="trailing")
    return draw(unet, scheduler, n_steps, n_samples)


def finetune(n_images: int, n_steps: int, checkpoint: Path, device: str, max_steps: int | None) -> tuple:
    """用 n_images 条鱼微调 n_steps 步，返回（网络，训练记录，{步数: 画的图}）；中断后再运行就接着走。

    途中画的图用的是当时的权重，最后一次用的是滑动平均的权重。
    """
    set_seed(0)
    unet, history, course = butterfly_unet(), None, {}
    for stop in STOPS:
        if stop > n_steps or (max_steps is not None and stop > max_steps):
            break
        if stop:
            history = fit(
                unet, (training_images(n_images),), batch_loss, n_epochs=n_steps * BATCH_SIZE // n_images,
                batch_size=BATCH_SIZE, lr=5e-4, lr_decay=True, ema_decay=0.995, device=device,
                checkpoint=checkpoint, checkpoint_every=CHECKPOINT_EVERY, max_steps=stop,
            )
        drawn = checkpoint.with_name(f"{checkpoint.stem}-{stop}.safetensors")       # 画过的不必再画
        if not drawn.exists():
            images = (sample(unet.to(DEVICE).eval(), COURSE_STEPS, N_COURSE) * 255).round().byte()
            with written_whole(drawn) as partial:
                save_file({"images": images}, partial)
        course[stop] = load_file(drawn)["images"]
    return unet, history, course


def nearest(images: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """每张图到最近的训练图（或它的镜像）的距离，形状 (N,)；取值都是 0 到 1。"""
    training = torch.cat([training, training.flip(-1)])
    return torch.cdist(images.flatten(1), training.flatten(1)).min(dim=1).values


def shares(images: torch.Tensor) -> dict[str, float]:
    """家族裁判认作蝴蝶、鱼、都不是的比例。"""
    families = judge_families(images)[0]
    return {name: (families == i).float().mean().item() for i, name in enumerate(("butterfly", "fish", "other"))}


def record_course(course: dict[int, torch.Tensor], n_images: int) -> list[dict]:
    """每次停下来时：认作什么的比例，到最近的训练图的距离（中位数）。"""
    training = training_images(n_images) / 255
    return [
        {"step": step} | shares(images / 255) | {"nearest": nearest(images / 255, training).median().item()}
        for step, images in course.items()
    ]


def overfit_picture(images: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """上一行是画的八张，下一行是离它们最近的训练图（必要时取镜像）；都是 0 到 1。"""
    both = torch.cat([training, training.flip(-1)])
    picks = torch.cdist(images[:8].flatten(1), both.flatten(1)).argmin(dim=1)
    return torch.cat([images[:8], both[picks]])


def main():
    options = parser(__doc__.splitlines()[0], NAME).parse_args()
    few_checkpoint = options.checkpoint.with_name(options.checkpoint.stem + "-few.safetensors")
    unet, history, course = finetune(N_IMAGES, N_STEPS, options.checkpoint, options.device, options.max_steps)
    _, few_history, few_course = finetune(N_FEW, N_FEW_STEPS, few_checkpoint, options.device, options.max_steps)
    if options.max_steps is not None:
        return
    fresh = fish_images(300, IMAGE_SIZE, seed=SEED, **LARGE)[0] / 255

    def save(folder: Path) -> None:
        save_file(weight_difference(butterfly_unet(), unet.cpu()), folder / "difference.safetensors")
        grid_image(torch.cat([images[:8] for images in course.values()]) / 255, nrow=8).save(folder / "course.png")
        grid_image(
            overfit_picture(few_course[N_FEW_STEPS] / 255, training_images(N_FEW) / 255), nrow=8
        ).save(folder / "overfit.png")
        (folder / "course.json").write_text(json.dumps({
            "n_samples": N_COURSE, "n_steps": COURSE_STEPS,
            **{
                str(count): {
                    "course": record_course(drawn, count),
                    "nearest_of_new_renders": nearest(fresh, training_images(count) / 255).median().item(),
                }
                for count, drawn in ((N_IMAGES, course), (N_FEW, few_course))
            },
        }, indent=1), encoding="utf-8")

    save_model(options.output, save, history, options.device, "python recipes/fish_ddpm_32.py", few=few_history)


def measure(n_samples: int = 300) -> dict:
    """画 n_samples 张：认得出是鱼的比例，颜色与朝向各有多少；到最近的训练图的距离。"""
    unet = add_difference(copy.deepcopy(butterfly_unet()), resolve(NAME)).to(DEVICE)
    images = sample(unet, N_FINAL_STEPS, n_samples)
    families, found = judge_families(images)
    fishes = [one for one, family in zip(found, families.tolist(), strict=True) if family == 1]
    training = training_images() / 255
    fresh = fish_images(n_samples, IMAGE_SIZE, seed=SEED, **LARGE)[0] / 255
    return {
        "n_samples": n_samples,
        "n_steps": N_FINAL_STEPS,
        "shares": shares(images),
        "body_colors": {color: sum(one["body_color"] == color for one in fishes) for color in BODY_COLORS},
        "facing_left": sum(one["facing"] == "left" for one in fishes),
        "nearest_training_image": nearest(images, training).median().item(),
        "nearest_training_image_of_new_renders": nearest(fresh, training).median().item(),
    }


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    shares = result["shares"]
    course = json.loads((Path(resolve(NAME)) / "course.json").read_text(encoding="utf-8"))
    return [
        f"- {result['n_samples']} 张（DDIM，{result['n_steps']} 步）里，家族裁判认作鱼的占 {shares['fish']:.1%}"
        f"（要求不低于 90%），蝴蝶 {shares['butterfly']:.1%}，都不是 {shares['other']:.1%}",
        "- 各种颜色的张数：" + "，".join(f"{BODY_COLORS[c][0]} {n}" for c, n in result["body_colors"].items())
        + f"；头朝左的 {result['facing_left']} 张",
        f"- 到最近的训练图的距离（中位数）：生成的图 {result['nearest_training_image']:.2f}，"
        f"新画的图 {result['nearest_training_image_of_new_renders']:.2f}",
        "",
        f"训练途中，每次画 {course['n_samples']} 张（{course['n_steps']} 步）。"
        f"“用 {N_FEW} 条”的一列只用 {N_FEW} 条鱼，走 {N_FEW_STEPS:,} 步：新画的鱼到这 {N_FEW} 条的距离是 "
        f"{course[str(N_FEW)]['nearest_of_new_renders']:.2f}。",
        "",
        f"| 步数 | 认作蝴蝶 | 认作鱼 | 到最近的训练图 | 到最近的训练图，用 {N_FEW} 条 |",
        "|---|---|---|---|---|",
        *(
            f"| {many['step']} | {many['butterfly']:.0%} | {many['fish']:.0%} | {many['nearest']:.2f} | "
            + (f"{few['nearest']:.2f} |" if few else "|")
            for many, few in zip_longest(course[str(N_IMAGES)]["course"], course[str(N_FEW)]["course"])
        ),
    ]


if __name__ == "__main__":
    main()
