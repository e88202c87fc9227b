"""训练循环：进度条、断点续训、同一种子在 CPU 与 GPU 上用同一批随机数。"""

import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from .data import random_batches

BatchLoss = Callable[..., torch.Tensor]     # (model, *batch, generator) → 标量损失


@dataclass
class History:
    """一次训练的记录：每一步的损失，以及训练用去的秒数（含中断前的部分）。"""

    losses: list[float]
    seconds: float


def fit(
    model: nn.Module,
    tensors: tuple[torch.Tensor, ...],
    batch_loss: BatchLoss,
    *,
    n_epochs: int,
    batch_size: int = 128,
    micro_batch: int | None = None,
    lr: float = 1e-3,
    lr_decay: bool = False,
    ema_decay: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    max_steps: int | None = None,
) -> History:
    """用 Adam 训练 model，返回每一步的损失与用时。

    参数：
        model:      要训练的网络，就地更新。
        tensors:    整个训练集，各张量第一维都是样本数 N，如 (images, labels)。
        batch_loss: ``batch_loss(model, *batch, generator)`` 返回标量损失；
                    batch 已在 device 上，generator 是 CPU 随机数生成器。
        n_epochs:   轮数，正整数。
        batch_size: 每批样本数；最后一批可以不满。
        micro_batch: 给出时每批再切成这么大的小份，逐份反向传播、累加梯度（梯度累加），
                    损失与梯度不变，激活值占的内存更小，在 CPU 上也更快。
        lr:         学习率，正数。
        lr_decay:   True 时学习率按余弦从 lr 降到 0。
        ema_decay:  给出时训练结束后用权重的指数滑动平均替换权重，取值 0 到 1。
        seed:       打乱次序与抽取噪声的种子。
        device:     计算设备。
        checkpoint: 断点文件（.safetensors）；已存在则从中断处继续，结果与不中断时相同。
                    n_epochs 可以加大，接着多练几轮（lr_decay 时不行，学习率由总步数决定）；
                    其余决定结果的设置与断点里的不同，就拒绝续训。
        checkpoint_every: 每多少步存一次断点。
        max_steps:  至多走到第几步，用于只想先跑一小段时；学习率仍按 n_epochs 计算。
    返回：
        :class:`History`，其中 losses 的长度是已走的步数。
    异常：
        ValueError: 参数超出范围；断点文件损坏，或属于另一次训练；损失不再是有限的数
                    （这时断点仍是之前的，权重停在出错之前的一步）。
    来源：第 3.4.2 节手写的循环，加上进度条、断点与权重平均。
    """
    _check_options(
        tensors, lr, ema_decay, seed, n_epochs=n_epochs, batch_size=batch_size, micro_batch=micro_batch,
        checkpoint_every=checkpoint_every, max_steps=max_steps,
    )
    n_items = len(tensors[0])
    steps_per_epoch = math.ceil(n_items / batch_size)
    n_steps = n_epochs * steps_per_epoch
    model.to(device).train()
    # fused：一次更新全部参数，省去 CPU 上成百次小运算的开销
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    averaged = None
    if ema_decay is not None:
        averaged = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
        )
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    seconds = 0.0
    order = torch.empty(0, dtype=torch.long)        # 本轮的打乱次序

    if checkpoint is not None:
        checkpoint = Path(checkpoint)
        settings = {            # 决定训练结果的一切，续训时必须相同
            "lr": lr, "lr_decay": lr_decay, "ema_decay": ema_decay, "seed": seed,
            "batch_size": batch_size, "micro_batch": micro_batch, "tensors": _fingerprint(tensors),
        }
        if lr_decay:
            settings["n_epochs"] = n_epochs
        if checkpoint.exists():
            losses, order, seconds = _load_checkpoint(checkpoint, settings, model, optimizer, averaged, generator)

    stop = n_steps if max_steps is None else min(max_steps, n_steps)
    started = time.perf_counter() - seconds
    with tqdm(total=stop, initial=len(losses), desc="训练", unit="步", mininterval=1) as progress:
        while len(losses) < stop:
            step = len(losses)
            position = step % steps_per_epoch
            if position == 0:
                order = torch.cat(random_batches(n_items, batch_size, generator))
            indices = order[position * batch_size : (position + 1) * batch_size]
            if lr_decay:
                optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / n_steps))

            optimizer.zero_grad()
            loss = 0.0
            for part in indices.split(micro_batch or batch_size):
                part_loss = batch_loss(model, *(tensor[part].to(device) for tensor in tensors), generator)
                part_loss = part_loss * (len(part) / len(indices))      # 各份加起来仍是整批的平均
                part_loss.backward()
                loss += part_loss.item()
            if not math.isfinite(loss):
                raise ValueError(f"第 {step + 1} 步的损失是 {loss}，训练停在这里，断点仍是之前的。请调小 lr 再试。")
            optimizer.step()
            if averaged is not None:
                averaged.update_parameters(model)
            losses.append(loss)

            progress.update()
            progress.set_postfix(loss=f"{losses[-1]:.4f}")
            if checkpoint is not None and len(losses) % checkpoint_every == 0:
                _save_checkpoint(
                    checkpoint, settings, model, optimizer, averaged, generator,
                    losses, order, time.perf_counter() - started,
                )

    if averaged is not None and len(losses) == n_steps:
        model.load_state_dict(averaged.module.state_dict())
    model.eval()
    return History(losses, time.perf_counter() - started)


