"""图、表、式按章编号：chapters/03-from-scratch.md 里的第一幅图是“图 3.1”。

Sphinx 自己的章号来自目录里的先后次序，还会印在每个标题前面。
本书的标题自带中文章号，各章又不是按次序写成的，所以章号改取文件名开头的数字，只用来给图、表、式编号。

代码格输出的表（pandas 的 DataFrame）也能有表号：它的 mystnb.figure.name 以 tab- 开头时，按表编号。
"""

import re

from docutils import nodes
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinx.transforms import SphinxTransform

CHAPTER_FILE = re.compile(r"chapters/(\d+)-")
_assign_figure_numbers = TocTreeCollector.assign_figure_numbers


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


def setup(app):
    # Sphinx 没有为这一步留接口，只能换掉收集器的方法
    TocTreeCollector.assign_figure_numbers = assign_figure_numbers
    visit_as_figure = (lambda self, node: self.visit_figure(node), lambda self, node: self.depart_figure(node))
    app.add_enumerable_node(OutputTable, "table", html=visit_as_figure)
    app.add_transform(FindOutputTables)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
