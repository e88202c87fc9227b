"""计算设备与随机种子（第 3.2.1 节）。"""

import random

import numpy as np
import torch


def get_device() -> torch.device:
    """返回本机最快的计算设备：依次尝试 CUDA、Apple 芯片的 MPS、CPU。

    来源：第 3.2.1 节。
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def set_seed(seed: int) -> torch.Generator:
    """固定 Python、NumPy 和 PyTorch 的全局随机种子，并返回一个 CPU 随机数生成器。

    参数：
        seed: 非负整数，小于 2**32（NumPy 的上限）。
    返回：
        以同一种子初始化的 ``torch.Generator``。它放在 CPU 上：
        先在 CPU 上抽随机数、再搬到设备，同一个种子在 CPU 与 GPU 上才会给出同一批噪声。
    异常：
        ValueError: 种子不是整数或超出范围。
    来源：第 3.2.1 节。
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed 应是 0 到 {2**32 - 1} 之间的整数，收到的是 {seed!r}。")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
