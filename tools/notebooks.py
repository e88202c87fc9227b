"""由各章的 MyST 源文件生成、执行配对的 .ipynb，并检查两者是否一致。

用法：.venv/bin/python tools/notebooks.py write [章名…] [--force]
      .venv/bin/python tools/notebooks.py check

MyST（.md）是源文件，.ipynb 由它生成：给 Colab、Binder 和 GitHub 用，其中的输出也是 nbval 对照的标准。
代码一字不改；正文换成普通 Markdown（见 plain_markdown.py），因为那些地方不认 MyST。不要手改 .ipynb，下次生成时改动会丢失。
输出由章里的代码、它用到的模块与模型等算出（见 execution.py），它们的摘要记在笔记本的元数据里：没有变，就沿用原来的输出。
变了就取 make book 执行的结果（见 executed.py），那里也没有，才执行。
"""

import argparse
import base64
import hashlib
import io
import json
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import yaml
from dependencies import DependencyError, chapter_packages
from executed import BookError, code_cells, code_sources, current_result, execute, named, write_whole
from execution import execution_key
from nbformat import NotebookNode
from numbering import NumberingError, book_numbers
from PIL import Image
from plain_markdown import MarkdownError, PlainMarkdown

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 1_500_000           # 一个笔记本的上限，再大 GitHub 上就看不了了

SETUP_CELL = '''\
#@title 准备运行环境：请先运行这一格
# 由 tools/notebooks.py 生成。在 Colab、Binder 或自己电脑的任何文件夹里都能用：
# 找不到本书的工具包就克隆仓库，缺哪个包才装哪个；都齐全时什么也不做。
def prepare_book(repository, branch, packages):
    import importlib.util
    import re
    import shutil
    import subprocess
    import sys
    from importlib.metadata import version
    from pathlib import Path

    def run(command, problem):
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(f"{problem}这台机器上没有 {command[0]}，请先安装它。") from None
        if result.returncode != 0:
            raise RuntimeError(f"{problem}请检查网络，再运行这一格。下面是 {command[0]} 的报错：\\n{result.stderr}")

    def missing(module):
        return importlib.util.find_spec(module) is None

    if not missing("book_utils"):
        root = Path(importlib.util.find_spec("book_utils").origin).parent.parent
    else:
        root = Path("..").resolve()
        if not (root / "book_utils" / "__init__.py").exists():
            root = Path(repository.rsplit("/", 1)[-1]).resolve()
            if not root.exists():
                # 先克隆到临时的名字：中途断网不会留下半个仓库
                partial = root.with_name(root.name + ".partial")
                shutil.rmtree(partial, ignore_errors=True)
                run(["git", "clone", "--quiet", "--depth", "1", "--branch", branch, repository, str(partial)],
                    f"没有克隆成功 {repository}。")
                partial.rename(root)
            elif not (root / "book_utils" / "__init__.py").exists():
                raise RuntimeError(f"{root} 里没有 book_utils，它不是本书的仓库。请删去它或改名，再运行这一格。")
        sys.path.insert(0, str(root))

    names = [name for module, name in packages.items() if missing(module)]
    if names:
        pins = dict(re.findall(r"^([\\w.-]+)==(\\S+)", (root / "requirements.txt").read_text(encoding="utf-8"), re.M))
        wanted = [f"{name}=={pins[name]}" for name in names]
        if "torch" not in names:
            # 已有的 PyTorch 不动：Colab 的那一份与它的 GPU 驱动相配
            wanted = [f"torch=={version('torch')}", *(w.split("==")[0] if w.startswith("torchvision") else w for w in wanted)]
        run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], f"没有装好 {'、'.join(names)}。")
        importlib.invalidate_caches()


prepare_book(
    repository=@REPOSITORY@,
    branch=@BRANCH@,
    packages=@PACKAGES@,
)
del prepare_book
'''


def chapter_sources(root: Path = ROOT) -> list[Path]:
    """返回含有代码格的章，按阅读次序；前言也有代码格，却没有配对的笔记本。"""
    return [source for source in code_sources(root) if source.parent.name == "chapters"]


def setup_source(source: Path, root: Path = ROOT) -> str:
    """返回一章的笔记本第一格的代码；仓库地址取自 _config.yml，要哪些包由章里的 import 得出。"""
    repository = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]
    wanted = chapter_packages(source, root)
    packages = "{\n" + "".join(f"        {json.dumps(k)}: {json.dumps(v)},\n" for k, v in wanted.items()) + "    }"
    return (
        SETUP_CELL.replace("@REPOSITORY@", json.dumps(repository["url"].rstrip("/")))
        .replace("@BRANCH@", json.dumps(repository.get("branch", "main")))
        .replace("@PACKAGES@", packages)
        .rstrip("\n")
    )


