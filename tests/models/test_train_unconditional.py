"""第 4.4.2 节的训练脚本：进程数与累加份数不改变训练，随时可以强行终止，坏选项说得清、不留下东西。

多进程的测试只用本机的回环网卡，网络用不到一点。
"""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import train_unconditional
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMPipeline
from PIL import Image
from support.paths import ROOT
from support.two_processes import environment, train_on_two_processes

from book_utils import butterfly_dataset, export_imagefolder
from book_utils.training import load_state

SCRIPT = ROOT / "recipes" / "train_unconditional.py"
STEPS = 24
TINY = (
    "--channels 8 16 --layers 1 --image-size 16 --n-butterflies 20 --batch-size 8 --lr 1e-3 --warmup 3 "
    f"--steps {STEPS} --checkpoint-every 2 --sample-every 1000 --cpu"
).split()
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
]
# 浮点加法的次序不同，结果的末位就不同。实测 40 步之内损失相差 2e-7（相对）、权重相差 3e-5（绝对），
# 这里各留出几倍的余地，免得换一种 CPU 就不通过
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4


def start(command, **variables) -> subprocess.Popen:
    return subprocess.Popen(
        [*map(str, command)], env=environment(**variables), encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]


def run_here(*options) -> int:
    """在本进程里运行脚本，省去重新导入的几秒；Accelerator 的全局状态用完就清。"""
    try:
        return train_unconditional.main([*map(str, options)])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def losses(folder) -> list[float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_state(folder / "checkpoint.safetensors")[0]


def assert_same_training(folder, reference):
    assert losses(folder) == pytest.approx(losses(reference), rel=LOSS_TOLERANCE)
    ours, theirs = weights(folder), weights(reference)
    assert ours.keys() == theirs.keys()
    for name in ours:
        # 注意力里键的偏置对输出毫无影响（softmax 减去同一个数不变），真正的梯度是 0，只有舍入误差；
        # Adam 按梯度自身的大小归一化，把这点误差也放大成了像样的一步，所以单独放宽
        tolerance = 10 * WEIGHT_TOLERANCE if name.endswith("to_k.bias") else WEIGHT_TOLERANCE
        if name.startswith("model."):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """accelerate launch 一个进程、不累加，是其余各种办法的参照。"""
    folder = tmp_path_factory.mktemp("one") / "output"
    finish(start([*LAUNCH, "--num_processes", 1, SCRIPT, *TINY, "--output", folder]))
    return folder


def test_one_process_learns_and_writes_everything(one_process):
    values = losses(one_process)
    assert len(values) == STEPS and sum(values[-5:]) < 0.85 * sum(values[:5])
    files = {str(path.relative_to(one_process)) for path in one_process.rglob("*") if path.is_file()}
    assert files == {
        "checkpoint.safetensors", "log.jsonl", "pipeline/model_index.json", "pipeline/unet/config.json",
        "pipeline/unet/diffusion_pytorch_model.safetensors", "pipeline/scheduler/scheduler_config.json",
    }


def test_two_processes_train_the_same_and_listen_on_loopback_only(one_process, tmp_path):
    # --cpu 时 accelerate launch 自己只起一个进程（多的要靠 mpirun），所以各起一个，用环境变量告诉它们次序
    command = [*LAUNCH, "--num_processes", 2, SCRIPT, *TINY]
    output, listening = train_on_two_processes(command, tmp_path)
    assert listening == {"127.0.0.1"}, "应当看到 gloo 在听，而且只在回环地址上"
    assert_same_training(output, one_process)


@pytest.mark.parametrize("options", [["--accumulation", 2], ["--accumulation", 8, "--gradient-checkpointing"]])
def test_saving_memory_trains_the_same(one_process, tmp_path, options):
    assert run_here(*TINY, "--output", tmp_path, *options) == 0
    assert_same_training(tmp_path, one_process)


def test_killed_training_ends_the_same(one_process, tmp_path):
    seed = random.randrange(10**6)
    print("种子：", seed)                    # 失败时 pytest 会显示，可以照着重来
    rng = random.Random(seed)
    command = [sys.executable, SCRIPT, *TINY, "--output", tmp_path / "output"]
    log = tmp_path / "output" / "log.jsonl"
    process = start(command)
    until = rng.randrange(1, STEPS - 6)
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < until):
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.03))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    if log.exists():
        log.write_text(log.read_text(encoding="utf-8") + '{"step": 99', encoding="utf-8")     # 就算写日志写到一半，也能接上
    finish(start(command))
    # 同一台机器、同样的线程数：一位都不差
    assert losses(tmp_path / "output") == losses(one_process)
    ours, theirs = weights(tmp_path / "output"), weights(one_process)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not [path for path in (tmp_path / "output").rglob("*") if path.name.endswith(".partial")]


def test_ctrl_c_says_how_to_continue(tmp_path, monkeypatch, capsys):
    def press_ctrl_c(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_unconditional, "save_checkpoint", press_ctrl_c)
    assert run_here(*TINY, "--output", tmp_path, "--steps", 2) == 130
    assert "再运行同样的命令" in capsys.readouterr().err


