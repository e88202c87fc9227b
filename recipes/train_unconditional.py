"""训练一个无条件的 DDPM：随书的蝴蝶世界，或你自己的一文件夹图像（第 4.4.2 节）。

同一个文件，不改一字，可以在一个进程或许多进程、CPU 或 GPU 上运行：

    python recipes/train_unconditional.py --data 我的照片
    accelerate launch recipes/train_unconditional.py --data 我的照片
    python recipes/train_unconditional.py --data 我的照片 --pretrained butterflies-ddpm-32      从现成的管线开始微调（第 5.5.2 节）

随时可以中断，再运行同样的命令就接着训练。结果在 --output 里：
pipeline/ 是 DDPMPipeline，samples/ 是途中的样图，log.jsonl 是每一步的记录，checkpoint.safetensors 是断点。
"""

import argparse
import json
import math
import os
import sys
import time
import zlib
from functools import lru_cache
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from common import MODELS_ROOT, ROOT
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from book_utils import butterfly_images, grid_image, image_files, open_rgb, resolve, set_seed
from book_utils.training import (
    check_settings,
    load_optimizer,
    load_state,
    optimizer_tensors,
    save_state,
    written_whole,
)

# 这些选项决定训练的结果，续训时必须与断点一致；进程数、累加份数、精度则可以换
SETTINGS = (
    "images", "pretrained", "image_size", "channels", "layers", "batch_size", "lr", "warmup", "ema_decay",
    "max_grad_norm", "flip", "seed",
)
# 从头训练时网络的默认大小；从现成的管线开始时，由管线决定
ARCHITECTURE = {"image_size": 64, "channels": [64, 128, 128, 256], "layers": 2}


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("-h", "--help", action="help", help="显示这份说明")
    add = parser.add_argument
    add("--data", type=Path, help="图像文件夹，子文件夹里的也算；不给则用蝴蝶世界")
    add("--n-butterflies", type=int, default=1000, help="用蝴蝶世界时画多少张，默认 %(default)s")
    add("--output", type=Path, default=ROOT / ".work" / "unconditional", help="结果写到哪个文件夹，默认 %(default)s")
    add("--pretrained", help="从哪个管线开始微调：随书模型的名字、一个文件夹，或 Hub 上的编号；不给则从头训练")
    add("--image-size", type=int, help=f"图像边长，像素；每张先裁成正方形，默认 {ARCHITECTURE['image_size']}")
    add("--channels", type=int, nargs="+", help=f"UNet 各级的通道数，默认 {ARCHITECTURE['channels']}")
    add("--layers", type=int, help=f"UNet 每级几个残差块，默认 {ARCHITECTURE['layers']}")
    add("--steps", type=int, default=1563, help="总步数，默认 %(default)s，即 1000 张、批大小 32 时的 50 轮")
    add("--batch-size", type=int, default=32, help="每更新一次权重用多少张图，所有进程合计，默认 %(default)s")
    add("--accumulation", type=int, default=1, help="每批分几份累加梯度，显存不够时调大，默认 %(default)s")
    add("--lr", type=float, default=1e-4, help="学习率，默认 %(default)s")
    add("--warmup", type=int, default=500, help="学习率从 0 线性升到 lr 用多少步，默认 %(default)s")
    add("--max-grad-norm", type=float, default=1.0, help="梯度的长度超过它就按比例缩短，默认 %(default)s")
    add("--ema-decay", type=float, default=0.999, help="权重滑动平均的衰减率，默认 %(default)s")
    add("--flip", action="store_true", help="随机左右翻转图像")
    add("--gradient-checkpointing", action="store_true", help="少存中间结果，反向传播时重算：省显存，费时间")
    add("--mixed-precision", help="no、fp16 或 bf16；默认听启动器的，启动器没说就是 no")
    add("--checkpoint-every", type=int, default=200, help="每多少步存一次断点，默认 %(default)s")
    add("--sample-every", type=int, default=500, help="每多少步画一次样图，默认 %(default)s")
    add("--workers", type=int, default=0, help="每个进程用几个子进程读图，默认 %(default)s")
    add("--seed", type=int, default=0, help="随机种子，默认 %(default)s")
    add("--cpu", action="store_true", help="有 GPU 也只用 CPU")
    add("--rendezvous", help="几个 CPU 进程在哪里碰头，如 file:///路径；默认用启动器给的端口")
    options = parser.parse_args(arguments)
    options.given = [name for name in ARCHITECTURE if getattr(options, name) is not None]
    for name, default in ARCHITECTURE.items():
        if name not in options.given:
            setattr(options, name, default)
    return options


