"""配方：mnist-unet2d，用 diffusers 的 UNet2DModel 做与最小 UNet 相同的事（第 3.5.3 节）。

用法：python recipes/mnist_unet2d.py
"""

import torch
from common import parser, save_model
from diffusers import UNet2DModel
from measuring import DEVICE, MNIST_DATA, clean_image_lines, measure_clean_image_model
from torch.nn import functional as F

from book_utils import corrupt, fit, mnist_tensors, resolve, set_seed

NAME = "mnist-unet2d"
PURPOSE = "diffusers 的 UNet2DModel，做与最小 UNet 相同的事（第 3.5.3 节）"
DATA = MNIST_DATA
DOCUMENT_LOSSES = ([0.018925, 0.012785, 0.011694], 0.10)     # 本书所依据的文档给出的每轮平均损失，允许的相对误差


def build_model() -> UNet2DModel:
    """第 3.5.3 节的 UNet2DModel，1,707,009 个参数。"""
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def batch_loss(model, images, generator):
    amount = torch.rand(len(images), generator=generator).to(images.device)
    prediction = model(corrupt(images, amount, generator), 0).sample     # 时间步恒为 0
    return F.mse_loss(prediction, images)


def main():
    options = parser(__doc__.splitlines()[0], NAME).parse_args()
    set_seed(0)
    model = build_model()
    history = fit(
        model, mnist_tensors(train=True)[:1], batch_loss, n_epochs=3, micro_batch=32,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        save_model(
            options.output, model.cpu().half().save_pretrained,
            history, options.device, "python recipes/mnist_unet2d.py",
        )


def measure(name: str = NAME) -> dict:
    model = UNet2DModel.from_pretrained(resolve(name)).to(DEVICE).eval()
    return measure_clean_image_model(name, lambda x: model(x, 0).sample, DOCUMENT_LOSSES)


card_lines = clean_image_lines


if __name__ == "__main__":
    main()
