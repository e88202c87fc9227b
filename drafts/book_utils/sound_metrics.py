"""给生成的声音打分：随书的声音裁判、Inception 分数（第 8.2.2 节）。"""

import torch
from torch import nn
from torch.nn import functional as F

from .metrics import require_finite
from .models import load_weights, resolve
from .worlds.sounds import CHOICES, KINDS, Sound


class SoundJudge(nn.Module):
    """看梅尔图说出是哪一种声音、还是都不是，以及音高与快慢。

    输入 (B, 1, 64, 64)，取值 −1 到 1；输出字典：``kind`` → (B, 7) 的对数几率，前六列依次是 KINDS，
    最后一列是“都不是”；``pitch`` → (B, 8)，``tempo`` → (B, 3)，各列的次序就是那个属性的取值次序。
    来源：第 8.2.2 节；配方见 recipes/sound_judge.py。
    """

    OTHER = len(KINDS)
    ATTRIBUTES = ("pitch", "tempo")

    def __init__(self):
        super().__init__()
        channels = (1, 24, 48, 64, 96)
        layers = []
        for c_in, c_out in zip(channels, channels[1:], strict=False):
            # 每层把边长减半：64 → 32 → 16 → 8 → 4
            layers += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
            if c_in > 1:
                layers += [nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 4 * 4, 96), nn.ReLU())
        sizes = {"kind": len(KINDS) + 1} | {name: len(CHOICES[name]) for name in self.ATTRIBUTES}
        self.heads = nn.ModuleDict({name: nn.Linear(96, size) for name, size in sizes.items()})

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, 64, 64) → (B, 96)。"""
        if x.ndim != 4 or x.shape[1:] != (1, 64, 64):
            raise ValueError(f"pictures 的形状应是 (B, 1, 64, 64)，收到的是 {tuple(x.shape)}。")
        require_finite(x, "pictures ")
        return self.body(x)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(x)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def describe(self, x: torch.Tensor, confidence: float = 0.9) -> tuple[torch.Tensor, list[dict[str, str]]]:
        """给出（各段的种类，是 KINDS 的下标，形状 (B,)；各段的音高与快慢）。

        对哪一种的把握都不到 confidence 的，算“都不是”（:attr:`OTHER`）。
        """
        outputs = self(x)
        sure, kind = outputs["kind"].softmax(dim=1).max(dim=1)
        kind = torch.where(sure > confidence, kind, self.OTHER)
        picks = {name: outputs[name].argmax(dim=1).tolist() for name in self.ATTRIBUTES}
        names = {name: tuple(CHOICES[name]) for name in self.ATTRIBUTES}
        return kind, [{name: names[name][picks[name][i]] for name in names} for i in range(len(x))]


def sound_labels(sounds: list[Sound]) -> torch.Tensor:
    """把声音换成 :class:`SoundJudge` 各输出的列号，依次是种类、音高、快慢：int64，形状 (N, 3)。"""
    return torch.tensor([
        [tuple(CHOICES[name]).index(getattr(sound, name)) for name in ("kind", *SoundJudge.ATTRIBUTES)]
        for sound in sounds
    ])


def sound_judge() -> SoundJudge:
    """载入随书的声音裁判（评估模式）。"""
    return load_weights(SoundJudge(), resolve("sound-judge"))


def inception_score(logits: torch.Tensor) -> float:
    """Inception 分数：exp E[KL(p(y|x) ‖ p(y))]，每个认得越明确、各个越分散，分数越高。

    参数：
        logits: 分类器的对数几率，形状 (N, 类数)。
    返回：
        1 到类数之间的数。
    异常：
        ValueError: 形状不合，或有 NaN、无穷。
    来源：第 8.2.2 节；Salimans 等（2016）。
    """
    if logits.ndim != 2 or len(logits) == 0:
        raise ValueError(f"logits 的形状应是 (N, 类数)，N ≥ 1，收到的是 {tuple(logits.shape)}。")
    if not bool(logits.isfinite().all()):
        raise ValueError("logits 里应当都是有限的数，收到的含有 NaN 或无穷。")
    log_p = F.log_softmax(logits.double(), dim=1)
    log_mean = log_p.logsumexp(dim=0) - torch.tensor(len(logits), dtype=torch.float64).log()
    return (log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp().item()
