"""给生成的图像打分：随书的数字分类器、蝴蝶裁判与特征距离（第 3.7.2、4.3.5 节）。"""

import torch
from torch import nn
from torch.nn import functional as F

from .models import load_weights, resolve
from .worlds import fish
from .worlds.butterflies import ATTRIBUTES, CHOICES, Butterfly


def require_finite(values: torch.Tensor, name: str) -> None:
    """values 里有 NaN 或无穷就报错，name 是它的叫法。

    坏掉的输入不能得分：argmax 对 NaN 也挑得出一类，截断会把无穷变成好端端的黑与白。

    异常：
        ValueError: 有不是有限的数。
    来源：第 3.7.2 节。
    """
    finite = values.isfinite()
    if not bool(finite.all()):
        raise ValueError(
            f"{name}里应当都是有限的数，收到的 {values.numel()} 个数里有 {int((~finite).sum())} 个是 NaN 或无穷。"
        )


class DigitClassifier(nn.Module):
    """小型卷积分类器：十个数字之外还有第 11 类“不是数字”，并给出 64 维特征。

    输入 (B, 1, 28, 28)，取值 0 到 1；输出 (B, 11) 的对数几率，第 10 列是“不是数字”。
    形状不合，或图像里有 NaN 或无穷，报 ValueError。
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
        if x.ndim != 4 or x.shape[1:] != (1, 28, 28):
            raise ValueError(f"images 的形状应是 (B, 1, 28, 28)，收到的是 {tuple(x.shape)}。")
        require_finite(x, "images ")
        return self.body(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def digit_classifier() -> DigitClassifier:
    """载入随书的数字分类器（评估模式）。"""
    return load_weights(DigitClassifier(), resolve("mnist-classifier"))


class ButterflyJudge(nn.Module):
    """看图说出是不是蝴蝶，以及它的翅膀颜色、花纹、背景、大小与位置。

    输入 (B, 3, H, W)，取值 0 到 1，正方形，任意边长（先缩放到 64 × 64）；
    输出字典：``is_butterfly`` → (B, 2) 的对数几率，其余属性名 → (B, 取值个数)，
    各列的次序就是 ``book_utils.worlds.butterflies`` 里那个属性的取值次序。
    来源：第 4.3.5 节；配方见 recipes/butterfly_judge.py。
    """

    ATTRIBUTES = ATTRIBUTES

    def __init__(self):
        super().__init__()
        channels = (3, 24, 48, 64, 96)
        layers = []
        for c_in, c_out in zip(channels, channels[1:], strict=False):
            # 每层把边长减半：64 → 32 → 16 → 8 → 4
            layers += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
            if c_in > 3:
                layers += [nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 4 * 4, 128), nn.ReLU())
        sizes = {"is_butterfly": 2} | {name: len(CHOICES[name]) for name in self.ATTRIBUTES}
        self.heads = nn.ModuleDict({name: nn.Linear(128, size) for name, size in sizes.items()})

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → (B, 128)。"""
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3]:
            raise ValueError(f"images 的形状应是 (B, 3, 边长, 边长)，收到的是 {tuple(x.shape)}。")
        require_finite(x, "images ")
        if x.shape[-1] != 64:
            x = F.interpolate(x, size=(64, 64), mode="bilinear", antialias=True)
        return self.body(x * 2 - 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(x)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def describe(self, x: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, str]]]:
        """给出（是蝴蝶的概率，形状 (B,)；每张图像的属性 → 取值）。"""
        outputs = self(x)
        names = {name: tuple(CHOICES[name]) for name in self.ATTRIBUTES}
        picks = {name: outputs[name].argmax(dim=1).tolist() for name in names}
        attributes = [{name: names[name][picks[name][i]] for name in names} for i in range(len(x))]
        return outputs["is_butterfly"].softmax(dim=1)[:, 1], attributes


def attribute_labels(butterflies: list[Butterfly]) -> torch.Tensor:
    """把属性换成 :class:`ButterflyJudge` 各输出的列号：int64，形状 (N, 5)。"""
    return torch.tensor([
        [tuple(CHOICES[name]).index(getattr(butterfly, name)) for name in ButterflyJudge.ATTRIBUTES]
        for butterfly in butterflies
    ])


def has_label(labels: torch.Tensor, name: str, value: str) -> torch.Tensor:
    """labels（:func:`attribute_labels` 的格式，(N, 5)）里哪几行的属性 name 取值 value：bool，形状 (N,)。"""
    return labels[:, ButterflyJudge.ATTRIBUTES.index(name)] == tuple(CHOICES[name]).index(value)


