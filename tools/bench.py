"""比较最小 UNet 的两种训练循环：本书的写法与所依据文档的写法（make bench）。

两者用同一份数据、同一个初始网络、同样的步数，在同一台机器上交替各跑几遍，
打印每秒处理的图像数、两者之比，以及最后一段的平均损失。
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision
from torch.nn import functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from book_utils import BasicUNet, corrupt, get_device, mnist_root, mnist_tensors, random_batches, set_seed

STEPS, ROUNDS, BATCH, TAIL = 60, 3, 128, 20


def document_loop(device):
    """文档的写法：DataLoader 逐张解码，默认的内存次序。"""
    dataset = torchvision.datasets.MNIST(
        mnist_root(), train=True, download=True, transform=torchvision.transforms.ToTensor()
    )
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True)
    net = BasicUNet().to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses, started = [], None
    for step, (x, _) in enumerate(loader):
        if step == 5:                       # 前五步用来热身，不计时
            started = time.perf_counter()
        x = x.to(device)
        noise_amount = torch.rand(x.shape[0]).to(device)
        amount = noise_amount.view(-1, 1, 1, 1)
        noisy_x = x * (1 - amount) + torch.rand_like(x) * amount
        loss = F.mse_loss(net(noisy_x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step + 1 == STEPS:
            break
    return losses, time.perf_counter() - started


def book_loop(device):
    """本书第 3.4.2 节的写法：整个数据集一个张量，channels_last。"""
    images, _ = mnist_tensors(train=True)
    generator = set_seed(0)
    net = BasicUNet().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses, started = [], None
    for step, indices in enumerate(random_batches(len(images), BATCH, generator)[:STEPS]):
        if step == 5:
            started = time.perf_counter()
        x = images[indices].to(device)
        amount = torch.rand(len(x), generator=generator).to(device)
        loss = F.mse_loss(net(corrupt(x, amount, generator)), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - started


def main():
    device = get_device()
    rates: dict[str, list[float]] = {"文档的循环": [], "本书的循环": []}
    for repeat in range(ROUNDS):
        for name, loop in zip(rates, (document_loop, book_loop), strict=True):
            set_seed(0)
            losses, seconds = loop(device)
            rates[name].append((STEPS - 5) * BATCH / seconds)
            tail = statistics.mean(losses[-TAIL:])
            print(f"第 {repeat + 1} 遍　{name}：每秒 {rates[name][-1]:5.0f} 张，最后 {TAIL} 步平均损失 {tail:.4f}")
    document, book = (statistics.median(values) for values in rates.values())
    print(f"中位数：文档每秒 {document:.0f} 张，本书每秒 {book:.0f} 张，比值 {book / document:.2f}（{device}）")


if __name__ == "__main__":
    main()
