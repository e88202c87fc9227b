"""测量第 6.3、6.4 节要画许多张才看得准的几件事；由 mini_stable_diffusion.py 的 measure() 调用。

引导与饱和，调度器与步数，零终端信噪比与挑时间步的办法，“不是”与负面提示词，交叉注意力，自编码器。
结果在 evaluation.json 的 "studies" 之下。两核的 CPU 上要五六分钟。
"""

import math
import time

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from measuring import DEVICE, SEED, agreement, judge_butterflies, psnr, sharpness, write_prompts
from torch.nn import functional as F
from tqdm import tqdm

from book_utils import (
    AttentionMaps,
    attention_map,
    butterfly_images,
    caption,
    draw_prompts,
    fish_images,
    mnist_tensors,
    random_butterflies,
    render_butterfly,
    sample_prompts,
    saturation,
    word_positions,
)
from book_utils.worlds.butterflies import BACKGROUNDS, ENGLISH_POSITIONS, PATTERNS, POSITIONS, SIZES, WING_COLORS

BEST = 2.0                                  # 模型卡里最好的引导强度
N_STEPS = 25
N_GUIDANCE = 32                             # 每种引导画这么多张
PLAIN_SCALES = (1.0, 2.0, 3.0, 5.0, 7.5)
REMEDIES = {"rescale": {"guidance_rescale": 0.7}, "interval": {"interval": (0.2, 0.8)}}
REMEDY_SCALES = (5.0, 7.5)

N_SCHEDULERS = 24                           # 每种调度器、每种步数画这么多张
SCHEDULERS = {
    "DDIM": DDIMScheduler,
    "欧拉法": EulerDiscreteScheduler,
    "欧拉法，补噪声": EulerAncestralDiscreteScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}
STEPS = (5, 10, 25, 50)

N_TERMINAL = 16                             # 黑背景、白背景各画这么多张
N_NEGATION = 24
N_ATTENTION = 64
TIMESTEPS = (999, 800, 600, 400, 200)
N_WALKS = 32


def start_latents(pipeline, n_images: int, seed: int) -> torch.Tensor:
    """起点：标准高斯噪声，形状 (n_images, 4, 16, 16)；第 i 张的种子是 seed + i，与管线逐张抽取的相同。"""
    shape = (1, pipeline.unet.config.in_channels, pipeline.unet.config.sample_size, pipeline.unet.config.sample_size)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(n_images)])


def clipped(images: torch.Tensor) -> float:
    """正好是 0 或 1 的数所占的比例：多半是解码之后超出了范围，被截断的。"""
    return ((images == 0) | (images == 1)).float().mean().item()


def measure_guidance(pipeline) -> dict:
    """引导强度与饱和，以及两种补救；所有设置用同样的提示词和起点。"""
    real, butterflies = butterfly_images(N_GUIDANCE, 64, seed=SEED + 10)
    prompts, latents = write_prompts(butterflies, SEED + 10), start_latents(pipeline, N_GUIDANCE, SEED + 10)

    def row(images) -> dict:
        return agreement(images, butterflies) | {
            "saturation": saturation(images).mean().item(), "clipped": clipped(images), "sharpness": sharpness(images),
        }

    def drawn(scale, **options):
        return sample_prompts(pipeline, prompts, latents, N_STEPS, scale, **options)

    settings = [("plain", scale, {}) for scale in PLAIN_SCALES]
    settings += [(name, scale, options) for name, options in REMEDIES.items() for scale in REMEDY_SCALES]
    table = {"plain": {}} | {name: {} for name in REMEDIES}
    for name, scale, options in tqdm(settings, desc="引导", unit="种"):
        table[name][f"{scale:g}"] = row(drawn(scale, **options))
    return {"n_images": N_GUIDANCE, "n_steps": N_STEPS, "real": row(real / 255)} | table


