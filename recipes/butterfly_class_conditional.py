"""配方：butterfly-class-conditional，要它画什么颜色的蝴蝶就画什么颜色的（第 5.9 节）。

类别是翅膀的颜色，八种；编号 8 表示“不指定”，训练时一成的标签换成它，采样时才能用无分类器引导。
差一些的同类 butterfly-class-conditional-small 在 butterfly_class_conditional_small.py，用来作自引导。

用法：python recipes/butterfly_class_conditional.py
"""

import torch
from common import parser, save_model
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from measuring import BATCH, DEVICE, SEED, features, judge_butterflies
from torch.nn import functional as F
from tqdm import tqdm

from book_utils import butterfly_images, fit, frechet_distance, resolve, sample_classes, set_seed
from book_utils.worlds.butterflies import WING_COLORS

NAME = "butterfly-class-conditional"
PURPOSE = "以翅膀颜色为条件的 UNet 与调度器，类别 8 是“不指定”，用于无分类器引导（第 5.9 节）"
DATA = "蝴蝶世界 32×32：20,000 只大的、在中央的蝴蝶（seed=1），不含留作检验的颜色 × 花纹组合"

NO_CLASS = len(WING_COLORS)             # 类别编号就是颜色在 WING_COLORS 里的次序
DROP_LABEL = 0.1
N_IMAGES = 20_000
IMAGE_SIZE = 32
noise_scheduler = DDPMScheduler(
    num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
)

# 测量的各种采样：组 → {引导强度: sample_classes 的选项}；"auto" 组另用差一些的同类
MIDDLE = (0.2, 0.8)                     # 只在 t/T 的这一段引导
SETTINGS = {
    "plain": {w: {} for w in (1.0, 2.0, 3.0, 5.0, 8.0)},
    "interval": {w: {"interval": MIDDLE} for w in (3.0, 5.0)},
    "auto": {w: {} for w in (2.0, 3.0)},
    "inconsistent": {w: {"consistent": False} for w in (5.0,)},
}


def class_numbers(butterflies) -> torch.Tensor:
    """各只蝴蝶的类别编号，(N,)。"""
    numbers = {name: number for number, name in enumerate(WING_COLORS)}
    return torch.tensor([numbers[butterfly.wing_color] for butterfly in butterflies])


def training_data() -> tuple[torch.Tensor, torch.Tensor]:
    """（图像，uint8，(N_IMAGES, 3, 32, 32)；类别编号，(N_IMAGES,)）：与 butterflies-ddpm-32 同样的蝴蝶。"""
    images, butterflies = butterfly_images(N_IMAGES, IMAGE_SIZE, seed=1, size="large", position="center")
    return images, class_numbers(butterflies)


def build_model(channels: tuple[int, ...] = (32, 48, 80)) -> UNet2DModel:
    """三级，32、16、8 像素，1,256,275 个参数；只在 8 × 8 上用注意力。"""
    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=NO_CLASS + 1,
    )


def batch_loss(model, images, labels, generator):
    """images：uint8，(B, 3, 32, 32)；labels：(B,)。返回预测速度的均方误差。"""
    drop = (torch.rand(len(labels), generator=generator) < DROP_LABEL).to(labels.device)
    labels = torch.where(drop, NO_CLASS, labels)
    flip = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)     # 随机左右翻转
    x0 = images / 127.5 - 1
    timesteps = torch.randint(1000, (len(x0),), generator=generator).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    noisy = noise_scheduler.add_noise(x0, noise, timesteps)
    velocity = noise_scheduler.get_velocity(x0, noise, timesteps)
    return F.mse_loss(model(noisy, timesteps, class_labels=labels).sample, velocity)


