"""每一章只执行一遍，结果放在 _build/executed：网站、配对的笔记本、输出的对照都取这一份。

用法：.venv/bin/python tools/executed.py [章名…] [--force]      执行过时的章（几章同时进行）

一章过没过时由执行键（见 execution.py）决定。执行时断网，进度条与滑块的控件关掉，与测试的条件相同。
"""

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import jupytext
import nbformat
import psutil
from execution import ROOT, execution_key
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from myst_nb.core.read import read_myst_markdown_notebook
from myst_parser.config.main import MdParserConfig
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from tqdm import tqdm

FOLDER = Path("_build/executed")
CELL_SECONDS = 600
OFFLINE = ROOT / "tools" / "offline"
SAMPLE_SECONDS = 0.1        # 每隔这么久看一次内核占多少内存


class BookError(Exception):
    """写给作者看的错误：一句中文说明，不需要调用栈。"""


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def write_whole(path: Path, text: str) -> None:
    """先写临时文件再改名：中途断了，也不会留下半个文件。"""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def workers() -> int:
    """同时执行几章：每个核一章，各用一个线程；章里的运算大多太小，两个线程快不了多少。"""
    return max(1, len(os.sched_getaffinity(0)))


def executed_path(source: Path, root: Path = ROOT) -> Path:
    return root / FOLDER / f"{source.stem}.ipynb"


def current_result(source: Path, root: Path = ROOT) -> NotebookNode | None:
    """一章上次执行的结果；没有，或者已经过时，返回 None。

    结果里只有代码格，没有正文，也没有笔记本的第一格；元数据里有 ``execution_key``、
    用时 ``seconds``、内存峰值 ``peak_mib`` 与几核 ``cores``。
    """
    path = executed_path(source, root)
    if not path.is_file():
        return None
    notebook = nbformat.read(path, as_version=4)
    return notebook if notebook.metadata.get("execution_key") == execution_key(source, root) else None


