"""测量第 7 章要许多张图才看得准的几件事；由 mini_stable_diffusion.py 的 measure() 调用。

各种反转的还原误差，精确的代价，找回的噪声，编辑，水印。结果在 evaluation.json 的 "inversion" 之下。
每格用几张图、走几步写在下面的常数里；照一批 50 份潜变量 0.25 秒算，两核的 CPU 上约 17 分钟，将近一半花在第一项。
"""

import io
import time
from dataclasses import replace

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, StableDiffusionImg2ImgPipeline
from measuring import DEVICE, NAMES, SEED, agreement, features, judge_butterflies, write_prompts
from PIL import Image, ImageFilter
from torch.nn import functional as F
from tqdm import tqdm

from book_utils import (
    butterfly_images,
    butterfly_judge,
    caption,
    decode_latents,
    diffedit_mask,
    direct_offsets,
    edit_latents,
    encode_images,
    frechet_distance,
    invert,
    invert_exact,
    lay_tree_ring,
    null_text,
    random_butterflies,
    regenerate,
    regenerate_exact,
    render_butterfly,
    silhouette,
    tree_ring_key,
    tree_ring_score,
)
from book_utils.inversion import encode_prompts
from book_utils.worlds.butterflies import CHOICES, HELD_OUT, Butterfly

BATCH = 50
EXACT = ("BDIA", "O-BELM")
GUIDANCE = 2.0                      # 第六章量出的最好的强度

# 一、还原
N_IMAGES = 100
STEPS = (10, 20, 50)
N_LONG, LONG = 20, 100              # 100 步只用 20 张，只比三种
N_DIFFUSERS = 50                    # diffusers 的反转只在这么多步上比
N_GUIDED, GUIDED_STEPS = 25, 20     # 有引导的各种办法
N_NULL, NULL_UPDATES = 10, 10
SCALES, N_SCALES = (1.0, 2.0, 3.0, 5.0), 100

# 二、精确的代价；三、找回的噪声
N_QUALITY, QUALITY_STEPS = 100, (10, 20)

# 四、编辑
N_EDITS, EDIT_STEPS, EDIT_GUIDANCE = 100, 20, 3.0
START_STEPS = (0, 3, 6, 9, 12)
STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8)
ATTENTION_SHARE = 0.8

# 五、水印
N_MARKED, N_UNMARKED, MARK_STEPS, FIND_STEPS = 100, 1000, 20, 10


def by_batches(compute, *batches):
    """把各批各自切成 BATCH 个一份，交给 compute，结果沿“图”的一维拼起来；compute 返回路径 (n + 1, N, …)。"""
    count = len(batches[0])
    parts = [
        compute(*(one[start : start + BATCH] for one in batches)) for start in range(0, count, BATCH)
    ]
    return torch.cat(parts, dim=1)


def errors(back: torch.Tensor, truth: torch.Tensor, span: float) -> dict[str, float]:
    """均方误差与 PSNR（跨度 span）：各张的平均，及 PSNR 的标准误。"""
    mse = (back - truth).square().flatten(1).mean(dim=1).double().clamp(min=1e-20)
    psnr = 10 * (span**2 / mse).log10()
    return {
        "mse": mse.mean().item(), "psnr": psnr.mean().item(), "psnr_se": (psnr.std() / len(psnr) ** 0.5).item(),
    }


# —— 一、还原 ——

@torch.no_grad()
def invert_diffusers(pipeline, latents, prompts, n_steps):
    """diffusers 自己的 DDIMInverseScheduler；返回路径。"""
    scheduler = DDIMInverseScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(n_steps)
    text, path = encode_prompts(pipeline, prompts), [latents]
    for t in scheduler.timesteps:
        path.append(scheduler.step(pipeline.unet(path[-1], t, text).sample, t, path[-1]).prev_sample)
    return torch.stack(path)


