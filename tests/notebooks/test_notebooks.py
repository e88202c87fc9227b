"""配对的笔记本：与源文件一致、断网可执行、输出不变、在空文件夹里也能运行。"""

import ast
import base64
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import dependencies
import executed
import execution
import nbformat
import notebooks
import numpy as np
import pytest
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from support.bare_environment import used_in_kernel
from support.paths import ROOT

SOURCES = notebooks.chapter_sources()
REPOSITORY = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
IGNORED_SHARE = 0.2             # 不比较输出的代码格至多占这么多，否则这一章等于没有测

each_chapter = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def committed(source: Path) -> nbformat.NotebookNode:
    notebook = notebooks.read_notebook(source.with_suffix(".ipynb"))
    assert notebook is not None, f"{source.with_suffix('.ipynb').name} 不存在或已损坏，请运行 make notebooks"
    return notebook


# —— 提交的笔记本本身 ——

def test_notebooks_match_their_sources():
    assert SOURCES, "chapters/ 里没有含代码的章"
    assert notebooks.check() == [], "请运行 make notebooks"


@each_chapter
def test_first_cell_prepares_environment(source):
    first = committed(source).cells[0]
    assert first.source == notebooks.setup_source(source)
    assert f'repository="{REPOSITORY}"' in first.source
    assert first.metadata.tags == ["remove-cell"]
    assert first.outputs == [], "都齐全时，准备环境的一格应当什么也不打印"


@each_chapter
def test_notebook_is_small(source):
    assert source.with_suffix(".ipynb").stat().st_size <= notebooks.MAX_BYTES


@each_chapter
def test_notebook_holds_nothing_volatile(source):
    notebook = committed(source)
    assert set(notebook.metadata) == {"kernelspec", "language_info", "execution_key"}
    for cell in notebooks.code_cells(notebook):
        assert "execution" not in cell.metadata
        for output in cell.outputs:
            assert output.get("name") != "stderr"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


@each_chapter
def test_most_outputs_are_compared(source):
    cells = notebooks.code_cells(committed(source))[1:]
    ignored = [c for c in cells if {"nbval-ignore-output", "nbval-skip"} & set(c.metadata.get("tags", []))]
    assert len(ignored) < IGNORED_SHARE * len(cells), [cell.source.splitlines()[0] for cell in ignored]


@each_chapter
def test_cells_do_not_end_with_semicolon(source):
    # nbval 不认行末的分号，会把 plt.plot(...); 的返回值当成输出来比较
    for cell in notebooks.code_cells(committed(source)):
        assert not cell.source.rstrip().endswith(";"), cell.source


# —— 断网重新执行，与提交的输出对照 ——

@pytest.mark.parametrize("code", [
    "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)",
    "import socket; socket.getaddrinfo('example.com', 80)",
    "import urllib.request; urllib.request.urlopen('http://example.com', timeout=1)",
    "import httpx; httpx.get('https://huggingface.co', timeout=1)",
    "import asyncio; asyncio.run(asyncio.open_connection('192.0.2.1', 80))",
])
def test_network_is_really_cut_off(code):
    result = subprocess.run([sys.executable, "-c", code], env=executed.kernel_environment(), capture_output=True, encoding="utf-8")
    assert result.returncode != 0
    assert "断网" in result.stderr or "Connection refused" in result.stderr, result.stderr


def test_loopback_still_works_offline():
    code = (
        "import socket; server = socket.create_server(('127.0.0.1', 0));"
        "socket.create_connection(server.getsockname()).close(); print('通')"
    )
    result = subprocess.run([sys.executable, "-c", code], env=executed.kernel_environment(), capture_output=True, encoding="utf-8")
    assert result.stdout == "通\n", result.stderr


# —— 在 Colab 那样的空文件夹里 ——

