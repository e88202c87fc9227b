"""反转与编辑：由图像求出画它的噪声，改一句话再走回来，在噪声里留下标记（第七章）。

约定：潜变量乘过缩放系数；时间步从小到大排，第 0 个状态是图像的潜变量，第 n 个是噪声。
第 i 个状态的“角度” φ 满足 cos φ = √ᾱ（第 5.4 节），图像处是 0，纯噪声处是 π/2。
"""

import difflib
import html
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import mplfonts
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch.nn import functional as F

from .images import open_rgb
from .training import written_whole

METHODS = ("BDIA", "O-BELM", "O-BELM-sigma")
LABEL_FIELDS = (
    "Label", "ContentProducer", "ProduceID", "ReservedCode1", "ContentPropagator", "PropagateID", "ReservedCode2",
)


# —— 网格与一步（第 7.2.3 节）——

def time_grid(scheduler, n_steps: int) -> tuple[list[int], list[float]]:
    """n_steps 步的时间步，与各个状态的角度。

    参数：
        scheduler: DDIMScheduler。
        n_steps:   步数，要整除训练时的时间步总数（1000）。
    返回：
        timesteps: n_steps 个时间步，从小到大，如 19、39、…、999；
        angles:    n_steps + 1 个角度，弧度，第 0 个属于图像。
    异常：
        ValueError: 步数不是正整数，或不能整除。
    来源：第 7.2.3 节。
    """
    if n_steps < 1 or scheduler.config.num_train_timesteps % n_steps:
        raise ValueError(f"步数应能整除 {scheduler.config.num_train_timesteps}，收到的是 {n_steps}。")
    stride = scheduler.config.num_train_timesteps // n_steps
    timesteps = list(range(stride - 1, scheduler.config.num_train_timesteps, stride))
    alpha_bars = [float(scheduler.final_alpha_cumprod), *scheduler.alphas_cumprod[timesteps].tolist()]
    return timesteps, [math.acos(math.sqrt(alpha_bar)) for alpha_bar in alpha_bars]


def rotate(z: torch.Tensor, velocity: torch.Tensor, angle: float) -> torch.Tensor:
    """把 z 朝速度的方向转过 angle（弧度）：正的走向噪声，负的走向图像。

    来源：第 7.2.3 节；就是第 5.4 节的 DDIM 的一步。
    """
    return math.cos(angle) * z + math.sin(angle) * velocity


def to_velocity(prediction: torch.Tensor, z: torch.Tensor, angle: float, prediction_type: str) -> torch.Tensor:
    """把网络的预测换算成速度。

    参数：
        prediction: 网络的输出，形状与 z 相同。
        z:          网络看到的潜变量。
        angle:      网络被问到的那个时间步的角度。
        prediction_type: "v_prediction"、"epsilon" 或 "sample"。
    异常：
        ValueError: 不认识的 prediction_type，或在纯噪声处由噪声求速度（要除以 0）。
    来源：第 7.2.3 节。
    """
    if prediction_type not in ("v_prediction", "epsilon", "sample"):
        raise ValueError(f"prediction_type 应是 v_prediction、epsilon 或 sample，收到的是 {prediction_type!r}。")
    if prediction_type == "epsilon" and math.cos(angle) < 1e-6:
        raise ValueError("纯噪声里没有原图：预测噪声的网络在这个时间步上求不出速度。")
    if prediction_type == "epsilon":
        return prediction / math.cos(angle) - math.tan(angle) * z
    if prediction_type == "sample":
        return (math.cos(angle) * z - prediction) / math.sin(angle)
    return prediction


def predict_velocity(
    pipeline, z: torch.Tensor, t: int, angle: float, text: torch.Tensor, guidance_scale: float = 1.0,
    negative_text: torch.Tensor | None = None,
) -> torch.Tensor:
    """在 (z, t) 处问一次网络，返回速度，形状与 z 相同。

    参数：
        pipeline: StableDiffusionPipeline，只用它的 unet 与 scheduler 的 prediction_type。
        z:        潜变量，形状 (N, C, h, w)。
        t:        时间步。
        angle:    t 的角度。
        text:     提示词的编码，形状 (N, L, D)。
        guidance_scale: 引导强度 w；恰好是 1 时只算一份。
        negative_text:  引导的出发点，形状同 text；w 不是 1 时必须给。
    来源：第 7.2.3 节。
    """
    if guidance_scale == 1:
        prediction = pipeline.unet(z, t, text).sample
    else:
        base, wanted = pipeline.unet(torch.cat([z, z]), t, torch.cat([negative_text, text])).sample.chunk(2)
        prediction = base + guidance_scale * (wanted - base)
    return to_velocity(prediction, z, angle, pipeline.scheduler.config.prediction_type)


