"""第 5.5.2 节的微调脚本：学得动、能续、坏选项说得清而且什么都不写。"""

import sys

import numpy as np
import pytest
import torch
from book_utils.training import load_state
from support.paths import ROOT
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

import finetune_unconditional


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """12 张纯色的小图，和一个很小的管线。"""
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "images").mkdir()
    for i in range(12):
        Image.fromarray(np.full((20, 24, 3), (200, 20 * i, 40), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
    )
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=prediction_type)
        DDPMPipeline(unet, scheduler).save_pretrained(folder / prediction_type)
    return folder


def run(place, output, *options, model="epsilon"):
    return finetune_unconditional.main([
        "--model", str(place / model), "--data", str(place / "images"), "--output", str(output),
        "--batch-size", "4", "--lr", "1e-3", "--device", "cpu", *map(str, options),
    ])


def weights(folder):
    return DDPMPipeline.from_pretrained(folder).unet.state_dict()


@pytest.mark.parametrize("model", ["epsilon", "v_prediction"])
def test_learns_and_writes_a_pipeline(place, tmp_path, model):
    assert run(place, tmp_path / "out", "--steps", 30, model=model) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]          # 断点用完就删
    before, after = weights(place / model), weights(tmp_path / "out")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert DDPMPipeline.from_pretrained(tmp_path / "out").scheduler.config.prediction_type == model


def test_interrupted_run_continues_to_the_same_result(place, tmp_path, monkeypatch):
    assert run(place, tmp_path / "whole", "--steps", 30) == 0
    original, calls = torch.nn.functional.mse_loss, []

    def interrupt(*arguments, **options):
        calls.append(1)
        if len(calls) == 26:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(finetune_unconditional.F, "mse_loss", interrupt)
    assert run(place, tmp_path / "broken", "--steps", 30) == 130
    left, = tmp_path.glob("broken-*.safetensors")
    assert len(load_state(left)[0]["losses"]) == 20 and not (tmp_path / "broken").exists()
    assert run(place, tmp_path / "broken", "--steps", 30) == 0
    assert len(calls) == 26 + 10
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.parametrize(("options", "words"), [
    (["--steps", 0], "--steps"), (["--batch-size", 0], "--batch-size"), (["--lr", -1], "lr"),
    (["--data", "没有的文件夹"], "没有的文件夹"), (["--model", "没有的管线"], "没有的管线"),
])
def test_bad_options_are_explained_and_leave_nothing(place, tmp_path, capsys, options, words):
    assert run(place, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("错误：") and words in error
    assert list(tmp_path.iterdir()) == []


def test_refuses_other_pipelines_and_existing_output(place, tmp_path, capsys):
    assert run(place, tmp_path / "out", model="sample") == 2 and "sample" in capsys.readouterr().err
    assert run(place, tmp_path / "out", "--model", "mnist-ddpm") == 2 and "彩色" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert run(place, tmp_path / "out") == 2 and "已经有了" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