def check_options(options: argparse.Namespace) -> None:
    """选项不对就抛出 ValueError；这时还什么都没有写。"""
    if options.pretrained is not None and options.given:
        names = "、".join(f"--{name.replace('_', '-')}" for name in options.given)
        raise ValueError(f"网络与边长由 --pretrained 的管线决定，不能再给 {names}。")
    at_least_one = (
        "n_butterflies", "layers", "steps", "batch_size", "accumulation", "checkpoint_every", "sample_every",
    )
    for name in at_least_one:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} 应是正整数，收到的是 {getattr(options, name)}。")
    if options.lr <= 0 or options.max_grad_norm <= 0 or not 0 <= options.ema_decay < 1:
        raise ValueError("--lr 与 --max-grad-norm 应大于 0，--ema-decay 应不小于 0、小于 1。")
    if options.warmup < 0 or options.workers < 0 or not 0 <= options.seed < 2**32:
        raise ValueError(f"--warmup、--workers 与 --seed 不能是负数，--seed 还应小于 {2**32}。")
    if options.mixed_precision not in (None, "no", "fp16", "bf16"):
        raise ValueError(f"--mixed-precision 应是 no、fp16 或 bf16，收到的是 {options.mixed_precision}。")
    if any(channels < 8 or channels % 8 for channels in options.channels):
        raise ValueError(f"--channels 都应是 8 的倍数，收到的是 {options.channels}。")
    factor = 2 ** (len(options.channels) - 1)
    if options.image_size < 16 or options.image_size % factor:
        raise ValueError(
            f"--image-size 应不小于 16，并且是 {factor} 的倍数（{len(options.channels)} 级的 UNet 要缩小 "
            f"{len(options.channels) - 1} 次，每次一半），收到的是 {options.image_size}。"
        )
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output 应是文件夹，{options.output} 却是一个文件。")


