"""并入 book_utils/models.py。"""

import copy

import torch


@torch.no_grad()
def widen_input(unet: torch.nn.Module, in_channels: int) -> torch.nn.Module:
    """复制 unet，把第一个卷积加宽到 in_channels 个输入通道；新通道的权重是 0，起初算得与原来的一样。

    参数：
        unet:        diffusers 的 UNet，第一个卷积叫 conv_in。
        in_channels: 加宽之后的输入通道数，不少于原来的。
    返回：
        新的网络，模式、设备与原来的相同；原来的不变。
    异常：
        ValueError: in_channels 比原来的还少。
    来源：第 6.5.2 节。
    """
    old = unet.conv_in
    if in_channels < old.in_channels:
        raise ValueError(f"in_channels 应不少于原来的 {old.in_channels}，收到的是 {in_channels}。")
    wider = copy.deepcopy(unet)
    wider.conv_in = torch.nn.Conv2d(
        in_channels, old.out_channels, old.kernel_size, padding=old.padding, device=old.weight.device
    )
    wider.conv_in.weight.zero_()
    wider.conv_in.weight[:, : old.in_channels] = old.weight
    wider.conv_in.bias.copy_(old.bias)
    wider.register_to_config(in_channels=in_channels)
    return wider