def round_trip(pipeline, method: str, latents, prompts, n_steps: int):
    """走到噪声再走回来：返回（走回的潜变量，噪声，网络调用的次数）。"""
    if method in EXACT:
        path = by_batches(lambda z, p: invert_exact(pipeline, z, p, n_steps, method), latents, prompts)
        back = by_batches(
            lambda last, before, p: regenerate_exact(pipeline, last, p, n_steps, method, previous=before),
            path[-1], path[-2], prompts,
        )
        return back[0], path[-1], 2 * n_steps - 1
    if method == "diffusers":
        path = by_batches(lambda z, p: invert_diffusers(pipeline, z, p, n_steps), latents, prompts)
    else:
        k = 3 if method == "fixed_point" else 1
        path = by_batches(lambda z, p: invert(pipeline, z, p, n_steps, n_iterations=k), latents, prompts)
    back = by_batches(lambda z, p: regenerate(pipeline, z, p, n_steps), path[-1], prompts)
    return back[0], path[-1], (4 if method == "fixed_point" else 2) * n_steps


def whiteness(noise: torch.Tensor) -> dict[str, float]:
    """噪声像不像标准高斯：标准差、峰度（高斯是 3）、左右相邻的相关、低频与高频的功率（白噪声都是 1）。"""
    flat = noise.flatten(1)
    centered = noise - noise.mean(dim=(2, 3), keepdim=True)
    power = torch.fft.fft2(noise).abs().square() / noise.shape[-1] ** 2
    frequency = torch.fft.fftfreq(noise.shape[-1]).to(noise.device) * noise.shape[-1]
    radius = torch.hypot(frequency[:, None], frequency[None, :])
    return {
        "std": flat.std().item(),
        "kurtosis": ((flat - flat.mean()).square().square().mean() / flat.var().square()).item(),
        "neighbour": ((centered[..., 1:] * centered[..., :-1]).mean() / centered.square().mean()).item(),
        "low": power[..., (radius >= 1) & (radius < 3)].mean().item(),
        "high": power[..., radius >= 6].mean().item(),
    }


def measure_reconstruction(pipeline) -> dict:
    images, butterflies = butterfly_images(N_IMAGES, 64, seed=SEED + 20)
    images, prompts = images / 255, write_prompts(butterflies, SEED + 20)
    latents = torch.cat([encode_images(pipeline, part) for part in images.split(BATCH)])
    span = (latents.max() - latents.min()).item()

    def decode(z):
        return torch.cat([decode_latents(pipeline, part) for part in z.split(BATCH)])

    settings = [(m, n, N_IMAGES) for n in STEPS for m in ("DDIM", "fixed_point", *EXACT)]
    settings += [("diffusers", N_DIFFUSERS, N_IMAGES)] + [(m, LONG, N_LONG) for m in ("DDIM", *EXACT)]
    table, noises = {}, {}
    for method, n_steps, count in tqdm(settings, desc="还原", unit="种"):
        started = time.perf_counter()
        back, noise, calls = round_trip(pipeline, method, latents[:count], prompts[:count], n_steps)
        table.setdefault(method, {})[str(n_steps)] = {
            "n_images": count, "calls": calls, "seconds": (time.perf_counter() - started) / count,
            "latents": errors(back, latents[:count], span),
            "pixels": errors(decode(back), images[:count], 1.0),
            "pixels_to_decoded": errors(decode(back), decode(latents[:count]), 1.0),
        }
        noises.setdefault(method, {})[str(n_steps)] = whiteness(noise)
    # 拿一句空话去反转，看说明帮了多少
    back = by_batches(
        lambda z, p: regenerate(pipeline, invert(pipeline, z, p, 20)[-1], p, 20), latents, [""] * N_IMAGES
    )
    return {
        "n_images": N_IMAGES, "latent_span": span, "floor": errors(decode(latents), images, 1.0),
        "table": table, "noise": noises,
        "true_noise": whiteness(torch.randn(latents.shape, generator=torch.Generator().manual_seed(SEED))),
        "empty_prompt_20": errors(decode(back[0]), images, 1.0),
    }


