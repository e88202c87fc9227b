"""第四章手写的训练循环经得起打断：在随机的时刻强行结束十次，再接着跑，结果与不中断时逐位相同。"""

import multiprocessing
import random
import re
import time
from pathlib import Path

import jupytext
import pytest
from support.paths import ROOT

CHAPTER = ROOT / "chapters/04-diffusers.md"
N_EPOCHS = 12
KILLS = 10


def chapter_namespace() -> dict:
    """执行第四章里定义训练循环的那几格，返回其中的名字。"""
    import os

    import torch
    from diffusers import DDPMScheduler
    from safetensors.torch import load_file, save_file
    from torch.nn import functional as F
    from tqdm import tqdm

    names = {
        "torch": torch, "DDPMScheduler": DDPMScheduler, "F": F, "tqdm": tqdm, "os": os,
        "load_file": load_file, "save_file": save_file,
    }
    wanted = re.compile(r"^def (training_loss|save_checkpoint|load_checkpoint|train)\(", re.M)
    for cell in jupytext.read(CHAPTER).cells:
        if cell.cell_type == "code" and wanted.search(cell.source):
            exec(cell.source, names)
    return names


def run_training(checkpoint: Path, results=None):
    """在子进程里训练一个很小的网络；走完时把损失与参数之和放进 results。"""
    import torch
    from diffusers import UNet2DModel

    torch.set_num_threads(1)
    names = chapter_namespace()
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    images = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    dataset = [{"images": image} for image in images]
    dataloader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    losses = names["train"](model, dataloader, N_EPOCHS, checkpoint)
    if results is not None:
        results.put((losses, [parameter.double().sum().item() for parameter in model.parameters()]))


@pytest.fixture(scope="module")
def forkserver():
    """先在一个服务进程里导入 PyTorch，之后每个子进程只要几十毫秒就能开始。"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "diffusers", "jupytext", "safetensors.torch"])
    return context


def finish(forkserver, checkpoint):
    results = forkserver.Queue()
    process = forkserver.Process(target=run_training, args=(checkpoint, results))
    process.start()
    answer = results.get(timeout=300)
    process.join()
    return answer


def test_killed_ten_times(forkserver, tmp_path):
    undisturbed = finish(forkserver, tmp_path / "undisturbed.safetensors")
    assert len(undisturbed[0]) == N_EPOCHS * 3

    checkpoint = tmp_path / "killed.safetensors"
    seed = random.SystemRandom().randrange(10**6)
    print(f"中断时刻的种子：{seed}")
    rng = random.Random(seed)
    progressed = 0
    for _ in range(KILLS):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = forkserver.Process(target=run_training, args=(checkpoint,))
        process.start()
        # 等它存下一个新断点，再过随机的一小会儿，在训练或写盘的途中强行结束
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        progressed += process.is_alive()
        process.kill()
        process.join()
    assert progressed >= 3, "训练太快，没有真的在途中结束过它"
    assert finish(forkserver, checkpoint) == undisturbed, f"种子 {seed}"


def test_checkpoint_of_another_model_is_refused(tmp_path):
    import torch

    names = chapter_namespace()
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(3, 3)
    names["save_checkpoint"](tmp_path / "x.safetensors", small, torch.optim.AdamW(small.parameters()), [1.0])
    with pytest.raises(RuntimeError):
        names["load_checkpoint"](tmp_path / "x.safetensors", large, torch.optim.AdamW(large.parameters()))
