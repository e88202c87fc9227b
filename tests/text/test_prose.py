"""正文：中文排版、用词、代码格的写法，以及“工具函数在书里完整讲过”。"""

import ast
import re
from pathlib import Path

import autocorrect_py
import notebooks
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from support.paths import ROOT
from support.prose import CHAPTERS, plain_lines, prose_lines

PAGES = [*CHAPTERS, *(ROOT / name for name in ("index.md", "glossary.md", "notation.md", "README.md", "CONTRIBUTING.md"))]
# 术语各有一个固定的说法；“您”与全书的口吻不合；其余是没写完的痕迹
FORBIDDEN = ["取样", "管道", "管理器", "迭代周期", "损坏过程", "您", "TODO", "待补充", "敬请期待"]
MACHINE_PATH = re.compile(r"(?<![\w./:-])/(?:work|root|home|tmp|Users|mnt)/\w|[A-Z]:\\\\?\w")
# 目录里的标题有“扩散模型-退化过程”这样的连字符，不加空格；行内公式与汉字之间也要空格
autocorrect_py.load_config('{"rules": {"space-dash": 0, "space-dollar": 1}}')
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
each_chapter = pytest.mark.parametrize("path", notebooks.chapter_sources(), ids=lambda path: path.name)


@each_page
def test_chinese_typography(path):
    text = "\n".join(prose_lines(path.read_text(encoding="utf-8")))
    found = autocorrect_py.lint_for(text, "markdown").lines
    assert [f"{path.name}:{line.line}：{line.old} → {line.new}" for line in found] == []


@each_page
def test_no_half_width_punctuation_between_chinese(path):
    pattern = re.compile(r"[\u4e00-\u9fff][,;:?!.()]\s?[\u4e00-\u9fff]|[\u4e00-\u9fff][,;?!]\s*$")
    found = [f"{path.name}:{number}：{line}" for number, line in plain_lines(path) if pattern.search(line)]
    assert found == []


@each_page
def test_words(path):
    found = [
        f"{path.name}:{number}：{word}"
        for number, line in plain_lines(path) if not line.startswith("#")       # 标题按 toc.yml 的原文
        for word in FORBIDDEN if word in re.sub(r"“[^”]*”", "", line)           # 引号里是在说这个词本身，如勘误
    ]
    assert found == []


@each_page
def test_no_machine_paths(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [f"{path.name}:{n}：{line}" for n, line in enumerate(lines, 1) if MACHINE_PATH.search(line)] == []


# —— 代码格 ——

def cell_sources(path: Path) -> list[str]:
    """一章里由作者写的代码格。"""
    return [cell.source for cell in notebooks.code_cells(notebooks.generate(path))[1:]]


@each_chapter
def test_every_cell_compiles(path):
    for source in cell_sources(path):
        plain = TransformerManager().transform_cell(source)     # %magic 与 !命令 先换成普通的 Python
        compile(plain, path.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def is_guard(node: ast.stmt) -> bool:
    """是不是只检查参数的语句：if …: raise …。"""
    return isinstance(node, ast.If) and not node.orelse and all(isinstance(s, ast.Raise) for s in node.body)


def essence(definition: ast.stmt) -> str:
    """去掉文档字符串和开头的参数检查之后的语法树；类则逐个方法处理。注释与排版本来就不在树里。"""
    for node in ast.walk(definition):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if ast.get_docstring(node) is not None:
                node.body.pop(0)
            while not isinstance(node, ast.ClassDef) and node.body and is_guard(node.body[0]):
                node.body.pop(0)
            node.body = node.body or [ast.Pass()]
    return ast.dump(definition)


def definitions(source: str) -> dict[str, ast.stmt]:
    tree = ast.parse(source)
    return {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}


def taught_helpers() -> list[tuple[str, str, ast.stmt]]:
    """各章里以“# book_utils.模块名”开头的代码格所定义的函数与类。"""
    return [
        (module[1], name, node)
        for path in notebooks.chapter_sources() for source in cell_sources(path)
        if (module := re.match(r"# book_utils\.(\w+)\s*\n", source))
        for name, node in definitions(source).items()
    ]


@pytest.mark.parametrize("module, name, node", [pytest.param(*h, id=f"{h[0]}.{h[1]}") for h in taught_helpers()])
def test_helper_is_taught_exactly_as_it_is(module, name, node):
    path = ROOT / "book_utils" / f"{module}.py"
    assert path.exists(), f"没有 book_utils/{module}.py"
    real = definitions(path.read_text(encoding="utf-8"))
    assert name in real, f"book_utils/{module}.py 里没有 {name}"
    assert essence(node) == essence(real[name]), (
        f"书里写的 {name} 与 book_utils/{module}.py 里的不同（文档字符串和开头的参数检查除外）：\n"
        f"—— 书里 ——\n{ast.unparse(node)}\n—— book_utils ——\n{ast.unparse(real[name])}"
    )


def test_comparison_ignores_only_docstrings_and_guards():
    taught = "def f(x: int):\n    return x + 1"
    def same(real: str) -> bool:
        return essence(definitions(taught)["f"]) == essence(definitions(real)["f"])

    assert same('def f(x: int):\n    """说明"""\n    if x < 0:\n        raise ValueError("x")\n    return x + 1  # 注释')
    assert not same("def f(x):\n    return x + 1")
    assert not same("def f(x: int):\n    return x + 2")
    assert not same("def f(x: int):\n    if x < 0:\n        x = 0\n    return x + 1")


def test_prose_is_told_from_code():
    text = (
        "---\nk: v\n---\n# 题\n(label)=\n```{code-cell}\nx,y\n```\n"
        "````{tip} 标题\n:class: x\n正文\n```python\ncode\n```\n````\n$$\na\n$$\n尾"
    )
    assert [line for line in prose_lines(text) if line] == ["# 题", "标题", "正文", "尾"]
    assert len(prose_lines(text)) == len(text.split("\n"))