def measure_guided(pipeline) -> dict:
    """有引导时的还原：DDIM 在各种强度下，以及几种办法。"""
    images, butterflies = butterfly_images(N_SCALES, 64, seed=SEED + 21)
    images, prompts = images / 255, write_prompts(butterflies, SEED + 21)
    latents = torch.cat([encode_images(pipeline, part) for part in images.split(BATCH)])
    span, n = (latents.max() - latents.min()).item(), GUIDED_STEPS

    def row(back, count, calls, seconds=None):
        return {
            "n_images": count, "calls": calls, "seconds": seconds,
            "latents": errors(back, latents[:count], span),
            "pixels": errors(
                torch.cat([decode_latents(pipeline, part) for part in back.split(BATCH)]), images[:count], 1.0
            ),
        }

    noise = by_batches(lambda z, p: invert(pipeline, z, p, n), latents, prompts)[-1]
    by_scale = {}
    for w in tqdm(SCALES, desc="引导强度", unit="种"):
        back = by_batches(lambda z, p, w=w: regenerate(pipeline, z, p, n, w), noise, prompts)[0]
        by_scale[f"{w:g}"] = row(back, N_SCALES, n + (1 if w == 1 else 2) * n)

    z, few, w = latents[:N_GUIDED], prompts[:N_GUIDED], GUIDANCE
    table = {}

    def measured(name, calls, compute, count=N_GUIDED):
        started = time.perf_counter()
        back = compute()
        table[name] = row(back, count, calls, (time.perf_counter() - started) / count)

    def invert_few():
        return invert(pipeline, z, few, n)

    def directly():
        path = invert_few()
        return regenerate(pipeline, path[-1], few, n, w, offsets=direct_offsets(pipeline, path, few, w))[0]

    def by_null_text():
        path = invert(pipeline, z[:N_NULL], few[:N_NULL], n)
        found = null_text(pipeline, path, few[:N_NULL], w, NULL_UPDATES)
        return regenerate(pipeline, path[-1], few[:N_NULL], n, w, found)[0]

    def exactly(method):
        path = invert_exact(pipeline, z, few, n, method, w)
        return regenerate_exact(pipeline, path[-1], few, n, method, w, path[-2])[0]

    # 引导的每一步是两份一批，算两次调用
    measured("DDIM", 3 * n, lambda: regenerate(pipeline, invert_few()[-1], few, n, w)[0])
    measured("negative_prompt", 3 * n, lambda: regenerate(pipeline, invert_few()[-1], few, n, w, few)[0])
    measured("direct", 5 * n, directly)
    measured("guided_both_ways", 4 * n, lambda: regenerate(pipeline, invert(
        pipeline, z, few, n, guidance_scale=w)[-1], few, n, w)[0])
    measured("null_text", n + 2 * n * (NULL_UPDATES + 2), by_null_text, N_NULL)
    for method in EXACT:
        measured(method, 4 * n - 2, lambda method=method: exactly(method))
    return {"n_steps": n, "guidance_scale": w, "n_updates": NULL_UPDATES, "by_scale": by_scale, "table": table}


# —— 二、三 ——