@torch.no_grad()
def encode_prompts(pipeline, prompts: list[str]) -> torch.Tensor:
    """几句话 → 文本编码器的输出，形状 (N, L, D)。

    来源：第 6.4.5 节。
    """
    tokens = pipeline.tokenizer(
        prompts, padding="max_length", max_length=pipeline.tokenizer.model_max_length, truncation=True,
        return_tensors="pt",
    )
    return pipeline.text_encoder(tokens.input_ids.to(pipeline.unet.device))[0]


@torch.no_grad()
def encode_images(pipeline, images: torch.Tensor) -> torch.Tensor:
    """图像 (N, 3, H, W)，取值 (0, 1) → 乘过缩放系数的潜变量；取均值，不抽样，免得来回不一致。

    来源：第 7.2.4 节。
    """
    pixels = (images * 2 - 1).to(pipeline.vae.device, pipeline.vae.dtype)
    return pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor


@torch.no_grad()
def decode_latents(pipeline, latents: torch.Tensor) -> torch.Tensor:
    """潜变量 → 图像 (N, 3, H, W)，取值 (0, 1)，在 CPU 上。

    来源：第 7.2.4 节。
    """
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1).float().cpu()


# —— 反转与返回（第 7.2.4 节）——

@torch.no_grad()
def invert(
    pipeline, latents: torch.Tensor, prompts: list[str], n_steps: int = 50, n_iterations: int = 1,
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    """DDIM 反转：由图像的潜变量走到噪声。

    参数：
        pipeline: StableDiffusionPipeline，调度器是 DDIM，timestep_spacing="trailing"。
        latents:  图像的潜变量，形状 (N, C, h, w)，见 :func:`encode_images`。
        prompts:  描述各张图的话；空字符串就是不说。
        n_steps:  步数，要整除 1000。
        n_iterations: 每步问几次网络。1 是普通的 DDIM 反转；更大是不动点迭代，越大越准。
        guidance_scale: 引导强度。除非采样时也用同样的强度，否则应是 1。
    返回：
        路径，形状 (n_steps + 1, N, C, h, w)，第 0 个就是 latents，末一个是噪声。
    异常：
        ValueError: 话与图的个数不同，n_iterations 不是正整数，或步数不能整除 1000。
    来源：第 7.2.4 节；不动点迭代见 Pan 等（2023）。
    """
    if isinstance(prompts, str) or len(prompts) != len(latents):
        raise ValueError(f"有 {len(latents)} 张图，prompts 应是同样多句话的列表，收到的是 {prompts!r}。")
    if n_iterations < 1:
        raise ValueError(f"n_iterations 应是正整数，收到的是 {n_iterations}。")
    timesteps, angles = time_grid(pipeline.scheduler, n_steps)
    text, empty = encode_prompts(pipeline, prompts), encode_prompts(pipeline, [""] * len(prompts))
    path = [latents]
    for i, t in enumerate(timesteps, start=1):
        turn = angles[i] - angles[i - 1]
        z = path[-1]                                    # 本该问 z_i，还不知道，先拿 z_{i-1} 代替
        for _ in range(n_iterations):
            velocity = predict_velocity(pipeline, z, t, angles[i], text, guidance_scale, empty)
            z = (path[-1] + math.sin(turn) * velocity) / math.cos(turn)
        path.append(z)
    return torch.stack(path)


@torch.no_grad()
def regenerate(
    pipeline, noise: torch.Tensor, prompts: list[str], n_steps: int = 50, guidance_scale: float = 1.0,
    negative: list[str] | torch.Tensor | None = None, offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """DDIM 采样：由噪声走回图像，留下整条路径。

    参数：
        noise:    噪声，形状 (N, C, h, w)。
        prompts:  提示词。
        guidance_scale: 引导强度 w。
        negative: 引导的出发点：几句话，或每步一份的编码 (n_steps, N, L, D)，见 :func:`null_text`；
                  不给就是空的提示词。
        offsets:  每步走完之后加上的修正，形状 (n_steps, N, C, h, w)，见 :func:`direct_offsets`。
        其余同 :func:`invert`。
    返回：
        路径，形状与次序同 :func:`invert`：第 0 个是图像的潜变量。
    异常：
        ValueError: 话与噪声的个数不同，或步数不能整除 1000。
    来源：第 7.2.3 节。
    """
    if isinstance(prompts, str) or len(prompts) != len(noise):
        raise ValueError(f"有 {len(noise)} 份噪声，prompts 应是同样多句话的列表，收到的是 {prompts!r}。")
    timesteps, angles = time_grid(pipeline.scheduler, n_steps)
    text = encode_prompts(pipeline, prompts)
    if not isinstance(negative, torch.Tensor):          # 各步用同一份
        negative = [encode_prompts(pipeline, negative or [""] * len(prompts))] * n_steps
    path = [noise]
    for i in range(n_steps, 0, -1):
        velocity = predict_velocity(
            pipeline, path[-1], timesteps[i - 1], angles[i], text, guidance_scale, negative[i - 1]
        )
        z = rotate(path[-1], velocity, angles[i - 1] - angles[i])
        path.append(z if offsets is None else z + offsets[i - 1])
    return torch.stack(path[::-1])


def miss_weights(angles: list[float], method: str) -> list[float]:
    """两种精确的方法里，“上一步走偏多少”的系数 γ_1、…、γ_{n−1}。

    参数：
        angles: n + 1 个角度，见 :func:`time_grid`。
        method: "BDIA"（系数恒为 1）、"O-BELM"（在角度里使二阶误差相消），
                或 "O-BELM-sigma"（原文的坐标；ᾱ_T = 0 时只能采样，不能反转）。
    异常：
        ValueError: 没有这种方法。
    来源：第 7.2.4 节；Zhang 等（2023），Wang 等（2024）。
    """
    if method not in METHODS:
        raise ValueError(f"method 应是 {'、'.join(METHODS)} 之一，收到的是 {method!r}。")
    turns = [after - before for before, after in zip(angles, angles[1:], strict=False)]
    if method == "BDIA":
        return [1.0] * (len(turns) - 1)
    if method == "O-BELM":
        return [(toward / away) ** 2 for toward, away in zip(turns, turns[1:], strict=False)]
    return [                                            # 原文的坐标，换算到角度
        (math.sin(toward) / math.sin(away)) ** 2 * math.cos(after) / math.cos(before)
        for toward, away, before, after in zip(turns, turns[1:], angles, angles[2:], strict=False)
    ]


@torch.no_grad()
def invert_exact(
    pipeline, latents: torch.Tensor, prompts: list[str], n_steps: int = 50, method: str = "O-BELM",
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    """精确的反转（BDIA 或 O-BELM），每步也只问一次网络。

    要原样走回来，得把路径的最后**两个**状态都交给 :func:`regenerate_exact`。
    参数、返回、异常同 :func:`invert`；method 见 :func:`miss_weights`。
    来源：第 7.2.4 节。
    """
    if isinstance(prompts, str) or len(prompts) != len(latents):
        raise ValueError(f"有 {len(latents)} 张图，prompts 应是同样多句话的列表，收到的是 {prompts!r}。")
    if min(miss_weights(time_grid(pipeline.scheduler, n_steps)[1], method), default=1.0) < 1e-6:
        raise ValueError(f"{method} 在 ᾱ = 0 的噪声计划上有一个系数是 0，不能反转；请改用 O-BELM。")
    timesteps, angles = time_grid(pipeline.scheduler, n_steps)
    weights = miss_weights(angles, method)
    text, empty = encode_prompts(pipeline, prompts), encode_prompts(pipeline, [""] * len(prompts))
    velocity = predict_velocity(pipeline, latents, timesteps[0], angles[1], text, guidance_scale, empty)
    turn = angles[1] - angles[0]
    path = [latents, (latents + math.sin(turn) * velocity) / math.cos(turn)]        # 头一步用普通的反转
    for i in range(1, n_steps):
        velocity = predict_velocity(pipeline, path[i], timesteps[i - 1], angles[i], text, guidance_scale, empty)
        miss = path[i - 1] - rotate(path[i], velocity, angles[i - 1] - angles[i])
        path.append(rotate(path[i], velocity, angles[i + 1] - angles[i]) + miss / weights[i - 1])
    return torch.stack(path)


@torch.no_grad()
def regenerate_exact(
    pipeline, noise: torch.Tensor, prompts: list[str], n_steps: int = 50, method: str = "O-BELM",
    guidance_scale: float = 1.0, previous: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`invert_exact` 的逆：由最后两个状态走回图像。

    参数：
        noise:    第 n 个状态。
        previous: 第 n − 1 个状态；不给（由新的噪声生成）就先走一步 DDIM。
        其余同 :func:`regenerate`。
    来源：第 7.2.4 节。
    """
    if isinstance(prompts, str) or len(prompts) != len(noise):
        raise ValueError(f"有 {len(noise)} 份噪声，prompts 应是同样多句话的列表，收到的是 {prompts!r}。")
    timesteps, angles = time_grid(pipeline.scheduler, n_steps)
    weights = miss_weights(angles, method)
    text, empty = encode_prompts(pipeline, prompts), encode_prompts(pipeline, [""] * len(prompts))
    if previous is None:
        velocity = predict_velocity(pipeline, noise, timesteps[-1], angles[-1], text, guidance_scale, empty)
        previous = rotate(noise, velocity, angles[-2] - angles[-1])
    path = [noise, previous]
    for i in range(n_steps - 1, 0, -1):
        velocity = predict_velocity(pipeline, path[-1], timesteps[i - 1], angles[i], text, guidance_scale, empty)
        miss = path[-2] - rotate(path[-1], velocity, angles[i + 1] - angles[i])
        path.append(rotate(path[-1], velocity, angles[i - 1] - angles[i]) + weights[i - 1] * miss)
    return torch.stack(path[::-1])


@torch.no_grad()
def direct_offsets(pipeline, path: torch.Tensor, prompts: list[str], guidance_scale: float) -> torch.Tensor:
    """直接反转（PnP 反转）：有引导的每一步从反转的路径上出发，走到的地方差多少，记下来。

    参数：
        path:    :func:`invert` 的返回值。
        prompts: 反转时用的话。
        guidance_scale: 采样时要用的引导强度。
    返回：
        各步的差，形状 (n_steps, N, C, h, w)，交给 :func:`regenerate` 的 offsets。
    来源：第 7.2.4 节；Ju 等（2024）。
    """
    if len(prompts) != path.shape[1]:
        raise ValueError(f"路径里有 {path.shape[1]} 张图，prompts 却有 {len(prompts)} 句。")
    timesteps, angles = time_grid(pipeline.scheduler, len(path) - 1)
    text, empty = encode_prompts(pipeline, prompts), encode_prompts(pipeline, [""] * len(prompts))
    offsets = []
    for i, t in enumerate(timesteps, start=1):
        velocity = predict_velocity(pipeline, path[i], t, angles[i], text, guidance_scale, empty)
        offsets.append(path[i - 1] - rotate(path[i], velocity, angles[i - 1] - angles[i]))
    return torch.stack(offsets)


def null_text(
    pipeline, path: torch.Tensor, prompts: list[str], guidance_scale: float = 2.0, n_updates: int = 10,
    learning_rate: float = 0.01,
) -> torch.Tensor:
    """空文本反转：逐步优化引导的出发点，使有引导的采样沿反转的路径走回去。

    参数：
        path, prompts, guidance_scale: 同 :func:`direct_offsets`。
        n_updates:     每步更新几次。
        learning_rate: Adam 的学习率。
    返回：
        每步一份的编码，形状 (n_steps, N, L, D)，交给 :func:`regenerate` 的 negative。
    来源：第 7.2.4 节；Mokady 等（2023）。
    """
    if len(prompts) != path.shape[1]:
        raise ValueError(f"路径里有 {path.shape[1]} 张图，prompts 却有 {len(prompts)} 句。")
    timesteps, angles = time_grid(pipeline.scheduler, len(path) - 1)
    text, learned = encode_prompts(pipeline, prompts), encode_prompts(pipeline, [""] * len(prompts))
    z, found = path[-1], []

    def step(i, z, negative_text):
        velocity = predict_velocity(pipeline, z, timesteps[i - 1], angles[i], text, guidance_scale, negative_text)
        return rotate(z, velocity, angles[i - 1] - angles[i])

    for i in range(len(timesteps), 0, -1):
        learned = learned.detach().clone().requires_grad_(True)     # 从上一步找到的出发
        optimizer = torch.optim.Adam([learned], lr=learning_rate)
        for _ in range(n_updates):
            loss = (step(i, z, learned) - path[i - 1]).square().mean()
            learned.grad, = torch.autograd.grad(loss, learned)      # 不给网络的权重算梯度
            optimizer.step()
        learned = learned.detach()
        with torch.no_grad():
            z = step(i, z, learned)
        found.append(learned)
    return torch.stack(found[::-1])


# —— 编辑（第 7.3 节）——

def align_tokens(tokenizer, source: str, target: str) -> torch.Tensor:
    """target 的每个词元对应 source 的第几个词元，形状 (L,)；新添的词元没有对应，是 −1。

    来源：第 7.3 节。
    """
    ids = tokenizer(
        [source, target], padding="max_length", max_length=tokenizer.model_max_length, truncation=True
    ).input_ids
    columns = [-1] * len(ids[1])
    # autojunk 会把出现很多次的补位当作杂质
    for action, i1, i2, j1, j2 in difflib.SequenceMatcher(None, ids[0], ids[1], autojunk=False).get_opcodes():
        for j in range(j1, j2):
            if action == "equal":
                columns[j] = i1 + j - j1
            elif action == "replace":                   # 换掉的几个词元按先后对应
                columns[j] = i1 + (j - j1) * (i2 - i1) // (j2 - j1)
    return torch.tensor(columns)


class SharedAttention:
    """交叉注意力的处理器：改后的图借用原图的注意力权重（prompt-to-prompt）。

    批里依次是三份：负面、原、改；只动“改”的一份。
    属性：
        columns: 每句话的 :func:`align_tokens`，形状 (N, L)。
        active:  是 False 时照常计算。
    来源：第 7.3 节；Hertz 等（2023）。
    """

    def __init__(self, columns: torch.Tensor):
        self.columns = columns
        self.active = True

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-2, -1) * attn.scale).softmax(dim=-1)        # (3N, 头, 像素, 词元)
        if self.active:
            negative, source, target = weights.chunk(3)
            index = self.columns[:, None, None, :].expand_as(target)
            target = torch.where(index >= 0, source.gather(-1, index.clamp(min=0)), target)
            weights = torch.cat([negative, source, target / target.sum(dim=-1, keepdim=True)])
        return attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


@contextmanager
def attention_processor(unet, processor) -> Iterator[None]:
    """``with attention_processor(unet, processor):`` 之内，各交叉注意力层都用 processor；出来时换回原来的。

    来源：第 7.3 节。
    """
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    originals = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(processor)
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.set_processor(original)


@torch.no_grad()
def diffedit_mask(
    pipeline, latents: torch.Tensor, source_prompts: list[str], target_prompts: list[str], strength: float = 0.5,
    n_noises: int = 8, threshold: float = 0.5, seed: int = 0,
) -> torch.Tensor:
    """DiffEdit 的自动掩膜：两句话的预测在哪里不同，哪里就该改。

    参数：
        latents:   图像的潜变量，形状 (N, C, h, w)。
        strength:  加噪到 t/T 是多少，0 到 1 之间。
        n_noises:  用几份噪声平均。
        threshold: 差别缩放到 0 到 1 之后，大于它的算要改。
    返回：
        掩膜，1 是要改的，形状 (N, 1, h, w)。
    异常：
        ValueError: strength 不在 0 与 1 之间，或 n_noises 不是正整数。
    来源：第 7.3 节；Couairon 等（2023）。
    """
    if not 0 < strength < 1:
        raise ValueError(f"strength 应在 0 与 1 之间，收到的是 {strength}。")
    if n_noises < 1:
        raise ValueError(f"n_noises 应是正整数，收到的是 {n_noises}。")
    t = round(strength * pipeline.scheduler.config.num_train_timesteps) - 1
    angle = math.acos(math.sqrt(float(pipeline.scheduler.alphas_cumprod[t])))
    text = torch.cat([encode_prompts(pipeline, source_prompts), encode_prompts(pipeline, target_prompts)])
    generator = torch.Generator().manual_seed(seed)
    difference = 0
    for _ in range(n_noises):
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = rotate(latents, noise, angle)           # cos φ · 原图 + sin φ · 噪声
        source, target = pipeline.unet(torch.cat([noisy, noisy]), t, text).sample.chunk(2)
        difference = difference + (target - source).abs().mean(dim=1, keepdim=True) / n_noises
    cap = 3 * difference.mean(dim=(2, 3), keepdim=True)             # 个别极大的格子不该压低其余的
    scaled = difference.minimum(cap)
    return (scaled > threshold * scaled.amax(dim=(2, 3), keepdim=True)).to(latents)


@torch.no_grad()
def edit_latents(
    pipeline, path: torch.Tensor, source_prompts: list[str], target_prompts: list[str], start_step: int = 4,
    guidance_scale: float = 3.0, attention_share: float = 0.0, mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """从反转的路径出发，换一句话走回来：一批图的编辑，返回改好的潜变量 (N, C, h, w)。

    参数：
        path:       :func:`invert` 的返回值；步数 n 由它的长度决定。
        source_prompts: 反转时描述原图的话，也是引导的出发点。
        target_prompts: 描述改后的图的话。
        start_step: 采样的头几步不走，从路径上的那一处出发：0 改得最多，n 什么也不改。
        guidance_scale: 从原来的话走向新的话，走几倍。
        attention_share: 头上几成的步借用原图的注意力（prompt-to-prompt），0 是不借。
        mask:       形状 (N, 1, h, w)，1 是要改的；0 的地方每走一步都换回反转的路径。
    异常：
        ValueError: 话与图的个数不同，start_step 或 attention_share 超出范围。
    来源：第 7.3 节。
    """
    if not path.shape[1] == len(source_prompts) == len(target_prompts):
        raise ValueError(
            f"有 {path.shape[1]} 张图、{len(source_prompts)} 句原话、{len(target_prompts)} 句新话，应一样多。"
        )
    if not 0 <= start_step < len(path):
        raise ValueError(f"start_step 应在 0 到 {len(path) - 1} 之间，收到的是 {start_step}。")
    if not 0 <= attention_share <= 1:
        raise ValueError(f"attention_share 应在 0 与 1 之间，收到的是 {attention_share}。")
    n_steps = len(path) - 1
    timesteps, angles = time_grid(pipeline.scheduler, n_steps)
    source, target = encode_prompts(pipeline, source_prompts), encode_prompts(pipeline, target_prompts)
    sharing = None
    if attention_share > 0:
        pairs = zip(source_prompts, target_prompts, strict=True)
        columns = torch.stack([align_tokens(pipeline.tokenizer, *pair) for pair in pairs])
        sharing = SharedAttention(columns.to(path.device))
    z = path[n_steps - start_step]
    with nullcontext() if sharing is None else attention_processor(pipeline.unet, sharing):
        for i in range(n_steps - start_step, 0, -1):
            t = timesteps[i - 1]
            if sharing is None:
                velocity = predict_velocity(pipeline, z, t, angles[i], target, guidance_scale, source)
            else:
                sharing.active = i > (1 - attention_share) * n_steps
                three = torch.cat([z, path[i], z]), t, torch.cat([source, source, target])
                base, _, wanted = pipeline.unet(*three).sample.chunk(3)
                prediction = base + guidance_scale * (wanted - base)
                velocity = to_velocity(prediction, z, angles[i], pipeline.scheduler.config.prediction_type)
            z = rotate(z, velocity, angles[i - 1] - angles[i])
            if mask is not None:
                z = mask * z + (1 - mask) * path[i - 1]
    return z


def edit(
    pipeline, image: Image.Image, source_prompt: str, target_prompt: str, start_step: int = 4, n_steps: int = 20,
    guidance_scale: float = 3.0, attention_share: float = 0.0, mask: torch.Tensor | str | None = None,
) -> Image.Image:
    """照一句新的话改一张图。

    参数：
        image:  正方形的 PIL 图像，任何大小与模式；缩放到模型的边长再改。
        source_prompt: 描述原图的话；空的也行，只是保得差些。
        target_prompt: 描述改后的图的话，不能是空的。
        n_steps: 反转与采样的步数，要整除 1000。
        mask:   "auto" 用 DiffEdit 的自动掩膜；也可以自己给，形状 (1, 1, h, w)，与潜变量一样大，1 是要改的。
        其余同 :func:`edit_latents`。
    返回：
        改好的 RGB 图像，边长是模型的边长。
    异常：
        ValueError: 不是图像，不是正方形，新的话是空的，掩膜不合，或 start_step 超出范围。
    来源：第 7.3 节。
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"image 应是 PIL 图像，收到的是 {type(image).__name__}。")
    if image.width != image.height:
        raise ValueError(f"image 应是正方形，收到的是 {image.width}×{image.height}。请先裁剪，免得被压扁。")
    if not target_prompt.strip():
        raise ValueError("target_prompt 是空的：请写出改后的图是什么样子。")
    if not 0 <= start_step <= n_steps:
        raise ValueError(f"start_step 应在 0 到 {n_steps} 之间，收到的是 {start_step}。")
    if isinstance(mask, str) and mask != "auto":
        raise ValueError(f"mask 应是 auto、形状 (1, 1, h, w) 的张量或不给，收到的是 {mask!r}。")
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    pixels = np.array(open_rgb(image).resize((size, size), Image.Resampling.LANCZOS))
    latents = encode_images(pipeline, torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    if isinstance(mask, str):
        mask = diffedit_mask(pipeline, latents, [source_prompt], [target_prompt])
    path = invert(pipeline, latents, [source_prompt], n_steps, n_iterations=2)
    edited = edit_latents(
        pipeline, path, [source_prompt], [target_prompt], start_step, guidance_scale, attention_share,
        None if mask is None else mask.to(latents),
    )
    picture = decode_latents(pipeline, edited)[0].permute(1, 2, 0)
    return Image.fromarray((picture * 255).round().byte().numpy())


def silhouette(images: torch.Tensor, threshold: float = 0.12) -> torch.Tensor:
    """纯色背景前的轮廓：从四边出发，走得到的是背景，走不到的是主体。

    参数：
        images:    取值 (0, 1)，形状 (N, 3, H, W)。
        threshold: 与背景（四边颜色的中位数）相差不到它的，算作背景的颜色。
    返回：
        bool，形状 (N, H, W)。
    来源：第 7.3 节。
    """
    edges = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], dim=-1)
    background = edges.median(dim=-1).values[..., None, None]
    passable = ((images - background).abs().amax(dim=1, keepdim=True) <= threshold).float()
    reached = passable.clone()
    reached[..., 1:-1, 1:-1] = 0                        # 从边上一圈出发
    cross = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]])[None, None].to(images)
    while True:
        grown = (F.conv2d(reached, cross, padding=1) > 0) * passable
        if torch.equal(grown, reached):
            return reached[:, 0] == 0
        reached = grown


