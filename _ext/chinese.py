"""中文书的几处细节：换行不变成空格，标题有稳定的锚点，引用写成“Ho 等（2020）”，界面文字用中文。"""

import re
from dataclasses import dataclass, field

from docutils import nodes
from rewrite import rewrite_pages
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


# 主题和扩展里写死的、没有中文翻译的界面文字
INTERFACE = {
    'title="Toggle primary sidebar"': 'title="目录" aria-label="目录"',
    'title="Toggle secondary sidebar"': 'title="本页内容" aria-label="本页内容"',
    'aria-label="Toggle hidden content"': "",
    'aria-label="Main"': 'aria-label="全书目录"',
    'aria-label="Page"': 'aria-label="本页内容"',
    'aria-label="当前页面"': 'aria-label="本页内容"',
    'aria-label="网页导航"': 'aria-label="目录"',
    'aria-label="Color mode"': 'aria-label="切换亮色、暗色"',
    'data-bs-title="Color mode"': 'data-bs-title="切换亮色、暗色"',
    'title="System Settings"': 'title="跟随系统"',
    'title="Link to this heading"': 'title="本节的链接"',
    'title="Link to this image"': 'title="本图的链接"',
    'title="Link to this table"': 'title="本表的链接"',
    'title="Link to this code"': 'title="本段代码的链接"',
    'title="Link to this equation"': 'title="本式的链接"',
    'title="Link to this term"': 'title="本词的链接"',
    '<p class="prev-next-subtitle">上一条</p>': '<p class="prev-next-subtitle">上一页</p>',
    '<p class="prev-next-subtitle">下一条</p>': '<p class="prev-next-subtitle">下一页</p>',
    # 首次打开时主题等脚本加载完才分亮暗，夜间会闪一下白；在这里立刻定下来
    'localStorage.getItem("theme") || "auto"':
        'localStorage.getItem("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")',
    'alt="Binder logo"': 'alt=""',
    'alt="Colab logo"': 'alt=""',
}


def translate_interface(app, exception):
    """把界面上剩下的英文换成中文。"""
    if exception or app.builder.format != "html":
        return

    def translate(text: str) -> str:
        for english, chinese in INTERFACE.items():
            text = text.replace(english, chinese)
        return text

    rewrite_pages(app.outdir, translate)


def setup(app):
    register_plugin("sphinxcontrib.bibtex.style.referencing", "chinese", ChineseReferenceStyle)
    app.add_transform(JoinChineseLines)
    app.add_transform(KeepPunctuation)
    app.add_transform(TightenCitations)
    app.add_transform(StableHeadingIds)
    app.connect("build-finished", translate_interface)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
