"""用另一套版本执行各章的笔记本：Colab 里较旧的，或者 PyPI 上最新的。

用法：python3 tools/other_versions.py colab [章名…]       版本写在 requirements-colab.txt
      python3 tools/other_versions.py newest [章名…]      requirements.txt 里各章用到的包，取各自最新的一版

环境建在 .venv-colab 或 .venv-newest 里，与本书的 .venv 互不相干；清单没有变就不重装（newest 每次都看有没有更新的）。
每一章从头执行到尾，出错的格逐一列出，不因一格停下。输出不与提交的对照：版本不同，数值可以不同；
章里的 assert 照常检查，滑块必须是活的（真的交出 ipywidgets 控件）。有一处不对，退出码就是 1。
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CELL_SECONDS = 1200
WIDGET = "application/vnd.jupyter.widget-view+json"
RUNNER = ("nbclient", "nbformat", "ipykernel")      # 在命令行里执行笔记本还要用的包


def wanted_packages(name: str, root: Path = ROOT) -> list[str]:
    """返回交给 pip 的要求：colab 照 requirements-colab.txt，newest 是各章用到的包，不写版本。

    异常：
        ValueError: 没有这一套版本，或清单里没有包。
    """
    if name == "colab":
        lines = (root / "requirements-colab.txt").read_text(encoding="utf-8").splitlines()
        wanted = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    elif name == "newest":
        text = (root / "requirements.txt").read_text(encoding="utf-8")
        section = re.search(r"^# —— 各章的代码.*?(?=^# ——|\Z)", text, re.M | re.S)
        wanted = re.findall(r"^([\w.-]+)==", section[0], re.M) if section else []
        wanted += [package for package in RUNNER if wanted]
    else:
        raise ValueError(f"没有“{name}”这一套版本，只有 colab 和 newest。")
    if not wanted:
        raise ValueError(f"“{name}”这一套里没有要装的包，请检查清单。")
    return wanted


def prepare(name: str, wanted: list[str], root: Path = ROOT) -> Path:
    """备好虚拟环境，返回其中的 Python；装好之后才写下标记，中断了再运行一次就接着装。"""
    folder = root / f".venv-{name}"
    python, done = folder / "bin" / "python", folder / ".installed"
    listed = "\n".join(wanted) + "\n"
    if name != "newest" and done.is_file() and done.read_text(encoding="utf-8") == listed:
        return python
    done.unlink(missing_ok=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    # 临时文件放在环境里：许多机器的 /tmp 放不下几个 GB 的安装包
    temporary = folder / ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--upgrade", *wanted],
                   env={**os.environ, "TMPDIR": str(temporary)}, check=True)
    shutil.rmtree(temporary)
    done.write_text(listed, encoding="utf-8")
    return python


def problems(notebook) -> list[str]:
    """已执行的笔记本里不对的格，每格一句话：报了错，或滑块只有文字、没有控件。"""
    found = []
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells):
        where = f"第 {number} 格（{next(iter(cell.source.splitlines()), '')[:60]}）"
        if "raises-exception" not in cell.metadata.get("tags", []):
            found += [f"{where}：{output.ename}: {output.evalue}"[:400]
                      for output in cell.outputs if output.output_type == "error"]
        for output in cell.outputs:
            data = output.get("data", {})
            shown = "".join(data.get("text/plain", ""))
            if WIDGET not in data and shown.startswith(("滑块：", "<book_utils.slider.Slider")):
                found.append(f"{where}：滑块不是活的，只有 {'、'.join(sorted(data))}")
    return found


def run_all(sources: list[Path], root: Path = ROOT) -> int:
    """在当前的环境里执行各个笔记本，打印每一章的结果，返回出错的格数。"""
    import nbformat
    from nbclient import NotebookClient

    variables = {key: value for key, value in os.environ.items() if key != "BOOK_SLIDERS"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    failed = 0
    for source in sources:
        notebook = nbformat.reads(source.read_text(encoding="utf-8"), as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = []           # 提交时的输出不算数
        client = NotebookClient(notebook, timeout=CELL_SECONDS, startup_timeout=CELL_SECONDS, kernel_name="python3",
                                allow_errors=True,
                                resources={"metadata": {"path": str(source.parent)}}, record_timing=False)
        started = time.perf_counter()
        try:
            client.execute(env={**variables, "TQDM_DISABLE": "1"})
            found = problems(notebook)
        except Exception as error:          # 内核被系统杀掉，或一格太久：这一章到此为止，后面的章照常
            found = [*problems(notebook), f"中途停下：{type(error).__name__}: {error}"[:400]]
        seconds = time.perf_counter() - started
        print(f"{source.stem}：{f'{len(found)} 处不对' if found else '全部通过'}（{seconds:.0f} 秒）", flush=True)
        for line in found:
            print(f"    {line}", flush=True)
        failed += len(found)
    return failed


def chapters(names: list[str], root: Path = ROOT) -> list[Path]:
    """返回要执行的笔记本，按阅读次序；不写章名则是所有章。

    异常：
        ValueError: 没有这样的章。
    """
    every = sorted((root / "chapters").glob("*.ipynb"))
    unknown = sorted({Path(name).stem for name in names} - {path.stem for path in every})
    if unknown:
        raise ValueError(f"没有这样的章：{'、'.join(unknown)}。有笔记本的章：{'、'.join(path.stem for path in every)}。")
    return [path for path in every if not names or path.stem in {Path(name).stem for name in names}]


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] == "--inside":        # 已经在那个环境里了，见下
        return int(run_all(chapters(arguments[1:])) > 0)
    name, *names = arguments or [""]
    try:
        wanted, sources = wanted_packages(name), chapters(names)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        python = prepare(name, wanted)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"没有建好 .venv-{name}：{error}。再运行一次就接着装。", file=sys.stderr)
        return 2
    command = [str(python), str(Path(__file__).resolve()), "--inside", *(source.stem for source in sources)]
    # 内核也要用那个环境里的 Python：不继承用户自己登记的内核
    return subprocess.run(command, env={**os.environ, "JUPYTER_PREFER_ENV_PATH": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