def generate(source: Path, root: Path = ROOT) -> NotebookNode:
    """把一章的 MyST 转成没有输出的笔记本：第一格准备运行环境，正文换成普通 Markdown。"""
    text = source.read_text(encoding="utf-8")
    if not re.search(r"\A---\n(?:.*\n)*?\s+format_name: myst\n", text):
        raise BookError(f"{source.name}：开头的元数据里要有 jupytext 一段（format_name: myst），否则网站不会执行代码格。")
    try:
        converted = jupytext.reads(text, fmt="md:myst")
    except Exception as error:
        raise BookError(f"{source.name}：不是合格的 MyST 笔记本（{error}）。") from error
    try:
        PlainMarkdown(converted, source, root, lambda: book_numbers(root)).convert()
        first = setup_source(source, root)
    except (DependencyError, NumberingError, MarkdownError) as error:
        raise BookError(f"{source.name}：{error}") from error
    setup = nbformat.v4.new_code_cell(
        first, metadata={"tags": ["remove-cell"], "cellView": "form"}     # cellView：在 Colab 里收起代码
    )
    notebook = nbformat.v4.new_notebook(
        cells=[setup, *converted.cells],
        # 不带 jupytext 的配对信息：免得 JupyterLab 在保存笔记本时反过来改写源文件
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "execution_key": execution_key(source, root),
        },
    )
    # 编号取自内容，同样的源文件总是得到同样的笔记本
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return notebook


def read_notebook(path: Path) -> NotebookNode | None:
    """读入已有的笔记本；没有或读不懂时返回 None。"""
    try:
        return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    except (FileNotFoundError, ValueError, nbformat.ValidationError):       # 不是 JSON 也属于 ValueError
        return None


def keep_outputs(notebook: NotebookNode, old: NotebookNode | None) -> bool:
    """旧笔记本的输出还作数时（见 execution.py）搬过来，返回 True。

    第一格（准备运行环境）不参与比较：它没有输出。
    """
    if old is None or old.metadata.get("execution_key") != notebook.metadata.execution_key:
        return False
    new_cells, old_cells = code_cells(notebook), code_cells(old)
    if [cell.source for cell in new_cells[1:]] != [cell.source for cell in old_cells[1:]]:
        return False                                    # 旧笔记本被人手改过
    if any(cell.source and cell.execution_count is None for cell in old_cells):
        return False
    for new, previous in zip(new_cells, old_cells, strict=True):
        new.outputs, new.execution_count = previous.outputs, previous.execution_count
    return True


def smaller_picture(png: str) -> str:
    """把 base64 的 PNG 换成 256 色的，文件小一半以上，看不出差别；有透明的、反而变大的，原样不动。"""
    data = base64.b64decode(png)
    picture = Image.open(io.BytesIO(data))
    if picture.convert("RGBA").getextrema()[3][0] < 255:
        return png
    buffer = io.BytesIO()
    few_colors = picture.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few_colors.save(buffer, "png", optimize=True)
    return png if buffer.tell() >= len(data) else base64.b64encode(buffer.getvalue()).decode()


def tidy(notebook: NotebookNode, source: Path, root: Path = ROOT) -> None:
    """去掉每次执行、每台机器都会变的东西：标准错误、控件编号、Python 的小版本号；
    调用栈里的本机路径改成相对路径。图只留一份，换成 256 色的：笔记本的大小有上限，网站上的仍是原来的。"""
    notebook.metadata.language_info = {"name": "python"}
    for number, cell in enumerate(code_cells(notebook)):
        outputs: list[NotebookNode] = []
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name == "stderr":
                    continue
                if outputs and outputs[-1].output_type == "stream":
                    outputs[-1].text += output.text         # 同一段打印分几次到达，次数不定
                    continue
            if "data" in output:
                output.data.pop("application/vnd.jupyter.widget-view+json", None)
                if not output.data:
                    continue
                if "image/png" in output.data:
                    output.data.pop("image/jpeg", None)         # 同一幅图，PIL 两种格式都给
                    output.data["image/png"] = smaller_picture(output.data["image/png"])
            if output.output_type == "error":
                output.traceback = [line.replace(f"{root}/", "") for line in output.traceback]
            outputs.append(output)
        cell.outputs = outputs
        cell.metadata.pop("execution", None)
        if str(root) in json.dumps(outputs, ensure_ascii=False):
            raise BookError(f"{source.name}：第 {number} 个代码格的输出里有本机路径 {root}，换一台机器就不同了。")


