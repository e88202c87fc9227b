"""配方：butterflies-ddpm-32，生成 32 × 32 蝴蝶的 DDPM 管线（第四、五、七章）。

与第 4.3.4 节的循环做同样的事，只是图像更多、训练更久，对权重做滑动平均，并且改为预测速度：
最初预测噪声，训练 7,500 步后形状很好，颜色却偏得厉害，裁判只认 35.6% 是蝴蝶。在时间步 960 以上，
x0 = (x_t − √(1−ᾱ)·eps) / √ᾱ 要除以不到 0.06 的数，噪声里百分之几的误差就放大成整张图的偏色。

用法：python recipes/butterflies_ddpm_32.py
"""

import torch
from common import parser, save_model
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.nn import functional as F

from book_utils import butterfly_images, fit, set_seed

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
    options = parser(__doc__.splitlines()[0], "butterflies-ddpm-32").parse_args()
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


if __name__ == "__main__":
    main()
