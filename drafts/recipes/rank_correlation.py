"""并入 recipes/measuring.py：放在 sharpness 之前。"""

import torch
from torch.nn import functional as F


def ranks(values: torch.Tensor) -> torch.Tensor:
    """每一行里各数的名次，相同的数取平均名次；values：(N, D)。"""
    ordered = values.sort(dim=1).values
    return (
        torch.searchsorted(ordered, values, right=False) + torch.searchsorted(ordered, values, right=True) + 1
    ).double() / 2


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """斯皮尔曼秩相关，逐张计算：a、b 形状 (N, …)，返回 (N,)，取值 −1 到 1；只看次序，不看数值的大小。"""
    first, second = (ranks(x.flatten(1).float()) for x in (a, b))
    first, second = (x - x.mean(dim=1, keepdim=True) for x in (first, second))
    return F.cosine_similarity(first, second, dim=1)
