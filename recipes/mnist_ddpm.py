"""配方：mnist-ddpm，按 DDPM 的退化过程预测噪声；可去掉时间步作对照（第 3.7 节）。

用法：python recipes/mnist_ddpm.py
      python recipes/mnist_ddpm.py --without-timesteps   对照：损失记在 without_timesteps.json
"""

import json

import torch
from common import parser, save_model
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from measuring import DEVICE, MNIST_DATA, draw, judge_digits, samplers
from torch.nn import functional as F
from tqdm import tqdm

from book_utils import fit, frechet_distance, mnist_tensors, resolve, set_seed

NAME = "mnist-ddpm"
PURPOSE = "DDPM 管线：按高斯退化过程预测噪声（第 3.7 节）"
DATA = MNIST_DATA

STEPS_PER_EPOCH = 469
noise_scheduler = DDPMScheduler(num_train_timesteps=1000)


def build_model() -> UNet2DModel:
    """比第 3.5.3 节更窄更浅的 UNet2DModel，686,769 个参数；只在最低分辨率上用注意力。"""
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def batch_loss(model, images, generator, with_timesteps=True):
    x0 = images * 2 - 1                                                  # (0, 1) → (−1, 1)
    timesteps = torch.randint(1000, (len(x0),), generator=generator).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    noisy = noise_scheduler.add_noise(x0, noise, timesteps)
    prediction = model(noisy, timesteps if with_timesteps else 0).sample
    return F.mse_loss(prediction, noise)


def main():
    options = parser(__doc__.splitlines()[0], NAME)
    options.add_argument(
        "--without-timesteps", action="store_true", help="对照：时间步恒为 0，只走第一轮，只记下损失"
    )
    options = options.parse_args()
    if options.without_timesteps:
        options.checkpoint = options.checkpoint.with_stem(options.checkpoint.stem + "-without-timesteps")
        options.max_steps = min(options.max_steps or STEPS_PER_EPOCH, STEPS_PER_EPOCH)

    set_seed(0)
    model = build_model()
    history = fit(
        model, mnist_tensors(train=True)[:1],
        lambda *batch: batch_loss(*batch, with_timesteps=not options.without_timesteps),
        n_epochs=5, lr=2e-3, lr_decay=True, ema_decay=0.995,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.without_timesteps:
        losses = [round(loss, 6) for loss in history.losses]
        (options.output / "without_timesteps.json").write_text(json.dumps({"losses": losses}), encoding="utf-8")
    elif options.max_steps is None:
        pipeline = DDPMPipeline(unet=model.cpu().half(), scheduler=noise_scheduler)
        save_model(
            options.output, pipeline.save_pretrained, history, options.device, "python recipes/mnist_ddpm.py"
        )


@torch.no_grad()
def quality_table(unet, choices: dict, steps: tuple[int, ...], n_samples: int, real_features: torch.Tensor) -> dict:
    """每种方法、每种步数各生成 n_samples 张：认得出的比例，与真图特征的 Fréchet 距离。"""
    table: dict[str, dict] = {method: {} for method in choices}
    with tqdm(total=len(choices) * sum(steps), desc=f"{NAME}：采样", unit="步") as progress:
        for method, (scheduler, options) in choices.items():
            for n_steps in steps:
                rate, features = judge_digits(draw(unet, scheduler, n_steps, n_samples, **options))
                table[method][str(n_steps)] = {
                    "recognized": rate,
                    "distance": frechet_distance(features, real_features),
                }
                progress.update(n_steps)
    return table


def measure(name: str = NAME, n_samples: int = 300) -> dict:
    """四种采样方法、四种步数的质量；步数最少时，再与 leading 的挑法比较。"""
    pipeline = DDPMPipeline.from_pretrained(resolve(name))
    unet, config = pipeline.unet.to(DEVICE).eval(), pipeline.scheduler.config
    test_images, _ = mnist_tensors(train=False)
    real_rate, real_features = judge_digits(test_images[:n_samples])
    other_features = judge_digits(test_images[n_samples : 2 * n_samples])[1]
    return {
        "n_samples": n_samples,
        "real_recognized": real_rate,
        "real_distance": frechet_distance(real_features, other_features),
        "samplers": quality_table(unet, samplers(config), (5, 10, 20, 50), n_samples, real_features),
        "leading": quality_table(unet, samplers(config, "leading"), (5,), n_samples, real_features),
    }


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    titles = [f"{n} 步" for n in next(iter(result["samplers"].values()))]
    titles += [f"{n} 步，leading" for n in next(iter(result["leading"].values()))]
    rows = {method: [*row.values(), *result["leading"][method].values()] for method, row in result["samplers"].items()}
    return [
        f"每格 {result['n_samples']} 张：认得出的比例 / 与测试图像的 Fréchet 距离。"
        f"真图：{result['real_recognized']:.1%} / {result['real_distance']:.2f}（两批测试图像之间）。"
        "时间步的挑法是 trailing，最后一列换成 leading。",
        "",
        "| 方法 | " + " | ".join(titles) + " |",
        "|---|" + "---|" * len(titles),
        *(
            f"| {method} | " + " | ".join(f"{c['recognized']:.1%} / {c['distance']:.1f}" for c in row) + " |"
            for method, row in rows.items()
        ),
    ]


if __name__ == "__main__":
    main()
