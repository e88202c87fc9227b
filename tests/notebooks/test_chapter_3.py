"""第三章的代码，照读者会做的那样来用：练习的参考答案照抄就能运行，换了数据、批大小也行；采样不留计算图。"""

import re

import jupytext
import pytest
import torch
import torchvision
from support.paths import ROOT

import book_utils

CHAPTER = ROOT / "chapters/03-from-scratch.md"
CELLS = [cell.source for cell in jupytext.read(CHAPTER).cells if cell.cell_type == "code"]


def cell_with(text: str) -> str:
    """含有 text 的那一格，应当只有一格。"""
    found = [cell for cell in CELLS if text in cell]
    assert len(found) == 1, (text, len(found))
    return found[0]


def definition(name: str) -> str:
    """只取一格里函数 name 的定义，连同装饰器。"""
    pattern = rf"(?:^@[^\n]+\n)?^def {name}\(.*?(?=^\S(?!def)|\Z)"
    found = re.search(pattern, cell_with(f"def {name}("), re.S | re.M)
    return found[0]


def answer(exercise: str) -> list[str]:
    """练习的参考答案里的 python 代码块。"""
    text = CHAPTER.read_text(encoding="utf-8").split(f"{{admonition}} 练习 {exercise}")[1].split("{admonition} 练习")[0]
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """一个读者：在空文件夹里，执行过第一格，有随书的网络和起点；训练只走两步。返回他的名字空间。"""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    names: dict = {}
    exec(CELLS[0], names)
    real_fit = book_utils.fit
    names["steps"] = steps = []

    def short_fit(*arguments, **options):
        history = real_fit(*arguments, **(options | {"max_steps": 2, "batch_size": 8}))
        steps.append((options, history.losses))
        return history

    monkeypatch.setattr(book_utils, "fit", short_fit)
    exec("from book_utils import BasicUNet, corrupt", names)
    exec("noise = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(3))", names)
    for name in ("clean_image_loss", "move_towards_prediction", "unet2d_loss"):
        exec(definition(name), names)
    exec(cell_with("model = UNet2DModel(").split("n_parameters")[0], names)
    exec('net = book_utils.load_weights(BasicUNet(), resolve("mnist-basic-unet"))', names)
    return names


def test_answer_3_5_runs(reader):
    exec(cell_with("classifier = book_utils.digit_classifier()").split("with torch.no_grad()")[0], reader)
    exec(definition("recognized"), reader)
    (code,) = answer("3.5")
    exec(code.split("print(")[0] + "redrawn = renoise(net, noise[:4], 3)", reader)
    assert reader["redrawn"].shape == (4, 1, 28, 28) and not reader["redrawn"].requires_grad


def test_answer_3_6_runs_from_a_common_start(reader, capsys):
    train, draw = answer("3.6")
    exec(train, reader)
    assert "逐步相减" in capsys.readouterr().out
    assert [options["batch_size"] for options, _ in reader["steps"]] == [32, 32]
    first, second = (losses[0] for _, losses in reader["steps"])
    # 起点与题目相同、只有时间步不同：损失相近而不相等
    assert first != second and abs(first / second - 1) < 0.2
    exec(draw, reader)
    assert reader["told_samples"].shape == (8, 1, 28, 28)


def test_answer_3_7_replaces_the_test_pictures_too(reader, monkeypatch, capsys):
    """没有网络：用 MNIST 的一小部分冒充 FashionMNIST。"""
    class Fake:
        def __init__(self, root, train, download):
            images, labels = book_utils.mnist_tensors(train)
            self.data = (255 - images[:200, 0] * 255).byte()        # 反色，与 MNIST 分得清
            self.targets, self.classes = labels[:200], [f"第 {i} 类" for i in range(10)]

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", Fake)
    exec("test_images = None", reader)
    (code,) = answer("3.7")
    exec(code, reader)
    assert len(capsys.readouterr().out.splitlines()) == 10
    assert reader["images"].mean() > 0.5 and reader["test_images"].shape == (200, 1, 28, 28)
    assert reader["predictions"].shape == (200, 1, 28, 28)


def test_sampling_loops_work_with_every_scheduler_and_keep_no_graph(reader):
    """随机权重的小网络也要走得通：起点的大小、输入的换算都由调度器说了算。"""
    import diffusers

    exec(definition("sample"), reader)
    reader["ddpm"] = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
    )
    for name in ("DDPM", "DDIM", "DPMSolverMultistep", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete"):
        scheduler = getattr(diffusers, f"{name}Scheduler")(num_train_timesteps=1000)
        start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        seen = []
        hook = reader["ddpm"].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].std().item()))
        images = reader["sample"](scheduler, 4, start)
        hook.remove()
        assert images.shape == start.shape and not images.requires_grad, name
        # 网络看到的第一张图是单位方差的噪声，不论调度器用哪种坐标
        assert abs(seen[0] / start.std().item() - 1) < 0.01, (name, seen[0])
