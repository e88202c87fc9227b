"""配方：mnist-class-planes，把类别铺成通道交给 UNet，要它画几就画几（第 5.7 节）。

用法：python recipes/mnist_class_planes.py
"""

import torch
from common import parser, save_model
from measuring import DEVICE, MNIST_DATA, class_lines, measure_classes
from mnist_class_conditional import noise_scheduler
from safetensors.torch import save_file
from torch.nn import functional as F

from book_utils import ClassConditionedUnet, fit, load_weights, mnist_tensors, resolve, set_seed

NAME = "mnist-class-planes"
PURPOSE = "以数字为条件的 UNet，类别的嵌入铺成通道，与图像拼接（第 5.7 节）"
DATA = MNIST_DATA


def batch_loss(model, images, labels, generator):
    """images：(B, 1, 28, 28)，取值 (0, 1)；labels：(B,)。返回预测速度的均方误差。"""
    x0 = images * 2 - 1
    timesteps = torch.randint(1000, (len(x0),), generator=generator).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    noisy = noise_scheduler.add_noise(x0, noise, timesteps)
    return F.mse_loss(model(noisy, timesteps, labels), noise_scheduler.get_velocity(x0, noise, timesteps))


def main():
    options = parser(__doc__.splitlines()[0], NAME).parse_args()
    set_seed(0)
    model = ClassConditionedUnet()
    history = fit(
        model, mnist_tensors(train=True), batch_loss, n_epochs=3, batch_size=64,
        lr=2e-3, lr_decay=True, ema_decay=0.995,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        weights = {key: value.half().contiguous() for key, value in model.cpu().state_dict().items()}

        def save_weights(folder):
            save_file(weights, folder / "model.safetensors")
            noise_scheduler.save_pretrained(folder / "scheduler")

        save_model(options.output, save_weights, history, options.device, "python recipes/mnist_class_planes.py")


def measure(name: str = NAME) -> dict:
    """类别铺成通道的网络，没有引导。"""
    unet = load_weights(ClassConditionedUnet(), resolve(name)).to(DEVICE)
    return measure_classes(name, {"1": unet})


card_lines = class_lines


if __name__ == "__main__":
    main()