# —— 标记（第 7.3 节）——

def tree_ring_key(size: int = 16, radius: int = 5, seed: int = 0) -> torch.Tensor:
    """Tree-Ring 水印的密钥：频率平面上的同心圆，每个圆上一个数；圆之外是 0。形状 (size, size)。

    大小与标准高斯噪声的频谱相当，所以换上之后方差大致不变。
    异常：
        ValueError: radius 不在 1 与 size / 2 之间。
    来源：第 7.3 节；Wen 等（2023）。
    """
    if not 1 <= radius < size / 2:
        raise ValueError(f"radius 应在 1 与 {size / 2:g} 之间，收到的是 {radius}。")
    frequency = torch.fft.fftfreq(size) * size
    ring = torch.hypot(frequency[:, None], frequency[None, :]).round().long()
    inside = (ring >= 1) & (ring <= radius)             # 频率 0 是整张图的平均，不动它
    values = torch.randn(radius + 1, generator=torch.Generator().manual_seed(seed))
    key = torch.where(inside, values[ring.clamp(max=radius)], torch.zeros(()))
    return key * size / key[inside].square().mean().sqrt()


def lay_tree_ring(noise: torch.Tensor, key: torch.Tensor, channel: int = 0) -> torch.Tensor:
    """把密钥铺进噪声的一个通道的频谱里，返回同样形状的噪声 (N, C, h, w)。

    来源：第 7.3 节。
    """
    key = key.to(noise.device)
    spectrum = torch.fft.fft2(noise[:, channel].float())
    spectrum = torch.where(key != 0, key.to(spectrum.dtype), spectrum)
    marked = noise.clone()
    marked[:, channel] = torch.fft.ifft2(spectrum).real             # 密钥左右对称，虚部只是舍入误差
    return marked


