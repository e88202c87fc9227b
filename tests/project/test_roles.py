"""{sec} 的链接（_ext/roles.py）：第十章以后也认得；指向写好的章里没有的节，构建停下；没有写的章只是文字。"""

import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

CONF = """\
import sys
sys.path.insert(0, {extensions!r})
extensions = ["roles"]
root_doc = "index"
"""
CHAPTER = "第十二章 远处\n============\n\n12.3 近处\n---------\n\n{text}\n"


@pytest.fixture
def book(tmp_path) -> Path:
    """只有第十二章的小书，返回它的文件夹。"""
    (tmp_path / "conf.py").write_text(CONF.format(extensions=str(ROOT / "_ext")), encoding="utf-8")
    (tmp_path / "index.rst").write_text("首页\n====\n\n.. toctree::\n\n   chapters/12-far\n", encoding="utf-8")
    (tmp_path / "chapters").mkdir()
    return tmp_path


def build(book: Path, text: str) -> tuple[subprocess.CompletedProcess, str]:
    """写进第十二章，建网站，返回（结果，那一页）。"""
    (book / "chapters/12-far.rst").write_text(CHAPTER.format(text=text), encoding="utf-8")
    command = [sys.executable, "-B", "-m", "sphinx", "-b", "html", str(book), str(book / "html")]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    page = book / "html/chapters/12-far.html"
    return result, page.read_text(encoding="utf-8") if page.exists() else ""


def test_sections_and_chapters_beyond_ten_are_linked(book):
    result, page = build(book, "见 :sec:`12.3 节` 与 :sec:`第十二章`。")
    assert result.returncode == 0, result.stderr
    assert page.count('<a class="reference internal"') >= 2
    assert ">12.3 节</a>" in page.replace("<span>", "").replace("</span>", "")


def test_a_missing_section_of_a_written_chapter_stops_the_build(book):
    result, _ = build(book, "见 :sec:`12.9 节`。")
    assert result.returncode != 0
    assert "12.9" in result.stderr and "第 12 章里却没有这一节" in result.stderr


@pytest.mark.parametrize("text", ["13.1 节", "第十三章", "120.1 节", "2026 年"])
def test_a_chapter_not_yet_written_stays_text(book, text):
    result, page = build(book, f"见 :sec:`{text}`。")
    assert result.returncode == 0, result.stderr
    assert text in page and f"{text}</a>" not in page.replace("</span>", "")
