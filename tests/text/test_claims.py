"""正文里的断言不会悄悄变假：公式、引用的数、提到的章节，都与一处可以核对的东西拴在一起。

“重新生成笔记本再提交”会把错误连同输出一起记下来，比较输出就发现不了。所以：
- 每个单占一行的公式记在 claims.yml 里，连同核对它的那一格；公式一改，就要回去看那一格还核对不核对得上；
- 正文引用的百分数，要么与某一格打印的数相同（numbers），要么写明出自哪里（elsewhere）；
- 打印的文字里，没有哪一行说两边不一样；
- 提到的“3.6.5 节”“第六章”要真有。
"""

import re
from functools import cache

import notebooks
import pytest
import yaml
from pybtex.database import parse_file
from support.equations import displayed
from support.paths import ROOT
from support.prose import CHAPTERS, PAGES, prose_lines

CLAIMS = yaml.safe_load((ROOT / "tests/text/claims.yml").read_text(encoding="utf-8"))
SOURCES = {path.stem: path for path in notebooks.chapter_sources()}
BIBLIOGRAPHY = parse_file(ROOT / "references.bib", bib_format="bibtex").entries
PERCENT = re.compile(r"\d+(?:\.\d+)?\s?(?:\\?%|％|个百分点)")
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)\n```$", re.DOTALL | re.MULTILINE)


@cache
def source_text(chapter: str) -> str:
    return SOURCES[chapter].read_text(encoding="utf-8")


@cache
def prose(chapter: str) -> str:
    return "\n".join(prose_lines(source_text(chapter)))


@cache
def cells(chapter: str) -> list[str]:
    return CELL.findall(source_text(chapter))


@cache
def printed(chapter: str) -> str:
    """这一章打印的全部文字。"""
    notebook = notebooks.read_notebook(SOURCES[chapter].with_suffix(".ipynb"))
    texts = []
    for cell in notebooks.code_cells(notebook):
        for output in cell.outputs:
            texts.append(output.get("text", "") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(text.rstrip("\n") for text in texts)


def compact(tex: str) -> str:
    return re.sub(r"\s+", "", tex)


# —— 公式 ——

def records(chapter: str) -> dict[str, dict]:
    """这一章的各个公式在 claims.yml 里的记录；没有编号的，名字是“无编号 1”之类。"""
    found = dict(CLAIMS["formulas"].get(chapter, {}))
    return found | {f"无编号 {i}": one for i, one in enumerate(CLAIMS["unnumbered"].get(chapter, []), 1)}


def test_every_way_of_writing_an_equation_is_read():
    """math 指令的选项不限次序，围栏里还可以套围栏；美元号的一行、几行、带标签的；代码里的不算。"""
    text = "\n".join([
        "---", "a: $$q$$", "---", "````{admonition} 题", "```{math}", ":nowrap:", ":label: eq-a", "x=1", "", "y=2", "```", "````",
        "$$a+b$$", "$$", "c", "d$$ (eq-b)", "$$", "e", "$$", "```python", "$$z$$", "```", "```{code-cell} ipython3", "# $$", "```",
        ":::{math}", "f", ":::", "文中的 $$g$$ 不单占一行",
    ])
    assert displayed(text) == ({"eq-a": "x=1\n\ny=2", "eq-b": "c\nd"}, ["a+b", "e", "f"])


@pytest.mark.parametrize("chapter", SOURCES)
def test_every_displayed_equation_is_on_record(chapter):
    labelled, unlabelled = displayed(source_text(chapter))
    found = labelled | {f"无编号 {i}": tex for i, tex in enumerate(unlabelled, 1)}
    recorded = records(chapter)
    assert set(found) == set(recorded), "公式有增减：请在 tests/text/claims.yml 里添上或删去，并写明哪一格核对它"
    changed = [label for label, tex in found.items() if compact(recorded[label]["tex"]) != compact(tex)]
    assert changed == [], "这些公式改过：请看核对它们的那一格是否还对得上，再改 claims.yml"


@pytest.mark.parametrize("chapter", SOURCES)
def test_equations_are_checked_by_a_cell(chapter):
    """checked_by 是核对它的那一格里的几句代码，其中一句是 assert；没有格核对的写 why。"""
    for label, record in records(chapter).items():
        assert ("checked_by" in record) != ("why" in record), f"{label}：checked_by 与 why 恰有其一"
        if "checked_by" in record:
            lines = record["checked_by"]
            lines = [lines] if isinstance(lines, str) else lines
            matching = [cell for cell in cells(record.get("chapter", chapter)) if all(line in cell for line in lines)]
            assert matching, f"{label}：没有一格同时含有 {lines}"
            assert any(line.startswith("assert ") for line in lines), f"{label}：写上核对它的那句 assert"
            assert re.search(r"^\s*assert ", matching[0], re.MULTILINE)
        else:
            assert re.match(r"(定义|还没有格核对)：.{4,}", record["why"]), f"{label}：说明为什么没有核对"
        assert record.get("missing", "还没有格核对：").startswith("还没有格核对：")