def kernel_environment() -> dict[str, str]:
    """执行各章的环境变量：断网，没有进度条，滑块只留 HTML 一面，一章一个线程。"""
    path = os.pathsep.join(filter(None, [str(OFFLINE), str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "TQDM_DISABLE": "1", "BOOK_SLIDERS": "static", "OMP_NUM_THREADS": "1"}


def private_mib(process: psutil.Process) -> float:
    """进程与它的子进程私有的内存，MiB。映射进来的库不算：内存紧张时，系统可以把它们收回。"""
    total = 0
    for one in (process, *process.children(recursive=True)):
        status = Path(f"/proc/{one.pid}/status")
        found = re.search(r"RssAnon:\s+(\d+)", status.read_text(encoding="utf-8")) if status.exists() else None
        total += int(found[1]) if found else 0
    return total / 1024


@contextmanager
def watched_memory(client: NotebookClient) -> Iterator[list[float]]:
    """执行期间不断看内核占多少内存，最大的一次放进给出的列表；没有 /proc 的系统上是 0。"""
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            pid = getattr(getattr(client.km, "provisioner", None), "pid", None)
            if pid:
                with suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
                    peak[0] = max(peak[0], private_mib(psutil.Process(pid)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def run_cells(notebook: NotebookNode, folder: Path, after_cell: Callable[[], object] = lambda: None) -> float:
    """在 folder 里从头执行笔记本，就地填入输出；每执行完一格调用一次 after_cell。返回内存峰值，MiB。"""
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", record_timing=False, store_widget_state=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.on_cell_executed = lambda **_: after_cell()
    with watched_memory(client) as peak:
        client.execute(env=kernel_environment())
    return peak[0]


def execute(source: Path, root: Path = ROOT, position: int = 0) -> NotebookNode:
    """在一章所在的文件夹里从头执行它的代码格，结果写进 _build/executed。

    异常：
        BookError: 某一格出错；上次的结果保留。
    """
    converted = jupytext.reads(source.read_text(encoding="utf-8"), fmt="md:myst")
    notebook = nbformat.v4.new_notebook(
        cells=code_cells(converted),
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "execution_key": execution_key(source, root),
        },
    )
    started = time.perf_counter()
    with tqdm(total=len(notebook.cells), desc=f"执行 {source.stem}", unit="格", position=position, leave=False) as progress:
        try:
            peak = run_cells(notebook, source.parent, progress.update)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise BookError(f"{source.name}：执行出错，没有新的结果。\n{error}") from error
    notebook.metadata["peak_mib"] = round(peak)
    notebook.metadata["seconds"] = round(time.perf_counter() - started, 1)
    notebook.metadata["cores"] = len(os.sched_getaffinity(0))

    path = executed_path(source, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, nbformat.writes(notebook))
    return notebook


def fill_site_cache(source: Path, result: NotebookNode, root: Path = ROOT) -> None:
    """把一章的结果放进 myst-nb 的执行缓存（已经有的就不动）：建网站时它以为执行过了，就不再执行。"""
    page = read_myst_markdown_notebook(
        source.read_text(encoding="utf-8"), MdParserConfig(),
        code_directive="{code-cell}", raw_directive="{raw-cell}",
    )
    cache = get_cache(str(root / "_build/.jupyter_cache"))
    data = {"execution_seconds": result.metadata["seconds"], "execution_key": result.metadata["execution_key"]}
    try:
        if cache.match_cache_notebook(page).data == data:
            return
    except KeyError:
        pass
    cells = code_cells(page)
    for cell, done in zip(cells, result.cells, strict=True):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
    cache.cache_notebook_bundle(CacheBundleIn(page, str(source), data=data), check_validity=False, overwrite=True)
    # 源文件没有变而输出变了的页，Sphinx 看不出来：丢掉它上次读的结果
    relative = source.relative_to(root).with_suffix(".doctree")
    (root / "_build/.doctrees" / relative).unlink(missing_ok=True)


def code_sources(root: Path = ROOT) -> list[Path]:
    """含有代码格的页，按阅读次序：前言与各章。"""
    pages = [root / "index.md", *sorted((root / "chapters").glob("*.md"))]
    return [
        page for page in pages
        if page.is_file() and re.search(r"^[`:]{3,}\{code-cell\}", page.read_text(encoding="utf-8"), re.M)
    ]


def named(sources: list[Path], names: list[str]) -> list[Path]:
    """sources 里名字在 names 中的；names 为空就是全部。

    异常：
        BookError: 有的名字不是其中的页。
    """
    wanted = {Path(name).stem for name in names}
    unknown = sorted(wanted - {source.stem for source in sources})
    if unknown:
        known = "、".join(source.stem for source in sources) or "无"
        raise BookError(f"没有这样的章：{'、'.join(unknown)}。含代码的章有：{known}。")
    return [source for source in sources if not wanted or source.stem in wanted]


def bring_up_to_date(sources: list[Path], force: bool = False, root: Path = ROOT) -> list[str]:
    """执行过时的页，几页同时进行，结果也放进网站的执行缓存；返回每页一句话的结果。

    异常：
        BookError: 有的页出错；其余的照常做完，错误合在一起说。
    """
    results = {source: None if force else current_result(source, root) for source in sources}
    # 代码最多的先做：最后只剩一章时，另一个核就闲着了
    outdated = sorted((s for s, result in results.items() if result is None), key=lambda s: -s.stat().st_size)

    def one(job: tuple[int, Path]) -> NotebookNode | BookError:
        position, source = job
        try:
            return execute(source, root, position)
        except BookError as error:
            return error

    with ThreadPoolExecutor(workers()) as pool:
        results |= zip(outdated, pool.map(one, enumerate(outdated)), strict=True)
    for source, result in results.items():      # 一个进程依次写：缓存是一个 SQLite 文件
        if not isinstance(result, BookError):
            fill_site_cache(source, result, root)
    errors = [str(result) for result in results.values() if isinstance(result, BookError)]
    if errors:
        raise BookError("\n\n".join(errors))
    done = {source: results[source].metadata for source in outdated}
    return [f"{s.stem}：执行用了 {d['seconds']:.0f} 秒，内存至多 {d['peak_mib']} MiB" for s, d in done.items()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="执行过时的章，供网站、笔记本与测试取用。")
    parser.add_argument("names", nargs="*", metavar="章名", help="如 03-from-scratch；不写则是全书")
    parser.add_argument("--force", action="store_true", help="没有过时也重新执行")
    options = parser.parse_args(arguments)
    try:
        sources = named(code_sources(), options.names)
    except BookError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        for line in bring_up_to_date(sources, options.force):
            print(line)
    except BookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
