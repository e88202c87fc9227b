"""配方：mini-stable-diffusion，看中文或英文提示词画 64 × 64 的蝴蝶（第六、七、九章）。

与 Stable Diffusion 同样的三步，先要有 butterfly-clip：
1. 训练自编码器，把图像 (3, 64, 64) 压成潜变量 (4, 16, 16)；
2. 把训练图一次全部编码，存下潜变量；
3. 在潜变量上训练条件 UNet，文字编码器取自 butterfly-clip，不再改动。

用法：python recipes/mini_stable_diffusion.py
      python recipes/mini_stable_diffusion.py --stage autoencoder    只做第一步，这时还不需要 butterfly-clip
中断后再运行，从中断的那一步接着做；--max-steps 在每一步里都至多走这么多步，第一步的两趟没有走完就不做后面的。
"""

import hashlib
import math
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from butterfly_clip import encode, write_captions
from common import MODELS_ROOT, load_as_float32, parser, save_model
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from measuring import (
    DEVICE,
    NAMES,
    SEED,
    agreement,
    features,
    nearest,
    onnx_difference,
    onnx_line,
    psnr,
    sharpness,
    spread,
    write_prompts,
    write_unseen_prompts,
)
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from book_utils import (
    History,
    butterfly_images,
    fit,
    frechet_distance,
    grid_image,
    random_butterflies,
    resolve,
    set_seed,
)
from book_utils.training import load_state, save_state
from book_utils.worlds.butterflies import ATTRIBUTES

NAME = "mini-stable-diffusion"
PURPOSE = "看中文或英文提示词画 64×64 的蝴蝶：StableDiffusionPipeline（第六、七、九章）"
DATA = (
    "蝴蝶世界 64×64：自编码器用 24,000 只（seed=31），UNet 用 40,000 只（seed=32）、每只八句说明，"
    "都不含留作检验的颜色 × 花纹组合；文字编码器取自 butterfly-clip"
)

IMAGE_SIZE = 64
COMMAND = "python recipes/mini_stable_diffusion.py"

# 第一步：自编码器
VAE_CHANNELS = (32, 64, 64)     # 三级，边长减半两次：64 → 32 → 16
VAE_IMAGES, VAE_BATCH = 24_000, 8
# 两趟，各是（轮数，学习率，平方误差的权重，KL 的权重）。第一趟还原到 26.6 dB；
# 第二趟从它的权重出发，步子小，更看重平方误差，KL 放得很轻，专磨翅缘与花纹
VAE_PASSES = ((3, 1e-3, 4.0, 2e-6), (2, 5e-4, 10.0, 1e-7))

# 第二、三步：条件 UNet
UNET_CHANNELS = (64, 128, 192)  # 边长 16、8、4 三级
N_IMAGES, N_EPOCHS, BATCH_SIZE = 40_000, 10, 32
N_CAPTIONS = 8                  # 每张图的说明，一半中文，一半英文
DROP_CAPTION = 0.1              # 这么多的说明换成空的，采样时才能用无分类器引导
SNR_CAP = 5.0

GUIDANCE_SCALES = (1.0, 2.0, 3.0, 5.0, 7.5)     # 测量时用这几种
N_STEPS = 25


# —— 第一步 ——

def build_autoencoder() -> AutoencoderKL:
    """AutoencoderKL，(3, 64, 64) ↔ (4, 16, 16)。

    归一化每组 4 到 8 个通道：一组只有一个通道时，大片的纯色会被减成零，颜色就还原不准。
    """
    levels = len(VAE_CHANNELS)
    return AutoencoderKL(
        sample_size=IMAGE_SIZE, block_out_channels=VAE_CHANNELS, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8,
    )


def autoencoder_loss(vae, images, generator, mse_weight, kl_weight):
    """images：uint8 (B, 3, 64, 64)。绝对误差 + mse_weight × 平方误差 + kl_weight × KL。

    绝对误差让平坦处的颜色准；平方误差盯住翅缘与花纹，PSNR 就由它算出。KL 的权重很小，
    只求潜变量大小适中、略有噪声也能还原：UNet 生成的潜变量总有些误差。
    """
    x = images / 127.5 - 1
    latents = vae.encode(x).latent_dist
    noise = torch.randn(latents.mean.shape, generator=generator).to(x.device)
    decoded = vae.decode(latents.mean + latents.std * noise).sample
    return F.l1_loss(decoded, x) + mse_weight * F.mse_loss(decoded, x) + kl_weight * latents.kl().mean()


