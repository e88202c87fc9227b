"""参考文献：写法齐全一致，没有重复，每一条都被引用，引用的都有。"""

import re
import unicodedata

import pytest
import yaml
from pybtex.database import Entry, parse_file
from pybtex.richtext import Text
from support.paths import ROOT

ENTRIES = parse_file(ROOT / "references.bib", bib_format="bibtex").entries
PAGES = [*ROOT.glob("*.md"), *(ROOT / "chapters").glob("*.md")]
CITED = {
    key.strip()
    for page in PAGES
    for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", page.read_text("utf-8"))
    for key in group.split(",")
}
VENUES = ("journal", "booktitle", "publisher", "institution", "school", "howpublished", "eprint")
LATER_ON_ARXIV = {"ho2021classifier"}       # 先在研讨会上发表，第二年才放到 arXiv
SHORT_NAMES = {"bfl": "blackforestlabs"}
ARXIV_TITLES = yaml.safe_load((ROOT / "tests/text/arxiv_titles.yml").read_text("utf-8"))


def plain(text: str) -> str:
    """去掉 LaTeX 的记号、大小写、音标和标点，用来比较。"""
    text = unicodedata.normalize("NFKD", str(Text.from_latex(text))).casefold()
    return re.sub(r"[^a-z0-9]", "", text)


def arxiv_number(entry: Entry) -> str | None:
    """arXiv 编号，不含版本；没有则为 None。"""
    text = entry.fields.get("eprint", "") + " " + entry.fields.get("url", "")
    match = re.search(r"(?:^|arxiv\.org/abs/)(\d{4}\.\d{4,5})", text)
    return match and match[1]


def test_there_are_enough_entries():
    assert len(ENTRIES) >= 60


def entry_is_complete(key):
    entry = ENTRIES[key]
    fields = entry.fields
    assert entry.persons.get("author"), "缺作者"
    assert fields.get("title"), "缺题目"
    assert re.fullmatch(r"\d{4}", fields.get("year", "")), "缺年份"
    assert 1900 <= int(fields["year"]) <= 2026
    assert any(fields.get(name) for name in VENUES), f"缺发表的地方，应有其一：{VENUES}"
    assert arxiv_number(entry) or fields.get("doi") or fields.get("url") or fields.get("isbn"), "缺 arXiv 编号、DOI 或网址"


def authors_are_named(key):
    """作者列全；很长的名单至少列十位，再写 others。"""
    authors = ENTRIES[key].persons["author"]
    names = [plain(str(person)) for person in authors]
    assert all(person.last_names for person in authors)
    assert "etal" not in names
    if "others" in names:
        assert names.index("others") == len(names) - 1 >= 10


def identifiers_are_well_formed(key):
    entry = ENTRIES[key]
    fields = entry.fields
    if "doi" in fields:
        assert re.fullmatch(r"10\.\d{4,9}/\S+", fields["doi"]), "DOI 只写 10. 开头的编号，不写网址"
    if "eprint" in fields:
        assert fields.get("archiveprefix") == "arXiv" and arxiv_number(entry) == fields["eprint"]
    if "url" in fields:
        assert fields["url"].startswith("https://")
    number = arxiv_number(entry)
    if number:
        submitted, month = 2000 + int(number[:2]), int(number[2:4])
        assert 1 <= month <= 12
        assert submitted <= int(fields["year"]) or key in LATER_ON_ARXIV, f"arXiv 编号 {number} 是 {submitted} 年的，比发表还晚"


def arxiv_number_belongs_to_this_title(key):
    entry = ENTRIES[key]
    number = arxiv_number(entry)
    if number:
        assert number in ARXIV_TITLES, f"arXiv 编号 {number} 不在 tests/text/arxiv_titles.yml 里"
        recorded = ARXIV_TITLES[number]
        assert plain(entry.fields["title"]) == plain(recorded), f"arXiv:{number} 是《{recorded}》"


def key_is_author_year_word(key):
    """键是作者的姓或机构名、年份、题目里的词，全小写。"""
    entry = ENTRIES[key]
    match = re.fullmatch(r"([a-z]+)(\d{4})([a-z0-9]+)", key)
    assert match and match[2] == entry.fields["year"]
    name = SHORT_NAMES.get(match[1], match[1])
    leading = entry.persons["author"][:2]           # 机构在前、人名在后的，取哪一个都行
    assert any(name in plain(" ".join(person.prelast_names + person.last_names)) for person in leading)
    assert match[3] in plain(entry.fields["title"].replace("++", "pp")), "键的最后一段应取自题目"


def entry_is_cited(key):
    assert key in CITED, f"没有一页引用 {key}"


CHECKS = [
    entry_is_complete, authors_are_named, identifiers_are_well_formed, arxiv_number_belongs_to_this_title,
    key_is_author_year_word, entry_is_cited,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_entry(check):
    """每一项检查逐条查完，一次列出所有不合的条目。"""
    bad = []
    for key in ENTRIES:
        try:
            check(key)
        except AssertionError as error:
            bad.append(f"{key}：{str(error).splitlines()[0]}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("value", ["title", "doi", "arxiv"])
def test_no_duplicates(value):
    seen = {}
    for key, entry in ENTRIES.items():
        found = {
            "title": plain(entry.fields["title"]),
            "doi": entry.fields.get("doi", "").casefold(),
            "arxiv": arxiv_number(entry),
        }[value]
        if found:
            assert found not in seen, f"{key} 与 {seen[found]} 的 {value} 相同"
            seen[found] = key


def test_recorded_arxiv_numbers_are_used():
    assert sorted(set(ARXIV_TITLES) - {arxiv_number(entry) for entry in ENTRIES.values()}) == []
    assert len(set(map(plain, ARXIV_TITLES.values()))) == len(ARXIV_TITLES) > 100


def test_citations_exist():
    assert sorted(CITED - set(ENTRIES)) == []
