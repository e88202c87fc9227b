"""中文书的几处细节：换行不变成空格，标题有稳定的锚点，引用写成“Ho 等（2020）”。界面文字见 interface.py。"""

import re
from dataclasses import dataclass, field

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform
from sphinxcontrib.bibtex.plugin import register_plugin
from sphinxcontrib.bibtex.style.referencing import BracketStyle, PersonStyle
from sphinxcontrib.bibtex.style.referencing.author_year import AuthorYearReferenceStyle

# 汉字、中文标点、全角字符，以及中文里用的弯引号、破折号和省略号
CJK = r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\u2014\u2018\u2019\u201c\u201d\u2026]"


class JoinChineseLines(SphinxTransform):
    """源文件里汉字之间的换行，浏览器会显示成空格；这里去掉。"""

    default_priority = 400

    def apply(self, **kwargs):
        for parent in self.document.findall(nodes.TextElement):
            if isinstance(parent, nodes.FixedTextElement):      # 代码块原样保留
                continue
            parent[:] = [child for child in parent if child != ""]      # MyST 会留下空的文字节点
            for i in range(len(parent) - 2, 0, -1):             # 从后往前删，前面的序号不变
                around = parent[i - 1].astext()[-1:] + parent[i + 1].astext()[:1]
                if parent[i] == "\n" and re.fullmatch(CJK * 2, around):
                    del parent[i]


class KeepPunctuation(SphinxTransform):
    """公式排好后是一整块，浏览器会在它与标点之间换行，句号于是落到行首；把公式和紧跟着的标点绑在一起。"""

    default_priority = 420

    def apply(self, **kwargs):
        for formula in list(self.document.findall(nodes.math)):
            parent, i = formula.parent, formula.parent.index(formula)
            after = parent[i + 1] if i + 1 < len(parent) else None
            if isinstance(after, nodes.Text) and (found := re.match(r"[，。、；：？！）”]+", after)):
                parent[i:i + 2] = [
                    nodes.inline("", "", formula, nodes.Text(found[0]), classes=["math-with-punctuation"]),
                    nodes.Text(after[found.end():]),
                ]


class TightenCitations(SphinxTransform):
    """引用的括号是全角的，自带空白；去掉作者在引用前后习惯留的空格。"""

    default_priority = 410

    def apply(self, **kwargs):
        for cite in self.document.findall(lambda node: isinstance(node, pending_xref) and node["refdomain"] == "cite"):
            parent, i = cite.parent, cite.parent.index(cite)
            # {cite:p} 以括号开头，前面不留空格；两种引用都以括号结尾，后面都不留
            if i > 0 and cite["reftype"] == "p" and isinstance(parent[i - 1], nodes.Text):
                parent[i - 1] = nodes.Text(parent[i - 1].rstrip(" "))
            if i + 1 < len(parent) and isinstance(parent[i + 1], nodes.Text):
                parent[i + 1] = nodes.Text(parent[i + 1].lstrip(" "))


class StableHeadingIds(SphinxTransform):
    """给标题稳定的锚点，好让别处的链接不会因为增删一节而失效。

    Sphinx 的锚点只留 ASCII 字符，中文标题于是成了 id1、id2……，“5.4 DDIM：更快的采样过程”则是 ddim。
    这里有节号的用节号（#sec-3-2-1）；没有节号、Sphinx 又只给了编号的，用标题本身（#术语表）。
    """

    default_priority = 10       # 在收集目录和交叉引用之前

    def apply(self, **kwargs):
        ids, names = self.document.ids, self.document.nameids
        for section in self.document.findall(nodes.section):
            old, title = section["ids"][0], section[0].astext()
            number = re.match(r"\d+(\.\d+)+", title)
            new = "sec-" + number[0].replace(".", "-") if number else re.sub(r"\s+", "-", title)
            if (number or re.fullmatch(r"id\d+", old)) and new not in ids:
                section["ids"][0] = new
                ids[new] = ids.pop(old)
                for name in section["names"]:
                    names[name] = new


def brackets():
    return BracketStyle(left="（", right="）", sep="；")


@dataclass
class ChineseReferenceStyle(AuthorYearReferenceStyle):
    """{cite:t} → Ho 等（2020）；{cite:p} → （Ho 等，2020）。"""

    bracket_textual: BracketStyle = field(default_factory=brackets)
    bracket_parenthetical: BracketStyle = field(default_factory=brackets)
    person: PersonStyle = field(
        default_factory=lambda: PersonStyle(sep="、", sep2=" 和 ", last_sep=" 和 ", other=" 等")
    )
    author_year_sep: str = "，"
    text_reference_sep: str = ""
    post_text_sep: str = "，"


def setup(app):
    register_plugin("sphinxcontrib.bibtex.style.referencing", "chinese", ChineseReferenceStyle)
    app.add_transform(JoinChineseLines)
    app.add_transform(KeepPunctuation)
    app.add_transform(TightenCitations)
    app.add_transform(StableHeadingIds)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