def train_autoencoder(options) -> tuple[AutoencoderKL, History, bool]:
    """第一步，两趟；训练好的部分只从断点读回。最后一项：两趟是否都走完了。"""
    set_seed(0)
    vae = build_autoencoder()
    images = butterfly_images(VAE_IMAGES, IMAGE_SIZE, seed=31)[0]
    total = History([], 0.0)
    for number, (n_epochs, lr, mse_weight, kl_weight) in enumerate(VAE_PASSES, start=1):
        history = fit(
            vae, (images,), partial(autoencoder_loss, mse_weight=mse_weight, kl_weight=kl_weight),
            n_epochs=n_epochs, batch_size=VAE_BATCH, lr=lr, lr_decay=True, ema_decay=0.998, seed=number - 1,
            device=options.device, max_steps=options.max_steps,
            checkpoint=options.checkpoint.with_stem(f"{options.checkpoint.stem}-autoencoder-{number}"),
        )
        total = History(total.losses + history.losses, total.seconds + history.seconds)
        if len(history.losses) < n_epochs * math.ceil(VAE_IMAGES / VAE_BATCH):
            return vae, total, False
    return vae.requires_grad_(False), total, True


# —— 第二步 ——

def training_images() -> torch.Tensor:
    """UNet 的训练图，uint8，形状 (N_IMAGES, 3, 64, 64)；测量时也用它来查有没有背下训练图。"""
    return butterfly_images(N_IMAGES, IMAGE_SIZE, seed=32)[0]


@torch.no_grad()
def training_latents(vae: AutoencoderKL, cache: Path, device: str) -> torch.Tensor:
    """训练图的潜变量，float16，形状 (N_IMAGES, 4, 16, 16)，还没有乘 scaling_factor；存在 cache 里。

    取均值而不抽样：后验的标准差只有均值的百分之几。换了自编码器或张数，就重新编码。
    """
    weights = b"".join(value.cpu().numpy().tobytes() for value in vae.state_dict().values())
    made_from = {"vae": hashlib.sha256(weights).hexdigest(), "n_images": N_IMAGES}
    if cache.exists():
        tensors, notes = load_state(cache)
        if notes == made_from:
            return tensors["latents"]
    latents = torch.cat([
        vae.encode(batch.to(device) / 127.5 - 1).latent_dist.mean.half().cpu()
        for batch in tqdm(training_images().split(64), desc="编码", unit="批")
    ])
    save_state(cache, {"latents": latents}, made_from)
    return latents


# —— 第三步 ——

def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion 的噪声调度，调成最后一步全是噪声，并预测 v。

    原来的调度在最后一步还留着一点信号，训练时网络从那里读出整张图的明暗；采样从纯噪声开始，
    没有这点信号，背景就偏灰，画不出纯黑与纯白（Lin 等，2024）。全是噪声时预测 ε 没有意义，所以预测 v；
    采样必须从最后一步走起，所以时间步取 trailing。
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True,
        prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, steps_offset=1,
    )


def build_unet(text_width: int) -> UNet2DConditionModel:
    """条件 UNet；8 × 8 与 4 × 4 两级有交叉注意力。

    16 × 16 那一级只有卷积：它占去大半计算，而颜色、花纹、位置这些从文字来的消息，低分辨率上就说得清。
    """
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4, in_channels=4, out_channels=4, block_out_channels=UNET_CHANNELS,
        layers_per_block=1, cross_attention_dim=text_width, norm_num_groups=16,
        attention_head_dim=4,       # diffusers 里这个名字指的是头数
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


