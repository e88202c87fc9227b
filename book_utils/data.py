"""随书数据集：从仓库里的压缩文件取出，不联网。"""

import gzip
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch
import torchvision

from .checksums import DATA_ROOT, MNIST_MD5, unpack_folder


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def mnist_root(data_root: str | Path = DATA_ROOT) -> str:
    """备好随书的 MNIST，返回可交给 ``torchvision.datasets.MNIST(root=…)`` 的文件夹。

    首次调用时把 ``MNIST/raw/*.gz`` 解压到原处（约 55 MB）并核对 MD5；原处不可写时，
    解压到用户的缓存文件夹（``~/.cache/diffusion-book``，可用 ``XDG_CACHE_HOME`` 换地方）。
    之后 ``download=True`` 会发现文件都在，不再联网。

    参数：
        data_root: 含有 ``MNIST/raw`` 的文件夹，默认是随书的 ``data``。
    返回：
        文件夹路径（字符串）。
    异常：
        FileNotFoundError: 缺少压缩文件。
        PermissionError: 没有一处可写。
        ValueError: 压缩文件被截断，或内容与 MNIST 不符。
    来源：第 3.2.2 节。
    """
    raw = Path(data_root) / "MNIST" / "raw"
    unpacked = unpack_folder(raw)
    if unpacked != raw:
        unpacked.mkdir(parents=True, exist_ok=True)
    for name, md5 in MNIST_MD5.items():
        target, packed = unpacked / name, raw / f"{name}.gz"
        if target.exists() and _md5(target) == md5:
            continue
        if not packed.exists():
            raise FileNotFoundError(
                f"缺少数据文件 {packed}。请重新克隆本书仓库，或用 git checkout 恢复 data 文件夹。"
            )
        # 先写临时文件、核对后再改名：中途被强行结束，也不会留下半个文件
        handle, temporary = tempfile.mkstemp(dir=unpacked, prefix=f".{name}.")
        try:
            with gzip.open(packed) as source, os.fdopen(handle, "wb") as sink:
                shutil.copyfileobj(source, sink)
            if _md5(Path(temporary)) != md5:
                raise ValueError(f"数据文件 {packed} 的内容不是 MNIST（MD5 不符），请重新取得它。")
            os.replace(temporary, target)
        except (EOFError, OSError, ValueError) as error:
            Path(temporary).unlink(missing_ok=True)
            if isinstance(error, (EOFError, gzip.BadGzipFile)):
                raise ValueError(f"数据文件 {packed} 已损坏或不完整，请重新取得它。") from error
            raise
    return str(unpacked.parent.parent)


def mnist_tensors(train: bool = True, data_root: str | Path = DATA_ROOT) -> tuple[torch.Tensor, torch.Tensor]:
    """一次取出整个 MNIST，省去逐张解码。

    参数：
        train: True 取 60,000 张训练图像，False 取 10,000 张测试图像。
        data_root: 同 :func:`mnist_root`。
    返回：
        images: float32，形状 (N, 1, 28, 28)，取值 0 到 1；
        labels: int64，形状 (N,)，取值 0 到 9。
    来源：第 3.4.2 节。
    """
    dataset = torchvision.datasets.MNIST(mnist_root(data_root), train=train, download=True)
    return dataset.data.unsqueeze(1) / 255, dataset.targets


def random_batches(n_items: int, batch_size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """把 0 … n_items−1 打乱后切成小批，每个元素恰好出现一次。

    参数：
        n_items:    样本总数，正整数。
        batch_size: 每批样本数，正整数；最后一批可以不满。
        generator:  随机数生成器。
    返回：
        下标张量的列表，长度为 ⌈n_items / batch_size⌉。
    异常：
        ValueError: 参数不是正整数。
    来源：第 3.4.2 节。
    """
    if n_items < 1 or batch_size < 1:
        raise ValueError(f"n_items 与 batch_size 都应是正整数，收到的是 {n_items} 和 {batch_size}。")
    return list(torch.randperm(n_items, generator=generator).split(batch_size))
