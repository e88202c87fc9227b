"""正文里的断言不会悄悄变假：公式、引用的数、提到的章节，都与一处可以核对的东西拴在一起。

“重新生成笔记本再提交”会把错误连同输出一起记下来，比较输出就发现不了。所以：
- 每个带标签的公式记在 claims.yml 里，连同核对它的那一格；公式一改，就要回去看那一格还核对不核对得上；
- 正文引用的百分数，要么与某一格打印的数相同（numbers），要么写明出自哪里（elsewhere）；
- 提到的“3.6.5 节”“第六章”要真有。
"""

import re
from functools import cache

import notebooks
import pytest
import yaml
from support.paths import ROOT
from support.prose import CHAPTERS, PAGES, prose_lines

CLAIMS = yaml.safe_load((ROOT / "tests/text/claims.yml").read_text(encoding="utf-8"))
SOURCES = {path.stem: path for path in notebooks.chapter_sources()}
EQUATION = re.compile(r"```\{math\}\n:label: ([\w-]+)\n(.*?)\n```", re.DOTALL)
PERCENT = re.compile(r"\d+(?:\.\d+)?\s?%")


@cache
def source_text(chapter: str) -> str:
    return SOURCES[chapter].read_text(encoding="utf-8")


@cache
def prose(chapter: str) -> str:
    return "\n".join(prose_lines(source_text(chapter)))


@cache
def cells(chapter: str) -> list[str]:
    return re.findall(r"```\{code-cell\}[^\n]*\n(.*?)\n```", source_text(chapter), re.DOTALL)


@cache
def printed(chapter: str) -> str:
    """这一章打印的全部文字。"""
    notebook = notebooks.read_notebook(SOURCES[chapter].with_suffix(".ipynb"))
    texts = []
    for cell in notebooks.code_cells(notebook):
        for output in cell.outputs:
            texts.append(output.get("text", "") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(texts)


def compact(tex: str) -> str:
    return re.sub(r"\s+", "", tex)


# —— 公式 ——

@pytest.mark.parametrize("chapter", SOURCES)
def test_every_labelled_equation_is_on_record(chapter):
    found = {label: compact(tex) for label, tex in EQUATION.findall(source_text(chapter))}
    recorded = CLAIMS["formulas"].get(chapter, {})
    assert set(found) == set(recorded), "公式有增减：请在 tests/text/claims.yml 里添上或删去，并写明哪一格核对它"
    changed = [label for label, tex in found.items() if compact(recorded[label]["tex"]) != tex]
    assert changed == [], "这些公式改过：请看核对它们的那一格是否还对得上，再改 claims.yml"


@pytest.mark.parametrize("chapter", SOURCES)
def test_equations_are_checked_by_a_cell(chapter):
    """checked_by 是核对它的那一格里的一句代码；只是定义、无可核对的，写 why。"""
    for label, record in CLAIMS["formulas"].get(chapter, {}).items():
        if "checked_by" in record:
            matching = [cell for cell in cells(chapter) if record["checked_by"] in cell]
            assert matching, f"{label}：没有一格含有 {record['checked_by']!r}"
            assert any("assert" in cell for cell in matching), f"{label}：那一格没有 assert"
        else:
            assert len(record["why"]) >= 4, label


# —— 引用的数 ——

def numbers_in(text: str) -> list[str]:
    return re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)


@pytest.mark.parametrize("chapter", SOURCES)
def test_quoted_numbers_agree_with_the_outputs(chapter):
    """text 是正文里的一段，output 是一个正则，在这一章打印的文字里找到的各组数，依次等于 text 里的数。"""
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
            assert abs(float(stated) - float(computed)) <= 0.5 * 10**-digits + 1e-9, (claim["text"], stated, computed)


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
            missing = [number for number in numbers_in(claim["text"]) if number not in card]
            assert missing == [], f"{claim['card']} 的模型卡里没有这些数：{missing}（{claim['text']}）"
        else:
            assert len(claim["source"]) >= 2, claim


# —— 提到的章节 ——

SECTION = re.compile(r"(?<![\d.])(\d+(?:\.\d+)+)\s?节")


@pytest.mark.parametrize("path", [*CHAPTERS, ROOT / "index.md"], ids=lambda path: path.stem)
def test_mentioned_sections_exist(path):
    """“3.6.5 节”之类：那一章已经写了，就要真有这一节。"""
    headings = {found[0] for pages in PAGES.values() for _, title, _ in pages if (found := re.match(r"[\d.]+\d", title))}
    written = {number.split(".")[0] for number in headings}
    mentioned = SECTION.findall(path.read_text(encoding="utf-8"))
    assert [n for n in mentioned if n.split(".")[0] in written and n not in headings] == []
