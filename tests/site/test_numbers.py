"""网站上的编号就是写给笔记本用的编号（_build/numbers.json），没有图也没有执行时编出来的也一样。"""

import re
import shutil

import pytest
from numbering import book_numbers, read_numbers
from support.paths import ROOT

PAGES = sorted((ROOT / "_build/html/chapters").glob("*.html"))


def shown_numbers(html: str) -> dict[str, str]:
    """一页 HTML 里各个标签旁边印着的编号。"""
    found = {}
    for label, number in re.findall(r'<(?:figure|table)[^>]* id="([\w-]+)".*?class="caption-number">\S+ (\S+) <', html, re.S):
        found[label] = number
    for label, number in re.findall(r'id="equation-([\w-]+)">\s*<span class="eqno">\(([\d.]+)\)', html):
        found[label] = number
    return found


def test_the_site_shows_the_numbers_of_the_notebooks():
    assert PAGES, "请先运行 make book"
    shown = {}
    for page in PAGES:
        shown |= shown_numbers(page.read_text(encoding="utf-8"))
    numbers = book_numbers()
    wanted = {label: number for kind in ("figure", "table", "equation") for label, number in numbers[kind].items()}
    assert {"fig-mnist": "3.1", "tab-milestones": "1.2", "eq-corrupt": "3.1"}.items() <= shown.items()
    assert shown == wanted


@pytest.fixture
def copy(tmp_path):
    """书的一份副本，没有建过，也没有笔记本。"""
    for name in ("_config.yml", "_toc.yml", "references.bib", "package.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    for page in ROOT.glob("*.md"):
        shutil.copy(page, tmp_path / page.name)
    for name in ("_ext", "_static", "_extra", "spaces"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "chapters").mkdir()
    for source in (ROOT / "chapters").glob("*.md"):
        shutil.copy(source, tmp_path / "chapters" / source.name)
    return tmp_path


def test_a_clean_copy_gets_the_same_numbers(copy):
    assert read_numbers(copy) is None
    assert book_numbers(copy) == book_numbers()
    assert not (copy / "_build/html").exists() and not (copy / "_build/.jupyter_cache").exists()


def test_moving_a_figure_moves_its_number(copy):
    """只留第三章，添一幅图：它得到 3.1，原来的依次后移，式子的编号不变。"""
    (copy / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nparts:\n  - chapters:\n      - file: chapters/03-from-scratch\n", encoding="utf-8"
    )
    source = copy / "chapters" / "03-from-scratch.md"
    for other in set(source.parent.iterdir()) - {source}:
        other.unlink()
    text = source.read_text(encoding="utf-8")
    figure = "```{figure} ../_static/figures/basic-unet.svg\n:name: fig-added\n:alt: 图\n添上的一幅\n```\n\n"
    source.write_text(re.sub(r"^## ", figure + "## ", text, count=1, flags=re.M), encoding="utf-8")
    before, after = book_numbers(), book_numbers(copy)
    assert after["figure"]["fig-added"] == before["figure"]["fig-mnist"] == "3.1"
    assert after["figure"]["fig-mnist"] == "3.2"
    assert after["equation"] == {label: n for label, n in before["equation"].items() if n.startswith("3.")}
