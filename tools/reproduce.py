"""从头训练第三章的两个网络，各走完整的三轮，与所依据文档的损失并排打印（make reproduce）。

不改动 models/：模型与断点都写在 .work/reproduce，中断后再运行会接着训练。
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
import mnist_basic_unet
import mnist_unet2d

from book_utils import epoch_means


def main():
    within = True
    for recipe in (mnist_basic_unet, mnist_unet2d):
        name, (document, tolerance) = recipe.NAME, recipe.DOCUMENT_LOSSES
        folder = ROOT / ".work" / "reproduce" / name
        if not (folder / "training.json").exists():
            print(f"训练 {name}……", flush=True)
            script = ROOT / "recipes" / f"{name.replace('-', '_')}.py"
            checkpoint = folder.with_suffix(".safetensors")
            subprocess.run(
                [sys.executable, script, "--output", folder, "--checkpoint", checkpoint], check=True
            )
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        print(f"{name}（{training['seconds'] / 60:.0f} 分钟，{training['machine']}）")
        losses = epoch_means(training["losses"], steps_per_epoch=469)
        for epoch, (ours, theirs) in enumerate(zip(losses, document, strict=True), start=1):
            difference = ours / theirs - 1
            within &= abs(difference) <= tolerance
            print(f"  第 {epoch} 轮：本次 {ours:.6f}，文档 {theirs:.6f}，相差 {difference:+.1%}（允许 {tolerance:.0%}）")
    print("全部在允许的范围内。" if within else "有的超出了允许的范围。")
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
