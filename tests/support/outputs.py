"""按 nbval 的规则比较一格的输出，不必重新执行。"""

import re
from functools import cache
from types import SimpleNamespace

from nbformat import NotebookNode
from nbval.plugin import IPyNbCell, coalesce_streams, get_sanitize_patterns, nocolors

from support.paths import ROOT

SANITIZE = ROOT / "tests/support/nbval-sanitize.cfg"
# 与 nbval 的默认值相同：图不比较（由打印的值把关）；再加标准错误，提交的笔记本不保存它（见 nbval_lenient.py）
SKIPPED = (
    "metadata", "traceback", "prompt_number", "output_type", "name", "execution_count",
    "application/vnd.jupyter.widget-view+json", "image/png", "image/jpeg", "stderr",
)
UNCOMPARED = {"nbval-ignore-output", "nbval-skip"}


@cache
def sanitize_patterns() -> dict[str, str]:
    return dict(get_sanitize_patterns(SANITIZE.read_text(encoding="utf-8")))


class _Cell:
    """只借用 nbval 里比较输出的几个方法。"""

    compare_outputs = IPyNbCell.compare_outputs
    format_output_compare = IPyNbCell.format_output_compare
    sanitize = IPyNbCell.sanitize
    colors = nocolors

    def __init__(self):
        self.parent = SimpleNamespace(skip_compare=SKIPPED, sanitize_patterns=sanitize_patterns())
        self.config = None
        self.ihook = SimpleNamespace(pytest_assertrepr_compare=lambda **_: [])
        self.comparison_traceback: list[str] = []


def difference(reference: list[NotebookNode], new: list[NotebookNode]) -> str:
    """两格输出的不同之处；相同则为空。"""
    cell = _Cell()
    return "" if cell.compare_outputs(coalesce_streams(new), coalesce_streams(reference)) else "\n".join(cell.comparison_traceback)


def compare_cells(committed: list[NotebookNode], executed: list[NotebookNode]) -> list[str]:
    """逐格比较，返回不同的格，每格一段：哪一格，原来是什么，现在是什么。"""
    problems = []
    for number, (old, new) in enumerate(zip(committed, executed, strict=True), start=1):
        if UNCOMPARED & set(old.metadata.get("tags", [])):
            continue
        found = difference(old.outputs, new.outputs)
        if found:
            first = next((line for line in old.source.splitlines() if not re.match(r"\s*(#|$)", line)), "")
            problems.append(f"第 {number} 个代码格（{first}）的输出变了：{found}")
    return problems
