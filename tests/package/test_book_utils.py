"""book_utils 的单元测试：好的输入给出对的结果，坏的输入给出说得清的中文错误，且不留下半成品。"""

import contextlib
import gzip
import hashlib
import re
import shutil

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import book_utils
from book_utils import Slider, corrupt, fit, frechet_distance, grid_image, load_weights, mnist_root, resolve
from book_utils.data import MNIST_MD5
from book_utils.metrics import FamilyJudge
from book_utils.models import MODELS_ROOT

# —— 设备与种子 ——

def test_same_seed_gives_same_numbers():
    first = torch.rand(3, generator=book_utils.set_seed(7)), torch.rand(3), np.random.rand()
    second = torch.rand(3, generator=book_utils.set_seed(7)), torch.rand(3), np.random.rand()
    assert all(torch.equal(a, b) for a, b in zip(first[:2], second[:2], strict=True)) and first[2] == second[2]


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "0", True])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="seed 应是 0 到 4294967295 之间的整数"):
        book_utils.set_seed(seed)


# —— 退化过程 ——

def test_corrupt_follows_the_formula():
    x = torch.rand(3, 1, 28, 28)
    amount = torch.tensor([0.0, 0.3, 1.0])
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(5))
    result = corrupt(x, amount, torch.Generator().manual_seed(5))
    expected = torch.stack([x[0], 0.7 * x[1] + 0.3 * noise[1], noise[2]])
    torch.testing.assert_close(result, expected)
    assert result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("amount", [0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)])
def test_corrupt_takes_one_amount_for_the_whole_batch(amount):
    x = torch.rand(3, 1, 8, 8)
    result, expected = (
        corrupt(x, a, torch.Generator().manual_seed(5)) for a in (amount, torch.full((3,), 0.5))
    )
    assert result.dtype == x.dtype and torch.equal(result, expected)
    assert torch.equal(corrupt(x, 0), x)


@pytest.mark.parametrize("amount", [-0.1, 2, float("nan"), [-0.1, 0.5], [0.5, 1.1], [float("nan"), 0.5]])
def test_corrupt_rejects_amount_out_of_range(amount):
    with pytest.raises(ValueError, match="amount 应在 0 到 1 之间"):
        corrupt(torch.rand(2, 1, 28, 28), torch.tensor(amount) if isinstance(amount, list) else amount)


@pytest.mark.parametrize("amount", [torch.rand(3), torch.rand(2, 1), torch.rand(1), [0.1, 0.2], "0.5", None])
def test_corrupt_rejects_amount_of_wrong_shape_or_kind(amount):
    with pytest.raises(ValueError, match=r"形状为 \(2,\)"):
        corrupt(torch.rand(2, 1, 28, 28), amount)


@pytest.mark.parametrize("x, said", [
    (torch.rand(28, 28), "torch.float32 张量 (28, 28)"),
    (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), "torch.uint8 张量"),
    (None, "None"),
])
def test_corrupt_rejects_images_of_wrong_shape_or_kind(x, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        corrupt(x, 0.5)


# —— 最小 UNet ——

def test_basic_unet_shape_and_size():
    net = book_utils.BasicUNet()
    assert sum(p.numel() for p in net.parameters()) == 309_057
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 1, 28, 28)
    assert book_utils.BasicUNet(3, 3)(torch.rand(2, 3, 32, 16)).shape == (2, 3, 32, 16)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 1, 27, 28), (1, 1, 28, 30)])
def test_basic_unet_rejects_wrong_shape(shape):
    with pytest.raises(ValueError, match="4 的倍数"):
        book_utils.BasicUNet()(torch.rand(shape))


# —— 数据 ——

def packed_mnist(folder, names=MNIST_MD5):
    """在 folder 里放一份只有压缩文件的 MNIST，返回其根目录。"""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in names:
        shutil.copy(book_utils.DATA_ROOT / "MNIST" / "raw" / f"{name}.gz", raw)
    return folder


