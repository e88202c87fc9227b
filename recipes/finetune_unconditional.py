"""最短的微调脚本：拿一个 DDPMPipeline，用一个文件夹的图像接着训练（第 5.5.2 节）。

    python recipes/finetune_unconditional.py --data 我的图像 --output 我的管线

--model 可以是随书模型的名字、一个管线文件夹，或 Hub 上的编号。随时可以中断，再运行同样的命令就接着走。
所有图像一次读进内存，适合几百到几万张；更多就用 train_unconditional.py。
"""

import argparse
import hashlib
import math
import sys
from pathlib import Path

import diffusers
import torch
from common import MODELS_ROOT
from diffusers import DDPMPipeline
from torch.nn import functional as F
from train_unconditional import Images

from book_utils import fit, get_device, resolve
from book_utils.training import written_whole


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="butterflies-ddpm-32", help="从哪个管线开始，默认 %(default)s")
    add("--data", type=Path, required=True, help="图像文件夹（imagefolder 的布局），图像会裁成正方形")
    add("--output", type=Path, required=True, help="微调后的管线写到哪个文件夹，它应当还不存在")
    add("--steps", type=int, default=100, help="走多少步，默认 %(default)s")
    add("--batch-size", type=int, default=16, help="每批多少张，默认 %(default)s")
    add("--micro-batch", type=int, help="内存不够时，每批再分成这么大的小份，累加梯度")
    add("--lr", type=float, default=2e-4, help="开始的学习率，按余弦降到 0，默认 %(default)s")
    add("--device", default=str(get_device()), help="计算设备，默认自动选择")
    return parser.parse_args(arguments)


def load_pipeline(name: str) -> DDPMPipeline:
    """载入管线；不是本脚本能微调的，抛出 ValueError。"""
    try:
        embedded = name in {folder.name for folder in MODELS_ROOT.iterdir()}
        pipeline = DDPMPipeline.from_pretrained(resolve(name) if embedded else name)
    except (OSError, ValueError) as error:
        raise ValueError(f"载入不了管线 {name!r}：{error}") from error
    unet = pipeline.unet.config
    if unet.in_channels != 3 or unet.out_channels != 3 or not isinstance(unet.sample_size, int) or unet.num_class_embeds:
        raise ValueError(f"只会微调画正方形彩色图像、没有条件的管线，{name!r} 不是。")
    if pipeline.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"只会微调预测 epsilon 或 v_prediction 的管线，{name!r} 预测的是 "
            f"{pipeline.scheduler.config.prediction_type}。"
        )
    return pipeline


def checkpoint_path(options: argparse.Namespace, n_images: int) -> Path:
    """断点放在输出文件夹旁边。名字里有设置的摘要：换了设置就是另一次训练，不会接错。"""
    settings = (
        options.model, str(options.data.resolve()), n_images, options.steps, options.batch_size, options.lr,
    )
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    return options.output.with_name(f"{options.output.name}-{digest}.safetensors")


def finetune(options: argparse.Namespace) -> None:
    if options.steps < 1 or options.batch_size < 1:
        raise ValueError(
            f"--steps 与 --batch-size 应是正整数，收到的是 {options.steps} 和 {options.batch_size}。"
        )
    if options.output.exists():
        raise ValueError(f"{options.output} 已经有了，不会覆盖它。请换一个 --output。")
    pipeline = load_pipeline(options.model)
    noise_scheduler = pipeline.scheduler
    options.image_size = pipeline.unet.config.sample_size       # Images 按它缩放
    images = torch.stack(list(Images(options)))                 # uint8，(N, 3, H, W)

    def batch_loss(model, batch, generator):
        clean = batch / 127.5 - 1                               # 0 … 255 → (−1, 1)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        n_timesteps = noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(n_timesteps, (len(clean),), generator=generator).to(clean.device)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        # 预测什么，要与原来的模型一致
        target = noise
        if noise_scheduler.config.prediction_type == "v_prediction":
            target = noise_scheduler.get_velocity(clean, noise, timesteps)
        return F.mse_loss(model(noisy, timesteps).sample, target)

    checkpoint = checkpoint_path(options, len(images))
    fit(
        pipeline.unet, (images,), batch_loss,
        n_epochs=math.ceil(options.steps / math.ceil(len(images) / options.batch_size)), max_steps=options.steps,
        batch_size=options.batch_size, micro_batch=options.micro_batch,
        lr=options.lr, lr_decay=True,
        device=options.device, checkpoint=checkpoint, checkpoint_every=20,
    )
    with written_whole(options.output) as partial:
        pipeline.save_pretrained(partial)
    checkpoint.unlink(missing_ok=True)                          # 走完了，断点不再有用
    print(f"已写出 {options.output}")


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    diffusers.utils.logging.disable_progress_bar()              # 只留训练自己的进度条
    try:
        finetune(options)
    except ValueError as error:
        print(f"错误：{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\n已中断。再运行同样的命令，就从最近的断点接着走。", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
