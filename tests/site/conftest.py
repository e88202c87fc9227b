"""网站的每一页打开一次，各文件里只看不改的检查共用；没有变过的页可以跳过。"""

import pytest
from support.browser import built_pages, visit
from support.page_hashes import PageHashes


@pytest.fixture(scope="session", params=built_pages())
def opened(request, site, browser):
    """逐页打开（电脑宽度、亮色）。改了宽度或配色的检查用 support.browser 的 as_phone、as_dark，用完会还原。"""
    with visit(browser, site, request.param) as record:
        yield record


def pytest_configure(config):
    config.stash[PageHashes.KEY] = PageHashes.from_environment()


def pytest_collection_modifyitems(config, items):
    """逐页的检查里，页面自上次通过以来没有变过的，跳过（CI 与 FULL=1 从不跳过）。"""
    hashes = config.stash[PageHashes.KEY]
    for item in items:
        page = page_of(item)
        if page and hashes.passed(item.nodeid, page):
            item.add_marker(pytest.mark.skip(reason="这一页自上次通过以来没有变过；要全部重查：FULL=1"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """通过的记下来；失败的留下一张页面的截图，免得只能凭文字猜。"""
    outcome = yield
    report = outcome.get_result()
    page = page_of(item)
    if call.when != "call":
        return
    if page and report.passed:
        item.config.stash[PageHashes.KEY].record(item.nodeid, page)
    if report.failed:
        shown = item.funcargs.get("opened")
        if shown is not None:
            report.sections.append(("页面截图", shown.screenshot(item.name)))


def page_of(item) -> str | None:
    """一项检查看的是哪一页；不是逐页的检查为 None。"""
    parameters = getattr(item, "callspec", None)
    if parameters is None:
        return None
    value = parameters.params.get("opened", parameters.params.get("name"))
    return value if isinstance(value, str) and value.endswith(".html") else None