@pytest.fixture
def photos(tmp_path):
    """读者自己的一文件夹图像：路径里有方括号，大小与训练时的不同，还混进灰度、16 位、透明的图，名字里有 test。"""
    folder = export_imagefolder(butterfly_dataset(6, image_size=24), tmp_path / "[D_DATA]照片")
    Image.open(folder / "00000.png").convert("L").crop((0, 0, 24, 17)).save(folder / "00000.png")
    Image.fromarray(np.full((20, 20), 30_000, dtype=np.uint16)).save(folder / "00001.png")
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(folder / "test_00002.png")
    return folder


def test_pictures_become_8_bit_and_opaque(photos):
    images = train_unconditional.Images(train_unconditional.parse_options(["--data", str(photos), "--image-size", "16"]))
    assert [path.name for path in images.files][-2:] == ["00005.png", "test_00002.png"] and len(images) == 7
    assert images[0].shape == (3, 16, 16) and images[0].dtype == torch.uint8
    assert images[1].unique().tolist() == [117]                 # 30,000 ÷ 257
    assert images[6].unique().tolist() == [255]                 # 藏着的红色不见了


def test_other_photos_are_refused(photos, tmp_path, capsys):
    options = [*TINY, "--data", photos, "--output", tmp_path / "output"]
    assert run_here(*options, "--steps", 1) == 0
    Image.new("RGB", (20, 20)).save(photos / "00003.png")       # 张数没有变
    assert run_here(*options, "--steps", 2) == 2
    assert "images 是 7 张（校验值" in capsys.readouterr().err


def test_huge_photo_is_named(photos, tmp_path, capsys):
    Image.new("1", (14_200, 14_200)).save(photos / "00004.png")
    assert run_here(*TINY, "--data", photos, "--output", tmp_path / "output") == 2
    error = capsys.readouterr().err
    assert error.startswith("错误：图像") and "00004.png 太大" in error
    assert not (tmp_path / "output").exists()


def test_own_photos(photos, tmp_path):
    options = [*TINY, "--data", photos, "--output", tmp_path / "output", "--flip", "--sample-every", 2]
    assert run_here(*options, "--steps", 2) == 0
    assert run_here(*options, "--steps", 3, "--mixed-precision", "bf16") == 0       # 可以接着练，也可以换精度
    assert len(losses(tmp_path / "output")) == 3
    assert Image.open(tmp_path / "output" / "samples" / "000002.png").size == (4 * 18 + 2,) * 2
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "output" / "pipeline")
    assert pipeline.unet.config.sample_size == 16 and len(pipeline.scheduler) == 1000
    # 管线里是滑动平均的权重
    average = torch.cat([weight.flatten() for weight in pipeline.unet.parameters()])
    tensors = weights(tmp_path / "output")
    kept = torch.cat([tensors[f"ema.{i}"].flatten() for i in range(sum(name.startswith("ema.") for name in tensors))])
    assert torch.equal(average, kept)


def test_damaged_photo_is_named(photos, tmp_path, capsys):
    (photos / "00003.png").write_bytes((photos / "00003.png").read_bytes()[:60])
    assert run_here(*TINY, "--data", photos, "--output", tmp_path / "output") == 2
    assert "00003.png" in capsys.readouterr().err


def test_every_image_is_used_equally_often():
    options = train_unconditional.parse_options(["--batch-size", "8"])
    options.n_images = 20
    steps = [train_unconditional.batch_indices(options, step) for step in range(5)]     # 40 张，正好两轮
    assert torch.cat(steps).bincount().tolist() == [2] * 20
    assert torch.equal(train_unconditional.batch_indices(options, 3), steps[3])


def test_another_training_in_the_same_folder(tmp_path, capsys):
    assert run_here(*TINY, "--output", tmp_path, "--steps", 1) == 0
    before = weights(tmp_path)
    assert run_here(*TINY, "--output", tmp_path, "--steps", 2, "--lr", 0.5, "--seed", 7) == 2
    message = capsys.readouterr().err
    assert "lr 是 0.001，这次是 0.5；seed 是 0，这次是 7" in message
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path).items())


@pytest.mark.parametrize("options, message", [
    (["--data", "没有这个文件夹"], "没有文件夹 没有这个文件夹"),
    (["--data", "."], "里没有图像"),
    (["--image-size", 1024], "image_size 应在 16 到 512 之间，收到的是 1024"),
    (["--image-size", 33], "--image-size 应不小于 16，并且是 2 的倍数（2 级的 UNet 要缩小 1 次"),
    (["--channels", 8, 12], "--channels 都应是 8 的倍数，收到的是 [8, 12]"),
    (["--batch-size", 8, "--accumulation", 3], "1 × 3 = 3 的倍数，收到的是 8"),
    (["--mixed-precision", "fp32"], "应是 no、fp16 或 bf16，收到的是 fp32"),
    (["--mixed-precision", "fp16"], "CPU 上不能用 fp16"),
    (["--steps", 0], "--steps 应是正整数，收到的是 0"),
    (["--lr", 0], "应大于 0"),
    (["--seed", -1], "不能是负数"),
])
def test_bad_options_leave_nothing_behind(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_here(*TINY, "--output", "output", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("错误：") and message in error
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "output").write_text("别的东西", encoding="utf-8")
    assert run_here(*TINY, "--output", tmp_path / "output") == 2
    assert "却是一个文件" in capsys.readouterr().err and (tmp_path / "output").read_text(encoding="utf-8") == "别的东西"