class UNetLoss:
    """在加噪的潜变量上预测 v 的损失，可交给 ``fit``。

    参数：
        text_encoder: 冻结的文字编码器。
        empty:        空提示词的词元编号，形状 (1, L)。
        scheduler:    :func:`build_scheduler`。
    """

    def __init__(self, text_encoder, empty, scheduler):
        self.text_encoder, self.empty, self.scheduler = text_encoder, empty, scheduler
        self.snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)

    def __call__(self, unet, latents, tokens, generator):
        """latents：float16 (B, 4, 16, 16)，已缩放到标准差为 1；tokens：(B, K, L)，每张图的 K 句说明。"""
        count, device = len(latents), latents.device
        picks = torch.randint(tokens.shape[1], (count,), generator=generator).to(device)
        tokens = tokens[torch.arange(count, device=device), picks].long()
        drop = (torch.rand(count, 1, generator=generator) < DROP_CAPTION).to(device)
        tokens = torch.where(drop, self.empty.to(device), tokens)
        with torch.no_grad():
            text = self.text_encoder(tokens).last_hidden_state

        # 把 0 … 1000 分成 B 段，每段抽一个时间步：每批都有各种噪声量，损失的起伏小得多
        spots = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        n_timesteps = self.scheduler.config.num_train_timesteps
        timesteps = (spots * n_timesteps).long().clamp(max=n_timesteps - 1)     # 舍入可能恰好到 1000
        # 压低噪声极少的时间步：权重 min(SNR + 1, γ + 1) / (SNR + 1)。min-SNR（Hang 等，2023）的
        # min(SNR, γ) / (SNR + 1) 在纯噪声处是 0，而颜色与位置正是在那里定下的，所以各加 1
        snr = self.snr[timesteps]
        weights = ((snr + 1).clamp(max=SNR_CAP + 1) / (snr + 1)).to(device)
        timesteps = timesteps.to(device)

        x0 = latents.float()
        noise = torch.randn(x0.shape, generator=generator).to(device)
        noisy = self.scheduler.add_noise(x0, noise, timesteps)
        target = self.scheduler.get_velocity(x0, noise, timesteps)
        errors = (unet(noisy, timesteps, text).sample - target).square().mean(dim=(1, 2, 3))
        return (weights * errors).mean()


def main(arguments: list[str] | None = None):
    options = parser(__doc__.splitlines()[0], NAME)
    options.add_argument("--stage", choices=("autoencoder", "all"), default="all", help="autoencoder：只做第一步")
    options.add_argument("--clip", type=Path, help="butterfly-clip 的文件夹，默认用随书的")
    options = options.parse_args(arguments)
    if options.stage == "all":                  # 没有 butterfly-clip 就早些说，不要等自编码器训练完
        clip = options.clip or Path(resolve("butterfly-clip"))
        if not clip.is_dir():
            raise FileNotFoundError(f"没有找到 butterfly-clip 的文件夹 {clip}。请先运行 recipes/butterfly_clip.py。")
    vae, vae_history, finished = train_autoencoder(options)
    if options.stage == "autoencoder" or not finished:
        return                                  # 自编码器没有训练完，潜变量还会变，UNet 学了也不算数

    cache = options.checkpoint.with_stem(options.checkpoint.stem + "-latents")
    latents = training_latents(vae, cache, options.device)
    scale = 1 / latents.float().std().item()            # 缩放到标准差为 1，噪声调度才合适
    vae.register_to_config(scaling_factor=scale)
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    text_encoder = CLIPModel.from_pretrained(clip).text_model.to(options.device).requires_grad_(False)
    texts, _ = write_captions(random_butterflies(N_IMAGES, seed=32), N_CAPTIONS, seed=32)
    tokens = encode(tokenizer, texts).view(N_IMAGES, N_CAPTIONS, -1).to(torch.int16)

    set_seed(1)
    unet, scheduler = build_unet(text_encoder.config.hidden_size), build_scheduler()
    history = fit(
        unet, (latents * scale, tokens), UNetLoss(text_encoder, encode(tokenizer, [""]), scheduler),
        n_epochs=N_EPOCHS, batch_size=BATCH_SIZE, lr=6e-4, lr_decay=True, ema_decay=0.9995,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        pipeline = StableDiffusionPipeline(
            vae=vae.cpu().half(), text_encoder=text_encoder.cpu().half(), tokenizer=tokenizer,
            unet=unet.cpu().half(), scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )

        def save_weights(folder):
            pipeline.save_pretrained(folder)
            load_as_float32(folder / "text_encoder" / "config.json")

        save_model(options.output, save_weights, history, options.device, COMMAND, autoencoder=vae_history)


# —— 测量 ——

def pipeline_onnx_differences(pipeline, prompts: list[str]) -> dict[str, float]:
    """管线的三个网络；输入是 prompts 与种子固定的噪声。"""
    tokens = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    text = pipeline.text_encoder.cpu()(tokens).last_hidden_state.detach()
    latents = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(SEED))
    timesteps = torch.linspace(0, 999, len(prompts)).long()
    return {
        "text_encoder": onnx_difference(pipeline.text_encoder, lambda m, ids: m(ids).last_hidden_state, (tokens,)),
        "unet": onnx_difference(pipeline.unet, lambda m, x, t, text: m(x, t, text).sample, (latents, timesteps, text)),
        "vae_decoder": onnx_difference(pipeline.vae, lambda m, z: m.decode(z).sample, (latents,)),
    }


