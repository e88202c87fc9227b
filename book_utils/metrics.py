"""给生成的数字打分：随书的数字分类器、认出率与特征距离（第 3.7.2 节）。"""

import torch
from torch import nn

from .models import load_weights, resolve


class DigitClassifier(nn.Module):
    """小型卷积分类器：十个数字之外还有第 11 类“不是数字”，并给出 64 维特征。

    输入 (B, 1, 28, 28)，取值 0 到 1；输出 (B, 11) 的对数几率，第 10 列是“不是数字”。
    来源：第 3.5.1 节；配方见 recipes/mnist_classifier.py。
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 64), nn.ReLU(),
        )
        self.head = nn.Linear(64, 11)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, 28, 28) → (B, 64)。"""
        return self.body(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def digit_classifier() -> DigitClassifier:
    """载入随书的数字分类器（评估模式）。"""
    return load_weights(DigitClassifier(), resolve("mnist-classifier"))


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """两组特征各拟合一个高斯分布，返回两个高斯之间的 Fréchet 距离（平方）。

    d² = |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^{1/2})

    参数：
        a, b: 特征，形状 (N_a, D) 与 (N_b, D)，每组至少 2 个样本。
              样本少时此值偏大，只宜在样本数相同的组之间比较。
    返回：
        非负浮点数，0 表示两组的均值与协方差相同。
    异常：
        ValueError: 形状不合或样本太少。
    来源：第 3.7.2 节；Heusel 等（2017）的 FID 用同一公式，特征取自 Inception 网络。
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"两组特征的形状应是 (N, D)、D 相同且 N ≥ 2，收到的是 {tuple(a.shape)} 和 {tuple(b.shape)}。"
        )
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(features.T)) for features in (a, b))
    # Σ_a Σ_b 的特征值都非负，平方根之和就是 tr (Σ_a Σ_b)^{1/2}
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0)
    spread = cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0.0, ((a.mean(0) - b.mean(0)).square().sum() + spread).item())
