"""正文里的两种行内写法。

{newterm}`退化过程`：术语第一次出现，加粗并链接到术语表。写成 **{term}`退化过程`** 不行：
前面紧挨着汉字时，Markdown 不认这样的星号，会原样印出来。

{sec}`3.6.1 节`、{sec}`第六章`：指向那一节、那一章的链接；那一章还没有写，就只是文字。
术语表和前言要提到全书的章节，新写好一章，这些地方自动变成链接，不必逐处去改。
"""

import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.errors import ExtensionError
from sphinx.util.docutils import ReferenceRole, SphinxRole
from sphinx.util.nodes import make_refnode

NUMBER = re.compile(r"第[一二三四五六七八九十]+章|\d+(?:\.\d+)*|附录")


class NewTermRole(ReferenceRole):
    def run(self):
        node = pending_xref(
            "", nodes.inline("", self.title, classes=["xref", "std", "std-term"]), refdomain="std", reftype="term",
            reftarget=self.target, refexplicit=self.has_explicit_title, refwarn=True, refdoc=self.env.docname,
        )
        self.set_source_info(node)
        return [nodes.strong("", "", node)], []


class SectionRole(SphinxRole):
    def run(self):
        found = NUMBER.match(self.text)
        if not found:
            raise ExtensionError(f"{{sec}} 里要以章节号开头，如“3.6.1 节”“第六章”，收到的是“{self.text}”。")
        node = pending_xref(
            "", nodes.inline("", self.text), refdomain="", reftype="book-section", reftarget=found[0],
            refwarn=False, refdoc=self.env.docname,
        )
        self.set_source_info(node)
        return [node], []


def numbered_headings(env) -> dict[str, tuple[str, str]]:
    """章节号 → (页, 锚点)；“第三章”与“3.6.1”都在内。"""
    found = {}
    for docname, toc in env.tocs.items():
        for entry in toc.findall(nodes.reference):
            number = NUMBER.match(entry.astext())
            if number and docname.startswith("chapters/"):
                found.setdefault(number[0], (docname, entry["anchorname"].removeprefix("#")))
    return found


def resolve_section(app, env, node, content):
    if node.get("reftype") != "book-section":
        return None
    target, headings = node["reftarget"], numbered_headings(env)
    if target in headings:
        docname, anchor = headings[target]
        return make_refnode(app.builder, node["refdoc"], docname, anchor, content, env.titles[docname].astext())
    chapter = target.split(".")[0]
    if any(number.startswith(f"{chapter}.") for number in headings):
        raise ExtensionError(f"{node['refdoc']} 里的 {{sec}} 指向 {target}，第 {chapter} 章里却没有这一节。")
    return content


def setup(app):
    app.add_role("newterm", NewTermRole())
    app.add_role("sec", SectionRole())
    app.connect("missing-reference", resolve_section)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
