"""测量第 5.6 节的两种损失引导：颜色损失的两种梯度，CLIP 的强度与裁块；由 butterfly_clip.py 的 measure() 调用。"""

import torch
from diffusers import DDIMScheduler, DDPMPipeline
from measuring import DEVICE, SEED, judge_butterflies
from torch.nn import functional as F
from tqdm import tqdm

from book_utils import angle_loss, color_loss, guided_sample, random_cutouts, resolve
from book_utils.worlds.butterflies import WING_COLORS

N_STEPS = 15
N_IMAGES = 48                       # 每种设置画这么多张，八种颜色、两种语言一样多
GREEN = (0.1, 0.9, 0.5)             # 颜色损失的目标
COLOR_SCALES = {"through": (0, 20, 40, 100), "direct": (100, 300)}
CLIP_SCALES = {0: (3, 10, 30, 100), 4: (10, 100)}        # 裁块数 → 强度；0 是看整张图


def measure_loss_guidance(clip, tokenizer) -> dict:
    """颜色损失：离目标多近、还认得出多少；CLIP：八种颜色、中英文提示词，画出所要颜色的比例。

    clip、tokenizer 是 butterfly-clip，图像大小 64 × 64、均值与标准差都是 0.5。
    """
    pipeline = DDPMPipeline.from_pretrained(resolve("butterflies-ddpm-32"))
    unet = pipeline.unet.to(DEVICE).eval().requires_grad_(False)
    clip = clip.eval().requires_grad_(False)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    noise = torch.randn(N_IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(SEED)).to(DEVICE)
    names = list(WING_COLORS)
    wanted = [names[i % 8] for i in range(N_IMAGES)]
    prompts = [
        f"一只{WING_COLORS[name][0]}的蝴蝶" if i // 8 % 2 == 0 else f"a {name} butterfly" for i, name in enumerate(wanted)
    ]
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").to(DEVICE)
    with torch.no_grad():
        directions = F.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1)

    def image_direction(images):
        pixels = F.interpolate(images, size=(64, 64), mode="bilinear")
        return F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def clip_loss(n_cutouts):
        generator = torch.Generator().manual_seed(SEED)

        def loss(x0):
            if n_cutouts == 0:
                return angle_loss(image_direction(x0), directions)
            pieces = image_direction(random_cutouts(x0, n_cutouts, generator))
            return angle_loss(pieces, directions.repeat(n_cutouts, 1)).view(n_cutouts, -1).mean(dim=0)
        return loss

    targets = torch.tensor([WING_COLORS[name][1] for name in wanted], device=DEVICE).view(-1, 3, 1, 1) * 2 - 1

    def wing_color_loss(x0):
        return (x0 - targets).abs().mean(dim=(1, 2, 3))

    def shown(images) -> dict:
        good, found = judge_butterflies(images)
        right = torch.tensor([seen["wing_color"] == name for seen, name in zip(found, wanted, strict=True)])
        with torch.no_grad():
            loss = angle_loss(image_direction(images * 2 - 1), directions).mean().item()
        return {
            "color": right.float().mean().item(),
            "color_zh": right.view(-1, 8)[::2].float().mean().item(),
            "color_en": right.view(-1, 8)[1::2].float().mean().item(),
            "recognized": good.float().mean().item(),
            "clip_loss": loss,
        }

    n_runs = sum(len(scales) for scales in (*COLOR_SCALES.values(), *CLIP_SCALES.values())) + 2
    with tqdm(total=n_runs, desc="引导", unit="批") as progress:
        def draw(loss_function, scale, through_unet=True):
            images = guided_sample(unet, scheduler, noise, N_STEPS, loss_function, scale, through_unet)
            progress.update()
            return images

        result = {
            "n_color": N_IMAGES,
            "n_clip": N_IMAGES,
            "n_steps": N_STEPS,
            "unguided": shown(draw(wing_color_loss, 0, through_unet=False)),
            "clip": {
                str(n_cutouts): {str(scale): shown(draw(clip_loss(n_cutouts), scale)) for scale in scales}
                for n_cutouts, scales in CLIP_SCALES.items()
            },
            "wing_color_loss": shown(draw(wing_color_loss, 40)),
        }
        color = {}
        for key, scales in COLOR_SCALES.items():
            color[key] = {}
            for scale in scales:
                images = draw(lambda x0: color_loss(x0, GREEN), scale, key == "through")
                color[key][str(scale)] = {
                    "color_error": color_loss(images * 2 - 1, GREEN).mean().item() / 2,
                    "mean_color": images.mean(dim=(0, 2, 3)).tolist(),
                    "recognized": judge_butterflies(images)[0].float().mean().item(),
                }
        return result | {"color_loss": color}


def loss_guidance_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    rows = {"不引导": result["unguided"], "颜色损失，γ = 40": result["wing_color_loss"]}
    for n_cutouts, table in result["clip"].items():
        name = "整张图" if n_cutouts == "0" else f"{n_cutouts} 个裁块"
        rows |= {f"CLIP，{name}，γ = {scale}": row for scale, row in table.items()}
    return [
        f"引导 `butterflies-ddpm-32`（第 5.6 节），八种颜色、中英文提示词，每种设置 {result['n_clip']} 张、"
        f"{result['n_steps']} 步（要求：画出所要颜色的比例是不引导的 4 倍以上，认得出的不低于 80%）：",
        "",
        "| | 画出所要的颜色 | 中文 | 英文 | 认得是蝴蝶 | CLIP 的损失 |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {row['color']:.1%} | {row['color_zh']:.1%} | {row['color_en']:.1%} | {row['recognized']:.1%} "
            f"| {row['clip_loss']:.2f} |" for name, row in rows.items()
        ),
        "",
        f"颜色损失，目标 {GREEN}，每种强度 {result['n_color']} 张：",
        "",
        "| 梯度 | γ | 与目标颜色的距离 | 认得是蝴蝶 |",
        "|---|---|---|---|",
        *(
            f"| {title} | {scale} | {row['color_error']:.3f} | {row['recognized']:.1%} |"
            for key, title in (("through", "穿过网络"), ("direct", "直接的路"))
            for scale, row in result["color_loss"][key].items()
        ),
    ]