def tree_ring_score(noise: torch.Tensor, key: torch.Tensor, channel: int = 0) -> torch.Tensor:
    """噪声的频谱与密钥的相关系数，形状 (N,)，−1 到 1；没有水印的在 0 附近。

    来源：第 7.3 节。
    """
    key = key.to(noise.device)
    spectrum, wanted = torch.fft.fft2(noise[:, channel].float())[:, key != 0], key[key != 0]
    return (spectrum.real @ wanted) / (spectrum.abs().square().sum(dim=1).sqrt() * wanted.norm())


def add_visible_label(image: Image.Image, text: str = "AI 生成") -> Image.Image:
    """在右下角写上看得见的标识；字高约为短边的 6%，至少 12 像素。返回新的图。

    异常：
        ValueError: 没有字，或图太小，写不下。
    来源：第 7.3 节。
    """
    if not text.strip():
        raise ValueError("text 是空的：看得见的标识要有字。")
    if min(image.size) < 64:
        raise ValueError(f"图太小（{image.width}×{image.height}），写上的字看不清；短边至少要有 64 像素。")
    labelled = image.convert("RGB")
    font = ImageFont.truetype(
        Path(mplfonts.__file__).parent / "fonts" / "NotoSansCJKsc-Regular.otf", max(12, round(0.06 * min(image.size)))
    )
    draw = ImageDraw.Draw(labelled)
    anchor = (image.width - 2, image.height - 2)
    draw.rectangle(draw.textbbox(anchor, text, font=font, anchor="rd"), fill="white")
    draw.text(anchor, text, font=font, fill="black", anchor="rd")
    return labelled


