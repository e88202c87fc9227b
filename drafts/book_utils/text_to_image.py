"""由文字生成图像：成批地画，检查提示词，量饱和度（第 6.3 节），以及手写的采样循环（第 6.4.5 节）。"""

import math

import torch

from .guidance import unseen_words


def draw_prompts(
    pipeline, prompts: list[str], seeds: int | list[int] = 0, n_steps: int = 25, guidance_scale: float = 2.0,
    negative_prompt: str | None = None, **options,
) -> torch.Tensor:
    """每句提示词画一张。

    参数：
        pipeline: StableDiffusionPipeline。
        prompts:  提示词；空字符串就是不提要求。太长的会被截断，见 :func:`prompt_notes`。
        seeds:    各张的种子；给一个整数，第 i 张就用 seeds + i。
        n_steps:  步数，1 到训练时的时间步总数。
        guidance_scale: 引导强度 w；不大于 1 就是不引导。
        negative_prompt: 负面提示词，各张共用；不引导时不起作用。
        options:  其余的交给管线，如 height、width、guidance_rescale。
    返回：
        取值 (0, 1) 的图像，形状 (N, 3, H, W)。
    异常：
        ValueError: 没有提示词，种子的个数不对，步数、强度或边长不合要求。
    来源：第 6.3 节。
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts 应是一个列表，里面至少有一句话，收到的是 {prompts!r}。")
    if not 1 <= n_steps <= pipeline.scheduler.config.num_train_timesteps:
        raise ValueError(f"n_steps 应在 1 到 {pipeline.scheduler.config.num_train_timesteps} 之间，收到的是 {n_steps}。")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale 应是有限的数，收到的是 {guidance_scale}。")
    if any(options.get(side) is not None and (options[side] < 8 or options[side] % 8) for side in ("height", "width")):
        raise ValueError(
            f"height 与 width 应是 8 的正整数倍，收到的是 {options.get('height')} 和 {options.get('width')}。"
        )
    if not isinstance(seeds, int) and len(seeds) != len(prompts):
        raise ValueError(f"有 {len(prompts)} 句提示词，种子却有 {len(seeds)} 个。")
    if isinstance(seeds, int):
        seeds = [seeds + i for i in range(len(prompts))]
    images = []
    for start in range(0, len(prompts), 25):            # 一次至多 25 句，省内存
        part = prompts[start : start + 25]
        output = pipeline(
            part, num_inference_steps=n_steps, guidance_scale=guidance_scale, output_type="np",
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + 25]],
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(part), **options,
        )
        images.append(torch.from_numpy(output.images).permute(0, 3, 1, 2))
    return torch.cat(images)


def prompt_notes(tokenizer, prompt: str) -> list[str]:
    """提示词里有什么会读不到或读不懂：被截掉的部分，随书的词表没有见过的词。都没有就是空列表。

    参数：
        tokenizer: mini-stable-diffusion 或 butterfly-clip 的 CLIPTokenizer。
        prompt:    一句提示词。
    返回：
        给读者看的话，每句说一件事。
    来源：第 6.3 节。
    """
    notes = []
    room = tokenizer.model_max_length - 2               # 句首、句尾各占一个
    spans = tokenizer(
        prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    ).offset_mapping
    if len(spans) > room:
        notes.append(f"太长：共 {len(spans)} 个词元，只读前 {room} 个，读不到“{prompt[spans[room][0]:]}”")
    if unseen := unseen_words(tokenizer, prompt):
        notes.append(f"没有学过：{'、'.join(unseen)}")
    return notes


def saturation(images: torch.Tensor) -> torch.Tensor:
    """各张图的饱和度（HSV 里的 S，各像素平均），形状 (B,)，取值 0（灰）到 1（最艳）。

    参数：
        images: 彩色图像，形状 (B, 3, H, W)，取值 (0, 1)。
    异常：
        ValueError: 形状不对。
    来源：第 6.3 节。
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images 的形状应是 (B, 3, H, W)，收到的是 {tuple(images.shape)}。")
    high, low = images.amax(dim=1), images.amin(dim=1)
    return ((high - low) / high.clamp(min=1e-6)).mean(dim=(1, 2))


