"""测量随书模型，把结果写进 models/<名字>/evaluation.json 与模型卡 README.md。

用法：python recipes/evaluate.py [名字 …]        不给名字则测量全部
怎样测量、卡片里写什么，在各模型自己的配方里：模型 mnist-ddpm 的是 mnist_ddpm.py 的 measure() 与 card_lines()。
"""

import argparse
import importlib
import json
import time
from types import ModuleType

from common import CHECKSUMS, MODELS_ROOT, machine
from measuring import DEVICE


def embedded_models() -> list[str]:
    """随书模型的名字，按字母次序。"""
    return sorted(path.parent.name for path in MODELS_ROOT.glob(f"*/{CHECKSUMS}"))


def recipe_of(name: str) -> ModuleType:
    """模型 name 的配方：名字里的 - 换成 _ 就是文件名。"""
    return importlib.import_module(name.replace("-", "_"))


def card_text(name: str, result: dict) -> str:
    """模型卡 README.md 的全文；result 是 measure() 的结果，也就是 evaluation.json 的内容。"""
    folder, recipe = MODELS_ROOT / name, recipe_of(name)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    stages = [
        f"{title}：{stage['steps']:,} 步，{stage['seconds'] / 60:.0f} 分钟"
        for title, stage in (("自编码器", training.get("autoencoder")), ("训练", training)) if stage
    ]
    return "\n".join([
        f"# {name}",
        "",
        recipe.PURPOSE + "。",
        "",
        f"- 数据：{recipe.DATA}",
        f"- 配方：`{training['command']}`",
        f"- {'；'.join(stages)}，{training['machine']}",
        f"- 存盘精度：{getattr(recipe, 'PRECISION', '半精度，safetensors；装入后转成单精度')}",
        "- 许可：与本书相同" + ("；训练数据的许可见 `data/MNIST/README.md`" if name.startswith("mnist") else ""),
        "",
        "## 测量",
        "",
        f"`python recipes/evaluate.py {name}`（{result['machine']}）：",
        "",
        *recipe.card_lines(result),
        "",
        "## 校验和（SHA-256）",
        "",
        "```",
        (folder / CHECKSUMS).read_text(encoding="utf-8").rstrip(),
        "```",
        "",
    ])


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("names", nargs="*", choices=[[], *embedded_models()], metavar="名字")
    for name in options.parse_args().names or embedded_models():
        started = time.perf_counter()
        recipe = recipe_of(name)
        result = recipe.measure() | {"machine": machine(str(DEVICE))}
        (MODELS_ROOT / name / "evaluation.json").write_text(
            json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8"
        )
        (MODELS_ROOT / name / "README.md").write_text(card_text(name, result), encoding="utf-8")
        print(f"{name}（{time.perf_counter() - started:.0f} 秒）", *recipe.card_lines(result), "", sep="\n")


if __name__ == "__main__":
    main()
