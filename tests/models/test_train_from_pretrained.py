"""第 5.5.2 节：train_unconditional.py 从现成的管线开始微调。

学得动；一个进程与两个进程走的是同一条路；预测噪声与预测速度的都行；不能微调的管线与不合的选项说得清、什么都不写。
"""

import json
import sys

import numpy as np
import pytest
import torch
import train_unconditional
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from support.paths import ROOT
from support.two_processes import train_on_two_processes

from book_utils import open_rgb

SCRIPT = ROOT / "recipes" / "train_unconditional.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """12 张各种模式的小图，几个很小的管线，一个空文件夹。"""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "images").mkdir()
    (folder / "empty").mkdir()
    for i in range(9):
        Image.fromarray(np.full((20, 24, 3), (200, 20 * i, 40), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
    Image.new("L", (20, 20), 90).save(folder / "images" / "gray.png")
    Image.new("RGBA", (20, 30), (10, 200, 30, 128)).save(folder / "images" / "transparent.png")
    Image.fromarray(np.full((24, 24), 40_000, dtype=np.uint16)).save(folder / "images" / "sixteen.png")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
    )
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=prediction_type)
        DDPMPipeline(unet, scheduler).save_pretrained(folder / prediction_type)
    return folder


def options_for(place, output, *options, model="epsilon"):
    return [
        "--pretrained", place / model, "--data", place / "images", "--output", output, "--batch-size", 4,
        "--lr", "1e-3", "--warmup", 2, "--ema-decay", 0.5, "--cpu", *options,
    ]


def run(place, output, *options, model="epsilon") -> int:
    """在本进程里运行脚本；Accelerator 的全局状态用完就清。"""
    try:
        return train_unconditional.main([*map(str, options_for(place, output, *options, model=model))])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def weights(folder):
    return DDPMPipeline.from_pretrained(folder).unet.state_dict()


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("model", ["epsilon", "v_prediction"])
def test_starts_from_the_pipeline_and_learns(place, tmp_path, model):
    assert run(place, tmp_path / "out", "--steps", 40, "--sample-every", 20, model=model) == 0
    before, after = weights(place / model), weights(tmp_path / "out" / "pipeline")
    changes = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert max(changes.values()) > 1e-3
    assert max(changes.values()) < 0.1, "40 步、学习率 1e-3，权重至多走 0.04 左右：应当从原来的权重出发"
    losses = [record["loss"] for record in log(tmp_path / "out")]
    assert len(losses) == 40 and sum(losses[-10:]) < sum(losses[:10])
    assert {path.name for path in (tmp_path / "out" / "samples").iterdir()} == {"000020.png", "000040.png"}
    config = DDPMPipeline.from_pretrained(tmp_path / "out" / "pipeline").scheduler.config
    assert config.prediction_type == model and config.num_train_timesteps == 100


def test_first_loss_is_that_of_the_pipeline_own_target(place, tmp_path):
    """预测速度的网络，真相就得是速度：第一步的损失与手算的相同，与拿噪声当真相的不同。"""
    assert run(place, tmp_path / "out", "--steps", 1, model="v_prediction") == 0
    options = train_unconditional.parse_options([*map(str, options_for(place, tmp_path, model="v_prediction"))])
    unet, scheduler = train_unconditional.build(options)
    images = train_unconditional.Images(options)
    options.n_images = len(images)
    x0 = torch.stack([images[i] for i in train_unconditional.batch_indices(options, 0).tolist()]) / 127.5 - 1
    _, timesteps, noise = train_unconditional.draw(options, 0, 100)
    assert timesteps.max() < 100
    with torch.no_grad():
        prediction = unet(scheduler.add_noise(x0, noise, timesteps), timesteps).sample
    a, s = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1).sqrt(), (1 - scheduler.alphas_cumprod[timesteps]).view(-1, 1, 1, 1).sqrt()
    loss = log(tmp_path / "out")[0]["loss"]
    assert loss == pytest.approx((prediction - (a * noise - s * x0)).square().mean().item(), rel=1e-4)
    assert loss != pytest.approx((prediction - noise).square().mean().item(), rel=1e-2)


def test_two_processes_train_the_same(place, tmp_path):
    assert run(place, tmp_path / "one", "--steps", 6) == 0
    command = [sys.executable, SCRIPT, *options_for(place, tmp_path / "ignored", "--steps", 6)]
    two, _ = train_on_two_processes(command, tmp_path)
    assert [r["loss"] for r in log(two)] == pytest.approx([r["loss"] for r in log(tmp_path / "one")], rel=1e-4)
    one, two = weights(tmp_path / "one" / "pipeline"), weights(two / "pipeline")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-3)


def test_continues_where_it_stopped(place, tmp_path):
    assert run(place, tmp_path / "whole", "--steps", 6) == 0
    assert run(place, tmp_path / "parts", "--steps", 3) == 0
    assert run(place, tmp_path / "parts", "--steps", 6) == 0
    whole, parts = weights(tmp_path / "whole" / "pipeline"), weights(tmp_path / "parts" / "pipeline")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_another_pipeline_in_the_same_folder_is_refused(place, tmp_path, capsys):
    assert run(place, tmp_path / "out", "--steps", 1) == 0
    assert run(place, tmp_path / "out", "--steps", 2, model="v_prediction") == 2
    assert "pretrained" in capsys.readouterr().err


def test_any_ddpm_like_scheduler_will_do(place, tmp_path):
    """存盘时换上了 DDIM 调度器的管线也能微调。"""
    pipeline = DDPMPipeline.from_pretrained(place / "v_prediction")
    DDPMPipeline(pipeline.unet, DDIMScheduler.from_config(pipeline.scheduler.config)).save_pretrained(tmp_path / "ddim")
    _, scheduler = train_unconditional.load_pretrained(str(tmp_path / "ddim"))
    assert isinstance(scheduler, DDPMScheduler) and scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(("options", "words"), [
    (["--data", "没有的文件夹"], "没有的文件夹"), (["--pretrained", "没有的管线"], "没有的管线"),
    (["--image-size", 32], "不能再给 --image-size"), (["--channels", 8, 16, "--layers", 1], "--channels、--layers"),
    (["--pretrained", "mnist-ddpm"], "彩色"), (["--steps", 0], "--steps"),
])
def test_bad_options_are_explained_and_leave_nothing(place, tmp_path, capsys, options, words):
    assert run(place, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("错误：") and words in error
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_and_other_targets_are_explained(place, tmp_path, capsys):
    assert run(place, tmp_path / "out", "--data", place / "empty") == 2
    assert "没有图像" in capsys.readouterr().err
    assert run(place, tmp_path / "out", model="sample") == 2
    assert "预测的是 sample" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_pictures_in_other_modes_are_read_sensibly(place):
    """灰度、透明、16 位的图各读成什么样：不是一片白，也不是一片黑。"""
    options = train_unconditional.parse_options(["--data", str(place / "images"), "--image-size", "16"])
    images = train_unconditional.Images(options)
    named = dict(zip((path.stem for path in images.files), images, strict=True))
    assert named["gray"].float().mean().item() == pytest.approx(90, abs=1)
    assert named["sixteen"].float().mean().item() == pytest.approx(40_000 / 65_535 * 255, abs=1)
    assert torch.equal(named["transparent"][:, 8, 8], torch.from_numpy(np.array(open_rgb(place / "images" / "transparent.png")))[8, 8])
    assert named["transparent"][0].float().mean() > 100, "半透明处应衬上白色"
