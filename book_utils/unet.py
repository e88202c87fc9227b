"""书里自己搭的两个 UNet：第 3.4.1 节最小的一个，第 5.7.2 节以类别为条件的一个。"""

import torch
from diffusers import UNet2DModel
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


class ClassConditionedUnet(nn.Module):
    """把类别的嵌入铺成通道，与 28 × 28 的灰度图像拼接后交给 UNet2DModel；687,385 个参数（默认时）。

    参数：
        n_classes:      类别数，正整数。
        class_channels: 每个类别的嵌入有几个数，就铺成几个通道，正整数。
    来源：第 5.7.2 节。
    """

    def __init__(self, n_classes: int = 10, class_channels: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(n_classes, class_channels)
        self.unet = UNet2DModel(
            sample_size=28,
            in_channels=1 + class_channels,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(16, 32, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor | int, class_labels: torch.Tensor) -> torch.Tensor:
        """x (B, 1, 28, 28)、时间步（标量或 (B,)）、类别编号 (B,) → 与 x 同形状的预测。"""
        if x.ndim != 4 or x.shape[1] != 1 or class_labels.shape != x.shape[:1]:
            raise ValueError(
                "ClassConditionedUnet 的输入应是 (B, 1, H, W) 的图像和 (B,) 的类别，"
                f"收到的是 {tuple(x.shape)} 和 {tuple(class_labels.shape)}。"
            )
        planes = self.embedding(class_labels)[:, :, None, None].expand(-1, -1, *x.shape[-2:])
        return self.unet(torch.cat([x, planes], dim=1), t).sample