def rescale_guidance(guided: torch.Tensor, conditional: torch.Tensor, amount: float) -> torch.Tensor:
    """把引导后的预测的标准差，向有条件的预测的标准差调回几成。

    参数：
        guided:      引导后的预测，形状 (B, C, H, W)。
        conditional: 有条件的预测，形状相同。
        amount:      调回几成，0（不调）到 1（全调回去）。
    返回：
        形状与 guided 相同。
    异常：
        ValueError: 两个形状不同，或 amount 不在 0 与 1 之间。
    来源：第 6.3 节；Lin 等（2024）的 3.4 节。
    """
    if guided.shape != conditional.shape:
        raise ValueError(f"两份预测的形状应相同，收到的是 {tuple(guided.shape)} 和 {tuple(conditional.shape)}。")
    if not 0 <= amount <= 1:
        raise ValueError(f"amount 应在 0 与 1 之间，收到的是 {amount}。")
    target = conditional.std(dim=(1, 2, 3), keepdim=True)
    actual = guided.std(dim=(1, 2, 3), keepdim=True)
    return amount * (guided * (target / actual)) + (1 - amount) * guided


@torch.no_grad()
def sample_prompts(
    pipeline, prompts: list[str], latents: torch.Tensor, n_steps: int = 25, guidance_scale: float = 2.0,
    guidance_rescale: float = 0.0, interval: tuple[float, float] = (0.0, 1.0),
) -> torch.Tensor:
    """手写的文生图循环，带无分类器引导；interval 是 (0, 1) 时与 StableDiffusionPipeline 逐位相同。

    参数：
        pipeline: StableDiffusionPipeline，只用它的部件；调度器不补噪声（如 DDIM、DPM-Solver++）。
        prompts:  提示词。
        latents:  起点，标准高斯噪声，形状 (N, C, H', W')，每句一份。
        n_steps:  步数，1 到训练时的时间步总数。
        guidance_scale: 引导强度 w；不大于 1 就是不引导。
        guidance_rescale: 把标准差调回去几成，0 到 1（第 6.3 节）。
        interval: 只在 t/T 落在这个区间时引导，两个 0 到 1 的数。
    返回：
        取值 (0, 1) 的图像，形状 (N, 3, H, W)。
    异常：
        ValueError: 没有提示词，起点与提示词的个数不同，或步数、强度、区间不合要求。
    来源：第 6.4.5 节。
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts 应是一个列表，里面至少有一句话，收到的是 {prompts!r}。")
    if len(prompts) != len(latents):
        raise ValueError(f"有 {len(prompts)} 句提示词，起点却有 {len(latents)} 份。")
    if not 1 <= n_steps <= pipeline.scheduler.config.num_train_timesteps:
        raise ValueError(f"n_steps 应在 1 到 {pipeline.scheduler.config.num_train_timesteps} 之间，收到的是 {n_steps}。")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale 应是有限的数，收到的是 {guidance_scale}。")
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale 应在 0 与 1 之间，收到的是 {guidance_rescale}。")
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"interval 应是（低, 高），0 ≤ 低 ≤ 高 ≤ 1，收到的是 {interval}。")
    scheduler, vae, device = pipeline.scheduler, pipeline.vae, pipeline.unet.device

    def encode(texts):
        tokens = pipeline.tokenizer(
            texts, padding="max_length", max_length=pipeline.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        )
        return pipeline.text_encoder(tokens.input_ids.to(device))[0]

    conditional_text = encode(prompts)
    both_texts = torch.cat([encode([""] * len(prompts)), conditional_text])
    scheduler.set_timesteps(n_steps, device=device)
    latents = latents.to(device, conditional_text.dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        if guidance_scale > 1 and interval[0] <= float(t) / scheduler.config.num_train_timesteps <= interval[1]:
            model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            unconditional, conditional = pipeline.unet(model_input, t, both_texts).sample.chunk(2)
            prediction = unconditional + guidance_scale * (conditional - unconditional)
            if guidance_rescale > 0:
                prediction = rescale_guidance(prediction, conditional, guidance_rescale)
        else:
            prediction = pipeline.unet(scheduler.scale_model_input(latents, t), t, conditional_text).sample
        latents = scheduler.step(prediction, t, latents).prev_sample
    return (vae.decode(latents / vae.config.scaling_factor).sample * 0.5 + 0.5).clamp(0, 1).float().cpu()
