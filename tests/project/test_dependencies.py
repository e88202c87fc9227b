"""要哪些包只由代码里的 import 得出：几处清单都与它相符，没有漏列，也没有多列。"""

import re

import dependencies
import notebooks
import pytest
from dependencies import normalized, packages_of, pinned_packages
from support.paths import ROOT

from book_utils import environment

SOURCES = notebooks.chapter_sources()


def wanted_by_chapters() -> set[str]:
    """各章合起来要的包（标准写法）。"""
    return {normalized(name) for source in SOURCES for name in dependencies.chapter_packages(source).values()}


def test_each_chapter_wants_what_it_imports():
    by_chapter = {source.stem[:2]: set(dependencies.chapter_packages(source)) for source in SOURCES}
    assert "datasets" in by_chapter["04"], "第四章自己导入的"
    assert "accelerate" in by_chapter["04"], "它运行的训练脚本要的"
    assert "tokenizers" in by_chapter["02"] and "tokenizers" not in by_chapter["03"]
    assert all({"torch", "mplfonts", "PIL"} <= modules for modules in by_chapter.values()), "book_utils 要的"


def test_requirements_list_exactly_the_packages_of_the_chapters():
    section = {normalized(name) for name in environment.chapter_pins()}
    assert section == wanted_by_chapters()


def test_binder_installs_the_packages_of_the_chapters():
    binder = set(pinned_packages(ROOT / "binder/requirements.txt"))
    assert binder - {"jupyterlab"} == wanted_by_chapters()


def test_without_requirements_the_check_asks_for_what_book_utils_imports():
    """只拿到 book_utils 文件夹的人，自检要看的就是它自己要的包；连 Hub 才用的两个不算。"""
    needed = {normalized(name) for name in packages_of(dependencies.book_modules()).values()}
    assert needed - {"httpx", "socksio"} <= {normalized(name) for name in environment.CORE_PACKAGES}


def test_an_import_without_a_pin_is_an_error(tmp_path):
    (tmp_path / "requirements.txt").write_text("torch==1.0\n", encoding="utf-8")
    assert packages_of({"torch"}, tmp_path) == {"torch": "torch"}
    with pytest.raises(dependencies.DependencyError, match="PIL.*pillow.*requirements.txt"):
        packages_of({"PIL"}, tmp_path)
    with pytest.raises(dependencies.DependencyError, match="nosuch.*环境里没有"):
        packages_of({"nosuch"}, tmp_path)


def test_continuous_integration_and_set_up_read_the_same_files():
    for name in ("tools/setup.sh", ".github/workflows/book.yml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"\b[\w.-]+==\d", text.replace("pip==", "")), f"{name} 里另写了版本"