def save_labelled(image: Image.Image, path: str | Path, producer: str, content_id: str) -> Path:
    """存成 PNG，在文件的元数据里写上“人工智能生成合成”的隐式标识。

    参数：
        image:      图像。
        path:       文件名，以 .png 结尾。
        producer:   生成服务的提供者（名称或编码）。
        content_id: 这张图的编号。
    返回：
        写好的文件；中断时不会留下半个。
    异常：
        ValueError: 不是 .png，或提供者、编号是空的。
    来源：第 7.3 节；字段见 GB 45438—2025 附录 E。
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"文件名应以 .png 结尾，收到的是 {path}。")
    if not (producer.strip() and content_id.strip()):
        raise ValueError(f"提供者与编号都不能是空的，收到的是 {producer!r} 和 {content_id!r}。")
    fields = dict.fromkeys(LABEL_FIELDS, "") | {"Label": "1", "ContentProducer": producer, "ProduceID": content_id}
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:TC260="http://www.tc260.org.cn/ns/AIGC/1.0/"><TC260:AIGC>'
        f"{html.escape(json.dumps(fields, ensure_ascii=False))}"
        "</TC260:AIGC></rdf:Description></rdf:RDF></x:xmpmeta>"
    )
    notes = PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", packet)
    with written_whole(path) as partial:
        image.save(partial, format="PNG", pnginfo=notes)
    return Path(path)


def read_label(path: str | Path) -> dict[str, str] | None:
    """读出图像文件里的隐式标识；没有就是 None。

    异常：
        ValueError: 有标识，内容却读不懂。
    来源：第 7.3 节。
    """
    with Image.open(path) as image:
        packet = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp", "")
    packet = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet
    found = re.search(r"<TC260:AIGC>(.*?)</TC260:AIGC>", packet, re.DOTALL)
    try:
        return json.loads(html.unescape(found[1])) if found else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} 里有标识，内容却读不懂：{found[1][:80]}") from error
