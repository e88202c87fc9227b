"""测量 butterfly-clip 与 mini-stable-diffusion，由 evaluate.py 调用。

提示词与图像都是新的，种子不曾用于训练；提示词一半中文，一半英文。
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import torch
from common import MODELS_ROOT
from diffusers import StableDiffusionPipeline
from mini_stable_diffusion import training_images
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from book_utils import (
    Butterfly,
    butterfly_images,
    butterfly_judge,
    frechet_distance,
    get_device,
    grid_image,
    random_butterflies,
    random_caption,
    render_butterfly,
    resolve,
)
from book_utils.butterflies import BACKGROUNDS, ENGLISH_POSITIONS, PATTERNS, POSITIONS, SIZES, WING_COLORS
from book_utils.captions import ATTRIBUTES

DEVICE = get_device()
SEED = 20_000
GUIDANCE_SCALES = (1.0, 2.0, 3.0, 5.0, 7.5)
N_STEPS = 25
NAMES = {"wing_color": "颜色", "pattern": "花纹", "background": "背景", "size": "大小", "position": "位置"}


@torch.no_grad()
def judge_butterflies(images: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """（裁判有没有九成以上把握是蝴蝶，各张的属性）；images 取值 0 到 1。"""
    judge = butterfly_judge().to(DEVICE)
    parts = [judge.describe(part.to(DEVICE)) for part in images.split(500)]
    return torch.cat([part[0].cpu() for part in parts]) > 0.9, [item for part in parts for item in part[1]]


def distinct_butterflies(count: int, seed: int, held_out: bool = False) -> list[Butterfly]:
    """count 只蝴蝶，说明里提到的五个属性两两不全相同。"""
    found = {}
    for butterfly in random_butterflies(count * 3, seed, held_out):
        found.setdefault(tuple(getattr(butterfly, name) for name in ATTRIBUTES), butterfly)
    return list(found.values())[:count]


def write_prompts(butterflies: list[Butterfly], seed: int) -> list[str]:
    """每只蝴蝶一句提示词，五个属性都说；中文与英文交替。"""
    rng = np.random.default_rng(seed)
    return [random_caption(b, rng, ("zh", "en")[i % 2]) for i, b in enumerate(butterflies)]


def write_unseen_prompts(butterflies: list[Butterfly]) -> list[str]:
    """训练时没有用过的句式（其中的“飞”“身后”、flying、backdrop 等字词也没有见过）；中文与英文交替。"""
    return [
        f"身后一片{BACKGROUNDS[b.background][0]}，{POSITIONS[b.position][0]}飞着{SIZES[b.size][0]}个子的蝴蝶，"
        f"它是{WING_COLORS[b.wing_color][0]}的，{PATTERNS[b.pattern]}"
        if i % 2 == 0 else
        f"flying {ENGLISH_POSITIONS[b.position]}: one {b.size} {b.wing_color} {b.pattern} butterfly; "
        f"{b.background} backdrop"
        for i, b in enumerate(butterflies)
    ]


# —— 导出成 ONNX ——

class Computation(torch.nn.Module):
    """网络与一个算式 ``compute(network, *inputs)``，合成一个模块，好交给 torch.onnx.export。"""

    def __init__(self, network: torch.nn.Module, compute: Callable[..., torch.Tensor]):
        super().__init__()
        self.network, self.compute = network, compute

    def forward(self, *inputs):
        return self.compute(self.network, *inputs)


@torch.no_grad()
def onnx_difference(network: torch.nn.Module, compute: Callable, inputs: tuple[torch.Tensor, ...]) -> float:
    """把 ``compute(network, *inputs)`` 导出成 ONNX，用 onnxruntime 算一遍，返回与 PyTorch 的最大差。都在 CPU 上算。"""
    network = network.cpu().eval()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(Computation(network, compute).eval(), inputs, path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [argument.name for argument in session.get_inputs()]
        output, = session.run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))
    return (torch.from_numpy(output) - compute(network, *inputs)).abs().max().item()


def clip_onnx_differences(model: CLIPModel, tokens: torch.Tensor, pixels: torch.Tensor) -> dict[str, float]:
    """小 CLIP 两座塔的特征；tokens (B, L) 与 pixels (B, 3, 64, 64) 是新的说明与图像。"""
    return {
        "text_features": onnx_difference(model, lambda m, ids: m.get_text_features(ids).pooler_output, (tokens,)),
        "image_features": onnx_difference(model, lambda m, x: m.get_image_features(x).pooler_output, (pixels,)),
    }


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


# —— butterfly-clip ——

@torch.no_grad()
def evaluate_retrieval(model, tokenizer, processor, n_sets: int = 5, set_size: int = 100) -> dict:
    """在 set_size 句说明里找图像的那一句，在 set_size 张图像里找说明的那一张：找对的比例，n_sets 组的平均。"""
    def compare(butterflies, language, seed):
        rng = np.random.default_rng(seed)
        texts = [random_caption(b, rng, language) for b in butterflies]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        pictures = [Image.fromarray(render_butterfly(b, 64, seed * 1000 + i).image) for i, b in enumerate(butterflies)]
        pixels = processor(pictures, return_tensors="pt").pixel_values
        logits = model(**tokens.to(model.device), pixel_values=pixels.to(model.device)).logits_per_image.cpu()
        right = torch.arange(len(logits))
        return [(scores.argmax(dim=1) == right).float().mean().item() for scores in (logits, logits.T)]

    retrieval = {}
    for language in ("zh", "en"):
        for key, held_out in ((language, False), (language + "_held_out", True)):
            seeds = range(SEED, SEED + n_sets)
            scores = [compare(distinct_butterflies(set_size, seed, held_out), language, seed) for seed in seeds]
            retrieval[key] = dict(zip(("image_to_text", "text_to_image"), np.mean(scores, axis=0).tolist(), strict=True))
    return retrieval


def evaluate_clip(name: str, n_sets: int = 5, set_size: int = 100) -> dict:
    folder = resolve(name)
    model = CLIPModel.from_pretrained(folder).to(DEVICE).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(folder)
    tokens = tokenizer(["一只红色的蝴蝶，靠左", "a small blue butterfly"], padding="max_length", return_tensors="pt")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(SEED)) * 2 - 1
    return {
        "set_size": set_size,
        "n_sets": n_sets,
        "retrieval": evaluate_retrieval(model, tokenizer, processor, n_sets, set_size),
        "onnx_difference": clip_onnx_differences(model, tokens.input_ids, pixels),
    }


# —— mini-stable-diffusion ——

def psnr(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """各张的峰值信噪比，分贝，形状 (B,)；两者取值 0 到 1。"""
    return -10 * (decoded - images).square().mean(dim=(1, 2, 3)).log10()


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


def agreement(images: torch.Tensor, butterflies: list[Butterfly]) -> dict[str, float]:
    """裁判看到的属性与所要的相同的比例；认不出是蝴蝶的算错。"""
    is_butterfly, found = judge_butterflies(images)
    right = torch.tensor([
        [keep and seen[name] == getattr(wanted, name) for name in NAMES]
        for keep, seen, wanted in zip(is_butterfly.tolist(), found, butterflies, strict=True)
    ]).float()
    rates = dict(zip(NAMES, right.mean(dim=0).tolist(), strict=True))
    both = (right[:, 0] * right[:, 1]).mean().item()
    return {"is_butterfly": is_butterfly.float().mean().item()} | rates | {"color_and_pattern": both}


def sharpness(images: torch.Tensor) -> float:
    """相邻像素之差的均方根：模糊的图小，有噪点的图大。"""
    across, down = images.diff(dim=3).square().mean(), images.diff(dim=2).square().mean()
    return (across + down).sqrt().item()


def spread(images: torch.Tensor) -> float:
    """images：(N, K, 3, 64, 64)，每行是同一句提示词的 K 张。各行里两两之差的均方根，再平均。"""
    return torch.stack([F.pdist(row.flatten(1)).mean() for row in images]).div(images[0, 0].numel() ** 0.5).mean().item()


def nearest(images: torch.Tensor, training: torch.Tensor) -> float:
    """各张到最近的训练图的距离的中位数；缩到 32 × 32 再比。"""
    small = F.interpolate(images, size=(32, 32), mode="area").flatten(1)
    return torch.cat([torch.cdist(p, training).min(dim=1).values for p in small.split(50)]).median().item()


@torch.no_grad()
def features(images: torch.Tensor) -> torch.Tensor:
    """裁判的 128 维特征。"""
    judge = butterfly_judge().to(DEVICE)
    return torch.cat([judge.features(part.to(DEVICE)).cpu() for part in images.split(500)])


def evaluate_mini_stable_diffusion(name: str, n_prompts: int = 300) -> dict:
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


def onnx_line(result: dict) -> str:
    names = {
        "text_features": "文字特征", "image_features": "图像特征",
        "text_encoder": "文本编码器", "unet": "UNet", "vae_decoder": "解码器",
    }
    differences = "，".join(f"{names[part]} {value:.1e}" for part, value in result["onnx_difference"].items())
    return f"- 导出成 ONNX、用 onnxruntime 计算，与 PyTorch 的最大差（要求不超过 1e-3）：{differences}"


def clip_lines(result: dict) -> list[str]:
    """butterfly-clip 的测量结果，写进模型卡。"""
    titles = {"zh": "中文", "en": "英文", "zh_held_out": "中文，留作检验的组合", "en_held_out": "英文，留作检验的组合"}
    return [
        f"在 {result['set_size']} 句各不相同的说明（或 {result['set_size']} 张新画的图）里，头一个就找对的比例，"
        f"{result['n_sets']} 组平均（要求不低于 90%；留作检验的组合另计）：",
        "",
        "| | 由图找文 | 由文找图 |",
        "|---|---|---|",
        *(
            f"| {title} | {scores['image_to_text']:.1%} | {scores['text_to_image']:.1%} |"
            for title, scores in ((title, result["retrieval"][key]) for key, title in titles.items())
        ),
        "",
        onnx_line(result),
    ]


def mini_stable_diffusion_lines(result: dict) -> list[str]:
    """mini-stable-diffusion 的测量结果，写进模型卡。"""
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
