"""配方：butterflies-ddpm-32，生成 32 × 32 蝴蝶的 DDPM 管线（第四、五、七章）。

与第 4.3.4 节的循环做同样的事，只是图像更多、训练更久，对权重做滑动平均，并且改为预测速度：
最初预测噪声，训练 7,500 步后形状很好，颜色却偏得厉害，裁判只认 35.6% 是蝴蝶。在时间步 960 以上，
x0 = (x_t − √(1−ᾱ)·eps) / √ᾱ 要除以不到 0.06 的数，噪声里百分之几的误差就放大成整张图的偏色。

用法：python recipes/butterflies_ddpm_32.py
"""

import torch
from common import parser, save_model
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from measuring import DEVICE, SEED, draw, judge_butterflies, nearest, samplers
from torch.nn import functional as F
from tqdm import tqdm

from book_utils import butterfly_images, fit, resolve, set_seed
from book_utils.worlds.butterflies import BACKGROUNDS, HELD_OUT, PATTERNS, WING_COLORS

NAME = "butterflies-ddpm-32"
PURPOSE = "DDPM 管线，生成 32×32 的蝴蝶（第四、五、七章）"
DATA = "蝴蝶世界 32×32：20,000 只大的、在中央的蝴蝶（seed=1），不含留作检验的颜色 × 花纹组合"

N_IMAGES = 20_000
IMAGE_SIZE = 32
noise_scheduler = DDPMScheduler(
    num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
)


def training_images() -> torch.Tensor:
    """训练用的蝴蝶，uint8，形状 (N_IMAGES, 3, 32, 32)；测量时也用它来查有没有背下训练图。

    大的、在中央的蝴蝶，像博物馆的标本照；颜色、花纹、背景、翅形与角度都随机。
    """
    return butterfly_images(N_IMAGES, IMAGE_SIZE, seed=1, size="large", position="center")[0]


def build_model() -> UNet2DModel:
    """第 4.3.3 节的小网络，2,736,099 个参数；只在最低分辨率上用注意力。"""
    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,      # 每组至少四个通道；默认的 32 组在 32 通道时每组一个，会减掉各通道的均值
    )


def batch_loss(model, images, generator):
    """images 是 uint8，形状 (B, 3, 32, 32)；返回预测速度 √ᾱ·eps − √(1−ᾱ)·x0 的均方误差。"""
    flip = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)     # 随机左右翻转
    x0 = images / 127.5 - 1                                                      # 0 … 255 → (−1, 1)
    timesteps = torch.randint(1000, (len(x0),), generator=generator).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    noisy = noise_scheduler.add_noise(x0, noise, timesteps)
    velocity = noise_scheduler.get_velocity(x0, noise, timesteps)
    return F.mse_loss(model(noisy, timesteps).sample, velocity)