def measure_quality(pipeline) -> dict:
    """由同样的噪声、不引导地生成：三种采样画得怎样；再把生成的图反转回去，找回的噪声像不像原来的那份。"""
    real, butterflies = butterfly_images(N_QUALITY, 64, seed=SEED + 22)
    prompts = write_prompts(butterflies, SEED + 22)
    more = features(butterfly_images(300, 64, seed=SEED + 23)[0] / 255)
    noise = torch.randn(N_QUALITY, 4, 16, 16, generator=torch.Generator().manual_seed(SEED + 22)).to(DEVICE)

    def drawn(method, n_steps):
        if method == "DDIM":
            return by_batches(lambda z, p: regenerate(pipeline, z, p, n_steps), noise, prompts)
        return by_batches(lambda z, p: regenerate_exact(pipeline, z, p, n_steps, method), noise, prompts)

    def judged(images):
        return agreement(images, butterflies) | {"distance": frechet_distance(features(images), more)}

    def similarity(found):
        """找回的噪声与真的噪声：逐张的余弦、相对误差。"""
        return {
            "cosine": F.cosine_similarity(found.flatten(1), noise.flatten(1)).mean().item(),
            "relative_error": ((found - noise).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)).mean().item(),
        }

    quality, paths = {}, {}
    for n_steps in QUALITY_STEPS:
        for method in ("DDIM", *EXACT, "O-BELM-sigma"):          # 末一个是原文的系数，只能采样
            paths[method, n_steps] = drawn(method, n_steps)
            images = torch.cat([decode_latents(pipeline, part) for part in paths[method, n_steps][0].split(BATCH)])
            quality.setdefault(method, {})[str(n_steps)] = judged(images)
    n = QUALITY_STEPS[-1]
    path = paths["DDIM", n]
    found = {
        "DDIM": by_batches(lambda z, p: invert(pipeline, z, p, n), path[0], prompts)[-1],
        "fixed_point": by_batches(lambda z, p: invert(pipeline, z, p, n, n_iterations=3), path[0], prompts)[-1],
        "DDIM_empty": by_batches(lambda z, p: invert(pipeline, z, p, n), path[0], [""] * N_QUALITY)[-1],
    }
    # 经过一次解码与编码，像真的收到一张图那样
    pixels = torch.cat([decode_latents(pipeline, part) for part in path[0].split(BATCH)])
    again = torch.cat([encode_images(pipeline, part) for part in pixels.split(BATCH)])
    found["DDIM_from_pixels"] = by_batches(lambda z, p: invert(pipeline, z, p, n), again, prompts)[-1]
    # 精确的方法只拿到图，不知道第 1 个状态
    found["O-BELM"] = by_batches(lambda z, p: invert_exact(pipeline, z, p, n), paths["O-BELM", n][0], prompts)[-1]
    return {
        "n_images": N_QUALITY, "quality": quality, "real": judged(real / 255),
        "n_steps": n, "found": {name: similarity(one) | whiteness(one) for name, one in found.items()},
    }


# —— 四、编辑 ——

KINDS = ("wing_color", "pattern", "background", "size", "position", "add_spots", "remove_spots")


def make_edits(count: int, seed: int) -> list[tuple[str, Butterfly, Butterfly]]:
    """（种类，原来的，要的）：七种轮流；要的组合不在留作检验的之中。"""
    rng, edits = np.random.default_rng(seed), []
    butterflies = random_butterflies(8 * count, seed)
    while len(edits) < count:
        kind, source = KINDS[len(edits) % len(KINDS)], butterflies.pop()
        if kind in ("add_spots", "remove_spots"):
            before, after = ("plain", "spotted") if kind == "add_spots" else ("spotted", "plain")
            source, name, values = replace(source, pattern=before), "pattern", [after]
        else:
            name, values = kind, [value for value in CHOICES[kind] if value != getattr(source, kind)]
        target = replace(source, **{name: values[rng.integers(len(values))]})
        if not {(b.wing_color, b.pattern) for b in (source, target)} & HELD_OUT:
            edits.append((kind, source, target))
    return edits