def measure_schedulers(pipeline) -> dict:
    """五种调度器、四种步数：画对的比例，离自己 50 步的图多远（均方根），一张要几秒。"""
    butterflies = random_butterflies(N_SCHEDULERS, SEED + 11)
    prompts, original = write_prompts(butterflies, SEED + 11), pipeline.scheduler
    table = {}
    with tqdm(total=len(SCHEDULERS) * len(STEPS), desc="调度器", unit="种") as progress:
        for name, kind in SCHEDULERS.items():
            pipeline.scheduler = kind.from_config(original.config)
            images, seconds = {}, {}
            for n_steps in STEPS:
                started = time.perf_counter()
                images[n_steps] = draw_prompts(pipeline, prompts, SEED + 11, n_steps, BEST)
                seconds[n_steps] = (time.perf_counter() - started) / N_SCHEDULERS
                progress.update()
            last = images[STEPS[-1]]
            table[name] = {
                str(n_steps): agreement(images[n_steps], butterflies) | {
                    "gap": (images[n_steps] - last).square().mean().sqrt().item(), "seconds": seconds[n_steps],
                }
                for n_steps in STEPS
            }
    pipeline.scheduler = original
    return {"n_images": N_SCHEDULERS, "guidance_scale": BEST, "table": table}


def rim(images: torch.Tensor) -> float:
    """最外一圈（四个像素宽）的平均亮度。"""
    inner = torch.zeros(images.shape[-2:], dtype=torch.bool)
    inner[4:-4, 4:-4] = True
    return images[..., ~inner].mean().item()


def measure_terminal(pipeline, n_steps: int = 10) -> dict:
    """零终端信噪比与 trailing，有与没有：黑背景、白背景的图，边上有多亮。"""
    original = pipeline.scheduler
    sets = {
        background: butterfly_images(N_TERMINAL, 64, seed=SEED + 12, background=background) for background in ("black", "white")
    }
    table = {}
    for spacing in ("trailing", "leading"):
        for zero_snr in (True, False):
            pipeline.scheduler = DDIMScheduler.from_config(
                original.config, timestep_spacing=spacing, rescale_betas_zero_snr=zero_snr
            )
            row = {}
            for background, (_, butterflies) in sets.items():
                images = draw_prompts(pipeline, write_prompts(butterflies, SEED + 12), SEED + 12, n_steps, BEST)
                row[background] = {"rim": rim(images), "background": agreement(images, butterflies)["background"]}
            table[f"{spacing}{'+zero' if zero_snr else ''}"] = row
    pipeline.scheduler = original
    real = {background: rim(images / 255) for background, (images, _) in sets.items()}
    return {"n_images": N_TERMINAL, "n_steps": n_steps, "real": real, "table": table}


def measure_negation(pipeline) -> dict:
    """画出红蝴蝶的比例：不提颜色，说“不是红色”，以及把红色写进负面提示词。"""
    settings = {
        "unsaid": ("一只蝴蝶", None), "red": ("一只红色的蝴蝶", None),
        "not_red": ("一只不是红色的蝴蝶", None), "negative": ("一只蝴蝶", "一只红色的蝴蝶"),
    }
    result = {"n_images": N_NEGATION}
    for name, (prompt, negative_prompt) in settings.items():
        images = draw_prompts(
            pipeline, [prompt] * N_NEGATION, SEED + 13, N_STEPS, BEST, negative_prompt=negative_prompt
        )
        is_butterfly, found = judge_butterflies(images)
        red = [keep and seen["wing_color"] == "red" for keep, seen in zip(is_butterfly.tolist(), found, strict=True)]
        result[name] = {"red": sum(red) / N_NEGATION, "is_butterfly": is_butterfly.float().mean().item()}
    return result


def words_of(butterfly, language: str) -> dict[str, tuple[str, bool]]:
    """说明里说各个属性的词，以及要不要找最后一次出现的（背景在句末，可能与翅膀同色）。"""
    if language == "zh":
        return {
            "wing_color": (WING_COLORS[butterfly.wing_color][0], False), "pattern": (PATTERNS[butterfly.pattern], False),
            "butterfly": ("蝴蝶", False), "size": (SIZES[butterfly.size][0], False),
            "position": (POSITIONS[butterfly.position][0], False),
            "background": (BACKGROUNDS[butterfly.background][0], True),
        }
    return {
        "wing_color": (butterfly.wing_color, False), "pattern": (butterfly.pattern, False),
        "butterfly": ("butterfly", False), "size": (butterfly.size, False),
        "position": (ENGLISH_POSITIONS[butterfly.position], False), "background": (butterfly.background, True),
    }


