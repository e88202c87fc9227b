"""训练一个无条件的 DDPM：随书的蝴蝶世界，或你自己的一文件夹图像（第 4.4.2 节）。

同一个文件，不改一字，可以在一个进程或许多进程、CPU 或 GPU 上运行：

    python recipes/train_unconditional.py --data 我的照片
    accelerate launch recipes/train_unconditional.py --data 我的照片

随时可以中断，再运行同样的命令就接着训练。结果在 --output 里：
pipeline/ 是 DDPMPipeline，samples/ 是途中的样图，log.jsonl 是每一步的记录，checkpoint.safetensors 是断点。
"""

import argparse
import json
import math
import os
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from common import ROOT
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from book_utils import butterfly_dataset, grid_image, set_seed
from book_utils.training import load_optimizer, load_state, optimizer_tensors, save_state, written_whole

# 这些选项决定训练的结果，续训时必须与断点一致；进程数、累加份数、精度则可以换
SETTINGS = (
    "n_images", "image_size", "channels", "layers", "batch_size", "lr", "warmup", "ema_decay",
    "max_grad_norm", "flip", "seed",
)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("-h", "--help", action="help", help="显示这份说明")
    add = parser.add_argument
    add("--data", type=Path, help="图像文件夹（imagefolder 的布局）；不给则用蝴蝶世界")
    add("--n-butterflies", type=int, default=1000, help="用蝴蝶世界时画多少张，默认 %(default)s")
    add("--output", type=Path, default=ROOT / ".work" / "unconditional", help="结果写到哪个文件夹，默认 %(default)s")
    add("--image-size", type=int, default=64, help="图像边长，像素；每张先裁成正方形，默认 %(default)s")
    add("--channels", type=int, nargs="+", default=[64, 128, 128, 256], help="UNet 各级的通道数，默认 %(default)s")
    add("--layers", type=int, default=2, help="UNet 每级几个残差块，默认 %(default)s")
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
    return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    """选项不对就抛出 ValueError；这时还什么都没有写。"""
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
    """数据集里的图像，裁成正方形、缩放，成为 uint8 张量 (3, image_size, image_size)。"""

    def __init__(self, options: argparse.Namespace):
        self.size = options.image_size
        if options.data is None:
            # 与配方 butterflies_ddpm_32.py 一样：大的、在中央的蝴蝶
            self.rows = butterfly_dataset(
                options.n_butterflies, options.image_size, seed=1, size="large", position="center"
            )
            return
        suffixes = Image.registered_extensions()
        if not options.data.is_dir():
            raise ValueError(f"没有文件夹 {options.data}。请检查 --data。")
        if not any(path.suffix.lower() in suffixes for path in options.data.rglob("*")):
            raise ValueError(f"文件夹 {options.data} 里没有图像。")
        import datasets

        try:
            self.rows = datasets.load_dataset("imagefolder", data_dir=str(options.data), split="train")
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"文件夹 {options.data} 不是 imagefolder 的布局：{error}") from error
        self.paths = self.rows.cast_column("image", datasets.Image(decode=False))       # 报错时说得出文件名

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        try:
            image = self.rows[index]["image"].convert("RGB")
        except OSError as error:
            raise ValueError(f"图像 {self.paths[index]['image']['path']} 读不出来：{error}") from error
        image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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


def draw(options: argparse.Namespace, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """第 step 步整批的（是否翻转，时间步，噪声），形状 (B,)、(B,)、(B, 3, H, W)。"""
    generator, size = seeded(options.seed, 1, step), options.image_size
    flips = (torch.rand(options.batch_size, generator=generator) < 0.5) & options.flip
    timesteps = torch.randint(1000, (options.batch_size,), generator=generator)
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
    settings = notes.get("settings", {})
    different = [
        f"{name} 是 {settings.get(name)}，这次是 {getattr(options, name)}"
        for name in SETTINGS if settings.get(name) != getattr(options, name)
    ]
    if different:
        raise ValueError(
            f"{options.output} 里是另一次训练的断点，它的 {'；'.join(different)}。请改回原来的选项，或换一个 --output。"
        )
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
    lines = path.read_text().splitlines(keepends=True)[:n_lines] if path.exists() else []
    with written_whole(path) as partial:
        partial.write_text("".join(lines))
    return open(path, "a", buffering=1)         # 每写一行就落到文件里


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
    with accelerator.main_process_first():      # 主进程先建好数据集的缓存，其余进程直接用
        images = Images(options)
    options.n_images = len(images)

    set_seed(options.seed)                      # 各进程从同样的初始权重出发
    model = build_model(options)
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
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
        flips, timesteps, noise = (values.to(accelerator.device) for values in draw(options, step))
        loss = torch.zeros((), device=accelerator.device)
        for part in parts:
            x0 = next(batches).to(accelerator.device, non_blocking=True) / 127.5 - 1    # 0 … 255 → (−1, 1)
            x0 = torch.where(flips[part, None, None, None], x0.flip(-1), x0)
            noisy = noise_scheduler.add_noise(x0, noise[part], timesteps[part])
            with accelerator.accumulate(model):                 # 最后一份之前不同步梯度、不更新权重
                prediction = model(noisy, timesteps[part]).sample
                part_loss = F.mse_loss(prediction, noise[part])
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