@torch.no_grad()
def reconstruct(vae, images: torch.Tensor) -> torch.Tensor:
    """images（uint8）经自编码器压缩再还原，取值 0 到 1。"""
    latents = (vae.encode((batch / 127.5 - 1).to(DEVICE)).latent_dist.mean for batch in images.split(50))
    return torch.cat([(vae.decode(part).sample.cpu() / 2 + 0.5).clamp(0, 1) for part in latents])


def reconstruction(vae, images: torch.Tensor) -> float:
    """自编码器还原 images（uint8）的平均 PSNR，分贝。"""
    return psnr(reconstruct(vae, images), images / 255).mean().item()


def generate(pipeline, prompts: list[str], guidance_scale: float, seed: int = SEED) -> torch.Tensor:
    """每句提示词一张图，取值 0 到 1，形状 (len(prompts), 3, 64, 64)；第 i 张的种子是 seed + i。"""
    images = []
    for start in tqdm(range(0, len(prompts), 50), desc=f"采样，引导 {guidance_scale:g}", unit="批"):
        part = prompts[start : start + 50]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        output = pipeline(
            part, num_inference_steps=N_STEPS, guidance_scale=guidance_scale, generator=generators, output_type="np",
        )
        images.append(torch.from_numpy(output.images).permute(0, 3, 1, 2))
    return torch.cat(images)


