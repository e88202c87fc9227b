"""目录：tests/toc.yml 记下的部分、章、节一个不少、次序不变，每一节都有内容。"""

import re
import unicodedata
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
TOC = yaml.safe_load((ROOT / "tests" / "toc.yml").read_text(encoding="utf-8"))


def normalize(title: str) -> str:
    """全角半角、大小写、空格的差别不算，“主题-说明”与“主题：说明”算相同，末尾的冒号也不算。"""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", title).casefold()).replace("-", ":").rstrip(":")


def headings(path: Path) -> list[tuple[int, str, str]]:
    """返回 [(级别, 标题, 标题下的正文)]；正文到下一个同级或更高级的标题为止。"""
    text = re.sub(r"\A---\n.*?\n---\n", lambda m: "\n" * m[0].count("\n"), path.read_text(encoding="utf-8"), flags=re.S)
    lines = text.split("\n")
    tokens = MarkdownIt("commonmark").parse(text)
    found = [
        (int(token.tag[1]), inline.content, token.map[0], token.map[1])
        for token, inline in zip(tokens, tokens[1:]) if token.type == "heading_open"
    ]
    result = []
    for index, (level, title, _start, body_start) in enumerate(found):
        end = next((start for other, _, start, _ in found[index + 1:] if other <= level), len(lines))
        result.append((level, title, "\n".join(lines[body_start:end])))
    return result


def substance(body: str) -> str:
    """正文里去掉标题、标签和空白，剩下的才算内容。"""
    return re.sub(r"^(#+ .*|\(.*\)=|%.*|\+\+\+.*)$|\s", "", body, flags=re.M)


PAGES = {path: headings(path) for path in sorted((ROOT / "chapters").glob("*.md"))}
WRITTEN = {                             # 已写出的章：标题 → 文件
    normalize(title): path for path, found in PAGES.items() for level, title, _ in found if level == 1
}
CHAPTERS = [(part["title"], chapter) for part in TOC["parts"] for chapter in part["chapters"]]
EXISTING = [(part, chapter) for part, chapter in CHAPTERS if normalize(chapter["title"]) in WRITTEN]


def test_some_chapter_exists():
    assert EXISTING, "chapters/ 里没有一章的标题与 tests/toc.yml 相符"


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