def _check_options(
    tensors: tuple[torch.Tensor, ...], lr: float, ema_decay: float | None, seed: int, **positive: int | None
) -> None:
    """:func:`fit` 的参数超出范围时抛出 ValueError；positive 是应为正整数或 None 的那些。"""
    lengths = [len(tensor) for tensor in tensors]
    if not lengths or min(lengths) == 0 or len(set(lengths)) > 1:
        raise ValueError(f"tensors 里各张量的样本数应相同，并且不是 0，收到的是 {lengths}。")
    for name, value in positive.items():
        if value is not None and not (isinstance(value, Integral) and value >= 1):
            raise ValueError(f"{name} 应是正整数，收到的是 {value!r}。")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr 应是大于 0 的数，收到的是 {lr}。")
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"ema_decay 应在 0 与 1 之间，收到的是 {ema_decay}。")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed 应是非负整数，收到的是 {seed}。")


def _fingerprint(tensors: tuple[torch.Tensor, ...]) -> str:
    """训练数据的形状与校验值：换了数据，它就不同。"""
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy(), checksum)
    return f"{'、'.join(str(tuple(tensor.shape)) for tensor in tensors)}（校验值 {checksum:08x}）"


def epoch_means(losses: list[float], steps_per_epoch: int) -> list[float]:
    """把逐步的损失按轮求平均；最后不满一轮的部分不算。

    来源：第 3.4.2 节。
    """
    means = torch.tensor(losses)[: len(losses) // steps_per_epoch * steps_per_epoch]
    return means.view(-1, steps_per_epoch).mean(dim=1).tolist()


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """``with written_whole(path) as partial``：写到旁边的 partial（文件或文件夹），写完才改名成 path。

    系统的改名要么全做、要么不做，所以即使被 kill -9，path 也总是完整的：或是旧的，或是新的，或是没有。
    它防的是程序被终止；整台机器突然断电时，改名可能先于内容落到盘上，要防那个还得 fsync。
    写的途中出错，就删去 partial。
    来源：第 4.4.2 节。
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    _delete(partial)                # 上次被强行终止时留下的
    try:
        yield partial
        if path.is_dir():           # 非空的文件夹不能直接被改名覆盖
            _delete(path)
        os.replace(partial, path)
    except BaseException:
        _delete(partial)
        raise


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def save_state(path: str | Path, tensors: dict[str, torch.Tensor], notes: dict | None = None) -> None:
    """把张量和一份说明写进一个 safetensors 文件；任何时候中断都不会留下半个文件。

    参数：
        path:    目标文件；所在的文件夹不存在时会建立。
        tensors: 名字 → 张量，可以在任何设备上。
        notes:   能写成 JSON 的说明，如步数与设置。
    来源：第 4.4.2 节。
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, partial,
            metadata={"notes": json.dumps(notes or {}, ensure_ascii=False)},
        )


def load_state(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """读回 :func:`save_state` 写的文件，返回（张量，说明）；张量都在 CPU 上。

    异常：
        ValueError: 文件损坏，或不是 safetensors。
    来源：第 4.4.2 节。
    """
    try:
        with safe_open(path, "pt") as file:
            notes = (file.metadata() or {}).get("notes", "{}")
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(notes)     # noqa: SIM118  它不是字典
    except SafetensorError as error:
        raise ValueError(f"断点 {path} 已损坏或不完整：{error}。删去它可从头训练。") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """优化器的状态，摊平成 ``optimizer.参数序号.名字`` → 张量，可交给 :func:`save_state`。

    来源：第 4.4.2 节。
    """
    return {
        f"optimizer.{index}.{slot}": value
        for index, slots in optimizer.state_dict()["state"].items() for slot, value in slots.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """把 :func:`optimizer_tensors` 的结果装回优化器；tensors 里别的名字不理会，学习率等设置不变。

    来源：第 4.4.2 节。
    """
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, slot = key.split(".")
            slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def check_settings(path: str | Path, saved: dict, current: dict) -> None:
    """断点里的设置 saved 与这次的 current 不同，就抛出 ValueError，说出哪几项不同。

    来源：第 4.4.2 节。
    """
    different = [
        f"{name} 是 {saved.get(name, '（没有记录）')}，这次是 {current.get(name, '（没有）')}"
        for name in sorted(saved.keys() | current.keys()) if saved.get(name) != current.get(name)
    ]
    if different:
        raise ValueError(
            f"断点 {path} 属于另一次训练：它的 {'；'.join(different)}。"
            "请改回原来的设置，换一个断点，或删去它从头训练。"
        )


def _save_checkpoint(path, settings, model, optimizer, averaged, generator, losses, order, seconds):
    """把续训所需的一切写进断点。"""
    state = {f"model.{key}": value for key, value in model.state_dict().items()} | optimizer_tensors(optimizer)
    if averaged is not None:
        state |= {f"averaged.{key}": value for key, value in averaged.state_dict().items()}
    state["generator"] = generator.get_state()
    state["losses"] = torch.tensor(losses, dtype=torch.float64)
    state["order"] = order
    state["seconds"] = torch.tensor(seconds, dtype=torch.float64)
    save_state(path, state, {"settings": settings})


def _load_checkpoint(path, settings, model, optimizer, averaged, generator):
    """读回断点，返回 (losses, order, seconds)；其余状态就地恢复。"""
    state, notes = load_state(path)
    check_settings(path, notes.get("settings", {}), settings)

    def part(prefix):
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    try:
        model.load_state_dict(part("model."))
        if averaged is not None:
            averaged.load_state_dict(part("averaged."))
    except RuntimeError as error:
        raise ValueError(f"断点 {path} 不属于这次训练（网络不同）：{error}。删去它可从头训练。") from error
    load_optimizer(optimizer, state)
    generator.set_state(state["generator"])
    return state["losses"].tolist(), state["order"], state["seconds"].item()