@torch.no_grad()
def measure_attention(pipeline) -> dict:
    """真图加噪，看每个词的注意力有几成落在真的蝴蝶里，除以蝴蝶占画面的几成；大于 1 就是偏向蝴蝶。

    中文、英文的说明各一半；最细的一级（8 × 8）的三层平均，每张图的份量相同。
    """
    tokenizer, unet, vae, scheduler = pipeline.tokenizer, pipeline.unet, pipeline.vae, pipeline.scheduler
    butterflies = random_butterflies(N_ATTENTION, SEED + 14)
    renders = [render_butterfly(b, 64, SEED * 10 + i) for i, b in enumerate(butterflies)]
    languages = ["zh" if i % 2 == 0 else "en" for i in range(N_ATTENTION)]
    prompts = [caption(b, language) for b, language in zip(butterflies, languages, strict=True)]
    x0 = torch.stack([torch.from_numpy(render.image) for render in renders]).permute(0, 3, 1, 2).to(DEVICE) / 127.5 - 1
    masks = torch.stack([torch.from_numpy(render.mask) for render in renders]).float()[:, None]
    latents = vae.encode(x0).latent_dist.mean * vae.config.scaling_factor
    noise = start_latents(pipeline, N_ATTENTION, SEED + 14).to(DEVICE)
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(DEVICE)
    text = pipeline.text_encoder(tokens).last_hidden_state

    def watch(t) -> AttentionMaps:
        recorder = AttentionMaps(unet)
        unet(scheduler.add_noise(latents, noise, torch.full((N_ATTENTION,), t, device=DEVICE)), t, text)
        recorder.remove()
        return recorder

    # 只看最细的一级，随书模型是 8 × 8；掩膜也缩到那么大，落在格子里几成算几成
    pixels = max(recorded[0].shape[1] for recorded in watch(0).maps.values())
    masks = F.interpolate(masks, size=(math.isqrt(pixels),) * 2, mode="area")[:, 0]
    share = masks.mean(dim=(1, 2))

    def ratio(recorder, name, layers=None) -> torch.Tensor:
        """各张图的“落在蝴蝶里的份量 ÷ 蝴蝶占的份量”，形状 (N_ATTENTION,)。"""
        found = []
        for i, (b, language) in enumerate(zip(butterflies, languages, strict=True)):
            word, last = words_of(b, language)[name]
            where = word_positions(tokenizer, prompts[i], word, last)
            heat = attention_map(recorder, where, pixels=pixels, layers=layers)[i]
            found.append((heat * masks[i]).sum() / heat.sum() / share[i])
        return torch.stack(found)

    by_word, by_timestep, by_layer, padding = {}, {}, {}, []
    for t in tqdm(TIMESTEPS, desc="注意力", unit="步"):
        recorder = watch(t)
        for name in words_of(butterflies[0], "zh"):
            by_word.setdefault(name, []).append(ratio(recorder, name))
        by_timestep[str(t)] = by_word["wing_color"][-1].mean().item()
        finest = {layer: recorded[0] for layer, recorded in recorder.maps.items() if recorded[0].shape[1] == pixels}
        for layer in finest:
            by_layer.setdefault(layer, []).append(ratio(recorder, "wing_color", [layer]).mean().item())
        # 句首、句尾与补上的位置一共分到多少
        lengths = [len(tokenizer(prompt).input_ids) - 2 for prompt in prompts]
        weights = torch.stack(list(finest.values())).mean(dim=0)
        padding.append(sum(1 - weights[i, :, 1 : n + 1].sum(dim=-1).mean().item() for i, n in enumerate(lengths)) / N_ATTENTION)
    color = torch.stack(by_word["wing_color"]).mean(dim=0)
    return {
        "n_images": N_ATTENTION, "timesteps": list(TIMESTEPS),
        "share": share.mean().item(),
        "ratio": {name: torch.stack(values).mean().item() for name, values in by_word.items()},
        "color_zh": color[::2].mean().item(), "color_en": color[1::2].mean().item(),
        "color_above_one": (color > 1).float().mean().item(),
        "by_timestep": by_timestep, "by_layer": {layer: sum(values) / len(values) for layer, values in by_layer.items()},
        "not_words": sum(padding) / len(padding),
    }


