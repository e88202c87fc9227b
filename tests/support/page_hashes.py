"""哪些页的检查上次已经通过，而且页面从那以后没有变过。

浏览器里的检查占测试的大半时间，而作者一次多半只改一章。一页由它的 HTML、网站共用的样式与脚本、以及测试代码决定；
三者的摘要与上次通过时相同，就不必再查。记录在 _build/page-checks.json，不进 Git；CI 里（环境变量 CI）与 FULL=1 时不用它。
"""

import hashlib
import json
import os
from functools import cache
from pathlib import Path

import pytest

from support.browser import SITE
from support.paths import ROOT

RECORD = ROOT / "_build" / "page-checks"


@cache
def shared_digest() -> str:
    """各页共用的东西：网站的样式、脚本、字体与搜索索引，以及测试自己的代码。"""
    files = [
        *(path for path in SITE.rglob("*") if path.is_file() and path.suffix in (".css", ".js", ".woff", ".woff2")),
        *(path for path in (ROOT / "tests").rglob("*") if path.suffix in (".py", ".yml")),
    ]
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(path.relative_to(ROOT).as_posix().encode())
        total.update(path.read_bytes())
    return total.hexdigest()


@cache
def page_digest(page: str) -> str:
    """一页的摘要：它的 HTML、它用到的图，以及各页共用的东西。"""
    content = (SITE / page).read_bytes()
    total = hashlib.sha256(shared_digest().encode() + content)
    for path in sorted((SITE / "_images").glob("*")):
        if path.name.encode() in content:
            total.update(path.read_bytes())
    return total.hexdigest()


class PageHashes:
    """已经通过的检查 → 当时页面的摘要。每个进程写自己的文件，并行时不会互相覆盖。"""

    KEY = pytest.StashKey["PageHashes"]()

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.seen: dict[str, str] = {}
        if folder is not None:
            for path in sorted(folder.glob("*.json")):
                self.seen |= json.loads(path.read_text(encoding="utf-8"))

    @classmethod
    def from_environment(cls) -> "PageHashes":
        careful = os.environ.get("CI") or os.environ.get("FULL")
        return cls(None if careful else RECORD)

    def passed(self, check: str, page: str) -> bool:
        return self.folder is not None and (SITE / page).is_file() and self.seen.get(check) == page_digest(page)

    def record(self, check: str, page: str) -> None:
        if self.folder is None:
            return
        self.seen[check] = page_digest(page)
        self.folder.mkdir(parents=True, exist_ok=True)
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        (self.folder / f"{worker}.json").write_text(json.dumps(self.seen), encoding="utf-8")
