"""各测试共用的路径、网站与浏览器。"""

import sys

import pytest
from support.paths import ROOT

# 让测试能 import book_utils、tools 里的脚本、配方与扩展，不论从哪个文件夹启动 pytest
for folder in (ROOT / "_ext", ROOT / "recipes", ROOT / "tools", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


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
