"""第 3.4.1 节的最小 UNet。"""

import torch
from torch import nn


class BasicUNet(nn.Module):
    """三层下行、三层上行的最小 UNet，跳跃连接用加法，共 309,057 个参数（单通道时）。

    下行通道数：in_channels → 32 → 64 → 64；上行：64 → 64 → 32 → out_channels。

    参数：
        in_channels:  输入图像的通道数，正整数。
        out_channels: 输出图像的通道数，正整数。
    来源：第 3.4.1 节；结构的思想出自 Ronneberger 等（2015）。
    """

    def __init__(self, in_channels: int = 1, out_channels: int = 1):
        super().__init__()
        self.down_layers = nn.ModuleList([
            nn.Conv2d(in_channels, 32, kernel_size=5, padding=2),
            nn.Conv2d(32, 64, kernel_size=5, padding=2),
            nn.Conv2d(64, 64, kernel_size=5, padding=2),
        ])
        self.up_layers = nn.ModuleList([
            nn.Conv2d(64, 64, kernel_size=5, padding=2),
            nn.Conv2d(64, 32, kernel_size=5, padding=2),
            nn.Conv2d(32, out_channels, kernel_size=5, padding=2),
        ])
        self.act = nn.SiLU()
        self.downscale = nn.MaxPool2d(2)
        self.upscale = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H, W)；H 与 W 须是 4 的倍数。"""
        if x.ndim != 4 or x.shape[-1] % 4 or x.shape[-2] % 4:
            raise ValueError(
                f"BasicUNet 的输入形状应是 (B, C, H, W)，且 H、W 是 4 的倍数，收到的是 {tuple(x.shape)}。"
            )
        skips = []
        for i, layer in enumerate(self.down_layers):
            x = self.act(layer(x))
            if i < 2:                       # 最后一层之后不再下采样
                skips.append(x)
                x = self.downscale(x)
        for i, layer in enumerate(self.up_layers):
            if i > 0:                       # 第一层仍在最低分辨率上
                x = self.upscale(x) + skips.pop()
            x = self.act(layer(x))
        return x