def main():
    options = parser(__doc__.splitlines()[0], NAME).parse_args()
    set_seed(0)
    model = build_model()
    history = fit(
        model, (training_images(),), batch_loss, n_epochs=7, batch_size=32,
        lr=8e-4, lr_decay=True, ema_decay=0.999,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        pipeline = DDPMPipeline(unet=model.cpu().half(), scheduler=noise_scheduler)
        save_model(
            options.output, pipeline.save_pretrained, history, options.device,
            "python recipes/butterflies_ddpm_32.py",
        )


def count_attributes(kept: list[dict[str, str]]) -> dict:
    """kept 是认得出的各张的属性 → 各种取值的张数，以及留作检验的组合各有几张、颜色与花纹互相独立时应有几张。

    训练图里各种颜色、花纹、背景几乎一样多（花纹与颜色因为留出的组合略有出入），所以张数悬殊就是模型的偏好。
    """
    counts = {
        key: {choice: sum(a[name] == choice for a in kept) for choice in choices}
        for key, name, choices in (
            ("wing_colors", "wing_color", WING_COLORS), ("patterns", "pattern", PATTERNS),
            ("backgrounds", "background", BACKGROUNDS),
        )
    }
    held_out = [
        {
            "name": f"{WING_COLORS[color][0]}{PATTERNS[pattern]}",
            "count": sum((a["wing_color"], a["pattern"]) == (color, pattern) for a in kept),
            "expected": counts["wing_colors"][color] * counts["patterns"][pattern] / len(kept),
        }
        for color, pattern in sorted(HELD_OUT)
    ]
    return counts | {"held_out": held_out, "held_out_pairs": sum(pair["count"] for pair in held_out)}


@torch.no_grad()
def measure(name: str = NAME, n_samples: int = 500, n_steps: int = 100) -> dict:
    pipeline = DDPMPipeline.from_pretrained(resolve(name)).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    images = []
    for count in tqdm([50] * (n_samples // 50), desc=f"{name}：采样 {n_steps} 步", unit="批"):
        output = pipeline(batch_size=count, num_inference_steps=n_steps, generator=generator, output_type="np")
        images.append(torch.from_numpy(output.images).permute(0, 3, 1, 2))
    images = torch.cat(images)
    is_butterfly, found = judge_butterflies(images)
    kept = [attributes for attributes, keep in zip(found, is_butterfly.tolist(), strict=True) if keep]
    real, _ = butterfly_images(n_samples, 32, seed=SEED, size="large", position="center")
    real = real / 255
    # 每张生成的图到两万张训练图中最近的一张有多远；与新画的图到训练图的距离相比，太小就是背下来了
    training = training_images()
    training = torch.cat([training, training.flip(-1)]).flatten(1) / 255

    # 步数少时三种方法各能认出多少（第 5.4 节）；都是每步一次网络调用
    unet, few_steps, n_few = pipeline.unet.eval(), {}, 300
    choices = samplers(pipeline.scheduler.config)
    steps = (5, 10, 20, 50, 100)
    with tqdm(total=3 * sum(steps), desc=f"{name}：比较步数", unit="步") as progress:
        for method, key in (("DDPM", "DDPM"), ("DDIM", "DDIM（η = 0）"), ("DPM-Solver++", "DPM-Solver++")):
            scheduler, options = choices[key]
            few_steps[method] = {}
            for count in steps:
                drawn = draw(unet, scheduler, count, n_few, **options)
                few_steps[method][str(count)] = judge_butterflies(drawn)[0].float().mean().item()
                progress.update(count)
    return {
        "n_samples": n_samples,
        "n_steps": n_steps,
        "recognized": is_butterfly.float().mean().item(),
        "n_attributes": n_samples,      # 下面各种张数数自多少张样图
        **count_attributes(kept),
        "nearest_training_image": nearest(images, training),
        "nearest_training_image_of_new_renders": nearest(real, training),
        "n_few": n_few,
        "few_steps": few_steps,
    }


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    return [
        f"- {result['n_samples']} 张（{result['n_steps']} 步）里，裁判有九成以上把握是蝴蝶的占 "
        f"{result['recognized']:.1%}（要求不低于 95%）",
        *(
            f"- {result['n_attributes']} 张里认得出的各张，{title}：" + "，".join(
                f"{names[c] if key == 'patterns' else names[c][0]} {n}" for c, n in result[key].items()
            )
            for key, title, names in (
                ("wing_colors", "翅膀颜色", WING_COLORS), ("patterns", "花纹", PATTERNS), ("backgrounds", "背景", BACKGROUNDS),
            )
        ),
        f"- 其中训练时没有见过的颜色 × 花纹组合 {result['held_out_pairs']} 张；括号里是颜色与花纹互相独立时应有的："
        + "，".join(f"{pair['name']} {pair['count']}（{pair['expected']:.1f}）" for pair in result["held_out"]),
        f"- 到最近的训练图像的距离（中位数）：生成的图 {result['nearest_training_image']:.2f}，"
        f"新画的图 {result['nearest_training_image_of_new_renders']:.2f}",
        "",
        f"步数少时认得出的比例，每格 {result['n_few']} 张：",
        "",
        "| 方法 | " + " | ".join(f"{n} 步" for n in result["few_steps"]["DDPM"]) + " |",
        "|---|" + "---|" * len(result["few_steps"]["DDPM"]),
        *(
            f"| {method} | " + " | ".join(f"{rate:.1%}" for rate in row.values()) + " |"
            for method, row in result["few_steps"].items()
        ),
    ]


if __name__ == "__main__":
    main()
