"""各配方的损失：时间步从 0 抽到最后一步，同一个种子重复，不同的种子不同；采样循环不留计算图。"""

from types import SimpleNamespace

import butterflies_ddpm_32
import measuring
import mnist_class_conditional
import mnist_class_planes
import mnist_ddpm
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from book_utils import fit


class Watcher(nn.Module):
    """代替网络：记下收到的时间步，预测全零。"""

    def __init__(self, output):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.output, self.timesteps = output, []

    def forward(self, x, timesteps, *_, **__):
        self.timesteps.append(timesteps)
        return self.output(x * 0 + self.weight)


def sample_of(x):
    return SimpleNamespace(sample=x)


CASES = {
    mnist_ddpm: (sample_of, lambda: (torch.rand(4000, 1, 2, 2),)),
    mnist_class_conditional: (sample_of, lambda: (torch.rand(4000, 1, 2, 2), torch.randint(10, (4000,)))),
    mnist_class_planes: (lambda x: x, lambda: (torch.rand(4000, 1, 2, 2), torch.randint(10, (4000,)))),
    butterflies_ddpm_32: (sample_of, lambda: (torch.randint(256, (4000, 3, 2, 2), dtype=torch.uint8),)),
}


@pytest.mark.parametrize("recipe", CASES, ids=lambda recipe: recipe.__name__)
def test_timesteps_cover_the_whole_range(recipe):
    """4 万次抽取：每个时间步平均 40 次，漏掉最后一步的机会是 1e-17。"""
    output, batch = CASES[recipe]
    watcher = Watcher(output)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        recipe.batch_loss(watcher, *batch(), generator)
    seen = torch.cat(watcher.timesteps)
    assert seen.min() == 0 and seen.max() == 999
    counts = torch.bincount(seen, minlength=1000).float()
    assert counts.min() > 10 and counts[:500].sum() / counts.sum() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("recipe", CASES, ids=lambda recipe: recipe.__name__)
def test_same_seed_same_loss_other_seed_other_loss(recipe):
    output, batch = CASES[recipe]
    inputs = batch()

    def loss(seed):
        return recipe.batch_loss(Watcher(output), *inputs, torch.Generator().manual_seed(seed)).item()

    assert loss(3) == loss(3) != loss(4)


def test_fit_uses_its_seed():
    def train(seed):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        fit(model, (torch.arange(32.0).view(8, 4) / 32,),
            lambda m, x, g: (m(x) - torch.randn(len(x), 1, generator=g)).square().mean(),
            n_epochs=2, batch_size=4, seed=seed)
        return model.weight.detach()

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))


def test_fit_follows_the_cosine():
    """lr_decay 时，走到第 k 步的学习率是 lr·(1 + cos(πk/n)) / 2：用恒为 1 的梯度、SGD 式的位移核对总路程。"""
    rates = []

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

    model = Probe()

    def loss(m, x, generator):
        rates.append(m.weight.detach().clone())
        return m.weight * 1.0

    fit(model, (torch.zeros(10, 1),), loss, n_epochs=1, batch_size=1, lr=0.1, lr_decay=True)
    # 梯度恒为 1 时，Adam 的每一步恰好走 lr（偏差修正之后，动量之比为 1）
    steps = -torch.stack([*rates, model.weight.detach()]).diff()
    wanted = 0.1 * 0.5 * (1 + torch.cos(torch.pi * torch.arange(10) / 10))
    torch.testing.assert_close(steps, wanted, rtol=1e-3, atol=1e-5)


# —— 采样 ——

def test_samplers_are_pinned():
    """四种采样方法的设置：换掉调度器、改了间隔方式，都要在这里改一次。"""
    choices = measuring.samplers(DDPMScheduler(num_train_timesteps=1000).config)
    kinds = {name: (type(scheduler).__name__, options) for name, (scheduler, options) in choices.items()}
    assert kinds == {
        "DDPM": ("DDPMScheduler", {}),
        "DDIM（η = 0）": ("DDIMScheduler", {"eta": 0.0}),
        "DDIM（η = 1）": ("DDIMScheduler", {"eta": 1.0}),
        "DPM-Solver++": ("DPMSolverMultistepScheduler", {}),
    }


def test_drawing_leaves_no_graph():
    """采样循环不留计算图：漏了 no_grad，内存会随步数增长。"""
    network = Watcher(sample_of)
    network.config = SimpleNamespace(in_channels=1, sample_size=4)
    scheduler, options = measuring.samplers(DDPMScheduler(num_train_timesteps=1000).config)["DDPM"]
    images = measuring.draw(network, scheduler, 3, 2, **options)
    assert images.shape == (2, 1, 4, 4) and not images.requires_grad
    assert 0 <= images.min() and images.max() <= 1