def test_mnist_is_the_real_one():
    for train, count in ((True, 60_000), (False, 10_000)):
        images, labels = book_utils.mnist_tensors(train)
        assert images.shape == (count, 1, 28, 28) and labels.shape == (count,)
        assert images.min() == 0 and images.max() == 1 and images.dtype == torch.float32
        assert labels.unique().tolist() == list(range(10))
    raw = book_utils.DATA_ROOT / "MNIST" / "raw"
    for name, md5 in MNIST_MD5.items():
        assert hashlib.md5((raw / name).read_bytes()).hexdigest() == md5


def test_torchvision_finds_the_data_without_download(tmp_path, monkeypatch):
    def no_download(*args, **kwargs):
        raise AssertionError("不应下载")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", no_download)
    root = mnist_root(packed_mnist(tmp_path))
    dataset = torchvision.datasets.MNIST(root, train=False, download=True)
    assert len(dataset) == 10_000


def test_missing_data_file(tmp_path):
    packed_mnist(tmp_path, names=list(MNIST_MD5)[:3])
    with pytest.raises(FileNotFoundError, match="缺少数据文件.*t10k-labels-idx1-ubyte.gz"):
        mnist_root(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "other content", "not gzip"])
def test_damaged_data_file_leaves_nothing_behind(tmp_path, damage):
    raw = packed_mnist(tmp_path) / "MNIST" / "raw"
    victim = raw / "t10k-labels-idx1-ubyte.gz"
    content = victim.read_bytes()
    victim.write_bytes({
        "truncated": content[: len(content) // 2],
        "other content": gzip.compress(b"not mnist"),
        "not gzip": b"not gzip at all",
    }[damage])
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte.gz.*请重新取得它"):
        mnist_root(tmp_path)
    assert not (raw / "t10k-labels-idx1-ubyte").exists()
    assert not list(raw.glob(".t10k-labels*")), "留下了半个文件"


def test_half_written_raw_file_is_replaced(tmp_path):
    root = packed_mnist(tmp_path)
    half = root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    half.write_bytes(b"half")
    mnist_root(root)
    assert hashlib.md5(half.read_bytes()).hexdigest() == MNIST_MD5[half.name]


def test_random_batches_cover_everything_once():
    batches = book_utils.random_batches(1000, 128, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == [128] * 7 + [104]
    assert sorted(torch.cat(batches).tolist()) == list(range(1000))
    assert torch.cat(batches).tolist() != list(range(1000))


def test_random_batches_rejects_zero():
    with pytest.raises(ValueError, match="正整数"):
        book_utils.random_batches(10, 0, torch.Generator())


# —— 模型 ——

EMBEDDED = sorted(path.name for path in MODELS_ROOT.iterdir() if path.is_dir())


@pytest.fixture
def one_model(tmp_path):
    """一份可以弄坏的 mnist-basic-unet。"""
    shutil.copytree(MODELS_ROOT / "mnist-basic-unet", tmp_path / "mnist-basic-unet")
    return tmp_path


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_are_intact(name):
    folder = MODELS_ROOT / name
    assert resolve(name) == str(folder)
    listed = {line.split(maxsplit=1)[1] for line in (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()}
    weights = {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}
    assert weights and weights <= listed
    assert not [path for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]


@pytest.mark.parametrize("name", EMBEDDED)
def test_model_cards_agree_with_the_files(name):
    folder = MODELS_ROOT / name
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert (folder / "SHA256SUMS").read_text(encoding="utf-8").strip() in card
    for heading in ("数据：", "配方：", "训练：", "## 测量"):
        assert heading in card


def test_all_models_together_are_small():
    assert sum(path.stat().st_size for path in MODELS_ROOT.rglob("*") if path.is_file()) < 80e6


def test_unknown_model_lists_the_known_ones(one_model):
    with pytest.raises(FileNotFoundError, match="没有找到随书模型 'no-such-model'.*现有：mnist-basic-unet"):
        resolve("no-such-model", models_root=one_model)


def test_missing_model_file(one_model):
    (one_model / "mnist-basic-unet" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="缺少文件.*model.safetensors"):
        resolve("mnist-basic-unet", models_root=one_model)


def test_truncated_model_file(one_model):
    path = one_model / "mnist-basic-unet" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="已损坏或被改动.*SHA-256"):
        resolve("mnist-basic-unet", models_root=one_model)
    with pytest.raises(ValueError, match="已损坏或不完整"):
        load_weights(book_utils.BasicUNet(), path.parent)


def test_weights_of_another_network(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="与 BasicUNet 的结构不符"):
        load_weights(book_utils.BasicUNet(), tmp_path)


def test_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="没有找到权重文件"):
        load_weights(book_utils.BasicUNet(), tmp_path)


def test_hub_mode_returns_the_hub_id(monkeypatch):
    monkeypatch.setenv("BOOK_MODE", "hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")       # 只看返回值，不联网
    assert resolve("mnist-ddpm", hub="google/ddpm-cifar10-32") == "google/ddpm-cifar10-32"
    assert resolve("mnist-basic-unet") == str(MODELS_ROOT / "mnist-basic-unet")


def test_hub_mode_without_network(monkeypatch):
    monkeypatch.setenv("BOOK_MODE", "hub")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")         # 本机上没有程序在听的端口
    with pytest.raises(ConnectionError, match="BOOK_MODE=hub 需要联网，但连不上 http://127.0.0.1:9.*HF_ENDPOINT"):
        resolve("mnist-ddpm", hub="google/ddpm-cifar10-32")


def test_unknown_mode(monkeypatch):
    monkeypatch.setenv("BOOK_MODE", "huge")
    with pytest.raises(ValueError, match="BOOK_MODE 应是 embedded 或 hub，收到的是 'huge'"):
        resolve("mnist-ddpm")


# —— 训练循环 ——

class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        return self.layer(x)


def line_loss(model, x, generator):
    noise = 0.1 * torch.randn(x.shape, generator=generator)
    return (model(x) - (3 * x + noise)).square().mean()


def train_line(**options):
    book_utils.set_seed(0)
    model = Line()
    x = torch.linspace(-1, 1, 100).view(-1, 1)
    return model, fit(model, (x,), line_loss, n_epochs=20, batch_size=16, lr=0.05, **options)


def test_fit_learns():
    model, history = train_line()
    assert len(history.losses) == 20 * 7 and history.seconds > 0
    assert abs(model.layer.weight.item() - 3) < 0.2
    assert not model.training


@pytest.mark.parametrize("options", [{}, {"lr_decay": True, "ema_decay": 0.9}])
@pytest.mark.parametrize("stop", [1, 7, 50, 133])
def test_interrupted_training_ends_the_same(tmp_path, options, stop):
    expected_model, expected = train_line(**options)
    checkpoint = tmp_path / "checkpoint.safetensors"
    train_line(checkpoint=checkpoint, checkpoint_every=1, max_steps=stop, **options)
    model, history = train_line(checkpoint=checkpoint, checkpoint_every=1, **options)
    assert history.losses == expected.losses
    for a, b in zip(model.parameters(), expected_model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob("*.partial"))


def test_micro_batches_accumulate_to_the_same_gradient():
    def clean_loss(model, x, generator):
        return (model(x) - 3 * x).square().mean()

    x = torch.linspace(-1, 1, 100).view(-1, 1)
    results = []
    for micro_batch in (None, 5, 16):
        book_utils.set_seed(0)
        results.append(fit(Line(), (x,), clean_loss, n_epochs=3, batch_size=16, micro_batch=micro_batch).losses)
    for losses in results[1:]:
        assert losses == pytest.approx(results[0], rel=1e-4)
    with pytest.raises(ValueError, match="micro_batch 应是正整数，收到的是 0"):
        fit(Line(), (x,), clean_loss, n_epochs=1, micro_batch=0)


def test_checkpoint_of_another_network(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    train_line(checkpoint=checkpoint, checkpoint_every=1, max_steps=2)
    x = torch.linspace(-1, 1, 100).view(-1, 1)
    with pytest.raises(ValueError, match="不属于这次训练（网络不同）"):
        fit(nn.Linear(1, 1), (x,), line_loss, n_epochs=20, batch_size=16, lr=0.05, checkpoint=checkpoint)


@pytest.mark.parametrize("bad", [{"n_epochs": 0}, {"lr": 0.0}, {"ema_decay": 1.0}])
def test_fit_rejects_bad_options(bad):
    with pytest.raises(ValueError, match="收到的是"):
        fit(Line(), (torch.rand(4, 1),), line_loss, **({"n_epochs": 1} | bad))


def test_fit_rejects_tensors_of_different_length():
    with pytest.raises(ValueError, match=r"收到的是 \[4, 5\]"):
        fit(Line(), (torch.rand(4, 1), torch.rand(5)), line_loss, n_epochs=1)


def test_epoch_means_drops_the_unfinished_epoch():
    assert book_utils.epoch_means([1.0, 3.0, 5.0, 7.0, 100.0], 2) == [2.0, 6.0]


# —— 指标 ——

def test_frechet_distance_of_known_gaussians():
    # 一维：(μ_a − μ_b)² + (σ_a − σ_b)²
    a = torch.tensor([[-1.0], [1.0]]).repeat(500, 1)
    distance = frechet_distance(a, 3 * a + 5)
    sigma = a.double().std().item()
    assert distance == pytest.approx(25 + (2 * sigma) ** 2, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_rejects_wrong_shape():
    with pytest.raises(ValueError, match=re.escape("收到的是 (5, 3) 和 (5, 4)")):
        frechet_distance(torch.rand(5, 3), torch.rand(5, 4))


BROKEN = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("bad", BROKEN)
def test_frechet_distance_refuses_broken_features(bad):
    """一个坏数就让 max(0.0, nan) 得出满分 0，所以要拒绝；坏在哪一组都一样。"""
    good, broken = torch.rand(10, 3), torch.rand(10, 3)
    broken[4, 1] = bad
    for a, b in ((good, broken), (broken, good), (broken, broken)):
        with pytest.raises(ValueError, match="NaN 或无穷"):
            frechet_distance(a, b)


def test_frechet_distance_never_hides_an_overflow():
    huge = torch.full((10, 2), 1e200, dtype=torch.float64) * torch.rand(10, 2, dtype=torch.float64)
    with contextlib.suppress(RuntimeError):             # 求特征值时报错也可以
        assert not np.isfinite(frechet_distance(huge, torch.rand(10, 2)))


@pytest.mark.parametrize("judge, shape", [
    (book_utils.digit_classifier, (2, 1, 28, 28)),
    (book_utils.butterfly_judge, (2, 3, 32, 32)),
    (lambda: FamilyJudge().eval(), (2, 3, 32, 32)),
], ids=["数字分类器", "蝴蝶裁判", "家族裁判"])
@pytest.mark.parametrize("bad", BROKEN)
def test_judges_refuse_broken_images(judge, shape, bad):
    images = torch.rand(shape)
    judge = judge()
    judge(images)
    images[1, 0, 3, 3] = bad
    for ask in (judge, getattr(judge, "features", judge), getattr(judge, "describe", judge)):
        with pytest.raises(ValueError, match="1 个是 NaN 或无穷"):
            ask(images)


@pytest.mark.parametrize("shape", [(28, 28), (2, 3, 28, 28), (2, 1, 32, 32)])
def test_classifier_rejects_wrong_shape(shape):
    with pytest.raises(ValueError, match=re.escape(f"收到的是 {shape}")):
        book_utils.digit_classifier()(torch.rand(shape))


def test_classifier_knows_digits_and_rejects_the_rest():
    classifier = book_utils.digit_classifier()
    images, labels = book_utils.mnist_tensors(train=False)
    with torch.no_grad():
        guesses = torch.cat([classifier(part).argmax(dim=1) for part in images.split(500)])
        noise = classifier(torch.rand(200, 1, 28, 28)).argmax(dim=1)
        gray = classifier(images.mean(dim=0, keepdim=True)).argmax(dim=1)
    assert (guesses == labels).float().mean() > 0.99
    assert (noise == 10).float().mean() > 0.99 and gray.item() == 10


# —— 图像 ——

def test_grid_image_is_black_on_white():
    picture = grid_image(torch.zeros(3, 1, 28, 28), nrow=2)
    assert picture.mode == "L" and picture.size == (62, 62) and np.asarray(picture).min() == 255
    assert np.asarray(grid_image(torch.ones(1, 1, 4, 4), scale=3)).min() == 0


def test_grid_image_keeps_all_three_channels():
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert grid_image(red).getpixel((1, 1)) == (255, 0, 0)


def test_grid_image_puts_every_image_in_its_place():
    """两行三张，每张左右、上下都不对称：第几张、往哪边，错一处就不等。"""
    images = torch.zeros(6, 1, 2, 3)
    for index, image in enumerate(images):
        image[0] = torch.tensor([[1, 0.5, 0], [0, 0, 1]]) * (index + 1) / 6
    pixels = np.asarray(grid_image(images, nrow=3)).astype(float)
    assert pixels.shape == (2 * 4 + 2, 3 * 5 + 2)           # 每张四周留两个像素的白边
    for index, image in enumerate(images):
        top, left = 2 + index // 3 * 4, 2 + index % 3 * 5
        drawn = 1 - pixels[top : top + 2, left : left + 3] / 255
        np.testing.assert_allclose(drawn, image[0].numpy(), atol=0.5 / 255 + 1e-6)


def test_show_rows_keeps_the_order_of_rows():
    figure = book_utils.show_rows({"白": torch.zeros(2, 1, 4, 4), "黑": torch.ones(2, 1, 4, 4)}, nrow=2)
    tops = {text.get_text(): text.get_position()[1] for text in figure.texts}
    assert tops["白"] > tops["黑"]
    upper, lower = sorted(figure.axes, key=lambda axis: -axis.get_position().y0)
    assert np.asarray(upper.images[0].get_array()).min() == 255 and np.asarray(lower.images[0].get_array()).min() == 0
    plt.close(figure)


def test_plot_losses_draws_the_numbers_it_is_given():
    losses = {"一": [3.0, 1.0, 2.0, 6.0], "二": [0.0, 4.0]}
    figure = book_utils.plot_losses(losses, window=2)
    drawn = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert drawn == [
        [[0, 3], [1, 1], [2, 2], [3, 6]], [[1, 2], [2, 1.5], [3, 4]],      # 逐步，滑动平均
        [[0, 0], [1, 4]], [[1, 2]],
    ]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["一", "二"]
    plt.close(figure)


@pytest.mark.parametrize("options, message", [
    ({"nrow": 0}, "nrow 与 scale"), ({"scale": 0}, "nrow 与 scale"), ({"value_range": (1, 0)}, "低小于高"),
])
def test_grid_image_rejects_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        grid_image(torch.rand(1, 1, 4, 4), **options)


@pytest.mark.parametrize("bad", BROKEN)
def test_grid_image_refuses_broken_images(bad):
    with pytest.raises(ValueError, match="NaN 或无穷"):
        grid_image(torch.full((1, 1, 4, 4), bad))


def test_grid_image_clips_to_the_range():
    picture = np.asarray(grid_image(torch.full((1, 1, 4, 4), 9.0), value_range=(-1, 1)))
    assert picture.min() == 0


@pytest.mark.parametrize("bad", [torch.rand(28, 28), torch.rand(1, 2, 4, 4)])
def test_grid_image_rejects_wrong_shape(bad):
    with pytest.raises(ValueError, match="收到的是"):
        grid_image(bad)


def test_chinese_font_has_the_glyphs(recwarn):
    book_utils.use_book_style()
    figure, axis = plt.subplots()
    axis.set_title("噪声量与时间步：−1 到 1，√ᾱ")
    figure.canvas.draw()
    plt.close(figure)
    assert not [w for w in recwarn if "missing" in str(w.message)], "字体缺字，图上会出现方框"


# —— 滑块 ——

def draw_gray(value, other=0):
    return Image.new("L", (4, 4), int(value) + int(other))


def test_slider_html_holds_every_frame_and_label():
    page = Slider(draw_gray, {"噪声量": [0.0, 0.5, 1.0]}, alt="灰块").html()
    assert page.count("data:image/webp;base64,") == 4           # 三帧，加上先显示的中间一帧
    assert page.count('type="range"') == 1 and 'max="2"' in page and "<label>噪声量" in page
    assert "灰块（噪声量 = 0.5）" in page and "<output>0.5</output>" in page
    assert "http" not in page


def test_slider_with_two_controls_draws_every_combination():
    calls = []

    def draw(a, b):
        calls.append((a, b))
        return draw_gray(0)

    page = Slider(draw, {"方法": ["甲", "乙"], "步数": [1, 2, 3]}, alt="图").html()
    assert calls == [(a, b) for a in "甲乙" for b in (1, 2, 3)]
    assert page.count('type="range"') == 2 and page.count("data:image/webp") == 7


def test_slider_with_kernel_recomputes_at_any_value():
    seen = []

    def draw(value):
        seen.append(value)
        return draw_gray(0)

    box = Slider(draw, {"噪声量": [0.0, 0.5, 1.0]}, alt="灰块").widget()
    picture, control = box.children
    assert isinstance(control, ipywidgets.FloatSlider)
    control.value = 0.37                                        # 不在预先给出的取值里
    assert seen[-1] == 0.37 and picture.value[:4] == b"\x89PNG"


def test_slider_chooses_fitting_controls():
    box = Slider(draw_gray, {"步": [0, 10, 20], "偏移": [0.5, 1.5]}, alt="图").widget()
    assert isinstance(box.children[1], ipywidgets.IntSlider) and box.children[1].step == 1
    text = Slider(lambda name: draw_gray(0), {"方法": ["甲", "乙"]}, alt="图").widget()
    assert isinstance(text.children[1], ipywidgets.SelectionSlider)


def test_slider_has_two_faces(monkeypatch):
    slider = Slider(draw_gray, {"噪声量": [0.0, 1.0]}, alt="灰块")
    monkeypatch.delenv("BOOK_SLIDERS", raising=False)
    assert {"text/html", "text/plain", "application/vnd.jupyter.widget-view+json"} <= set(slider._repr_mimebundle_())
    monkeypatch.setenv("BOOK_SLIDERS", "static")
    assert set(slider._repr_mimebundle_()) == {"text/html", "text/plain"}


def test_slider_draws_figures_and_closes_them():
    def draw(value):
        figure, axis = plt.subplots(figsize=(2, 1))
        axis.plot([0, value])
        return figure

    before = plt.get_fignums()
    assert "data:image/webp" in Slider(draw, {"值": [1, 2]}, alt="线").html()
    assert plt.get_fignums() == before


@pytest.mark.parametrize("values, message", [
    ({}, "一个或两个，收到的是 0 个"),
    ({"a": [1, 2], "b": [1, 2], "c": [1, 2]}, "收到的是 3 个"),
    ({"噪声量": [0.5]}, "至少要有两个取值"),
    ({"噪声量": [0.5, 0.2]}, "应递增"),
    ({"噪声量": [0.5, "大"]}, "都是数或都是字符串"),
])
def test_slider_rejects_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        Slider(draw_gray, values, alt="图")


def test_slider_needs_alt_text():
    with pytest.raises(ValueError, match="alt"):
        Slider(draw_gray, {"噪声量": [0, 1]}, alt=" ")


def test_slider_rejects_other_pictures():
    with pytest.raises(ValueError, match="收到的是 ndarray"):
        Slider(lambda value: np.zeros((4, 4)), {"噪声量": [0, 1]}, alt="图").html()


def test_slider_stays_small():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400), dtype=np.uint8))
    with pytest.raises(ValueError, match="超过上限 300 KB"):
        Slider(lambda value: noise, {"帧": [0, 1, 2]}, alt="噪声").html()
