"""配方：mnist-class-conditional，要它画几就画几的扩散模型（第 5.9 节）。

UNet2DModel 的 num_class_embeds 给每个类别一个嵌入，加在时间嵌入上。编号 10 表示“不指定”：
训练时一成的标签换成它，采样时才能用无分类器引导。

用法：python recipes/mnist_class_conditional.py
"""

import torch
from common import parser, save_model
from diffusers import DDPMScheduler, UNet2DModel
from measuring import DEVICE, MNIST_DATA, class_lines, measure_classes
from torch.nn import functional as F

from book_utils import fit, mnist_tensors, resolve, set_seed

NAME = "mnist-class-conditional"
PURPOSE = "以数字为条件的 UNet 与调度器，类别 10 是“不指定”，用于无分类器引导（第 5.9 节）"
DATA = MNIST_DATA

NO_CLASS = 10               # 数字是 0 到 9
DROP_LABEL = 0.1
noise_scheduler = DDPMScheduler(
    num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
)


def build_model() -> UNet2DModel:
    """三级，28、14、7 像素；只在 7 × 7 上用注意力。"""
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(24, 48, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=NO_CLASS + 1,
    )


def batch_loss(model, images, labels, generator):
    """images：(B, 1, 28, 28)，取值 (0, 1)；labels：(B,)。返回预测速度的均方误差。"""
    drop = (torch.rand(len(labels), generator=generator) < DROP_LABEL).to(labels.device)
    labels = torch.where(drop, NO_CLASS, labels)
    x0 = images * 2 - 1
    timesteps = torch.randint(1000, (len(x0),), generator=generator).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    noisy = noise_scheduler.add_noise(x0, noise, timesteps)
    velocity = noise_scheduler.get_velocity(x0, noise, timesteps)
    return F.mse_loss(model(noisy, timesteps, class_labels=labels).sample, velocity)


def main():
    options = parser(__doc__.splitlines()[0], NAME).parse_args()
    set_seed(0)
    model = build_model()
    history = fit(
        model, mnist_tensors(train=True), batch_loss, n_epochs=4, batch_size=64,
        lr=1e-3, lr_decay=True, ema_decay=0.998,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        # 没有现成的管线会把类别交给网络，所以只存两个部件
        def save_weights(folder):
            model.cpu().half().save_pretrained(folder / "unet")
            noise_scheduler.save_pretrained(folder / "scheduler")

        save_model(
            options.output, save_weights, history, options.device, "python recipes/mnist_class_conditional.py"
        )


def measure(name: str = NAME) -> dict:
    """各种引导强度下画对的比例，以及同一个数字的各张有多不同。"""
    unet = UNet2DModel.from_pretrained(resolve(name), subfolder="unet").to(DEVICE).eval()
    no_class = unet.config.num_class_embeds - 1

    def guided(scale):
        def predict(x, t, labels):
            prediction = unet(x, t, class_labels=labels).sample
            if scale != 1:
                without = unet(x, t, class_labels=torch.full_like(labels, no_class)).sample
                prediction = without + scale * (prediction - without)
            return prediction
        return predict

    return measure_classes(name, {f"{scale:g}": guided(scale) for scale in (1.0, 2.0, 3.0, 5.0, 8.0)})


card_lines = class_lines


if __name__ == "__main__":
    main()
