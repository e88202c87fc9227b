"""笔记本里的正文：MyST 独有的写法都换成了普通 Markdown，编号与网站一致。"""

import re
from pathlib import Path

import nbformat
import notebooks
import pytest
from numbering import book_numbers
from plain_markdown import MarkdownError, PlainMarkdown, blocks

CONFIG = """\
sphinx:
  config:
    math_eqref_format: "({number})"
    numfig_format: {figure: 图 %s}
"""
NUMBERS = {
    "figure": {"fig-code": "3.1", "fig-b": "3.2"}, "table": {"tab-a": "3.1", "tab-other": "1.2"}, "code-block": {"code-a": "3.1"},
    "equation": {"eq-a": "3.1", "eq-d": "3.2", "eq-other": "1.9"},
    "title": {"sec-a": "甲节", "glossary": "术语表"},
}
BIBLIOGRAPHY = """\
@misc{ho, author = {Ho, Jonathan and Jain, Ajay and Abbeel, Pieter}, title = {T}, year = {2020}, url = {https://a.org}}
@misc{kb, author = {Kingma, D. P. and Ba, Jimmy}, title = {T}, year = {2015}, doi = {10.1/x}}
"""


@pytest.fixture
def convert(tmp_path):
    """返回一个函数：若干格（以“代码:标签:图题”开头的是带图题的代码格）→ 转换后的各格。"""
    (tmp_path / "chapters").mkdir()
    (tmp_path / "_config.yml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "references.bib").write_text(BIBLIOGRAPHY, encoding="utf-8")
    (tmp_path / "a.svg").write_text("<svg/>", encoding="utf-8")

    def run(*sources: str) -> list[str]:
        cells = []
        for source in sources:
            if source.startswith("代码:"):
                _, name, caption = source.split(":", 2)
                figure = {"name": name, "caption": caption}
                cells.append(nbformat.v4.new_code_cell("x", metadata={"mystnb": {"figure": figure}}))
            else:
                cells.append(nbformat.v4.new_markdown_cell(source))
        notebook = nbformat.v4.new_notebook(cells=cells)
        PlainMarkdown(notebook, tmp_path / "chapters" / "03-x.md", tmp_path, lambda: NUMBERS).convert()
        return [cell.source for cell in notebook.cells]

    return run


def test_equations_take_the_numbers_of_the_site(convert):
    (text,) = convert(
        "```{math}\n:label: eq-a\na\n```\n\n```{math}\nb\\\\\nc\n```\n\n$$\nd\n$$ (eq-d)\n\n"
        "见 {eq}`eq-d`、{eq}`eq-a` 和别章的 {eq}`eq-other`。"
    )
    assert text == (
        "$$\na\n\\tag{3.1}\n$$\n\n$$\n\\begin{aligned}\nb\\\\\nc\n\\end{aligned}\n$$\n\n$$\nd\n\\tag{3.2}\n$$\n\n"
        "见 (3.2)、(3.1) 和别章的 (1.9)。"
    )


def test_figures_are_embedded_and_numbered(convert):
    cells = convert(
        "代码:fig-code:第一幅，见 {numref}`fig-b`。",
        "```{figure} ../a.svg\n:name: fig-b\n:alt: 示意图\n第二幅\n```\n{numref}`图里 %s <fig-code>`",
    )
    assert cells[1] == "*图 3.1　第一幅，见 图 3.2。*"
    assert cells[2] == "![示意图](data:image/svg+xml;base64,PHN2Zy8+)\n\n*图 3.2　第二幅*\n图里 3.1"


def test_tables_keep_their_captions(convert):
    cells = convert(
        "```{table} 两种办法\n:name: tab-a\n\n| 甲 |\n| --- |\n| 见 {eq}`eq-a` |\n```\n后，{numref}`tab-a`、{numref}`tab-other`",
        "代码:tab-a:程序打印的表",
    )
    assert cells[0] == "*表 3.1　两种办法*\n\n| 甲 |\n| --- |\n| 见 (3.1) |\n\n后，表 3.1、表 1.2"
    assert cells[2] == "*表 3.1　程序打印的表*"


def test_code_blocks_stay_code(convert):
    (text,) = convert("````{code-block} python\n:name: code-a\n:caption: 一段\n```\nx = {1}\n```\n````\n{numref}`code-a`")
    assert text == "*代码 3.1　一段*\n\n````python\n```\nx = {1}\n```\n````\n\n代码 3.1"


def test_references_without_words_show_titles(convert):
    assert convert("见 {ref}`sec-a`、{doc}`../glossary`、{ref}`这里 <sec-a>`。") == ["见 甲节、术语表、这里。"]


@pytest.mark.parametrize("source, words", [
    ("{eq}`eq-none`", ["eq-none", "式"]),
    ("{numref}`eq-a`", ["eq-a", "图、表、代码"]),
    ("$$\nx\n$$ (eq-none)", ["eq-none"]),
    ("```{table} 没有标签\n| 甲 |\n```", ["都要有 name"]),
    ("{ref}`nowhere`", ["nowhere"]),
    ("{doc}`nowhere`", ["nowhere"]),
    ("{glue}`x`", ["{glue}"]),
    ("```{mermaid}\na\n```", ["{mermaid}"]),
])
def test_what_cannot_be_shown_is_an_error(convert, source, words):
    with pytest.raises(MarkdownError) as error:
        convert(source)
    assert all(word in str(error.value) for word in words)


def test_boxes_and_folded_answers(convert):
    (text,) = convert(
        "```{admonition} 练习 {term}`管线 <Pipeline>`\n:class: exercise\n题\n```\n"
        "````{dropdown} 答案\n```python\ny = {1}\n```\n````\n:::{tip}\n话\n:::"
    )
    assert text == (
        "**练习 管线**\n\n题\n\n<details>\n<summary>答案</summary>\n\n```python\ny = {1}\n```\n\n</details>\n\n**提示**\n\n话"
    )


def test_terms_and_sections(convert):
    assert convert("这叫{newterm}`速度`，见 {sec}`3.6.2 节`；{newterm}`管子 <管线>`。") == ["这叫**速度**，见 3.6.2 节；**管子**。"]


def test_citations_name_authors_and_link(convert):
    (text,) = convert("如 DDPM {cite:p}`ho,kb` 所说，{cite:t}`ho` 与 {cite:t}`missing`。")
    assert text == (
        "如 DDPM（[Ho 等，2020](https://a.org)；[Kingma 和 Ba，2015](https://doi.org/10.1/x)）所说，"
        "[Ho 等（2020）](https://a.org) 与 missing。"
    )


def test_included_files_are_shown(convert, tmp_path):
    (tmp_path / "app.py").write_text("x = {1}\n", encoding="utf-8")
    (text,) = convert("前\n\n```{literalinclude} ../app.py\n:language: python\n```\n\n后")
    assert text == "前\n\n```python\nx = {1}\n```\n\n后"


def test_labels_and_comments_disappear_but_code_stays(convert):
    (text,) = convert("(sec-a)=\n## 节\n% 注释\n```python\n(sec-a)=\n{eq}`a`\n```")
    assert text == "## 节\n```python\n(sec-a)=\n{eq}`a`\n```"


def test_unclosed_fence_does_not_hang():
    assert blocks(["```{tip} 题", "话"]) == [("tip", "题", {}, ["话"])]


# —— 各章 ——

def markdown_cells(source: Path) -> list[str]:
    """一章的笔记本里各格的正文。提交的笔记本与此相同，由 test_notebooks.py 核对。"""
    return [cell.source for cell in notebooks.generate(source).cells if cell.cell_type == "markdown"]


def prose(source: Path) -> list[str]:
    """各格的正文，去掉代码、公式和嵌入的图。"""
    hidden = r"(?ms)^(`{3,}).*?^\1$|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|data:[^)]*"
    return [re.sub(hidden, "", text) for text in markdown_cells(source)]


each_chapter = pytest.mark.parametrize("source", notebooks.chapter_sources(), ids=lambda path: path.stem)


@each_chapter
def test_no_myst_is_left_in_the_notebook(source: Path):
    for text in prose(source):
        assert not re.search(r"\{[a-z:-]+\}`?|^[`:]{3,}\{|^\([\w-]+\)=$", text, re.M), text


@each_chapter
def test_no_raw_label_is_left_in_the_notebook(source: Path):
    numbers = book_numbers()
    labels = {label for kind in ("figure", "table", "code-block", "equation") for label in numbers[kind]}
    assert {"fig-mnist", "tab-milestones", "eq-corrupt"} <= labels
    for text in prose(source):
        words = set(re.findall(r"[A-Za-z][\w-]*", text))
        assert not words & labels, text
        assert not re.search(r"\b(?:fig|tab|eq|sec|code)-[a-z]", text), text


@each_chapter
def test_every_caption_of_the_chapter_is_in_the_notebook(source: Path):
    """各章的图、表、式都在，编号与网站上的一样。"""
    numbers, text = book_numbers(), source.read_text(encoding="utf-8")
    whole = "\n".join(markdown_cells(source))
    for kind, shown in (("figure", "*图 {}　"), ("table", "*表 {}　"), ("code-block", "*代码 {}　"), ("equation", "\\tag{{{}}}")):
        for label, number in numbers[kind].items():
            if re.search(rf"(?:name|label):\s*{label}\b|\({label}\)$", text, re.M):
                assert shown.format(number) in whole, f"{label} 应当是 {number}"
