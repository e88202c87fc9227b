"""引导：采样时沿损失的梯度修正样本（第 5.6 节），以及以类别为条件的采样（第 5.9 节）。"""

import math
import re
from collections.abc import Callable

import torch
from torch.nn import functional as F

from .worlds.butterflies import WING_COLORS

MAX_SCALE = 1000.0          # 再大就只是数值溢出，不是引导


def predicted_x0(scheduler, prediction: torch.Tensor, x: torch.Tensor, t: torch.Tensor | int) -> torch.Tensor:
    """由网络的预测（速度或噪声）算出 x̂₀，形状与 x 相同；没有截断，可以求导。

    来源：第 5.6.1 节。
    """
    alpha_bar = scheduler.alphas_cumprod[int(t)].to(x)
    if scheduler.config.prediction_type == "v_prediction":
        return alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * prediction
    return (x - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()


def color_loss(images: torch.Tensor, target: tuple[float, float, float]) -> torch.Tensor:
    """各张图像与目标颜色之差的绝对值的平均，形状 (B,)，取值 0 到 2。

    参数：
        images: 形状 (B, 3, H, W)，取值 (−1, 1)。
        target: 目标颜色，红绿蓝三个 0 到 1 的数。
    异常：
        ValueError: 颜色不是三个 0 到 1 的数。
    来源：第 5.6.1 节。
    """
    if len(target) != 3 or not all(0 <= value <= 1 for value in target):
        raise ValueError(f"target 应是三个 0 到 1 的数（红、绿、蓝），收到的是 {target}。")
    color = torch.tensor(target, dtype=images.dtype, device=images.device).view(3, 1, 1) * 2 - 1
    return (images - color).abs().mean(dim=(1, 2, 3))


def loss_gradient(
    unet, scheduler, x: torch.Tensor, t: torch.Tensor | int, loss_function: Callable, through_unet: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """损失 ℓ(x̂₀) 对 x_t 的梯度。

    参数：
        unet, scheduler: 无条件的网络与它的调度器。
        x: x_t，形状 (B, C, H, W)；t 是时间步。
        loss_function: x̂₀ (B, C, H, W)，取值约 (−1, 1) → 各张的损失 (B,)。
        through_unet: True 时穿过网络求导；False 时把网络的预测当作常数。
    返回：
        （梯度，网络的预测），形状都与 x 相同。
    来源：第 5.6.1 节。
    """
    x = x.detach().requires_grad_()
    with torch.set_grad_enabled(through_unet):
        prediction = unet(x, t).sample
    loss = loss_function(predicted_x0(scheduler, prediction, x, t)).sum()      # 各张互不相干，加起来一次求导
    return torch.autograd.grad(loss, x)[0], prediction.detach()


def guided_sample(
    unet, scheduler, x: torch.Tensor, n_steps: int, loss_function: Callable, scale: float, through_unet: bool = True
) -> torch.Tensor:
    """带引导的采样：每一步先沿 −∇ℓ(x̂₀) 修正 x_t，再照常走一步。

    参数：
        unet, scheduler: 无条件的网络与 DDIM 调度器。
        x:       起点，标准高斯噪声，形状 (B, C, H, W)。
        n_steps: 步数，正整数。
        loss_function: 见 :func:`loss_gradient`，越小越好。
        scale:   引导的强度 γ，−MAX_SCALE 到 MAX_SCALE；0 是不引导，负数是往反方向推。
        through_unet: 求梯度时是否穿过网络。
    返回：
        取值 (0, 1) 的图像，形状与 x 相同。
    异常：
        ValueError: 强度不是有限的数，或绝对值太大。
    来源：第 5.6.1 节。
    """
    if not (math.isfinite(scale) and abs(scale) <= MAX_SCALE):
        raise ValueError(f"引导的强度应在 −{MAX_SCALE:g} 到 {MAX_SCALE:g} 之间，收到的是 {scale}。")
    scheduler.set_timesteps(n_steps)
    for t in scheduler.timesteps:
        gradient, prediction = loss_gradient(unet, scheduler, x, t, loss_function, through_unet)
        x = scheduler.step(prediction, t, x - scale * gradient).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


def angle_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """两组单位向量 (B, D) 的夹角的平方，形状 (B,)，取值 0 到 π²。

    来源：第 5.6.2 节。
    """
    chord = (a - b).norm(dim=-1)
    return (2 * (chord / 2).clamp(max=0.9999).asin()).square()


def random_cutouts(
    images: torch.Tensor, n_cutouts: int, generator: torch.Generator | None = None, smallest: float = 0.7
) -> torch.Tensor:
    """从每张图随机裁出 n_cutouts 个正方形，都缩放回原来的边长。可以求导。

    参数：
        images:    形状 (B, C, H, W)。
        n_cutouts: 每张裁几块，正整数。
        generator: CPU 上的随机数生成器。
        smallest:  裁出的边长至少占原图的几分之几，0 到 1。
    返回：
        形状 (n_cutouts × B, C, H, W)，先是各张的第一块，再是各张的第二块……
    异常：
        ValueError: 块数或比例不合要求。
    来源：第 5.6.2 节。
    """
    if n_cutouts < 1 or not 0 < smallest <= 1:
        raise ValueError(f"n_cutouts 应是正整数，smallest 应在 0 与 1 之间，收到的是 {n_cutouts} 和 {smallest}。")
    count = n_cutouts * len(images)
    side = smallest + (1 - smallest) * torch.rand(count, generator=generator)          # 边长占原图的比例
    shift = (1 - side)[:, None] * (2 * torch.rand(count, 2, generator=generator) - 1)   # 中心移到哪里
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = side
    affine[:, :, 2] = shift
    grid = F.affine_grid(affine.to(images), (count, *images.shape[1:]), align_corners=False)
    return F.grid_sample(images.repeat(n_cutouts, 1, 1, 1), grid, padding_mode="border", align_corners=False)


def unseen_words(tokenizer, prompt: str) -> list[str]:
    """prompt 里的哪些词是小 CLIP 没有见过的。

    随书的词表从训练的说明学来，见过的英文词与汉字都是一个词元；切成几段的就是没有见过的。

    参数：
        tokenizer: butterfly-clip 的 CLIPTokenizer。
        prompt:    一句提示词。
    返回：
        没有见过的词与汉字，依出现的次序；都见过就是空列表。
    来源：第 5.6.2 节。
    """
    words = re.findall(r"[一-鿿]|[^\W\d_一-鿿]+", prompt)          # 汉字一字一个，别的文字一词一个
    return [word for word in dict.fromkeys(words) if len(tokenizer.tokenize(word)) > 1]


def color_number(name: str) -> int:
    """翅膀颜色的类别编号，0 到 7；name 是中文名或英文名，如“红色”或 red。

    异常：
        ValueError: 没有这种颜色。
    来源：第 5.9 节。
    """
    for number, (english, (chinese, _)) in enumerate(WING_COLORS.items()):
        if name in (english, chinese, chinese.removesuffix("色")):
            return number
    raise ValueError(f"没有“{name}”这个类别；可以要的颜色是{'、'.join(chinese for chinese, _ in WING_COLORS.values())}。")


@torch.no_grad()
def sample_classes(
    unet, scheduler, x: torch.Tensor, labels: torch.Tensor, n_steps: int = 20, scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0), guide=None, consistent: bool = True,
) -> torch.Tensor:
    """以类别为条件的采样，带无分类器引导。

    参数：
        unet:      UNet2DModel，类别的最后一个编号是“不指定”。
        scheduler: DDIM 调度器。
        x:         起点，标准高斯噪声，形状 (B, C, H, W)。
        labels:    要画的类别，形状 (B,)。
        n_steps:   步数，正整数。
        scale:     引导强度 w，−MAX_SCALE 到 MAX_SCALE；1 是普通的条件生成，0 不理会类别，负数是躲开这一类。
        interval:  只在 t/T 落在这个区间时引导，两个 0 到 1 的数；区间之外 w = 1。
        guide:     给出另一个同类的网络时，用它的有条件的预测代替“不指定”的预测（自引导）。
        consistent: 原图截断之后，噪声是否跟着重算。
    返回：
        取值 (0, 1) 的图像，形状与 x 相同。
    异常：
        ValueError: 没有这个类别，或强度、区间不合要求。
    来源：第 5.9 节。
    """
    if len(labels) != len(x) or labels.min() < 0 or labels.max() >= unet.config.num_class_embeds:
        raise ValueError(
            f"labels 应是 {len(x)} 个 0 到 {unet.config.num_class_embeds - 1} 的编号"
            f"（最后一个是“不指定”），收到的是 {labels.tolist()}。"
        )
    if not (math.isfinite(scale) and abs(scale) <= MAX_SCALE):
        raise ValueError(f"引导的强度应在 −{MAX_SCALE:g} 到 {MAX_SCALE:g} 之间，收到的是 {scale}。")
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"interval 应是（低, 高），0 ≤ 低 ≤ 高 ≤ 1，收到的是 {interval}。")
    no_class = torch.full_like(labels, unet.config.num_class_embeds - 1)
    scheduler.set_timesteps(n_steps)
    for t in scheduler.timesteps:
        prediction = unet(x, t, class_labels=labels).sample
        if scale != 1 and interval[0] <= int(t) / scheduler.config.num_train_timesteps <= interval[1]:
            # 外推：从差一些的预测，走向好一些的，再多走几步
            worse = unet(x, t, class_labels=no_class) if guide is None else guide(x, t, class_labels=labels)
            prediction = worse.sample + scale * (prediction - worse.sample)
        x = scheduler.step(prediction, t, x, use_clipped_model_output=consistent).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)
