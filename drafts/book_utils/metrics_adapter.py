"""适配器裁判：看得出两种画风，认得出 DreamBooth 要学的那一只（第 9.2、9.3 节）。"""

import torch
from torch import nn
from torch.nn import functional as F

from .metrics import require_finite
from .models import load_weights, resolve


class AdapterJudge(nn.Module):
    """看图说三件事：发光了吗，装框了吗，是不是那一只左橙右蓝的蝴蝶。

    输入 (B, 3, H, W)，取值 0 到 1，正方形，任意边长（先缩放到 64 × 64）；
    输出 (B, 3) 的对数几率，各列依次是 HEADS。
    来源：第 9.2 节；配方见 recipes/adapter_judge.py。
    """

    HEADS = ("glow", "frame", "subject")

    def __init__(self):
        super().__init__()
        channels = (3, 16, 32, 48, 48)
        layers = []
        for c_in, c_out in zip(channels, channels[1:], strict=False):
            # 每层把边长减半：64 → 32 → 16 → 8 → 4
            layers += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 4 * 4, 48), nn.ReLU(), nn.Linear(48, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3]:
            raise ValueError(f"images 的形状应是 (B, 3, 边长, 边长)，收到的是 {tuple(x.shape)}。")
        require_finite(x, "images ")
        if x.shape[-1] != 64:
            x = F.interpolate(x, size=(64, 64), mode="bilinear", antialias=True)
        return self.body(x * 2 - 1)

    @torch.no_grad()
    def rates(self, x: torch.Tensor) -> dict[str, float]:
        """各项认出的比例：名字 → 0 到 1。"""
        found = (self(x) > 0).float().mean(dim=0).tolist()
        return dict(zip(self.HEADS, found, strict=True))


def adapter_judge() -> AdapterJudge:
    """载入随书的适配器裁判（评估模式）。"""
    return load_weights(AdapterJudge(), resolve("adapter-judge"))