class Images(Dataset):
    """训练图像，裁成正方形、缩放，成为 uint8 张量 (3, image_size, image_size)。"""

    def __init__(self, options: argparse.Namespace):
        self.size, self.folder = options.image_size, options.data
        self.files = None if options.data is None else image_files(options.data)
        if self.files is None:      # 与配方 butterflies_ddpm_32.py 一样：大的、在中央的蝴蝶
            self.drawn, _ = butterfly_images(
                options.n_butterflies, options.image_size, seed=1, size="large", position="center"
            )

    def __len__(self) -> int:
        return len(self.drawn if self.files is None else self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.files is None:
            return self.drawn[index]
        image = ImageOps.fit(open_rgb(self.files[index]), (self.size, self.size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def fingerprint(self) -> str:
        """张数，以及各文件的名字与大小的校验值：换了数据，它就不同；文件夹挪个地方没有关系。"""
        if self.files is None:
            return f"蝴蝶世界的 {len(self)} 张"
        names = "\n".join(f"{path.relative_to(self.folder)} {path.stat().st_size}" for path in self.files)
        return f"{len(self)} 张（校验值 {zlib.crc32(names.encode()):08x}）"


def build_model(options: argparse.Namespace) -> UNet2DModel:
    """每级宽高减半的 UNet；注意力的计算量与像素数的平方成正比，只在最低分辨率上用。"""
    n_downs = len(options.channels) - 1
    return UNet2DModel(
        sample_size=options.image_size,
        in_channels=3,
        out_channels=3,
        layers_per_block=options.layers,
        block_out_channels=tuple(options.channels),
        down_block_types=("DownBlock2D",) * n_downs + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * n_downs,
        norm_num_groups=math.gcd(32, *(channels // 2 for channels in options.channels)),     # 每组至少两个通道
    )


def load_pretrained(name: str) -> tuple[UNet2DModel, DDPMScheduler]:
    """载入要微调的管线，返回它的网络与 DDPM 调度器；载入不了，或不是本脚本能微调的，抛出 ValueError。"""
    try:
        embedded = name in {folder.name for folder in MODELS_ROOT.iterdir()}
        pipeline = DDPMPipeline.from_pretrained(resolve(name) if embedded else name)
    except (OSError, ValueError) as error:
        raise ValueError(f"载入不了管线 {name!r}：{error}") from error
    unet = pipeline.unet.config
    if unet.in_channels != 3 or unet.out_channels != 3 or not isinstance(unet.sample_size, int) or unet.num_class_embeds:
        raise ValueError(f"只会微调画正方形彩色图像、没有条件的管线，{name!r} 不是。")
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"只会微调预测 epsilon 或 v_prediction 的管线，{name!r} 预测的是 {noise_scheduler.config.prediction_type}。"
        )
    return pipeline.unet, noise_scheduler


def build(options: argparse.Namespace) -> tuple[UNet2DModel, DDPMScheduler]:
    """要训练的网络与调度器；从现成的管线开始时，边长照它的，SETTINGS 里不再记网络的大小。"""
    if options.pretrained is None:
        return build_model(options), DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    unet, noise_scheduler = load_pretrained(options.pretrained)
    options.image_size, options.channels, options.layers = unet.config.sample_size, None, None
    return unet, noise_scheduler


def target_of(noise_scheduler: DDPMScheduler, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor):
    """网络该预测什么，由调度器说了算：噪声，或速度（第 4.3.4 节）。"""
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(x0, noise, timesteps)
    return noise


# —— 随机数只由种子和步数决定：哪个进程、第几次运行来抽，都抽到同一批 ——

def seeded(seed: int, stream: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((2 * seed + stream) * 1_000_000_000 + number)


@lru_cache(maxsize=2)
def epoch_order(n_images: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n_images, generator=seeded(seed, 0, epoch))


def batch_indices(options: argparse.Namespace, step: int) -> torch.Tensor:
    """第 step 步用哪几张图，形状 (batch_size,)。各轮的打乱次序首尾相接，每批都是满的，不会有零头。"""
    positions = range(step * options.batch_size, (step + 1) * options.batch_size)
    n_images = options.n_images
    return torch.stack([epoch_order(n_images, options.seed, p // n_images)[p % n_images] for p in positions])


def draw(
    options: argparse.Namespace, step: int, n_timesteps: int = 1000
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """第 step 步整批的（是否翻转，时间步，噪声），形状 (B,)、(B,)、(B, 3, H, W)。"""
    generator, size = seeded(options.seed, 1, step), options.image_size
    flips = (torch.rand(options.batch_size, generator=generator) < 0.5) & options.flip
    timesteps = torch.randint(n_timesteps, (options.batch_size,), generator=generator)
    return flips, timesteps, torch.randn(options.batch_size, 3, size, size, generator=generator)


# —— 写文件：都先写到旁边，写完再改名，任何时候中断都不会留下半个文件 ——

def save_checkpoint(options, step, accelerator, model, optimizer, ema) -> None:
    tensors = {f"model.{key}": value for key, value in accelerator.unwrap_model(model).state_dict().items()}
    tensors |= optimizer_tensors(optimizer)
    tensors |= {f"ema.{index}": value for index, value in enumerate(ema.shadow_params)}
    settings = {name: getattr(options, name) for name in SETTINGS}
    notes = {"step": step, "ema_steps": ema.optimization_step, "settings": settings}
    if accelerator.scaler is not None:          # fp16 的损失缩放倍数也在训练中变化
        notes["scaler"] = accelerator.scaler.state_dict()
    save_state(options.output / "checkpoint.safetensors", tensors, notes)


def load_checkpoint(options, accelerator, model, optimizer, ema) -> int:
    """有断点就读回来，返回已走的步数；没有则返回 0。"""
    path = options.output / "checkpoint.safetensors"
    if not path.exists():
        return 0
    tensors, notes = load_state(path)
    check_settings(path, notes.get("settings", {}), {name: getattr(options, name) for name in SETTINGS})
    accelerator.unwrap_model(model).load_state_dict(
        {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    )
    load_optimizer(optimizer, tensors)
    for index, value in enumerate(ema.shadow_params):
        value.copy_(tensors[f"ema.{index}"])
    ema.optimization_step = notes["ema_steps"]
    if accelerator.scaler is not None and "scaler" in notes:
        accelerator.scaler.load_state_dict(notes["scaler"])
    return notes["step"]


def open_log(path: Path, n_lines: int):
    """打开日志续写，只留断点之前的 n_lines 行：断点之后走过的步会重走一遍。"""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:n_lines] if path.exists() else []
    with written_whole(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    return open(path, "a", buffering=1, encoding="utf-8")       # 每写一行就落到文件里


def save_samples(path: Path, unet, noise_scheduler, seed: int) -> None:
    """用 25 步 DDIM 画 16 张样图；每次从同样的噪声出发，好看出进步。"""
    sampler = DDIMScheduler.from_config(noise_scheduler.config, timestep_spacing="trailing")
    pipeline = DDIMPipeline(unet, sampler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(16, torch.Generator().manual_seed(seed), num_inference_steps=25, output_type="np").images
    path.parent.mkdir(exist_ok=True)
    with written_whole(path) as partial:
        grid_image(torch.from_numpy(images).permute(0, 3, 1, 2), nrow=4).save(partial, format="PNG")


def train(options: argparse.Namespace) -> None:
    check_options(options)
    try:
        accelerator = Accelerator(
            cpu=options.cpu,
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.accumulation,
            kwargs_handlers=[InitProcessGroupKwargs(init_method=options.rendezvous)] if options.rendezvous else [],
        )
    except ValueError as error:
        raise ValueError(f"这台机器不能按所给的精度训练：{error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("CPU 上不能用 fp16（accelerate 会不声不响地改用单精度），请用 bf16 或 no。")
    n_parts = accelerator.num_processes * options.accumulation
    if options.batch_size % n_parts:
        raise ValueError(
            f"--batch-size 应是进程数 × 累加份数 = {accelerator.num_processes} × {options.accumulation} "
            f"= {n_parts} 的倍数，收到的是 {options.batch_size}。"
        )
    set_seed(options.seed)                      # 各进程从同样的初始权重出发
    model, noise_scheduler = build(options)
    n_timesteps = noise_scheduler.config.num_train_timesteps
    images = Images(options)
    options.n_images, options.images = len(images), images.fingerprint()
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.95, 0.999), weight_decay=1e-6)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(model.parameters(), decay=options.ema_decay, foreach=True)
    first_step = load_checkpoint(options, accelerator, model, optimizer, ema)

    # 一步的整批分成 accumulation × 进程数 份；parts 的每一行是本进程的一份在批中的位置
    parts = torch.arange(options.batch_size).view(options.accumulation, accelerator.num_processes, -1)
    parts = parts[:, accelerator.process_index]
    batches = iter(DataLoader(
        images, num_workers=options.workers, pin_memory=accelerator.device.type == "cuda",
        batch_sampler=(
            batch_indices(options, step)[part].tolist()
            for step in range(first_step, options.steps) for part in parts
        ),
    ))
    log = None
    if accelerator.is_main_process:
        options.output.mkdir(parents=True, exist_ok=True)
        log = open_log(options.output / "log.jsonl", first_step)
    progress = tqdm(
        total=options.steps, initial=first_step, desc="训练", unit="步", disable=not accelerator.is_main_process
    )

    for step in range(first_step, options.steps):
        started = time.perf_counter()
        lr = options.lr * min(1.0, (step + 1) / max(1, options.warmup))
        optimizer.param_groups[0]["lr"] = lr
        flips, timesteps, noise = (values.to(accelerator.device) for values in draw(options, step, n_timesteps))
        loss = torch.zeros((), device=accelerator.device)
        for part in parts:
            x0 = next(batches).to(accelerator.device, non_blocking=True) / 127.5 - 1    # 0 … 255 → (−1, 1)
            x0 = torch.where(flips[part, None, None, None], x0.flip(-1), x0)
            noisy = noise_scheduler.add_noise(x0, noise[part], timesteps[part])
            with accelerator.accumulate(model):                 # 最后一份之前不同步梯度、不更新权重
                prediction = model(noisy, timesteps[part]).sample
                part_loss = F.mse_loss(prediction, target_of(noise_scheduler, x0, noise[part], timesteps[part]))
                accelerator.backward(part_loss)                 # 它会先把损失除以累加的份数
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            loss += part_loss.detach() / options.accumulation
        skipped = accelerator.optimizer_step_was_skipped        # fp16 溢出的步不更新权重
        if not skipped:
            ema.step(model.parameters())

        loss = accelerator.reduce(loss, reduction="mean").item()
        if not math.isfinite(loss) and not skipped:
            raise ValueError(f"第 {step + 1} 步的损失是 {loss}。断点仍是之前的；请调小 --lr 再试。")
        done = step + 1
        progress.update()
        progress.set_postfix(loss=f"{loss:.4f}")
        if accelerator.is_main_process:
            speed = options.batch_size / (time.perf_counter() - started)
            log.write(json.dumps({"step": done, "loss": loss, "lr": lr, "images_per_second": round(speed, 2)}) + "\n")
            if done % options.sample_every == 0:
                ema.store(model.parameters())
                ema.copy_to(model.parameters())
                samples = options.output / "samples" / f"{done:06d}.png"
                save_samples(samples, accelerator.unwrap_model(model), noise_scheduler, options.seed)
                ema.restore(model.parameters())
            if done % options.checkpoint_every == 0 or done == options.steps:
                save_checkpoint(options, done, accelerator, model, optimizer, ema)

    if accelerator.is_main_process:
        ema.copy_to(model.parameters())                         # 交出去的是滑动平均的权重
        with written_whole(options.output / "pipeline") as partial:
            DDPMPipeline(accelerator.unwrap_model(model), noise_scheduler).save_pretrained(partial)
    accelerator.end_training()


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    diffusers.utils.logging.disable_progress_bar()              # 只留训练自己的进度条
    try:
        train(options)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":  # 几个进程同样的错，只说一遍
            print(f"错误：{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\n已中断。再运行同样的命令，就从最近的断点接着训练。", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
