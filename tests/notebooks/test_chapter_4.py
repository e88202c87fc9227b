"""第四章的代码格，照读者会做的那样来用：换成自己的图像、换批大小、再运行一遍、打断了接着来、断网。

手写的训练循环还要经得起在随机的时刻强行结束：十次之后，结果与不中断时逐位相同。
"""

import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import pytest
from support.paths import ROOT

CHAPTER = ROOT / "chapters/04-diffusers.md"
CELLS = [cell.source for cell in jupytext.read(CHAPTER).cells if cell.cell_type == "code"]
N_EPOCHS = 12
KILLS = 5


def cell_with(text: str) -> str:
    """含有 text 的那一格，应当只有一格。"""
    found = [cell for cell in CELLS if text in cell]
    assert len(found) == 1, (text, len(found))
    return found[0]


def exercise(title: str) -> str:
    """正文里以“# title”开头的 python 代码块。"""
    return re.search(rf"```python\n(# {title}\n.*?)```", CHAPTER.read_text(encoding="utf-8"), re.S)[1]


def run(names: dict, *cells: str, **changes: str) -> None:
    """在 names 里依次执行各格；changes 是 原来的代码 → 读者改成的代码。"""
    for cell in cells:
        for old, new in changes.items():
            cell = cell.replace(old, new)
        exec(cell, names)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """一个读者：在空文件夹里，执行过第一格。返回他的名字空间。"""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    for name in ("BOOK_MODE", "BOOK_UPLOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    names = {"display": lambda *things: None}
    run(names, CELLS[0], CELLS[1])
    return names


SMALL = {"butterfly_dataset(1000,": "butterfly_dataset(40,", "batch_size = 64": "batch_size = 16"}
DATA = cell_with("dataset = book_utils.butterfly_dataset(")
PREPROCESS = cell_with("preprocess = transforms.Compose(")
BATCH = cell_with("xb = next(iter(train_dataloader))")
MODEL = cell_with("def build_model():")
LOSS = cell_with("def training_loss(")
CHECKPOINT = cell_with("def save_checkpoint(")
TRAIN = cell_with("def train(")
INTERRUPTED = cell_with("什么也不记得的新网络")
WHOLE = cell_with("n_epochs = 0")
LARGE = cell_with("large_model = UNet2DModel(")


def prepare(names: dict, **changes: str) -> None:
    """执行到定义 train 的那一格。"""
    run(names, DATA, PREPROCESS, BATCH, LARGE, MODEL, LOSS, CHECKPOINT, TRAIN, **changes)


# —— 训练的格 ——

def test_running_the_training_cells_again_and_with_another_batch_size(reader, capsys):
    prepare(reader, **SMALL)
    run(reader, INTERRUPTED)
    first = reader["losses"]
    assert len(first) == 2 * 3                                  # 40 张，每批 16 张
    run(reader, INTERRUPTED)
    assert reader["losses"] == first
    run(reader, PREPROCESS, **{"batch_size = 64": "batch_size = 8"})
    run(reader, INTERRUPTED)
    assert len(reader["losses"]) == 2 * 5
    printed = capsys.readouterr().out
    assert printed.count("学习率是 0.0004，这次是 0.001") == 3


def test_long_training_goes_on_after_an_interruption(reader):
    prepare(reader, **SMALL)
    run(reader, INTERRUPTED)                                    # noise_scheduler 在这一格
    cell = WHOLE.replace("n_epochs = 0", "n_epochs = 4")
    real, calls = reader["training_loss"], []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 8:                                     # 第三轮的途中
            raise KeyboardInterrupt
        return real(*arguments)

    reader["training_loss"] = interrupt
    reader["book_utils"].set_seed(0)
    with pytest.raises(KeyboardInterrupt):
        run(reader, cell)
    reader["training_loss"] = real
    run(reader, cell)
    resumed = reader["losses"]
    assert len(resumed) == 4 * 3
    run(reader, cell)                                           # 走完了再运行一遍：没有事可做
    assert reader["losses"] == resumed
    run(reader, WHOLE.replace("n_epochs = 0", "n_epochs = 5"))  # 多走一轮
    assert reader["losses"][:12] == resumed and len(reader["losses"]) == 5 * 3

    Path("butterflies.safetensors").unlink()
    reader["book_utils"].set_seed(0)
    run(reader, cell)
    assert reader["losses"] == resumed


@pytest.mark.parametrize(("change", "message"), [
    ({"batch_size = 64": "batch_size = 8"}, "批大小是 16，每份 16，这次是 8，每份 16"),
    ({"image_size = 32 ": "image_size = 16 ", "batch_size = 64": "batch_size = 16"}, r"数据是 40 张 \(3, 32, 32\)"),
])
def test_changed_settings_are_named_and_refused(reader, change, message):
    prepare(reader, **SMALL)
    run(reader, INTERRUPTED)
    run(reader, WHOLE.replace("n_epochs = 0", "n_epochs = 1"))
    before = Path("butterflies.safetensors").read_bytes()
    run(reader, PREPROCESS, **change)
    with pytest.raises(ValueError, match=message):
        run(reader, WHOLE.replace("n_epochs = 0", "n_epochs = 2"))
    assert Path("butterflies.safetensors").read_bytes() == before


def test_training_stops_when_the_loss_is_not_a_number(reader):
    prepare(reader, **SMALL)
    run(reader, INTERRUPTED)
    reader["training_loss"] = lambda *arguments: reader["torch"].tensor(float("nan"), requires_grad=True)
    with pytest.raises(ValueError, match="第 1 步的损失是 nan.*调小 lr"):
        run(reader, WHOLE.replace("n_epochs = 0", "n_epochs = 1"))
    assert not Path("butterflies.safetensors").exists()


def test_another_network_is_refused(reader):
    run(reader, LOSS, CHECKPOINT)
    from torch import nn, optim

    small, large = nn.Linear(2, 2), nn.Linear(3, 3)
    save, load = reader["save_checkpoint"], reader["load_checkpoint"]
    save(Path("x.safetensors"), small, optim.AdamW(small.parameters()), [1.0], {"网络": "6 个参数"})
    with pytest.raises(ValueError, match="网络是 6 个参数，这次是 12 个参数"):
        load(Path("x.safetensors"), large, optim.AdamW(large.parameters()), {"网络": "12 个参数"})


# —— 自己的图像：练习 4.3 的答案，原样执行，只是少走几步 ——

def test_exercise_with_twelve_pictures_of_ones_own(reader, tmp_path, capsys):
    folder = tmp_path / "[我的] 照片"
    (folder / "子文件夹").mkdir(parents=True)
    images, _ = reader["book_utils"].butterfly_images(12, 32, seed=5, held_out=True)
    for i, image in enumerate(images):
        name = folder / ("子文件夹" if i % 2 else ".") / f"{'test_' * (i == 3)}{i}.png"
        reader["Image"].fromarray(image.permute(1, 2, 0).numpy()).save(name)

    pipeline_cell = cell_with('resolve("butterflies-ddpm-32", hub=')
    run(reader, pipeline_cell, exercise("练习 4.3：数据").replace("你的文件夹", str(folder)))
    assert len(reader["dataset"]) == 12                         # 方括号、子文件夹、名字里有 test，一张也不少
    own = {"batch_size = 64": "batch_size = 4"}
    run(reader, cell_with("export_imagefolder("), PREPROCESS, BATCH, **own)
    run(reader, cell_with("schedules = {"), cell_with("def draw_noisy("), cell_with("too_little = {"))
    run(reader, LARGE, MODEL, LOSS, CHECKPOINT, TRAIN, INTERRUPTED)
    assert len(reader["losses"]) == 2 * 3

    both = exercise("练习 4.3：两种起点").replace("train_dataloader, 20,", "train_dataloader, 2,")
    run(reader, both.replace("num_inference_steps=100", "num_inference_steps=2"))
    first = capsys.readouterr().out
    # 预测速度的网络配上自己的调度器，第一步的损失就很低；配错了会是从头训练的样子
    torch = reader["torch"]
    torch.manual_seed(0)
    clean = next(iter(reader["train_dataloader"]))["images"]
    pipeline = reader["butterfly_pipeline"]
    own_loss = reader["training_loss"](pipeline.unet, pipeline.scheduler, clean).item()
    assert own_loss < 0.2
    run(reader, both.replace("num_inference_steps=100", "num_inference_steps=2"))       # 再运行一遍：断点已经走完
    assert [line for line in capsys.readouterr().out.splitlines() if "损失" in line] == [
        line for line in first.splitlines() if "最后一轮" in line
    ]


# —— 别的练习的答案 ——

def test_short_answers_run_and_say_what_the_text_says(reader, capsys):
    run(reader, exercise("练习 4.2"))
    assert capsys.readouterr().out.strip() == "0.01821"
    run(reader, cell_with('resolve("butterflies-ddpm-32", hub='), exercise("练习 4.1"), **{"(10, 25, 50, 200)": "(1, 2)"})
    run(reader, "from book_utils.worlds.butterflies import PATTERNS, WING_COLORS", cell_with("book_pipeline = DDPMPipeline"))
    run(reader, "book_pipeline.set_progress_bar_config(disable=True); judge = book_utils.butterfly_judge()")
    few = {"range(10)": "range(2)", "book_pipeline(50,": "book_pipeline(6,", "=100": "=10"}
    run(reader, exercise("练习 4.6"), **few)
    assert capsys.readouterr().out.count("应有") == 4


def test_answer_that_saves_every_few_steps(reader):
    prepare(reader, **SMALL)
    run(reader, exercise("练习 4.4"))
    torch, real = reader["torch"], reader["training_loss"]

    def start(name, loss=real):
        reader["training_loss"] = loss
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 3, 1)
        unet = lambda x, t: type("Output", (), {"sample": model(x)})  # noqa: E731  只要有参数、形状对就行
        scheduler = reader["DDPMScheduler"]()
        wrapped = torch.nn.Module()
        wrapped.inner, wrapped.forward = model, unet
        losses = reader["train_by_step"](wrapped, scheduler, reader["dataset"], 16, 4, Path(name), checkpoint_every=2)
        return losses, model.weight.clone()

    calls = []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 6:                                     # 第二轮的最后一步
            raise KeyboardInterrupt
        return real(*arguments)

    with pytest.raises(KeyboardInterrupt):
        start("a.safetensors", interrupt)
    resumed, weight = start("a.safetensors")
    whole, expected = start("b.safetensors")
    assert len(whole) == 12 and resumed == whole and torch.equal(weight, expected)


