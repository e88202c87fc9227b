"""站内链接：每个网址和锚点都在，放到任何子路径下、离线看都能用。"""

from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from support.browser import SITE, built_pages

BASE = "http://site/"       # 只用来把相对网址算成绝对的，不会真的访问


class _Page(HTMLParser):
    """收集一页里的 id、链接，以及浏览器打开这一页就会去取的文件。"""

    def __init__(self, name: str):
        super().__init__()
        self.ids, self.links, self.files = [], [], []
        self.feed((SITE / name).read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") != "canonical":
            self.files.append(values["href"])
        elif "src" in values:
            self.files.append(values["src"])


PAGES = {name: _Page(name) for name in built_pages()}


@pytest.fixture(params=PAGES)
def name(request):
    return request.param


def test_internal_links_exist(name):
    """相对的网址所指的文件都在；带 # 的，那一页里要有这个 id。"""
    missing = []
    for link in PAGES[name].links + PAGES[name].files:
        target = urlsplit(urljoin(BASE + name, link))
        if target.netloc != "site":
            continue
        path, fragment = unquote(target.path).lstrip("/"), unquote(target.fragment)
        if not (SITE / path).is_file() or (fragment and path in PAGES and fragment not in PAGES[path].ids):
            missing.append(link)
    assert missing == [], f"{name} 里有失效的链接"


def test_internal_links_are_relative(name):
    """以“/”开头的网址，网站一放进子路径就失效。"""
    assert [link for link in PAGES[name].links + PAGES[name].files if link.startswith("/")] == []


def test_files_come_from_own_site_and_links_are_secure(name):
    assert [f for f in PAGES[name].files if urlsplit(f).scheme not in ("", "data")] == [], "去别的网站取文件"
    assert [link for link in PAGES[name].links if urlsplit(link).scheme not in ("", "https", "mailto")] == []


def test_ids_are_unique(name):
    ids = PAGES[name].ids
    assert sorted({i for i in ids if ids.count(i) > 1}) == [], f"{name} 里有重复的 id，指向它的链接会落错地方"


def test_files_for_hosting():
    """GitHub Pages 见到 .nojekyll 才不丢掉 _static；404.html 不能依赖别的文件，因为不知道它会出现在哪一级。"""
    assert (SITE / ".nojekyll").is_file()
    page = _Page("404.html")
    assert page.files == [] and page.links == ["/"]
