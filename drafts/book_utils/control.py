"""控制图：由图取边缘与色块，整理读者自己的线稿，量画出的图合不合边缘，手写的 ControlNet 采样循环（第 9.1 节）。"""

import math

import cv2
import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image
from torch.nn import functional as F

from .images import open_rgb


@torch.no_grad()
def blank_controlnet(unet) -> ControlNetModel:
    """由 unet 的编码器抄来的 ControlNet，新添的层全部是零；存着的权重之差就是从它算起的。

    来源：第 9.1 节。
    """
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))
    for name, parameter in controlnet.named_parameters():
        if name.startswith("controlnet_"):              # 读控制图的小网络，与各级的零卷积
            parameter.zero_()
    return controlnet.requires_grad_(False).eval()


def canny_edges(images: torch.Tensor, low: float = 100, high: float = 200) -> torch.Tensor:
    """用 OpenCV 的 Canny 取边缘。

    参数：
        images: (B, 3, H, W)，取值 (0, 1)。
        low, high: 两个阈值，是亮度的梯度（像素取 0 到 255）；弱边缘要连着强边缘才算。
    返回：
        与 images 同形状的边缘图，取值 0 或 1，三个通道相同。
    异常：
        ValueError: 形状不合，图里有 NaN 或无穷，或阈值不是 0 ≤ low ≤ high。
    来源：第 9.1 节；Canny（1986）。
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images 的形状应是 (B, 3, H, W)，收到的是 {tuple(images.shape)}。")
    if not bool(images.isfinite().all()):
        raise ValueError("images 里有 NaN 或无穷，取不了边缘：多半是采样出了错。")
    if not 0 <= low <= high:
        raise ValueError(f"两个阈值应满足 0 ≤ low ≤ high，收到的是 {low} 和 {high}。")
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    edges = np.stack([cv2.Canny(picture.contiguous().numpy(), low, high) for picture in pixels])
    return (torch.from_numpy(edges) / 255)[:, None].expand(-1, 3, -1, -1)


def color_blocks(images: torch.Tensor, n_blocks: int = 4) -> torch.Tensor:
    """把图分成 n_blocks × n_blocks 块，每块换成自己的平均颜色；形状与取值不变。

    异常：
        ValueError: 形状不合，或 n_blocks 不是 1 到边长之间的整数。
    来源：第 9.1 节。
    """
    if images.ndim != 4 or not 1 <= n_blocks <= min(images.shape[-2:]):
        raise ValueError(
            f"images 的形状应是 (B, C, H, W)，n_blocks 应在 1 与边长之间，收到的是 {tuple(images.shape)} 和 {n_blocks}。"
        )
    return F.interpolate(F.adaptive_avg_pool2d(images, n_blocks), size=images.shape[-2:], mode="nearest")


def prepare_lines(picture: Image.Image, size: int) -> torch.Tensor:
    """把读者的线稿整理成边缘图 (1, 3, size, size)：黑底白线，取值 0 或 1。

    白底黑线、透明底、灰度、大小不同都可以；缩小时取每一块的最大值，细线不会丢。

    异常：
        ValueError: 不是正方形的 PIL 图像，里面一条线也没有，或 size 不是正整数。
    来源：第 9.1 节。
    """
    if not isinstance(picture, Image.Image):
        raise ValueError(f"picture 应是 PIL 图像，收到的是 {type(picture).__name__}。")
    if picture.width != picture.height:
        raise ValueError(f"picture 应是正方形，收到的是 {picture.width}×{picture.height}。请先裁剪，免得被压扁。")
    if size < 1:
        raise ValueError(f"size 应是正整数，收到的是 {size}。")
    lines = torch.from_numpy(np.array(open_rgb(picture).convert("L"))) > 127
    if lines.float().mean() > 0.5:                      # 亮处占多数，是白底黑线
        lines = ~lines
    if not lines.any():
        raise ValueError("picture 里一条线也没有：整张是同一种颜色。请用黑笔画在白底上，或用白笔画在黑底上。")
    return F.adaptive_max_pool2d(lines.float()[None, None], size).expand(-1, 3, -1, -1)


def edge_f1(drawn: torch.Tensor, wanted: torch.Tensor, tolerance: int = 1) -> torch.Tensor:
    """两组边缘图合得怎样，各张的 F1，形状 (B,)，取值 0 到 1。

    参数：
        drawn, wanted: 画出的图的边缘、所要的边缘，(B, C, H, W)，取值 0 或 1，只看第一个通道。
        tolerance: 差几个像素以内也算对。
    异常：
        ValueError: 形状不同，取值不是 0 与 1，所要的边缘里有一张是空的，或 tolerance 是负数。
    来源：第 9.1 节。
    """
    if drawn.shape != wanted.shape or drawn.ndim != 4:
        raise ValueError(f"两组边缘图的形状应是同样的 (B, C, H, W)，收到的是 {tuple(drawn.shape)} 和 {tuple(wanted.shape)}。")
    if tolerance < 0:
        raise ValueError(f"tolerance 应是非负整数，收到的是 {tolerance}。")
    if not all(bool(((edges == 0) | (edges == 1)).all()) for edges in (drawn, wanted)):
        raise ValueError("边缘图的取值应是 0 或 1：先用 canny_edges 或 prepare_lines。")
    if not bool(wanted[:, 0].any(dim=(1, 2)).all()):
        raise ValueError("所要的边缘里有一张是空的，谈不上合不合。")
    drawn, wanted = drawn[:, :1].float(), wanted[:, :1].float()

    def near(edges):                                    # 边缘向四周扩 tolerance 个像素
        return F.max_pool2d(edges, 2 * tolerance + 1, stride=1, padding=tolerance)

    precision = (drawn * near(wanted)).sum(dim=(1, 2, 3)) / drawn.sum(dim=(1, 2, 3)).clamp(min=1)
    recall = (wanted * near(drawn)).sum(dim=(1, 2, 3)) / wanted.sum(dim=(1, 2, 3)).clamp(min=1)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-6)


@torch.no_grad()
def sample_controlled(
    pipeline, controls: list[tuple], prompts: list[str], latents: torch.Tensor, n_steps: int = 25,
    guidance_scale: float = 2.0, start: float = 0.0, end: float = 1.0,
) -> torch.Tensor:
    """手写的文生图循环，每一步把各个 ControlNet 的修正加进 UNet；与 StableDiffusionControlNetPipeline 逐位相同。

    参数：
        pipeline: StableDiffusionPipeline，只用它的部件；调度器不补噪声。
        controls: （ControlNet，控制图 (N, 3, H, W)，强度）的列表；空的就是不控制。
        prompts:  提示词，N 句。
        latents:  起点，标准高斯噪声，形状 (N, C, H', W')。
        n_steps:  步数，正整数。
        guidance_scale: 引导强度，大于 1。
        start, end: 从全程的哪里起、到哪里止才控制，0 到 1。
    返回：
        取值 (0, 1) 的图像，形状 (N, 3, H, W)。
    异常：
        ValueError: 个数不同，或步数、强度、起止不合要求。
    来源：第 9.1 节。
    """
    if len({len(prompts), len(latents), *(len(image) for _, image, _ in controls)}) > 1:
        raise ValueError(
            "提示词、起点与各组控制图的个数应相同，收到的是 "
            f"{[len(prompts), len(latents), *(len(image) for _, image, _ in controls)]}。"
        )
    if n_steps < 1 or not (math.isfinite(guidance_scale) and guidance_scale > 1):
        raise ValueError(f"n_steps 应是正整数，guidance_scale 应大于 1，收到的是 {n_steps} 和 {guidance_scale}。")
    if not 0 <= start < end <= 1:
        raise ValueError(f"应有 0 ≤ start < end ≤ 1，收到的是 {start} 和 {end}。")
    if not all(math.isfinite(scale) and scale >= 0 for _, _, scale in controls):
        raise ValueError(f"控制强度应是非负的数，收到的是 {[scale for _, _, scale in controls]}。")

    scheduler, vae, device = pipeline.scheduler, pipeline.vae, pipeline.unet.device
    positive, negative = pipeline.encode_prompt(prompts, device, 1, True)
    text = torch.cat([negative, positive])
    scheduler.set_timesteps(n_steps, device=device)
    latents = latents.to(device, text.dtype) * scheduler.init_noise_sigma
    controls = [(net, torch.cat([image] * 2).to(device, text.dtype), scale) for net, image, scale in controls]
    for i, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        down, mid = None, None
        if start <= i / n_steps and (i + 1) / n_steps <= end:
            for net, image, scale in controls:
                more_down, more_mid = net(
                    model_input, t, encoder_hidden_states=text, controlnet_cond=image, conditioning_scale=scale,
                    return_dict=False,
                )
                down = more_down if down is None else [a + b for a, b in zip(down, more_down, strict=True)]
                mid = more_mid if mid is None else mid + more_mid
        prediction = pipeline.unet(
            model_input, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        unconditional, conditional = prediction.chunk(2)
        prediction = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(prediction, t, latents).prev_sample
    return (vae.decode(latents / vae.config.scaling_factor).sample * 0.5 + 0.5).clamp(0, 1).float().cpu()
