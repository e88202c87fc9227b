"""目录：tests/text/toc.yml 记下的部分、章、节一个不少、次序不变，每一节都有内容。"""

import re
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT
from support.prose import PAGES, headings, normalize, substance

TOC = yaml.safe_load((ROOT / "tests/text/toc.yml").read_text(encoding="utf-8"))


WRITTEN = {                             # 已写出的章：标题 → 文件
    normalize(title): path for path, found in PAGES.items() for level, title, _ in found if level == 1
}
CHAPTERS = [(part["title"], chapter) for part in TOC["parts"] for chapter in part["chapters"]]
EXISTING = [(part, chapter) for part, chapter in CHAPTERS if normalize(chapter["title"]) in WRITTEN]


def test_some_chapter_exists():
    assert EXISTING, "chapters/ 里没有一章的标题与 tests/text/toc.yml 相符"


def test_every_numbered_chapter_file_is_in_the_toc():
    titles = {normalize(chapter["title"]) for _, chapter in CHAPTERS}
    for path, found in PAGES.items():
        if re.match(r"\d\d-", path.name):
            first = found[0]
            assert first[0] == 1 and normalize(first[1]) in titles, f"{path.name} 的标题 {first[1]!r} 不在目录里"


@pytest.mark.parametrize("chapter", [c for _, c in EXISTING], ids=lambda chapter: chapter["title"])
def test_sections_are_complete_and_in_order(chapter):
    found = PAGES[WRITTEN[normalize(chapter["title"])]]
    titles = [normalize(title) for _, title, _ in found]
    position = 0
    for section in chapter.get("sections", []):
        wanted = normalize(section)
        assert wanted in titles[position:], f"缺少“{section}”，或它的次序不对"
        position = titles.index(wanted, position) + 1
        assert substance(found[position - 1][2]), f"“{section}”下面没有内容"


@pytest.mark.parametrize("chapter", [c for _, c in EXISTING], ids=lambda chapter: chapter["title"])
def test_heading_levels_follow_section_numbers(chapter):
    for level, title, _ in PAGES[WRITTEN[normalize(chapter["title"])]]:
        number = re.match(r"(\d+(?:\.\d+)+)\s", title)
        if number:
            assert level == number[1].count(".") + 1, f"“{title}”应是 {number[1].count('.') + 1} 级标题"


@pytest.mark.parametrize("path", list(PAGES), ids=lambda path: path.stem)
def test_every_heading_has_content(path):
    assert [title for _, title, body in PAGES[path] if not substance(body)] == []


def test_site_lists_parts_and_chapters_in_order():
    site = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [
        (normalize(part.get("caption", "")), Path(chapter["file"]).stem)
        for part in site["parts"] for chapter in part["chapters"]
    ]
    wanted = [(normalize(part), WRITTEN[normalize(chapter["title"])].stem) for part, chapter in EXISTING]
    assert [pair for pair in listed if pair in wanted] == wanted


def test_glossary_terms_are_defined():
    text = (ROOT / "glossary.md").read_text(encoding="utf-8")
    for term in TOC["glossary"]:
        assert term["zh"] in text and term["en"].casefold() in text.casefold(), f"术语表里缺少 {term['zh']}（{term['en']}）"


@pytest.mark.parametrize("title", [entry["title"] for entry in TOC["front"]])
def test_front_matter_exists(title):
    found = [heading for path in sorted(ROOT.glob("*.md")) for heading in headings(path)]
    assert any(normalize(heading) == normalize(title) and substance(body) for _, heading, body in found)
