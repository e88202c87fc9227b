"""各测试共用的路径、网站与浏览器。"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# 让测试能 import book_utils 与 tools 里的脚本，不论从哪个文件夹启动 pytest
for folder in (ROOT, ROOT / "tools"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def root() -> Path:
    """仓库根目录。"""
    return ROOT


# 用到时才导入 browser：不看网站的测试不必装 Playwright
@pytest.fixture(scope="module")
def site():
    """建好的网站在回环地址上的网址。"""
    from browser import serve

    with serve() as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    """无界面的 Chromium，一个文件里的测试共用。"""
    from browser import chromium

    with chromium() as opened:
        yield opened
