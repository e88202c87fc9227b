"""配方：数字分类器 mnist-classifier，用来给生成的数字打分（第 3.5.1 节）。

除了十个数字，它还要认出“不是数字”的图像：噪声、许多数字的平均。
否则它对噪声和灰影也会很有把握地报出一个数字，分数就失去了意义。

用法：python recipes/mnist_classifier.py
"""

import torch
from common import parser, save_model
from measuring import DEVICE, MNIST_DATA, SEED, judge_digits
from safetensors.torch import save_file
from torch.nn import functional as F

from book_utils import DigitClassifier, corrupt, digit_classifier, fit, mnist_tensors, set_seed

NAME = "mnist-classifier"
PURPOSE = "数字分类器，给生成的数字打分（第 3.5.1、3.7.2 节）"
DATA = MNIST_DATA

NOT_A_DIGIT = 10


def make_negatives(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """由一批数字 (B, 1, 28, 28) 造出“不是数字”的图像，两种各 B//8 张。"""
    count = len(images) // 8
    # 几乎只剩噪声的数字
    amount = 0.85 + 0.15 * torch.rand(count, generator=generator).to(images.device)
    noise = corrupt(images[:count], amount, generator)
    # 十张不同数字的平均：就像噪声很大时网络给出的灰影
    picks = torch.randint(len(images), (count, 10), generator=generator)
    return torch.cat([noise, images[picks].mean(dim=1)])


def batch_loss(model, images, labels, generator):
    shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
    images = torch.roll(images, shift, dims=(2, 3))          # 平移两个像素以内，数字还是那个数字
    negatives = make_negatives(images, generator)
    # 真数字有时淡一些：生成的数字笔画深浅不一，不该因此就不算数字
    faded = 0.5 + 0.5 * torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device)
    images = images * faded
    labels = torch.cat([labels, torch.full((len(negatives),), NOT_A_DIGIT, device=labels.device)])
    # 都加一点噪声：否则它只看背景是不是纯白，就能分辨真数字与“不是数字”
    mixed = torch.cat([images, negatives])
    amount = 0.2 * torch.rand(len(mixed), generator=generator).to(images.device)
    return F.cross_entropy(model(corrupt(mixed, amount, generator)), labels)


def main():
    options = parser(__doc__.splitlines()[0], NAME).parse_args()
    set_seed(0)
    model = DigitClassifier()
    history = fit(
        model, mnist_tensors(train=True), batch_loss, n_epochs=3, lr=2e-3, lr_decay=True,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        save_model(
            options.output,
            lambda folder: save_file(model.cpu().half().state_dict(), folder / "model.safetensors"),
            history, options.device, "python recipes/mnist_classifier.py",
        )


def measure(name: str = NAME) -> dict:
    images, labels = mnist_tensors(train=False)
    classifier = digit_classifier().to(DEVICE)
    with torch.no_grad():
        predictions = torch.cat([classifier(part.to(DEVICE)).argmax(dim=1).cpu() for part in images.split(500)])
    generator = torch.Generator().manual_seed(SEED)
    averages = images[torch.randint(len(images), (1000, 10), generator=generator)].mean(dim=1)
    return {
        "test_accuracy": (predictions == labels).float().mean().item(),
        "recognized_test_images": judge_digits(images)[0],
        "recognized_uniform_noise": judge_digits(torch.rand(1000, 1, 28, 28, generator=generator))[0],
        "recognized_averages": judge_digits(averages)[0],
    }


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    return [
        f"- 测试集正确率：{result['test_accuracy']:.2%}（要求不低于 99%）",
        f"- 九成以上把握是数字的比例：测试图像 {result['recognized_test_images']:.1%}，"
        f"均匀噪声 {result['recognized_uniform_noise']:.1%}，十张数字的平均 {result['recognized_averages']:.1%}",
    ]


if __name__ == "__main__":
    main()
