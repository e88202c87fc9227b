"""笔记本里的正文：MyST 独有的写法都换成了普通 Markdown，编号与网站一致。"""

import re
from pathlib import Path

import nbformat
import notebooks
import pytest
from plain_markdown import PlainMarkdown, blocks

CONFIG = """\
sphinx:
  config:
    math_eqref_format: "({number})"
    numfig_format: {figure: 图 %s}
"""
BIBLIOGRAPHY = """\
@misc{ho, author = {Ho, Jonathan and Jain, Ajay and Abbeel, Pieter}, title = {T}, year = {2020}, url = {https://a.org}}
@misc{kb, author = {Kingma, D. P. and Ba, Jimmy}, title = {T}, year = {2015}, doi = {10.1/x}}
"""


@pytest.fixture
def convert(tmp_path):
    """返回一个函数：若干格（以“代码:图题”开头的是带图题的代码格）→ 转换后的各格。"""
    (tmp_path / "chapters").mkdir()
    (tmp_path / "_config.yml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "references.bib").write_text(BIBLIOGRAPHY, encoding="utf-8")
    (tmp_path / "a.svg").write_text("<svg/>")

    def run(*sources: str) -> list[str]:
        cells = []
        for source in sources:
            if source.startswith("代码:"):
                figure = {"name": "fig-code", "caption": source[3:]}
                cells.append(nbformat.v4.new_code_cell("x", metadata={"mystnb": {"figure": figure}}))
            else:
                cells.append(nbformat.v4.new_markdown_cell(source))
        notebook = nbformat.v4.new_notebook(cells=cells)
        PlainMarkdown(notebook, tmp_path / "chapters" / "03-x.md", tmp_path).convert()
        return [cell.source for cell in notebook.cells]

    return run


def test_equations_are_numbered_by_chapter(convert):
    (text,) = convert(
        "```{math}\n:label: eq-a\na\n```\n\n```{math}\nb\\\\\nc\n```\n\n$$\nd\n$$ (eq-d)\n\n见 {eq}`eq-d` 和 {eq}`eq-a`。"
    )
    assert text == (
        "$$\na\n\\tag{3.1}\n$$\n\n$$\n\\begin{aligned}\nb\\\\\nc\n\\end{aligned}\n$$\n\n$$\nd\n\\tag{3.2}\n$$\n\n"
        "见 (3.2) 和 (3.1)。"
    )


def test_figures_are_embedded_and_share_one_numbering(convert):
    cells = convert(
        "代码:第一幅，见 {numref}`fig-b`。",
        "```{figure} ../a.svg\n:name: fig-b\n:alt: 示意图\n第二幅\n```\n{numref}`图里 %s <fig-code>`",
    )
    assert cells[1] == "*图 3.1　第一幅，见 图 3.2。*"
    assert cells[2] == "![示意图](data:image/svg+xml;base64,PHN2Zy8+)\n\n*图 3.2　第二幅*\n图里 3.1"


def test_boxes_and_folded_answers(convert):
    (text,) = convert(
        "```{admonition} 练习 {term}`管线 <Pipeline>`\n:class: exercise\n题\n```\n````{dropdown} 答案\n```python\ny = {1}\n```\n````\n:::{tip}\n话\n:::"
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


@pytest.mark.parametrize("source", notebooks.chapter_sources(), ids=lambda path: path.stem)
def test_no_myst_is_left_in_the_notebook(source: Path):
    for cell in notebooks.generate(source).cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"(?ms)^```.*?^```$|\$\$.*?\$\$|\$[^$]*\$|data:[^)]*", "", cell.source)
            assert not re.search(r"\{[a-z:-]+\}`|^[`:]{3,}\{|^\([\w-]+\)=$", text, re.M), cell.source
