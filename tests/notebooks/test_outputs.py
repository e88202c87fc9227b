"""各章重新执行的结果与提交的笔记本里的输出相同。

执行由 make book 做过了（tools/executed.py，断网），这里只比较，用的是 nbval 自己的规则；
另有一章真的交给 nbval 执行一遍，免得 pytest --nbval chapters/ 哪天坏了也不知道。
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import executed
import nbformat
import notebooks
import pytest
from support.outputs import SANITIZE, compare_cells
from support.paths import ROOT

SOURCES = notebooks.chapter_sources()
BINDER_MIB = 1.8 * 1024
QUICKEST = "02-hugging-face"         # 交给 nbval 的那一章，执行得最快


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_outputs_are_reproduced(source):
    result = executed.current_result(source)
    assert result is not None, f"{source.stem} 还没有执行，或者结果已经过时：请先运行 make book"
    committed = notebooks.read_notebook(source.with_suffix(".ipynb"))
    cells = notebooks.code_cells(committed)[1:]          # 第一格准备环境，没有输出
    assert [cell.source for cell in cells] == [cell.source for cell in result.cells], "请运行 make notebooks"
    problems = compare_cells(cells, result.cells)
    assert not problems, "输出与提交的笔记本不同；若是有意的改动，请运行 make notebooks：\n" + "\n".join(problems)


@pytest.mark.parametrize("source", executed.code_sources(), ids=lambda path: path.stem)
def test_chapter_fits_into_binder(source):
    """Binder 大约给 2 GB；章里起的训练脚本与内核一同计算在内。"""
    result = executed.current_result(source)
    assert result is not None, f"{source.stem} 还没有执行，或者结果已经过时：请先运行 make book"
    assert result.metadata["peak_mib"] <= BINDER_MIB


def run_nbval(folder: Path, names: list[str]) -> subprocess.CompletedProcess:
    """在断网状态下用 nbval 重新执行一个文件夹里的笔记本。"""
    path = os.pathsep.join([str(ROOT / "tests/support"), executed.kernel_environment()["PYTHONPATH"]])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "nbval_lenient", "-p", "no:cacheprovider", "-p", "no:xdist", "-q",
         "--color=no", "--nbval", "--nbval-current-env", f"--nbval-sanitize-with={SANITIZE}",
         f"--nbval-cell-timeout={executed.CELL_SECONDS}", "--nbval-kernel-startup-timeout=300", "--rootdir=.", *names],
        cwd=folder, env=executed.kernel_environment() | {"PYTHONPATH": path}, capture_output=True, encoding="utf-8",
    )


def test_nbval_itself_passes():
    result = run_nbval(ROOT / "chapters", [f"{QUICKEST}.ipynb"])
    assert result.returncode == 0, f"{result.stdout[-8000:]}\n{result.stderr[-2000:]}"


# —— 我们的比较与 nbval 的结论相同 ——

def slider_page(frame: str, label: str = "噪声量", frames: int = 2) -> str:
    data = json.dumps({"frames": [f"data:image/webp;base64,{frame}"] * frames, "labels": [label]})
    return f'<div class="book-slider"><img src="data:image/webp;base64,{frame}"><script>{data}</script></div>'


def page(html: str) -> list:
    return [nbformat.v4.new_output("display_data", {"text/html": html})]


def printed(text: str, name: str = "stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


REFERENCE = page(slider_page("AAAA"))
CASES = [                               # 名字，提交的输出，这一格的代码，相同吗
    ("相同", REFERENCE, f"page({slider_page('AAAA')!r})", True),
    ("只是帧的字节不同", REFERENCE, f"page({slider_page('BBbb+/==')!r})", True),
    ("滑块的名字不同", REFERENCE, f"page({slider_page('AAAA', label='时间步')!r})", False),
    ("少一帧", REFERENCE, f"page({slider_page('AAAA', frames=3)!r})", False),
    ("标准错误不算", REFERENCE, f"import sys; print('进度', file=sys.stderr); page({slider_page('AAAA')!r})", True),
    ("打印的数不同", [printed("0.47\n")], "print(0.45)", False),
    ("打印分几次到达", [printed("一\n二\n")], "print('一', flush=True); print('二')", True),
    ("少了输出", [printed("一\n")], "pass", False),
    ("多了输出", [], "print('一')", False),
    ("对象的地址不算", [printed("<a at 0x7f00>\n")], "print('<a at 0x7fff>')", True),
]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> list[tuple[bool, bool]]:
    """对每一例，我们与 nbval 各自的结论：一个笔记本，一格一例。"""
    folder = tmp_path_factory.mktemp("nbval")
    define = "from IPython.display import display\ndef page(html): display({'text/html': html}, raw=True)"
    code = nbformat.v4.new_code_cell
    cells = [code(define, execution_count=1)]
    cells += [code(source, outputs=outputs, execution_count=2) for _, outputs, source, _ in CASES]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "a.ipynb")
    report = run_nbval(folder, ["a.ipynb", "-rA"]).stdout
    result = nbformat.read(folder / "a.ipynb", as_version=4)
    executed.run_cells(result, folder)
    return [
        (compare_cells([cells[number]], [result.cells[number]]) == [], f"PASSED a.ipynb::Cell {number}\n" in report)
        for number in range(1, len(cells))
    ]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[case[0] for case in CASES])
def test_comparison_agrees_with_nbval(case, verdicts):
    ours, theirs = verdicts[case]
    assert ours == theirs == CASES[case][3]