# —— 打印的文字 ——

@pytest.mark.parametrize("chapter", SOURCES)
def test_no_output_says_that_the_two_sides_differ(chapter):
    """“……一致：False”之类：核对不上，正文却照旧说对得上。"""
    says = re.compile(r"(?:一致|相同|不差|相等|吻合|没有变|跟着打乱|都是 1|在下降|还在)\S*\s*False")
    assert [line for line in printed(chapter).split("\n") if says.search(line)] == []


# —— 引用的数 ——

def numbers_in(text: str) -> list[str]:
    return re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)


@pytest.mark.parametrize("chapter", SOURCES)
def test_quoted_numbers_agree_with_the_outputs(chapter):
    """text 是正文里的一段，output 是一个正则，在这一章打印的文字里找到的各组数，依次等于 text 里的数。

    which 只取 text 里的第几个数；打印的数先乘上 scale。
    """
    for claim in CLAIMS["numbers"].get(chapter, []):
        assert claim["text"] in prose(chapter), f"正文里没有这一段了：{claim['text']}"
        found = re.search(claim["output"], printed(chapter), re.DOTALL)
        assert found, f"打印的文字里找不到 {claim['output']}"
        quoted = [number.replace(",", "") for number in numbers_in(claim["text"])]
        quoted = [quoted[i] for i in claim["which"]] if "which" in claim else quoted
        groups = [group.replace(",", "") for group in found.groups()]
        assert len(quoted) == len(groups), claim
        for stated, computed in zip(quoted, groups, strict=True):
            digits = len(stated.partition(".")[2])
            # 正文可以少写几位，但必须是四舍五入的结果
            value = float(computed) * claim.get("scale", 1)
            assert abs(float(stated) - value) <= 0.5 * 10**-digits + 1e-9, (claim["text"], stated, computed)


@pytest.mark.parametrize("chapter", SOURCES)
def test_every_percentage_has_a_source(chapter):
    """正文里的每个百分数，都在某一条 numbers 或 elsewhere 的文字里。"""
    covered = [claim["text"] for claim in CLAIMS["numbers"].get(chapter, [])]
    covered += [claim["text"] for claim in CLAIMS["elsewhere"].get(chapter, [])]
    text = prose(chapter)
    for piece in covered:
        text = text.replace(piece, "")
    left = [text[max(0, m.start() - 20): m.end() + 5].replace("\n", " ") for m in PERCENT.finditer(text)]
    assert left == [], "这些百分数没有写明出处：请在 tests/text/claims.yml 里添上"


@pytest.mark.parametrize("chapter", SOURCES)
def test_numbers_from_elsewhere_are_still_there(chapter):
    """elsewhere：正文里的一段，与它的出处（文献的键、模型的名字，或一句理由）。模型卡里的数与 evaluation.json 核对。"""
    for claim in CLAIMS["elsewhere"].get(chapter, []):
        assert claim["text"] in prose(chapter), f"正文里没有这一段了：{claim['text']}"
        if "card" in claim:
            card = (ROOT / "models" / claim["card"] / "README.md").read_text(encoding="utf-8")
            given = set(numbers_in(card))
            missing = [number for number in numbers_in(claim["text"]) if number not in given]
            assert missing == [], f"{claim['card']} 的模型卡里没有这些数：{missing}（{claim['text']}）"
        elif re.fullmatch(r"[a-z]+\d{4}[a-z0-9]+", claim["source"]):
            assert claim["source"] in BIBLIOGRAPHY, f"references.bib 里没有 {claim['source']}"
            assert claim["source"] in source_text(chapter), f"这一章没有引用 {claim['source']}"
        else:
            assert len(claim["source"]) >= 4, claim


# —— 提到的章节 ——

SECTION = re.compile(r"(?<![\d.])(\d+(?:\.\d+)+)\s?节")


@pytest.mark.parametrize("path", [*CHAPTERS, ROOT / "index.md"], ids=lambda path: path.stem)
def test_mentioned_sections_exist(path):
    """“3.6.5 节”之类：那一章已经写了，就要真有这一节。"""
    headings = {found[0] for pages in PAGES.values() for _, title, _ in pages if (found := re.match(r"[\d.]+\d", title))}
    written = {number.split(".")[0] for number in headings}
    mentioned = SECTION.findall(path.read_text(encoding="utf-8"))
    assert [n for n in mentioned if n.split(".")[0] in written and n not in headings] == []
