"""各测试共用的路径、网站与浏览器；几个进程一起跑时怎样分工。"""

import os
import sys

import pytest
from support.paths import ROOT

# 几个进程一起跑（make test 用 -n），每个进程的 PyTorch 只用一个线程，免得互相争抢；要在导入 torch 之前
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# 让测试能 import book_utils、tools 里的脚本、配方与扩展，不论从哪个文件夹启动 pytest
for folder in (ROOT / "_ext", ROOT / "recipes", ROOT / "tools", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# 开发者的机器上设有代理时，测试与本机上的小服务器之间照样直连
from book_utils.environment import exempt_loopback  # noqa: E402  先把仓库加入路径

exempt_loopback()

# 费时的先开始，最后才不会只剩一个进程在忙
FIRST = ["models", "notebooks", "project", "site"]


def pytest_collection_modifyitems(items):
    """分组：一组里的检查由同一个进程做完。逐页的检查一页一组，共用打开着的那一页；其余一个文件一组，共用它的夹具。

    量快慢的都在一组，一个接一个，不会两个同时量。
    """
    def folder_order(item) -> int:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        return FIRST.index(folder) if folder in FIRST else len(FIRST)

    items.sort(key=folder_order)
    for item in items:
        group = str(item.path.relative_to(ROOT))
        opened = getattr(item, "callspec", None) and item.callspec.params.get("opened")
        if opened:
            group = str(opened)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def root():
    """仓库根目录。"""
    return ROOT


# 用到时才导入 browser：不看网站的测试不必装 Playwright
@pytest.fixture(scope="session")
def site():
    """建好的网站在回环地址上的网址。"""
    from support.browser import serve

    with serve() as url:
        yield url


@pytest.fixture(scope="session")
def browser():
    """无界面的 Chromium，一个进程里的测试共用。"""
    from support.browser import chromium

    with chromium() as opened:
        yield opened