def train(model, name: str, n_epochs: int, ema_decay: float, arguments: list[str] | None = None) -> None:
    """训练 model 并写出 models/name；差一些的同类也用它，数据与条件都相同。"""
    options = parser(f"训练 {name}", name).parse_args(arguments)
    history = fit(
        model, training_data(), batch_loss, n_epochs=n_epochs, batch_size=32,
        lr=1e-3, lr_decay=True, ema_decay=ema_decay,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        def save_weights(folder):
            model.cpu().half().save_pretrained(folder / "unet")
            noise_scheduler.save_pretrained(folder / "scheduler")

        save_model(
            options.output, save_weights, history, options.device, f"python recipes/{name.replace('-', '_')}.py"
        )


def main(arguments: list[str] | None = None):
    set_seed(0)
    train(build_model(), NAME, n_epochs=4, ema_decay=0.998, arguments=arguments)


# —— 测量 ——

def statistics(images: torch.Tensor, labels: torch.Tensor, real_features: torch.Tensor) -> dict:
    """颜色画对的比例、认得是蝴蝶的比例、同一颜色的各张之间的平均距离（只看画对的）、与真图的 Fréchet 距离。"""
    good, found = judge_butterflies(images)
    right = torch.tensor([list(WING_COLORS).index(seen["wing_color"]) for seen in found]) == labels
    seen_features = features(images)
    groups = [seen_features[right & good & (labels == label)] for label in range(NO_CLASS)]
    return {
        "as_asked": right.float().mean().item(),
        "recognized": good.float().mean().item(),
        "variety": torch.stack([torch.pdist(group).mean() for group in groups if len(group) > 1]).mean().item(),
        "distance": frechet_distance(seen_features, real_features),
    }


def real_images(n_each: int, seed: int) -> torch.Tensor:
    """新画的真图，每种颜色 n_each 张，取值 0 到 1，依类别排好。"""
    images, butterflies = butterfly_images(n_each * 16, IMAGE_SIZE, seed=seed, size="large", position="center")
    numbers = class_numbers(butterflies)
    return torch.cat([images[(numbers == label).nonzero()[:n_each, 0]] for label in range(NO_CLASS)]) / 255


def measure_settings(name: str, settings: dict, guide=None, n_samples: int = 160, n_steps: int = 15) -> dict:
    """用 settings（格式同 SETTINGS）里的每种采样各画 n_samples 张，八种颜色一样多。"""
    folder = resolve(name)
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet").to(DEVICE).eval()
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", timestep_spacing="trailing")
    labels = torch.arange(NO_CLASS).repeat_interleave(n_samples // NO_CLASS)
    noise = torch.randn(n_samples, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(SEED))
    real = real_images(n_samples // NO_CLASS, SEED)
    real_features = features(real)
    table = {}
    with tqdm(total=sum(map(len, settings.values())), desc=f"{name}：采样 {n_steps} 步", unit="种") as progress:
        for group, rows in settings.items():
            table[group] = {}
            for scale, options in rows.items():
                images = torch.cat([
                    sample_classes(
                        unet, scheduler, x.to(DEVICE), y.to(DEVICE), n_steps, scale,
                        guide=guide if group == "auto" else None, **options,
                    ).cpu()
                    for x, y in zip(noise.split(BATCH), labels.split(BATCH), strict=True)
                ])
                table[group][f"{scale:g}"] = statistics(images, labels, real_features)
                progress.update()
    other = real_images(n_samples // NO_CLASS, SEED + 1)
    return {
        "n_samples": n_samples, "n_steps": n_steps, "class_guidance": table,
        "real": statistics(other, labels, real_features),
    }


def measure(name: str = NAME) -> dict:
    """各种引导强度，只在一段噪声水平上引导，自引导，以及截断之后不重算噪声。"""
    guide = UNet2DModel.from_pretrained(resolve(f"{NAME}-small"), subfolder="unet").to(DEVICE).eval()
    return measure_settings(name, SETTINGS, guide) | {"interval": MIDDLE}


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    groups = {
        "plain": "引导", "interval": f"只在 t/T 为 {MIDDLE[0]} 到 {MIDDLE[1]} 时引导", "auto": "自引导",
        "inconsistent": "引导，截断之后不重算噪声",
    }
    rows = [
        (f"{groups[group]}，w = {scale}", row)
        for group, table in result["class_guidance"].items() for scale, row in table.items()
    ]
    return [
        f"每种采样 {result['n_samples']} 张（{result['n_steps']} 步），八种颜色一样多"
        "（butterfly-class-conditional 要求：最好的强度下，颜色画对不低于 95%）：",
        "",
        "| | 颜色画对 | 认得是蝴蝶 | 同一颜色的各张之间，特征的平均距离 | 与真图的 Fréchet 距离 |",
        "|---|---|---|---|---|",
        *(
            f"| {title} | {row['as_asked']:.1%} | {row['recognized']:.1%} | {row['variety']:.2f} | {row['distance']:.1f} |"
            for title, row in [*rows, ("新画的真图", result["real"])]
        ),
    ]


if __name__ == "__main__":
    main()