@torch.no_grad()
def measure_autoencoder(pipeline) -> dict:
    """潜变量的大小与 KL，误差在哪里，没有见过的图，以及两张图中间的一点。"""
    vae = pipeline.vae

    def encode(images):
        return vae.encode((images * 2 - 1).to(DEVICE)).latent_dist

    def decode(latents):
        return (vae.decode(latents).sample.cpu() / 2 + 0.5).clamp(0, 1)

    butterflies = random_butterflies(2 * N_WALKS, SEED + 15)
    renders = [render_butterfly(b, 64, SEED * 10 + 1000 + i) for i, b in enumerate(butterflies)]
    images = torch.stack([torch.from_numpy(render.image) for render in renders]).permute(0, 3, 1, 2) / 255
    masks = torch.stack([torch.from_numpy(render.mask) for render in renders])[:, None]
    posterior = encode(images)
    decoded = decode(posterior.mean)
    errors = (decoded - images).abs().mean(dim=1, keepdim=True)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(SEED)).to(DEVICE)
    sampled = decode(posterior.mean + posterior.std * noise)

    digits = mnist_tensors(train=False)[0][:N_WALKS]
    others = {
        "butterfly": images[:N_WALKS],
        "fish": fish_images(N_WALKS, 64, seed=SEED)[0] / 255,
        "digit": 1 - F.interpolate(digits, size=(64, 64), mode="bilinear").expand(-1, 3, -1, -1),
        "noise": torch.rand(N_WALKS, 3, 64, 64, generator=torch.Generator().manual_seed(SEED)),
    }
    others = {name: psnr(decode(encode(one).mean), one).mean().item() for name, one in others.items()}

    first, second = posterior.mean[:N_WALKS], posterior.mean[N_WALKS:]
    between = {
        "pixel": (images[:N_WALKS] + images[N_WALKS:]) / 2,
        "latent": decode((first + second) / 2),
    }
    walk = {
        name: {"is_butterfly": judge_butterflies(one)[0].float().mean().item(), "sharpness": sharpness(one)}
        for name, one in between.items()
    }
    walk["gap"] = (between["pixel"] - between["latent"]).square().mean().sqrt().item()
    walk["distance"] = (images[:N_WALKS] - images[N_WALKS:]).square().mean().sqrt().item()
    return {
        "n_images": 2 * N_WALKS,
        "mean_std": posterior.mean.std().item(), "posterior_std": posterior.std.mean().item(),
        "kl_per_image": posterior.kl().mean().item(),
        "psnr": psnr(decoded, images).mean().item(), "psnr_sampled": psnr(sampled, images).mean().item(),
        "error_inside": errors[masks].mean().item(), "error_outside": errors[~masks].mean().item(),
        "others": others, "walk": walk,
    }


def measure_studies(pipeline) -> dict:
    """第六章引用的各项测量；pipeline 是装入的 mini-stable-diffusion。"""
    pipeline.to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return {
        "guidance": measure_guidance(pipeline),
        "schedulers": measure_schedulers(pipeline),
        "terminal": measure_terminal(pipeline),
        "negation": measure_negation(pipeline),
        "attention": measure_attention(pipeline),
        "autoencoder": measure_autoencoder(pipeline),
    }


