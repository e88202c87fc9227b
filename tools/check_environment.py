"""命令行的环境自检：缺包、Python 太旧时也能运行。

用法：python tools/check_environment.py      有要处理的项目时，退出码是 1

自检的内容在 book_utils/environment.py。这里不能直接 import book_utils：它的 __init__.py 会导入 PyTorch 等包，
而缺的也许正是它们。所以先放一个没有内容、只指明文件夹的 book_utils 占住位置，再从中导入 environment 这一个模块。
"""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_main():
    """返回 book_utils.environment 的 main，不执行 book_utils/__init__.py。"""
    package = types.ModuleType("book_utils")
    package.__path__ = [str(ROOT / "book_utils")]
    sys.modules["book_utils"] = package
    from book_utils.environment import main
    return main


if __name__ == "__main__":
    sys.exit(load_main()())