# —— 换一个边长 ——

def test_image_size_must_fit_the_networks(reader):
    run(reader, DATA, **SMALL)
    with pytest.raises(ValueError, match="image_size 应是 8 的倍数，收到的是 30"):
        run(reader, PREPROCESS, **{"image_size = 32 ": "image_size = 30 "})


def test_everything_runs_at_another_image_size(reader):
    change = SMALL | {"image_size = 32 ": "image_size = 48 "}
    prepare(reader, **change)
    run(reader, cell_with("schedules = {"), cell_with("def draw_noisy("), cell_with("too_little = {"), INTERRUPTED)
    after = CELLS[CELLS.index(cell_with("book_pipeline = DDPMPipeline")) :]
    steps = {"n_steps = 100": "n_steps = 4"}
    # 跳过换成随书模型的那一格：用自己的网络，48 × 48
    upto = after.index(cell_with("def draw_trajectory("))
    names = "from book_utils.worlds.butterflies import PATTERNS, WING_COLORS"
    run(reader, names, *after[1 : upto + 1], cell_with("judge = book_utils.butterfly_judge()"), **steps)
    assert reader["trajectory"].shape == (5, 4, 3, 48, 48)
    # 用随书模型：它画 32 × 32 的
    run(reader, *after[: upto + 1], cell_with("judge = book_utils.butterfly_judge()"), **steps)
    assert reader["trajectory"].shape == (5, 4, 3, 32, 32)