def studies_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    guidance, schedulers, terminal = result["guidance"], result["schedulers"], result["terminal"]
    attention, vae, negation = result["attention"], result["autoencoder"], result["negation"]
    names = {"plain": "照常引导", "rescale": "标准差调回 0.7", "interval": "只在 t/T 为 0.2 到 0.8 时引导"}
    rows = {f"{names[key]}，w = {scale}": row for key in names for scale, row in guidance[key].items()}
    rows["新画的真图"] = guidance["real"]
    return [
        f"引导与饱和（第 6.3 节），每种设置 {guidance['n_images']} 张、{guidance['n_steps']} 步，同样的提示词与起点：",
        "",
        "| | 是蝴蝶 | 颜色 | 花纹 | 背景 | 饱和度 | 被截断的数 |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {row['is_butterfly']:.1%} | {row['wing_color']:.1%} | {row['pattern']:.1%} "
            f"| {row['background']:.1%} | {row['saturation']:.3f} | {row['clipped']:.1%} |"
            for name, row in rows.items()
        ),
        "",
        f"调度器与步数（第 6.4.4 节），每格 {schedulers['n_images']} 张、引导 {schedulers['guidance_scale']:g}："
        "颜色与花纹都对 / 离自己 50 步的图的均方根 / 一张的秒数：",
        "",
        "| | " + " | ".join(f"{n} 步" for n in next(iter(schedulers["table"].values()))) + " |",
        "|---|" + "---|" * len(next(iter(schedulers["table"].values()))),
        *(
            f"| {name} | " + " | ".join(
                f"{row['color_and_pattern']:.1%} / {row['gap']:.3f} / {row['seconds']:.2f}" for row in rows.values()
            ) + " |"
            for name, rows in schedulers["table"].items()
        ),
        "",
        f"最外一圈的亮度（第 6.4.4 节），黑、白背景各 {terminal['n_images']} 张、{terminal['n_steps']} 步：",
        "",
        "| | 黑背景 | 白背景 | 背景画对（黑 / 白） |",
        "|---|---|---|---|",
        *(
            f"| {'零终端信噪比' if key.endswith('+zero') else '原来的计划'}，{key.removesuffix('+zero')} "
            f"| {row['black']['rim']:.3f} | {row['white']['rim']:.3f} "
            f"| {row['black']['background']:.1%} / {row['white']['background']:.1%} |"
            for key, row in terminal["table"].items()
        ),
        f"| 真图 | {terminal['real']['black']:.3f} | {terminal['real']['white']:.3f} | |",
        "",
        f"- 画出红蝴蝶的比例，各 {negation['n_images']} 张：不提颜色 {negation['unsaid']['red']:.1%}，"
        f"“红色的” {negation['red']['red']:.1%}，“不是红色的” {negation['not_red']['red']:.1%}，"
        f"红色写进负面提示词 {negation['negative']['red']:.1%}",
        f"- 颜色词的注意力落在蝴蝶里的份量，是蝴蝶占画面的 {attention['ratio']['wing_color']:.2f} 倍（要求不低于 1.5）；"
        f"中文 {attention['color_zh']:.2f}，英文 {attention['color_en']:.2f}；背景词 {attention['ratio']['background']:.2f}，"
        f"位置词 {attention['ratio']['position']:.2f}；蝴蝶占画面 {attention['share']:.1%}，"
        f"句首、句尾与补上的位置分到 {attention['not_words']:.1%}",
        f"- 自编码器：潜变量均值的标准差 {vae['mean_std']:.3f}，后验的标准差 {vae['posterior_std']:.4f}，"
        f"每张图的 KL {vae['kl_per_image']:.0f}；蝴蝶里的平均误差 {vae['error_inside']:.4f}，"
        f"背景上 {vae['error_outside']:.4f}；没有见过的图的 PSNR：鱼 {vae['others']['fish']:.1f}，"
        f"数字 {vae['others']['digit']:.1f}，噪声 {vae['others']['noise']:.1f} dB",
        f"- 两张图中间的一点，裁判认作蝴蝶：像素的平均 {vae['walk']['pixel']['is_butterfly']:.1%}，"
        f"潜变量的平均 {vae['walk']['latent']['is_butterfly']:.1%}；两者相差（均方根）{vae['walk']['gap']:.3f}，"
        f"两张原图相差 {vae['walk']['distance']:.3f}",
    ]
