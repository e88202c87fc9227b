"""编号只由 Sphinx 做一次：图、表、式按章编号，编好之后写成一个文件，供生成笔记本时取用。

Sphinx 自己的章号来自目录里的先后次序，还会印在每个标题前面。
本书的标题自带中文章号，各章又不是按次序写成的，所以章号改取文件名开头的数字，只用来给图、表、式编号：
chapters/03-from-scratch.md 里的第一幅图是“图 3.1”。

代码格输出的表（pandas 的 DataFrame）也能有表号：它的 mystnb.figure.name 以 tab- 开头时，按表编号。

写出的文件是 _build/numbers.json，由 tools/numbering.py 读取：
    sources    据以编号的源文件的摘要，见 sources_digest
    figure、table、code-block、equation    标签 → 编号，如 "fig-mnist": "3.1"
    title      标签或页 → 标题
"""

import hashlib
import json
import re
from pathlib import Path

import nbformat
from docutils import nodes
from myst_nb.core.read import read_myst_markdown_notebook
from myst_parser.config.main import MdParserConfig
from sphinx.domains.std import StandardDomain
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinx.transforms import SphinxTransform

NUMBERS_FILE = "_build/numbers.json"
KINDS = ("figure", "table", "code-block")
CHAPTER_FILE = re.compile(r"chapters/(\d+)-")
_assign_figure_numbers = TocTreeCollector.assign_figure_numbers


# —— 编号 ——

def assign_figure_numbers(self, env):
    """编号时让 Sphinx 以为每章有章号，编完就收回，标题前就不会印出章号。"""
    env.toc_secnumbers = {
        docname: {"": (int(found[1]),)} for docname in env.all_docs if (found := CHAPTER_FILE.match(docname))
    }
    changed = _assign_figure_numbers(self, env)
    env.toc_secnumbers = {}
    return changed


class OutputTable(nodes.figure):
    """代码格输出的表，连同表题；除了编号，与图相同。"""


class FindOutputTables(SphinxTransform):
    default_priority = 20       # 在编号之前

    def apply(self, **kwargs):
        for figure in list(self.document.findall(nodes.figure)):
            if any(name.startswith("tab-") for name in figure["ids"]):
                table = OutputTable("", *figure.children, **figure.attributes)
                table["classes"].append("output-table")
                figure.replace_self(table)
                self.document.ids |= dict.fromkeys(table["ids"], table)


# —— 写出 ——

def sources_digest(root: Path) -> str:
    """编号由哪些文件决定：各页的源文件、目录、设置和本书的扩展；返回它们内容的摘要。"""
    total = hashlib.sha256()
    for pattern in ("*.md", "chapters/*.md", "_config.yml", "_toc.yml", "_ext/*.py"):
        for path in sorted(root.glob(pattern)):
            total.update(f"{path.relative_to(root).as_posix()}\n".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def collect_numbers(env) -> dict[str, dict[str, str]]:
    """全书带标签的图、表、代码、式的编号，以及标签与页的标题。"""
    numbers: dict[str, dict[str, str]] = {kind: {} for kind in (*KINDS, "equation", "title")}

    def number(docname: str, kind: str, anchor: str) -> str:
        return ".".join(map(str, env.toc_fignumbers.get(docname, {}).get(kind, {}).get(anchor, ())))

    standard: StandardDomain = env.get_domain("std")
    for label, (docname, anchor) in standard.anonlabels.items():
        for kind in KINDS:
            if found := number(docname, kind, anchor):
                numbers[kind][label] = found
    for label, (docname, _) in env.get_domain("math").equations.items():
        numbers["equation"][label] = number(docname, "displaymath", nodes.make_id(f"equation-{label}"))
    numbers["title"] = {label: str(title) for label, (_, _, title) in standard.labels.items()}
    numbers["title"] |= {docname: title.astext() for docname, title in env.titles.items()}
    return numbers


def remember_sources(app):
    """在读入各页之前取摘要：读的时候有人改了源文件，摘要就对不上，下次会重做。"""
    app.book_sources = sources_digest(Path(app.srcdir))


def write_numbers(app, env):
    path = Path(app.srcdir, NUMBERS_FILE)
    path.parent.mkdir(exist_ok=True)
    numbers = {"sources": app.book_sources, **collect_numbers(env)}
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(numbers, ensure_ascii=False, indent=1) + "\n", "utf-8")
    temporary.replace(path)


# —— 只为编号而读各章：不执行代码（tools/numbering.py） ——

def read_without_running(text: str, extensions: list[str]) -> nbformat.NotebookNode:
    """读入一页；代码格没有执行，就没有图，这里替有图题的格放一个占位的输出，Sphinx 才会给它编号。"""
    notebook = read_myst_markdown_notebook(text, MdParserConfig(enable_extensions=extensions), add_source_map=True)
    for cell in notebook.cells:
        if cell.cell_type == "code" and "figure" in cell.metadata.get("mystnb", {}):
            cell.outputs = [nbformat.v4.new_output("display_data", {"text/plain": "占位"})]
    return notebook


def setup(app):
    # Sphinx 没有为这一步留接口，只能换掉收集器的方法
    TocTreeCollector.assign_figure_numbers = assign_figure_numbers
    visit_as_figure = (lambda self, node: self.visit_figure(node), lambda self, node: self.depart_figure(node))
    app.add_enumerable_node(OutputTable, "table", html=visit_as_figure)
    app.add_transform(FindOutputTables)
    app.connect("builder-inited", remember_sources)
    app.connect("env-check-consistency", write_numbers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