def measure(name: str = NAME, n_prompts: int = 300) -> dict:
    pipeline = StableDiffusionPipeline.from_pretrained(resolve(name)).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    real, butterflies = butterfly_images(n_prompts, 64, seed=SEED)
    result = {
        "n_prompts": n_prompts,
        "n_steps": N_STEPS,
        "psnr": reconstruction(pipeline.vae, real),
        "psnr_held_out": reconstruction(pipeline.vae, butterfly_images(n_prompts, 64, SEED + 1, held_out=True)[0]),
    }

    prompts = write_prompts(butterflies, SEED)
    samples = {scale: generate(pipeline, prompts, scale) for scale in GUIDANCE_SCALES}
    result["guidance"] = {scale: agreement(images, butterflies) for scale, images in samples.items()}
    best = max(GUIDANCE_SCALES, key=lambda scale: sum(result["guidance"][scale][n] for n in NAMES))
    images = samples[best]
    result["best_guidance"] = best
    result["zh"] = agreement(images[::2], butterflies[::2])
    result["en"] = agreement(images[1::2], butterflies[1::2])
    result["unseen_phrasing"] = agreement(generate(pipeline, write_unseen_prompts(butterflies), best), butterflies)
    new = random_butterflies(n_prompts, SEED + 1, held_out=True)
    result["held_out"] = agreement(generate(pipeline, write_prompts(new, SEED + 1), best), new)

    # 裁判看真图的正确率，是上面各数的上限
    result["judge_on_renders"] = agreement(real / 255, butterflies)
    result["sharpness"] = sharpness(images)
    result["sharpness_of_renders"] = sharpness(real / 255)
    # 解码器能画到多清晰，是生成的图的上限；八张的平均是什么都没学会时的样子
    result["sharpness_of_reconstructions"] = sharpness(reconstruct(pipeline.vae, real))
    result["sharpness_of_averages"] = sharpness((real / 255)[: n_prompts // 8 * 8].unflatten(0, (-1, 8)).mean(dim=1))
    more = butterfly_images(n_prompts, 64, seed=SEED + 2)[0] / 255
    result["distance"] = frechet_distance(features(images), features(more))
    result["distance_of_renders"] = frechet_distance(features(real / 255), features(more))

    # 同一句提示词 8 个种子，与同样属性、翅形和角度随机的 8 张真图相比
    chosen = butterflies[:12]
    eight = generate(pipeline, [prompt for prompt in prompts[:12] for _ in range(8)], best, seed=SEED + 5000)
    fixed = [{name: getattr(b, name) for name in ATTRIBUTES} for b in chosen]
    truth = torch.stack([butterfly_images(8, 64, seed=SEED + i, **f)[0] / 255 for i, f in enumerate(fixed)])
    result["diversity"] = spread(eight.unflatten(0, (12, 8)))
    result["diversity_of_renders"] = spread(truth)
    training = torch.cat([
        F.interpolate(part / 255, size=(32, 32), mode="area").flatten(1) for part in training_images().split(500)
    ])
    result["nearest_training_image"] = nearest(images, training)
    result["nearest_training_image_of_new_renders"] = nearest(real / 255, training)

    seconds = []
    for prompt in prompts[:6]:                          # 第一次有预热，不算
        started = time.perf_counter()
        pipeline(prompt, num_inference_steps=N_STEPS, guidance_scale=max(best, 2.0))
        seconds.append(time.perf_counter() - started)
    result["seconds_per_image"] = statistics.median(seconds[1:])

    grid_image(images[:100], nrow=10).save(Path(MODELS_ROOT) / name / "samples.png")
    result["sample_prompts"] = prompts[:100]
    result["onnx_difference"] = pipeline_onnx_differences(pipeline, prompts[:4])
    return result


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    columns = {"is_butterfly": "是蝴蝶"} | NAMES | {"color_and_pattern": "颜色与花纹都对"}
    rows = {f"引导 {float(scale):g}": rates for scale, rates in result["guidance"].items()}
    at = f"引导 {result['best_guidance']:g}"
    rows |= {
        f"{at}，中文": result["zh"], f"{at}，英文": result["en"], f"{at}，没有见过的句式": result["unseen_phrasing"],
        f"{at}，留作检验的组合": result["held_out"], "新画的真图": result["judge_on_renders"],
    }
    return [
        f"- 自编码器还原新图的 PSNR：{result['psnr']:.2f} dB（要求不低于 28），"
        f"留作检验的组合 {result['psnr_held_out']:.2f} dB",
        f"- 一张图，{result['n_steps']} 步，有引导：{result['seconds_per_image']:.2f} 秒（要求 3 秒以内）",
        f"- 清晰程度（相邻像素之差的均方根）：{result['sharpness']:.4f}；新画的图 {result['sharpness_of_renders']:.4f}，"
        f"新画的图经自编码器还原 {result['sharpness_of_reconstructions']:.4f}，"
        f"新画的图每八张平均 {result['sharpness_of_averages']:.4f}",
        f"- 同一句提示词 8 张之间的差别：{result['diversity']:.3f}，同样属性的新图 {result['diversity_of_renders']:.3f}",
        f"- 到最近的训练图的距离（中位数）：{result['nearest_training_image']:.2f}，"
        f"新画的图 {result['nearest_training_image_of_new_renders']:.2f}",
        f"- 与新画的图的 Fréchet 距离（裁判的特征）：{result['distance']:.2f}，"
        f"两批新画的图之间 {result['distance_of_renders']:.2f}",
        onnx_line(result),
        "",
        f"{result['n_prompts']} 句提示词（一半中文），裁判看到的与所要的相同的比例"
        "（要求：颜色、背景 95%，花纹 90%，大小、位置 85%，留作检验的组合颜色与花纹都对 80%）：",
        "",
        "| | " + " | ".join(columns.values()) + " |",
        "|---|" + "---|" * len(columns),
        *(f"| {title} | " + " | ".join(f"{rates[c]:.1%}" for c in columns) + " |" for title, rates in rows.items()),
        "",
        f"前 100 句的图，没有挑选（{at}，从左到右、从上到下）：",
        "",
        "![100 句提示词各一张图](samples.png)",
        "",
        *(f"{i}. {prompt}" for i, prompt in enumerate(result["sample_prompts"], start=1)),
    ]


if __name__ == "__main__":
    main()
