"""各配方共用的部分：命令行选项，以及写出模型文件夹。"""

import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from book_utils import get_device  # noqa: E402  先把仓库加入路径
from book_utils.checksums import CHECKSUMS, MODELS_ROOT  # noqa: E402
from book_utils.environment import speak_chinese  # noqa: E402

speak_chinese()                 # 训练几十分钟，不能在最后打印一句中文时才出错


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """返回带有共同选项的命令行解析器；name 是 models/ 下的文件夹名。"""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--output", type=Path, default=MODELS_ROOT / name, help="写到哪个文件夹")
    options.add_argument(
        "--checkpoint", type=Path, default=ROOT / ".work" / f"{name}.safetensors",
        help="断点文件，中断后再运行即从此继续",
    )
    options.add_argument("--max-steps", type=int, default=None, help="只走这么多步就停（不写模型）")
    options.add_argument("--device", default=str(get_device()), help="计算设备，默认自动选择")
    return options


def machine(device: str) -> str:
    """一句话描述训练所用的机器。"""
    if device.startswith("cuda"):
        return f"GPU {torch.cuda.get_device_name()}，PyTorch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"CPU {name}，{torch.get_num_threads()} 线程，PyTorch {torch.__version__}"


def load_as_float32(config: Path) -> None:
    """在 transformers 的 config.json 里写明单精度：权重以半精度存盘，``from_pretrained`` 装入时转成单精度。

    不写明，transformers 就按存盘的精度装入，与 diffusers（总是单精度）不一致，在 CPU 上一起用会报错。
    """
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(settings | {"dtype": "float32"}, indent=2), encoding="utf-8")


def save_model(folder: Path, save_weights, history, device: str, command: str, **stages) -> None:
    """写出模型文件夹：权重与配置、SHA256SUMS、训练记录 training.json。

    参数：
        folder: 目标文件夹。
        save_weights: ``save_weights(folder)`` 把权重与配置写进 folder。
        history: :class:`book_utils.History`。
        device: 训练所用设备。
        command: 从头得到这个模型的命令。
        stages: 分几步训练的模型，前几步各自的 :class:`book_utils.History`；history 是最后一步的。
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder)
    notes = {
        "README.md", "training.json", "evaluation.json", "without_timesteps.json", "samples.png",
        "course.json", "course.png", "overfit.png", CHECKSUMS,
    }
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in notes)
    (folder / CHECKSUMS).write_text("".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in files
    ), encoding="utf-8")

    def record(history):
        return {
            "steps": len(history.losses),
            "seconds": round(history.seconds),
            "losses": [round(loss, 6) for loss in history.losses],
        }

    (folder / "training.json").write_text(json.dumps(
        {"command": command, "machine": machine(device)} | record(history)
        | {name: record(stage) for name, stage in stages.items()},
        ensure_ascii=False,
    ), encoding="utf-8")
    print(f"已写出 {folder}（{sum(path.stat().st_size for path in files) / 1e6:.1f} MB）")