def test_sampling_loop_works_with_euler(reader):
    """手写的循环里有 init_noise_sigma 与 scale_model_input，换成 Euler 就与 DDIM 画出几乎同样的图；没有就不是。"""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    run(reader, cell_with("book_pipeline = DDPMPipeline"))
    cell = cell_with("def sample(").split("model.eval()")[0]
    without = cell.replace(" * scheduler.init_noise_sigma", "").replace("scheduler.scale_model_input(x, t)", "x")
    assert without != cell
    reader["model"].eval()

    def draw(code, kind):
        run(reader, code)
        scheduler = kind.from_config(reader["noise_scheduler"].config, timestep_spacing="trailing")
        return reader["sample"](reader["model"], scheduler, n_images=12, n_steps=20, seed=1)[-1]

    by_ddim = draw(cell, DDIMScheduler)
    right, wrong = ((draw(code, EulerDiscreteScheduler) - by_ddim).abs().mean().item() for code in (cell, without))
    assert right < 0.3 * wrong, (right, wrong)


# —— 断网 ——

@pytest.mark.parametrize("text", ["dreambooth = StableDiffusionPipeline", 'load_dataset("huggan/', 'hub="johnowhitaker'])
def test_hub_cells_say_in_one_sentence_that_there_is_no_network(text, tmp_path):
    """HF_ENDPOINT 指向没有人听的端口：几秒之内结束，最后一行是一句中文。"""
    code = "\n".join([CELLS[0], "import time; began = time.monotonic()", "try:",
                      *("    " + line for line in cell_with(text).splitlines()),
                      "finally:", "    print('用时', time.monotonic() - began)"])
    environment = {
        name: value for name, value in os.environ.items()
        if not name.startswith("HF_") and "proxy" not in name.lower()
    } | {
        "BOOK_MODE": "hub", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ConnectionError: BOOK_MODE=hub 需要联网，但") and "HF_ENDPOINT" in last
    assert float(done.stdout.split("用时")[-1]) < 20


# —— 正文里的数 ——

def test_figures_about_the_samples_are_those_measured():
    text = CHAPTER.read_text(encoding="utf-8")
    result = json.loads((ROOT / "models/butterflies-ddpm-32/evaluation.json").read_text(encoding="utf-8"))
    answer = text[text.index("练习 4.6（探究）") :]
    for pair in result["held_out"]:
        sentence = f"{pair['name']} {pair['count']} 张（应有 {pair['expected']:.1f}）"
        assert sentence in answer, sentence


# —— 强行结束十次 ——

def chapter_namespace() -> dict:
    """执行第四章里定义训练循环的那几格，返回其中的名字。"""
    import math

    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from torch.nn import functional as F
    from tqdm import tqdm

    names = {
        "torch": torch, "F": F, "tqdm": tqdm, "os": os, "math": math,
        "load_file": load_file, "save_file": save_file, "safe_open": safe_open,
    }
    run(names, LOSS, CHECKPOINT, TRAIN)
    return names


def run_training(checkpoint: Path, results=None):
    """在子进程里训练一个很小的网络；走完时把损失与参数之和放进 results。"""
    import torch
    from diffusers import DDPMScheduler, UNet2DModel

    torch.set_num_threads(1)
    names = chapter_namespace()
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    images = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    dataset = [{"images": image} for image in images]
    dataloader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    losses = names["train"](model, DDPMScheduler(), dataloader, N_EPOCHS, checkpoint)
    if results is not None:
        results.put((losses, [parameter.double().sum().item() for parameter in model.parameters()]))


@pytest.fixture(scope="module")
def forkserver():
    """先在一个服务进程里导入 PyTorch，之后每个子进程只要几十毫秒就能开始。"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "diffusers", "jupytext", "safetensors.torch"])
    return context


def finish(forkserver, checkpoint):
    results = forkserver.Queue()
    process = forkserver.Process(target=run_training, args=(checkpoint, results))
    process.start()
    answer = results.get(timeout=300)
    process.join()
    return answer


def test_killed_five_times(forkserver, tmp_path):
    undisturbed = finish(forkserver, tmp_path / "undisturbed.safetensors")
    assert len(undisturbed[0]) == N_EPOCHS * 3

    checkpoint = tmp_path / "killed.safetensors"
    seed = random.SystemRandom().randrange(10**6)
    print(f"中断时刻的种子：{seed}")
    rng = random.Random(seed)
    progressed = 0
    for _ in range(KILLS):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = forkserver.Process(target=run_training, args=(checkpoint,))
        process.start()
        # 等它存下一个新断点，再过随机的一小会儿，在训练或写盘的途中强行结束
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        progressed += process.is_alive()
        process.kill()
        process.join()
    assert progressed >= 2, "训练太快，没有真的在途中结束过它"
    assert finish(forkserver, checkpoint) == undisturbed, f"种子 {seed}"