def save(notebook: NotebookNode, path: Path) -> str:
    """写出笔记本（先写临时文件再改名），返回写了什么。"""
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    size = len(text.encode())
    if size > MAX_BYTES:
        largest = max(code_cells(notebook), key=lambda cell: len(json.dumps(cell.outputs)))
        raise BookError(
            f"{path.name}：生成后有 {size / 1e6:.2f} MB，超过上限 {MAX_BYTES / 1e6:.1f} MB，没有写出。"
            f"输出最大的代码格以 {largest.source.splitlines()[0]!r} 开头"
            f"（{len(json.dumps(largest.outputs)) / 1e6:.2f} MB），请减少它的图或滑块的帧。"
        )
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return "没有变化"
    write_whole(path, text)
    return f"已写出，{size / 1e3:.0f} KB"


def write(source: Path, force: bool = False, root: Path = ROOT) -> str:
    """生成一章的笔记本，返回一句话的结果；决定输出的东西都没有变时沿用旧的输出，不执行。"""
    target = source.with_suffix(".ipynb")
    notebook, old = generate(source, root), read_notebook(target)
    if not force and keep_outputs(notebook, old):
        return f"{target.name}：不必执行，{save(notebook, target)}"
    result = None if force else current_result(source, root)
    how = "取自 make book 的执行结果"
    if result is None:
        result = execute(source, root)
        how = f"执行用了 {result.metadata['seconds']:.0f} 秒"
    first, *rest = code_cells(notebook)
    first.execution_count = 1                   # 都齐全时它什么也不做，所以不必执行
    for cell, done in zip(rest, result.cells, strict=True):
        cell.outputs = done.outputs
        cell.execution_count = done.execution_count and done.execution_count + 1
    tidy(notebook, source, root)
    return f"{target.name}：{how}，{save(notebook, target)}"


def differences(source: Path, root: Path = ROOT) -> list[str]:
    """返回笔记本与源文件不一致之处，每处一句话；一致时为空。"""
    name = source.with_suffix(".ipynb").name
    committed = read_notebook(source.with_suffix(".ipynb"))
    if committed is None:
        return [f"{name}：没有这个笔记本，或者它不是合格的 JSON"]
    wanted = generate(source, root)
    if len(wanted.cells) != len(committed.cells):
        return [f"{name}：应有 {len(wanted.cells)} 格，实有 {len(committed.cells)} 格"]
    problems = []
    # 执行键不同不算不一致：输出真的变没变，由 tests/notebooks/test_outputs.py 对照
    for notebook in (committed, wanted):
        notebook.metadata.pop("execution_key", None)
    if committed.metadata != wanted.metadata:
        problems.append(f"{name}：笔记本的元数据不同")
    for number, (new, old) in enumerate(zip(wanted.cells, committed.cells, strict=True)):
        for key in ("cell_type", "source", "metadata", "id"):
            if new.get(key) != old.get(key):
                first_line = (new.source.splitlines() or [""])[0]
                problems.append(f"{name}：第 {number} 格的 {key} 不同（源文件里它以 {first_line!r} 开头）")
                break
        else:
            if new.cell_type == "code" and new.source and old.execution_count is None:
                problems.append(f"{name}：第 {number} 格还没有执行")
    return problems


def check(root: Path = ROOT) -> list[str]:
    """检查所有章，返回不一致之处；没有源文件的笔记本也算。"""
    sources = chapter_sources(root)
    problems = [problem for source in sources for problem in differences(source, root)]
    for notebook in sorted((root / "chapters").glob("*.ipynb")):
        if notebook.with_suffix(".md") not in sources:
            problems.append(f"{notebook.name}：没有与它配对的、含代码格的 .md")
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="由各章的 MyST 源文件生成配对的笔记本。")
    commands = parser.add_subparsers(dest="command", required=True)
    writer = commands.add_parser("write", help="生成并执行")
    writer.add_argument("names", nargs="*", metavar="章名", help="如 03-from-scratch；不写则是所有章")
    writer.add_argument("--force", action="store_true", help="什么都没有变也重新执行")
    commands.add_parser("check", help="只检查是否一致")
    options = parser.parse_args(arguments)

    if options.command == "check":
        problems = check()
        for problem in problems:
            print(problem)
        if problems:
            print("笔记本与源文件不一致，请运行 make notebooks。")
            return 1
        print(f"{len(chapter_sources())} 个笔记本都与源文件一致。")
        return 0

    try:
        sources = named(chapter_sources(), options.names)
    except BookError as error:
        print(error, file=sys.stderr)
        return 2
    failed = False
    for source in sources:
        try:
            print(write(source, options.force))
        except BookError as error:
            print(error, file=sys.stderr)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