@pytest.fixture(scope="session")
def snapshot(tmp_path_factory) -> str:
    """把工作目录（含未提交的改动）做成一个临时 git 仓库，返回它的地址，充当网上的仓库。"""
    folder = tmp_path_factory.mktemp("remote") / "book"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    if listed.returncode != 0:
        pytest.skip("本书不在 git 仓库里（可能是下载的压缩包），无法测试克隆")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.endswith(".ipynb"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    # 权重压不小：不压缩、不求差，克隆快得多
    quick = (["config", "core.compression", "0"], ["config", "pack.window", "0"])
    for command in (["init", "-q", "-b", "main"], *quick, ["add", "-A", "-f"], ["commit", "-q", "-m", "快照"]):
        subprocess.run([*git, *command], cwd=folder, check=True, capture_output=True)
    return folder.as_uri()


def bare_kernel(folder: Path) -> str:
    """造一个看不见本书仓库的内核：不处理 .pth（-S），所需的包另由 PYTHONPATH 给出。返回 JUPYTER_PATH。"""
    spec = folder / "kernels" / "bare"
    spec.mkdir(parents=True)
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (spec / "kernel.json").write_text(json.dumps({
        "argv": [sys.executable, "-S", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "bare",
        "language": "python",
        "env": {"PYTHONPATH": os.pathsep.join(sorted(packages)), "BOOK_SLIDERS": "static"},
    }), encoding="utf-8")
    return str(folder)


def run_in_empty_folder(tmp_path: Path, monkeypatch, cells: list, remote: str) -> nbformat.NotebookNode:
    """在空文件夹里、没有 book_utils 的内核中执行若干格，克隆的地址换成 remote。"""
    work = tmp_path / "content"
    work.mkdir()
    monkeypatch.setenv("JUPYTER_PATH", bare_kernel(tmp_path / "jupyter"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "2")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{remote}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", REPOSITORY)
    monkeypatch.setenv("GIT_CONFIG_KEY_1", "safe.directory")
    monkeypatch.setenv("GIT_CONFIG_VALUE_1", "*")
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(
        notebook, timeout=300, kernel_name="bare", resources={"metadata": {"path": str(work)}}
    ).execute()
    return notebook


def all_imports(source: Path) -> str:
    """一章各格里的全部 import 语句，函数里的也算；recipes/ 里的脚本不算，章里导入它们之前先改了路径。"""
    own = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    trees = [ast.parse(code) for code in execution.chapter_code(source)]
    found = [node for tree in trees for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    found = [node for node in found if not {alias.name for alias in node.names} & own]
    return "\n".join(dict.fromkeys(map(ast.unparse, found)))


@each_chapter
def test_notebook_runs_from_an_empty_folder(source, snapshot, tmp_path, monkeypatch):
    """空文件夹，只有 PyTorch、NumPy 和内核：第一格克隆仓库、装好缺的包，之后每一个 import 都要成功。"""
    cells = notebooks.code_cells(notebooks.generate(source))
    code = nbformat.v4.new_code_cell
    pinned = list(dependencies.pinned_packages(ROOT / "requirements.txt"))
    before = code(used_in_kernel(["torch", "numpy", "ipykernel"], pinned))
    probe = code("import book_utils\nprint(book_utils.__file__)")
    result = run_in_empty_folder(tmp_path, monkeypatch, [before, *cells[:2], code(all_imports(source)), probe], snapshot)
    name = REPOSITORY.rstrip("/").rsplit("/", 1)[-1]
    assert result.cells[1].outputs == []
    assert result.cells[-1].outputs[0].text.strip() == str(tmp_path / "content" / name / "book_utils" / "__init__.py")
    assert [path.name for path in (tmp_path / "content").iterdir()] == [name]


def test_a_package_left_out_of_the_list_is_noticed(snapshot, tmp_path, monkeypatch):
    """上面的测试抓得住漏列的包：从清单里拿掉 datasets，第四章就导入不了。"""
    source = next(path for path in SOURCES if path.stem.startswith("04-"))
    cells = notebooks.code_cells(notebooks.generate(source))
    assert '"datasets": "datasets",' in cells[0].source
    cells[0].source = cells[0].source.replace('"datasets": "datasets",', "")
    pinned = list(dependencies.pinned_packages(ROOT / "requirements.txt"))
    before = nbformat.v4.new_code_cell(used_in_kernel(["torch", "numpy", "ipykernel"], pinned))
    with pytest.raises(CellExecutionError, match="No module named 'datasets'"):
        run_in_empty_folder(tmp_path, monkeypatch, [before, *cells[:2]], snapshot)


def test_failed_clone_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    setup = nbformat.v4.new_code_cell(notebooks.setup_source(SOURCES[0]))
    with pytest.raises(CellExecutionError, match="没有克隆成功"):
        run_in_empty_folder(tmp_path, monkeypatch, [setup], (tmp_path / "nowhere").as_uri())
    assert list((tmp_path / "content").iterdir()) == []


def run_setup_with_missing(monkeypatch, absent: set[str]) -> list[list[str]]:
    """假装缺少若干模块，执行准备环境的一格，返回它要运行的命令。"""
    real, commands = importlib.util.find_spec, []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else real(name))

    def fake_run(command, **_options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake_run)
    exec(notebooks.setup_source(SOURCES[0]), {})
    return commands


def test_setup_installs_nothing_when_all_is_there(monkeypatch):
    assert run_setup_with_missing(monkeypatch, set()) == []


def test_setup_installs_only_what_is_missing_and_never_touches_torch(monkeypatch):
    (command,) = run_setup_with_missing(monkeypatch, {"diffusers", "torchvision"})
    assert command[1:5] == ["-m", "pip", "install", "--quiet"]
    # torchvision 不指定版本，由 pip 找与现有 torch 相配的
    assert command[5:6] == [f"torch=={version('torch')}"] and "torchvision" in command
    assert [w.split("==")[0] for w in command[5:]] == ["torch", "torchvision", "diffusers"]
    assert command[-1].startswith("diffusers==")


# —— tools/notebooks.py ——

SAMPLE = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# 示例

```{code-cell} ipython3
:tags: [hide-input]
import sys
print("一", 1 + 1)
print("警告", file=sys.stderr)
```

正文。
"""


@pytest.fixture
def sample(tmp_path) -> Path:
    """一个只有一章的小书，返回那一章的源文件。"""
    (tmp_path / "chapters").mkdir()
    (tmp_path / "_config.yml").write_text((ROOT / "_config.yml").read_text(encoding="utf-8"), encoding="utf-8")
    source = tmp_path / "chapters" / "01-sample.md"
    source.write_text(SAMPLE, encoding="utf-8")
    return source


def test_write_executes_then_keeps_outputs(sample, tmp_path, monkeypatch):
    assert "执行用了" in notebooks.write(sample, root=tmp_path)
    cell = notebooks.code_cells(committed(sample))[1]
    assert cell.metadata.tags == ["hide-input"]
    assert [(o.name, o.text) for o in cell.outputs] == [("stdout", "一 2\n")]
    assert notebooks.check(tmp_path) == []

    monkeypatch.setattr(notebooks, "execute", lambda *_: pytest.fail("只改了正文，不该执行"))
    sample.write_text(SAMPLE.replace("正文。", "改过的正文。"), encoding="utf-8")
    assert notebooks.check(tmp_path) == [
        "01-sample.ipynb：第 3 格的 source 不同（源文件里它以 '改过的正文。' 开头）"
    ]
    assert "不必执行" in notebooks.write(sample, root=tmp_path)
    assert notebooks.code_cells(committed(sample))[1].outputs == cell.outputs
    assert notebooks.check(tmp_path) == []


def test_failing_cell_leaves_the_old_notebook(sample, tmp_path):
    sample.with_suffix(".ipynb").write_text("旧的", encoding="utf-8")
    sample.write_text(SAMPLE.replace("1 + 1", "1 / 0"), encoding="utf-8")
    with pytest.raises(notebooks.BookError, match="(?s)执行出错.*ZeroDivisionError"):
        notebooks.write(sample, root=tmp_path)
    assert sample.with_suffix(".ipynb").read_text(encoding="utf-8") == "旧的"
    assert sorted(path.name for path in sample.parent.iterdir()) == ["01-sample.ipynb", "01-sample.md"]


def test_source_without_jupytext_header_is_refused(sample, tmp_path):
    sample.write_text(SAMPLE.replace("format_name: myst", "x: y"), encoding="utf-8")
    with pytest.raises(notebooks.BookError, match="jupytext"):
        notebooks.generate(sample, tmp_path)


def test_oversized_notebook_and_machine_paths_are_refused(sample, tmp_path):
    notebook = notebooks.generate(sample, tmp_path)
    cell = notebooks.code_cells(notebook)[1]
    cell.outputs = [nbformat.v4.new_output("stream", text="长" * notebooks.MAX_BYTES)]
    with pytest.raises(notebooks.BookError, match="超过上限 1.5 MB"):
        notebooks.save(notebook, sample.with_suffix(".ipynb"))
    assert not sample.with_suffix(".ipynb").exists()
    cell.outputs = [nbformat.v4.new_output("stream", text=f"{tmp_path}/models")]
    with pytest.raises(notebooks.BookError, match="本机路径"):
        notebooks.tidy(notebook, sample, tmp_path)


def test_pictures_take_less_room_and_look_the_same(sample, tmp_path):
    """同一幅图只留 PNG，换成 256 色：小一半以上，平均相差不到 4（满分 255）；透明的图一个字节也不动。"""
    def encoded(pixels, mode) -> str:
        buffer = io.BytesIO()
        Image.fromarray(pixels, mode).save(buffer, "png")
        return base64.b64encode(buffer.getvalue()).decode()

    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(60, 200, (8, 8, 3)), np.ones((16, 16, 1))) + rng.normal(0, 3, (128, 128, 3))
    smooth = np.kron(smooth, np.ones((3, 3, 1))).astype(np.uint8)
    glass = np.concatenate([smooth, np.full((*smooth.shape[:2], 1), 128, np.uint8)], axis=2)
    notebook = notebooks.generate(sample, tmp_path)
    cell = notebooks.code_cells(notebook)[1]
    before = {"opaque": encoded(smooth, "RGB"), "glass": encoded(glass, "RGBA")}
    cell.outputs = [
        nbformat.v4.new_output("display_data", {"image/png": png, "image/jpeg": "aaaa"}) for png in before.values()
    ]
    notebooks.tidy(notebook, sample, tmp_path)
    opaque, kept = (output.data for output in cell.outputs)
    assert "image/jpeg" not in opaque and kept["image/png"] == before["glass"]
    assert len(opaque["image/png"]) < 0.5 * len(before["opaque"])
    after = np.asarray(Image.open(io.BytesIO(base64.b64decode(opaque["image/png"]))).convert("RGB"))
    assert np.abs(after.astype(int) - smooth).mean() < 4


def test_check_reports_orphans_and_unexecuted_cells(sample, tmp_path):
    nbformat.write(notebooks.generate(sample, tmp_path), sample.with_suffix(".ipynb"))
    (sample.parent / "02-orphan.ipynb").write_text("{}", encoding="utf-8")
    problems = notebooks.check(tmp_path)
    assert any("还没有执行" in problem for problem in problems)
    assert any(problem.startswith("02-orphan.ipynb") for problem in problems)