def butterfly_judge() -> ButterflyJudge:
    """载入随书的蝴蝶裁判（评估模式）。"""
    return load_weights(ButterflyJudge(), resolve("butterfly-judge"))


class FamilyJudge(nn.Module):
    """看图说出是蝴蝶、是鱼，还是都不是；是鱼的，还说出颜色、花纹、背景与朝向。

    输入 (B, 3, H, W)，取值 0 到 1，正方形，任意边长（先缩放到 32 × 32）；
    输出字典：``family`` → (B, 3) 的对数几率，各列依次是 FAMILIES；其余属性名 → (B, 取值个数)，
    各列的次序就是 ``book_utils.worlds.fish`` 里那个属性的取值次序。
    来源：第 5.5.1 节；配方见 recipes/family_judge.py。
    """

    FAMILIES = ("butterfly", "fish", "other")
    ATTRIBUTES = ("body_color", "pattern", "background", "facing")

    def __init__(self):
        super().__init__()
        channels = (3, 24, 48, 64)
        layers = []
        for c_in, c_out in zip(channels, channels[1:], strict=False):
            # 每层把边长减半：32 → 16 → 8 → 4
            layers += [
                nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(),
                nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 96), nn.ReLU())
        sizes = {"family": len(self.FAMILIES)} | {name: len(fish.CHOICES[name]) for name in self.ATTRIBUTES}
        self.heads = nn.ModuleDict({name: nn.Linear(96, size) for name, size in sizes.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3]:
            raise ValueError(f"images 的形状应是 (B, 3, 边长, 边长)，收到的是 {tuple(x.shape)}。")
        require_finite(x, "images ")
        if x.shape[-1] != 32:
            x = F.interpolate(x, size=(32, 32), mode="bilinear", antialias=True)
        features = self.body(x * 2 - 1)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def describe(self, x: torch.Tensor, confidence: float = 0.9) -> tuple[torch.Tensor, list[dict[str, str]]]:
        """给出（各张的家族，是 FAMILIES 的下标，形状 (B,)；各张当作鱼看时的属性）。

        对蝴蝶或鱼的把握不到 confidence 的，算“都不是”。
        """
        outputs = self(x)
        sure, family = outputs["family"].softmax(dim=1).max(dim=1)
        family = torch.where(sure > confidence, family, len(self.FAMILIES) - 1)
        picks = {name: outputs[name].argmax(dim=1).tolist() for name in self.ATTRIBUTES}
        names = {name: tuple(fish.CHOICES[name]) for name in self.ATTRIBUTES}
        return family, [{name: names[name][picks[name][i]] for name in names} for i in range(len(x))]


def fish_labels(fishes: list[fish.Fish]) -> torch.Tensor:
    """把鱼换成 :class:`FamilyJudge` 各输出的列号，第一列是家族：int64，形状 (N, 5)。"""
    return torch.tensor([
        [FamilyJudge.FAMILIES.index("fish")]
        + [tuple(fish.CHOICES[name]).index(getattr(one, name)) for name in FamilyJudge.ATTRIBUTES]
        for one in fishes
    ])


def family_judge() -> FamilyJudge:
    """载入随书的家族裁判（评估模式）。"""
    return load_weights(FamilyJudge(), resolve("family-judge"))


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """两组特征各拟合一个高斯分布，返回两个高斯之间的 Fréchet 距离（平方）。

    d² = |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^{1/2})

    参数：
        a, b: 特征，形状 (N_a, D) 与 (N_b, D)，每组至少 2 个样本。
              样本少时此值偏大，只宜在样本数相同的组之间比较。
    返回：
        非负浮点数，0 表示两组的均值与协方差相同。
    异常：
        ValueError: 形状不合，样本太少，或特征里有 NaN 或无穷。
    来源：第 3.7.2 节；Heusel 等（2017）的 FID 用同一公式，特征取自 Inception 网络。
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"两组特征的形状应是 (N, D)、D 相同且 N ≥ 2，收到的是 {tuple(a.shape)} 和 {tuple(b.shape)}。"
        )
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise ValueError("两组特征里应当都是有限的数，收到的含有 NaN 或无穷：多半是生成图像的网络或采样出了错。")
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(features.T)) for features in (a, b))
    # Σ_a Σ_b 的特征值都非负，平方根之和就是 tr (Σ_a Σ_b)^{1/2}
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0)
    spread = cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + spread
    return distance.clamp(min=0).item()     # 舍入可能得 −1e-13；不用 max(0.0, …)，它会把 NaN 变成 0
