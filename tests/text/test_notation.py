"""符号表与正文的公式对得上：用到的符号都在表里，表里的符号真的出现在它指的那一节，一字多义的都列了出来。"""

import re
from collections import defaultdict
from dataclasses import dataclass

import pytest
from support.formulas import formulas, symbols
from support.paths import ROOT
from support.prose import CHAPTERS, numbered_sections

NOTATION = (ROOT / "notation.md").read_text("utf-8")
SECTIONS = numbered_sections()
# 这些符号占着好几行，意思却是同一个：带不同下标、写在不同的式子里
ONE_MEANING = {r"\mathbf{x}", r"\boldsymbol{\epsilon}", r"\bar{\alpha}", "t", r"\mathcal{N}", r"\nabla", r"\mathbb{E}"}


@dataclass
class Row:
    symbols: list[str]      # 第一列每个公式打头的符号
    places: list[str]       # 第二列指的章节号

    @property
    def chapters(self) -> set[str]:
        return {place.split(".")[0] for place in self.places}


def table_rows() -> list[Row]:
    found = []
    for line in NOTATION.split("\n"):
        if not line.startswith("| $"):
            continue
        first, meaning = re.split(r" \| ", line.strip("| "))[:2]
        leading = [symbols(piece)[:1] for piece in re.findall(r"\$([^$]+)\$", first)]
        places = re.findall(r"\{sec\}`([\d.]+) 节`", meaning)
        assert places, f"没有写在哪一节：{line}"
        found.append(Row([symbol for piece in leading for symbol in piece], places))
    return found


ROWS = table_rows()
LISTED = {symbol for row in ROWS for symbol in row.symbols}
part = NOTATION.split("## 一个字母，几个意思")[1].split("\n## ")[0]
AMBIGUOUS = {
    symbol for line in part.split("\n") if line.startswith("- $")
    for piece in re.findall(r"\$([^$]+)\$", line.split("：")[0]) for symbol in symbols(piece)
}


def used_in(text: str) -> dict[str, str]:
    """用到的符号 → 用到它的一个公式。"""
    return {symbol: formula for formula in formulas(text) for symbol in symbols(formula)}


def without_hat(symbol: str) -> str:
    """戴帽子的是预测值，一维时不用黑体：都算作原来的符号。"""
    return re.sub(r"^\\hat\{(.*)\}$", r"\1", symbol)


def test_symbols_are_read_from_tex():
    text = "\n".join([
        "---", "a: $q$", "---", "```{code-cell} ipython3", "$z$", "```", "```{math}", ":label: eq-x",
        r"\bar\alpha_t \\[4pt] \mathrm{KL}", "```", "````{dropdown} 答案", r"式 $\hat{\mathbf{x}}_0$，`$y$`", "```python",
        "$w$", "```", "再看 $r_t$", "````",
    ])
    assert [symbols(formula) for formula in formulas(text)] == [[r"\bar{\alpha}", "t"], [r"\hat{\mathbf{x}}"], ["r", "t"]]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_symbol_is_in_the_table(path):
    used = used_in(path.read_text("utf-8"))
    missing = {s: f.strip() for s, f in used.items() if s not in LISTED and without_hat(s) not in LISTED}
    assert missing == {}, "请在 notation.md 里补上"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_ambiguous_symbols_are_explained_for_this_chapter(path):
    """有几个意思的字母，用到它的每一章都要有一行说明它在这一章里的意思。"""
    chapter = str(int(path.name[:2]))
    explained = {symbol for row in ROWS if chapter in row.chapters for symbol in row.symbols}
    used = used_in(path.read_text("utf-8"))
    assert {s: used[s].strip() for s in AMBIGUOUS if s in used and s not in explained} == {}


def test_symbols_occur_where_the_table_says():
    wrong = []
    for row in ROWS:
        written = [place for place in row.places if place in SECTIONS]
        used = set().union(*(used_in(SECTIONS[place]) for place in written))
        if written:
            wrong += [f"{symbol} 不在 {'、'.join(written)}" for symbol in row.symbols if symbol not in used]
        wrong += [
            f"{row.symbols} 指的 {p} 里一个也没有"
            for p in written if row.symbols and not set(row.symbols) & set(used_in(SECTIONS[p]))
        ]
    assert wrong == []


def test_letters_with_several_meanings_are_all_listed():
    """在表里占两行以上的字母，除了 ONE_MEANING，恰好是“一个字母，几个意思”里列的那些。"""
    rows = defaultdict(int)
    for row in ROWS:
        for symbol in set(row.symbols):
            rows[symbol] += 1
    several = {symbol for symbol, count in rows.items() if count > 1}
    assert several - ONE_MEANING == AMBIGUOUS