def ssim_map(a: torch.Tensor, b: torch.Tensor, window: int = 7) -> torch.Tensor:
    """各像素的 SSIM（均匀窗），取值范围 1，形状 (N, H, W)。"""
    def mean(x):
        return F.avg_pool2d(F.pad(x, (window // 2,) * 4, mode="reflect"), window, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    both = mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return value.mean(dim=1)


@torch.no_grad()
def structure(images: torch.Tensor) -> torch.Tensor:
    """裁判在 8×8 处的特征，各位置两两的余弦，形状 (N, 64, 64)；PIE-Bench 用 DINO 的特征做同样的事。"""
    judge = butterfly_judge().to(DEVICE)
    inner = judge.body[:15](images.to(DEVICE) * 2 - 1).flatten(2).transpose(1, 2)
    inner = F.normalize(inner - inner.mean(dim=1, keepdim=True), dim=-1)
    return (inner @ inner.transpose(1, 2)).cpu()


def standard_error(values: torch.Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item()


def score_edits(images, edits, sources, truths) -> dict:
    """各项平均与标准误；truths 是照新的属性、同一个种子画的真图。"""
    is_butterfly, found = judge_butterflies(images)
    asked, kept = [], []
    for keep, seen, (kind, _, target) in zip(is_butterfly.tolist(), found, edits, strict=True):
        name = "pattern" if kind.endswith("spots") else kind
        asked.append(keep and seen[name] == getattr(target, name))
        kept.append(keep and all(seen[other] == getattr(target, other) for other in NAMES if other != name))
    asked, kept = torch.tensor(asked).float(), torch.tensor(kept).float()
    shape, wanted = silhouette(images), silhouette(truths)
    iou = (shape & wanted).sum(dim=(1, 2)) / (shape | wanted).sum(dim=(1, 2)).clamp(min=1)
    # 真图里没有变的像素，改后也不该变
    still = ((truths - sources).abs().amax(dim=1) < 0.01).float()
    area = still.sum(dim=(1, 2)).clamp(min=1)
    mse = ((images - sources).square().mean(dim=1) * still).sum(dim=(1, 2)) / area
    psnr = -10 * mse.clamp(min=1e-10).log10()
    ssim = (ssim_map(images, sources) * still).sum(dim=(1, 2)) / area
    moved = (structure(images) - structure(sources)).square().mean(dim=(1, 2))

    def summary(chosen):
        rates = {
            "asked": asked[chosen], "kept": kept[chosen], "iou": iou[chosen], "iou_80": (iou[chosen] >= 0.8).float(),
            "psnr": psnr[chosen], "mse": mse[chosen], "ssim": ssim[chosen], "structure": moved[chosen],
            "all": asked[chosen] * kept[chosen] * (iou[chosen] >= 0.8),
        }
        means = {name: values.mean().item() for name, values in rates.items()}
        return means | {f"{name}_se": standard_error(values) for name, values in rates.items()}

    kinds = np.array([kind for kind, _, _ in edits])
    everything = torch.ones(len(edits), dtype=torch.bool)
    return summary(everything) | {
        "by_kind": {kind: summary(torch.from_numpy(kinds == kind)) for kind in KINDS}
    }


def measure_edits(pipeline) -> dict:
    edits = make_edits(N_EDITS, SEED + 24)

    def pictures(index):
        drawn = [render_butterfly(edit[index], 64, SEED * 10 + 2000 + i).image for i, edit in enumerate(edits)]
        return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 255

    sources, truths = pictures(1), pictures(2)
    old = [caption(source, ("zh", "en")[i % 2]) for i, (_, source, _) in enumerate(edits)]
    new = [caption(target, ("zh", "en")[i % 2]) for i, (_, _, target) in enumerate(edits)]
    latents = torch.cat([encode_images(pipeline, part) for part in sources.split(BATCH)])
    started = time.perf_counter()
    path = by_batches(lambda z, p: invert(pipeline, z, p, EDIT_STEPS, n_iterations=2), latents, old)
    inversion_seconds = (time.perf_counter() - started) / N_EDITS

    def edited(mask=None, before=0.0, **options):
        """返回（得分，每张几秒）；before 是此前已经花掉的秒数。"""
        started, parts = time.perf_counter(), []
        for start in range(0, N_EDITS, BATCH):
            part = slice(start, start + BATCH)
            chosen = None if mask is None else mask[part]
            parts.append(decode_latents(pipeline, edit_latents(
                pipeline, path[:, part], old[part], new[part], mask=chosen, **options
            )))
        seconds = (time.perf_counter() - started) / N_EDITS + before
        return score_edits(torch.cat(parts), edits, sources, truths) | {"seconds": seconds}

    result = {
        "n_edits": N_EDITS, "n_steps": EDIT_STEPS, "guidance_scale": EDIT_GUIDANCE, "n_by_kind": {
            kind: sum(kind == one for one, _, _ in edits) for kind in KINDS
        },
    }
    result["truth"] = score_edits(truths, edits, sources, truths)
    result["nothing"] = edited(start_step=EDIT_STEPS)
    result["start_step"] = {
        str(start): edited(start_step=start, guidance_scale=EDIT_GUIDANCE, before=inversion_seconds)
        for start in tqdm(START_STEPS, desc="编辑，从哪一步出发", unit="种")
    }
    best = max(START_STEPS, key=lambda start: result["start_step"][str(start)]["all"])
    result["best_start"] = best
    shared = {"start_step": best, "guidance_scale": EDIT_GUIDANCE, "before": inversion_seconds}
    result["prompt_to_prompt"] = edited(attention_share=ATTENTION_SHARE, **shared)
    started = time.perf_counter()
    mask = torch.cat([
        diffedit_mask(pipeline, latents[s : s + BATCH], old[s : s + BATCH], new[s : s + BATCH])
        for s in range(0, N_EDITS, BATCH)
    ])
    shared["before"] += (time.perf_counter() - started) / N_EDITS
    result["diffedit"] = edited(mask=mask, **shared)
    # 自动掩膜与“真图里变了的像素”重合多少
    changed = ((truths - sources).abs().amax(dim=1, keepdim=True) >= 0.01).float()
    changed = F.interpolate(changed, size=mask.shape[-2:], mode="area") > 0.5
    overlap = mask.cpu() > 0.5
    result["mask_iou"] = (
        (overlap & changed).sum(dim=(1, 2, 3)) / (overlap | changed).sum(dim=(1, 2, 3)).clamp(min=1)
    ).float().mean().item()

    img2img = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    result["img2img"] = {}
    for strength in tqdm(STRENGTHS, desc="图生图", unit="种"):
        started, parts = time.perf_counter(), []
        for start in range(0, N_EDITS, BATCH):
            part = slice(start, start + BATCH)
            parts.append(img2img(
                new[part], image=sources[part], strength=strength, num_inference_steps=EDIT_STEPS,
                guidance_scale=EDIT_GUIDANCE, output_type="pt",
                generator=[torch.Generator().manual_seed(SEED + start + i) for i in range(len(new[part]))],
            ).images.cpu())
        result["img2img"][f"{strength:g}"] = score_edits(torch.cat(parts), edits, sources, truths) | {
            "seconds": (time.perf_counter() - started) / N_EDITS
        }
    return result


# —— 五、水印 ——

def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=quality)
    return Image.open(buffer).convert("RGB")


def attacked(images: torch.Tensor, change) -> torch.Tensor:
    """把 change（PIL → PIL）用在每一张上。"""
    done = []
    for image in (images * 255).round().byte().permute(0, 2, 3, 1).numpy():
        done.append(np.asarray(change(Image.fromarray(image))))
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2) / 255


ATTACKS = {
    "none": lambda image: image,
    "jpeg_75": lambda image: jpeg(image, 75),
    "jpeg_50": lambda image: jpeg(image, 50),
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "crop": lambda image: image.crop((4, 4, 60, 60)).resize((64, 64), Image.Resampling.LANCZOS),
}


def measure_watermark(pipeline) -> dict:
    """真阳性率与误报：没有水印的是新画的真图与生成的图。检测时不知道提示词，用空话反转。"""
    key = tree_ring_key(seed=1)

    def score(images):
        latents = torch.cat([encode_images(pipeline, part) for part in images.split(BATCH)])
        found = by_batches(lambda z: invert(pipeline, z, [""] * len(z), FIND_STEPS), latents)[-1]
        return tree_ring_score(found, key).cpu()

    butterflies = random_butterflies(N_MARKED, SEED + 25)
    prompts = write_prompts(butterflies, SEED + 25)
    noise = torch.randn(N_MARKED, 4, 16, 16, generator=torch.Generator().manual_seed(SEED + 25)).to(DEVICE)
    drawn = {}
    for name, start in {"marked": lay_tree_ring(noise, key), "unmarked": noise}.items():
        path = by_batches(lambda z, p: regenerate(pipeline, z, p, MARK_STEPS, GUIDANCE), start, prompts)
        drawn[name] = torch.cat([decode_latents(pipeline, part) for part in path[0].split(BATCH)])
    img2img = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(SEED + i) for i in range(N_MARKED)]
    regenerated = torch.cat([
        img2img(
            prompts[start : start + BATCH], image=drawn["marked"][start : start + BATCH], strength=0.5,
            num_inference_steps=MARK_STEPS, guidance_scale=GUIDANCE, output_type="pt",
            generator=generators[start : start + BATCH],
        ).images.cpu()
        for start in range(0, N_MARKED, BATCH)
    ])
    renders = butterfly_images(N_UNMARKED - N_MARKED, 64, seed=SEED + 26)[0] / 255
    unmarked = torch.cat([score(renders), score(drawn["unmarked"])])
    threshold = unmarked.quantile(0.99).item()
    scores = {name: score(attacked(drawn["marked"], change)) for name, change in ATTACKS.items()}
    scores["img2img"] = score(regenerated)
    wrong_key = tree_ring_key(seed=2)
    return {
        "n_marked": N_MARKED, "n_unmarked": N_UNMARKED, "steps": MARK_STEPS, "find_steps": FIND_STEPS,
        "threshold": threshold, "unmarked": [round(value, 4) for value in unmarked.tolist()],
        "scores": {name: [round(value, 4) for value in values.tolist()] for name, values in scores.items()},
        "true_positives": {name: (values > threshold).float().mean().item() for name, values in scores.items()},
        "wrong_key": tree_ring_score(lay_tree_ring(noise, key), wrong_key).abs().mean().item(),
        "quality": {
            name: agreement(images, butterflies) | {"std": images.std().item()} for name, images in drawn.items()
        },
        "changed": (drawn["marked"] - drawn["unmarked"]).abs().mean().item(),
    }


def measure_inversion(pipeline) -> dict:
    """第七章引用的各项测量；pipeline 是装入的 mini-stable-diffusion。"""
    pipeline.to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    result = {
        "reconstruction": measure_reconstruction(pipeline),
        "guided": measure_guided(pipeline),
        "quality": measure_quality(pipeline),
        "edits": measure_edits(pipeline),
        "watermark": measure_watermark(pipeline),
    }
    return result | {"seconds": time.perf_counter() - started}


METHOD_NAMES = {
    "DDIM": "DDIM 反转", "diffusers": "DDIMInverseScheduler", "fixed_point": "不动点，每步三次", "BDIA": "BDIA",
    "O-BELM": "O-BELM", "negative_prompt": "负面提示词反转", "direct": "直接反转", "null_text": "空文本反转",
    "guided_both_ways": "反转时也引导",
}
KIND_NAMES = {
    "wing_color": "颜色", "pattern": "花纹", "background": "背景", "size": "大小", "position": "位置",
    "add_spots": "添上斑点", "remove_spots": "去掉斑点",
}
ATTACK_NAMES = {
    "none": "没有改动", "jpeg_75": "JPEG 75", "jpeg_50": "JPEG 50", "blur": "模糊", "crop": "裁剪",
    "img2img": "图生图 0.5",
}


def edit_row(title: str, row: dict) -> str:
    return (
        f"| {title} | {row['asked']:.0%} | {row['kept']:.0%} | {row['iou_80']:.0%} | {row['all']:.0%} "
        f"| {row['psnr']:.1f} | {row['mse'] * 1000:.2f} | {row['ssim']:.3f} | {row['structure']:.4f} "
        f"| {row['iou']:.2f} | {row.get('seconds', 0):.2f} |"
    )


def inversion_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    reconstruction, guided, quality = result["reconstruction"], result["guided"], result["quality"]
    edits, watermark = result["edits"], result["watermark"]
    floor, table = reconstruction["floor"], reconstruction["table"]
    lines = [
        f"反转（第 7.2.4 节），{reconstruction['n_images']} 张新画的图（100 步的只用 {N_LONG} 张），不引导，"
        "走到噪声再走回来。"
        f"像素取值 0 到 1；潜变量的跨度 {reconstruction['latent_span']:.2f}。"
        f"自编码器自己的误差：PSNR {floor['psnr']:.2f} dB，均方误差 {floor['mse']:.5f}：",
        "",
        "| | 步数 | 像素 PSNR（dB） | 像素 MSE | 潜变量 PSNR（dB） | 潜变量 MSE | 每张调用 | 每张秒数 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, rows in table.items():
        for n_steps, row in rows.items():
            lines.append(
                f"| {METHOD_NAMES[method]} | {n_steps} | {row['pixels']['psnr']:.2f} ± {row['pixels']['psnr_se']:.2f} "
                f"| {row['pixels']['mse']:.5f} | {row['latents']['psnr']:.1f} | {row['latents']['mse']:.2e} "
                f"| {row['calls']} | {row['seconds']:.2f} |"
            )
    lines += [
        "",
        f"有引导（w = {guided['guidance_scale']:g}，{guided['n_steps']} 步）走回来：",
        "",
        "| | 张数 | 像素 PSNR（dB） | 潜变量 PSNR（dB） | 每张调用 | 每张秒数 |",
        "|---|---|---|---|---|---|",
        *(
            f"| {METHOD_NAMES[name]} | {row['n_images']} "
            f"| {row['pixels']['psnr']:.2f} ± {row['pixels']['psnr_se']:.2f} "
            f"| {row['latents']['psnr']:.1f} | {row['calls']} | {row['seconds']:.2f} |"
            for name, row in guided["table"].items()
        ),
        "",
        "DDIM 反转，走回来时的强度 w 与像素 PSNR（dB）：" + "，".join(
            f"w = {w}：{row['pixels']['psnr']:.2f}" for w, row in guided["by_scale"].items()
        ),
        "",
        f"精确的代价，同样的 {quality['n_images']} 份噪声，不引导：颜色与花纹都对 / 与真图的 Fréchet 距离：",
        "",
        "| | " + " | ".join(f"{n} 步" for n in QUALITY_STEPS) + " |",
        "|---|" + "---|" * len(QUALITY_STEPS),
        *(
            f"| {name} | " + " | ".join(
                f"{row['color_and_pattern']:.1%} / {row['distance']:.1f}" for row in rows.values()
            ) + " |"
            for name, rows in quality["quality"].items()
        ),
        "",
        f"编辑（第 7.3 节），{edits['n_edits']} 处，七种，{edits['n_steps']} 步，强度 {edits['guidance_scale']:g}；"
        f"从第 {edits['best_start']} 步出发最好：",
        "",
        "| | 改对 | 其余不变 | 轮廓 IoU ≥ 0.8 | 三样都好 | 不该变处 PSNR | MSE × 1000 | SSIM | 结构 | IoU | 每张秒数 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        edit_row("真图（上限）", edits["truth"]),
        edit_row("只经过自编码器", edits["nothing"]),
        *(edit_row(f"edit，从第 {start} 步出发", row) for start, row in edits["start_step"].items()),
        edit_row("加上 prompt-to-prompt", edits["prompt_to_prompt"]),
        edit_row("加上 DiffEdit 的掩膜", edits["diffedit"]),
        *(edit_row(f"图生图，{strength}", row) for strength, row in edits["img2img"].items()),
        "",
        "各种编辑（从最好的一步出发），改对 / 其余不变 / 轮廓 IoU ≥ 0.8：" + "；".join(
            f"{KIND_NAMES[kind]} {row['asked']:.0%} / {row['kept']:.0%} / {row['iou_80']:.0%}"
            for kind, row in edits["start_step"][str(edits["best_start"])]["by_kind"].items()
        ),
        "",
        f"水印（第 7.3 节），{watermark['n_marked']} 张有、{watermark['n_unmarked']} 张没有，误报 1% 时的真阳性率："
        + "，".join(f"{ATTACK_NAMES[name]} {rate:.0%}" for name, rate in watermark["true_positives"].items()),
    ]
    return lines
