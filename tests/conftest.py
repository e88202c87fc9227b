"""各测试共用的路径与小工具。"""

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
