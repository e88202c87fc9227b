"""改写网页的规则（_ext/rewrite.py）：用得上的换掉；一处也用不上的，构建停下并说出是哪一条。"""

import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

CONF = """\
import sys
sys.path[:0] = [{extensions!r}, {here!r}]
extensions = ["sample_rules"]
"""
RULES = """\
from rewrite import Rule, add_rules

def setup(app):
    add_rules(app, {rules})
"""
SWAP = 'Rule("换掉甲", "甲+", "乙")'


@pytest.fixture
def book(tmp_path) -> Path:
    """一个两页的小网站，返回它的文件夹。"""
    (tmp_path / "conf.py").write_text(CONF.format(extensions=str(ROOT / "_ext"), here=str(tmp_path)), encoding="utf-8")
    (tmp_path / "index.rst").write_text("首页\n====\n\n甲甲甲\n\n.. toctree::\n\n   other\n", encoding="utf-8")
    (tmp_path / "other.rst").write_text("另一页\n======\n\n丙\n", encoding="utf-8")
    return tmp_path


def build(book: Path, *rules: str) -> subprocess.CompletedProcess:
    (book / "sample_rules.py").write_text(RULES.format(rules=", ".join(rules)), encoding="utf-8")
    command = [sys.executable, "-B", "-m", "sphinx", "-b", "html", str(book), str(book / "html"), "-d", str(book / "doctrees")]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


def page(book: Path, name: str) -> str:
    return (book / "html" / f"{name}.html").read_text(encoding="utf-8")


def test_rules_are_applied_in_order(book):
    result = build(book, SWAP, 'Rule("换掉乙", "<p>乙</p>", lambda found: "<p>丁</p>")')
    assert result.returncode == 0, result.stderr
    assert "<p>丁</p>" in page(book, "index") and "甲" not in page(book, "index")
    assert "<p>丙</p>" in page(book, "other")


def test_a_rule_without_a_match_stops_the_build_with_its_name(book):
    result = build(book, SWAP, 'Rule("再也没有的东西", "戊", "己")')
    assert result.returncode != 0
    assert "再也没有的东西" in result.stderr and "换掉甲" not in result.stderr


def test_rebuilding_one_page_remembers_the_others(book):
    assert build(book, SWAP).returncode == 0
    (book / "other.rst").write_text("另一页\n======\n\n改过的丙\n", encoding="utf-8")
    result = build(book, SWAP)
    assert result.returncode == 0, result.stderr
    assert "改过的丙" in page(book, "other") and "<p>乙</p>" in page(book, "index")


def test_the_last_match_gone_is_noticed_when_only_that_page_is_rebuilt(book):
    assert build(book, SWAP).returncode == 0
    text = (book / "index.rst").read_text(encoding="utf-8")
    (book / "index.rst").write_text(text.replace("甲甲甲", "没有了"), encoding="utf-8")
    result = build(book, SWAP)
    assert result.returncode != 0 and "换掉甲" in result.stderr


def test_changed_rules_redo_every_page(book):
    assert build(book, SWAP).returncode == 0
    result = build(book, 'Rule("换掉甲", "甲+", "庚")', 'Rule("换掉丙", "丙", "辛")')
    assert result.returncode == 0, result.stderr
    assert "<p>庚</p>" in page(book, "index") and "<p>辛</p>" in page(book, "other")


def test_two_rules_cannot_share_a_name(book):
    result = build(book, SWAP, SWAP)
    assert result.returncode != 0 and "换掉甲" in result.stderr
