"""全书的编号：图、表、式在网站上是几号，笔记本里也是几号。

编号由 Sphinx 做（_ext/book_numbers.py），写在 _build/numbers.json。源文件没有变，就用现成的；变了，或者是刚克隆的仓库，
就让 Sphinx 只读一遍各章，不执行代码，也不写网页，要几秒钟。
"""

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "_ext"))

from book_numbers import NUMBERS_FILE, sources_digest  # noqa: E402

Numbers = dict[str, dict[str, str]]      # 种类 → {标签: 编号}


class NumberingError(Exception):
    """Sphinx 没有能给全书编号。"""


def book_numbers(root: Path = ROOT) -> Numbers:
    """全书的编号，格式见 _ext/book_numbers.py；源文件变过就重新编。

    异常：
        NumberingError: Sphinx 读不懂某一章，附上它的报错。
    """
    return _numbers(root, sources_digest(root))


@cache
def _numbers(root: Path, sources: str) -> Numbers:
    found = read_numbers(root)
    if found is None or found["sources"] != sources:
        # 另起一个进程：Sphinx 会改动 docutils 的全局设置
        result = subprocess.run([sys.executable, __file__, str(root)], capture_output=True, encoding="utf-8")
        found = read_numbers(root)
        if result.returncode != 0 or found is None:
            raise NumberingError(f"没有编好全书的图、表、式。Sphinx 的报错：\n{result.stdout}{result.stderr}")
    return found


def read_numbers(root: Path) -> dict | None:
    """读入 _build/numbers.json；没有或读不懂时返回 None。"""
    try:
        return json.loads((root / NUMBERS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def count(root: Path) -> int:
    """让 Sphinx 读一遍各章，由 _ext/book_numbers.py 写出编号；返回退出码。"""
    from jupyter_book.config import get_final_config
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    config, _ = get_final_config(
        user_yaml=root / "_config.yml", sourcedir=root,
        cli_config={"external_toc_path": "_toc.yml", "latex_individualpages": False},
    )
    reader = ["book_numbers.read_without_running", {"extensions": config["myst_enable_extensions"]}, False]
    config |= {"nb_execution_mode": "off", "nb_custom_formats": {".md": reader}}
    with tempfile.TemporaryDirectory() as folder, patch_docutils(None), docutils_namespace():
        app = Sphinx(
            srcdir=root, confdir=None, outdir=Path(folder, "out"), doctreedir=Path(folder, "doctrees"),
            buildername="dummy", confoverrides=config, status=None, warning=None,
        )
        app.builder.read()
        list(app.env.check_dependents(app, set()))      # Sphinx 在这一步给图、表、式编号
        app.events.emit("env-check-consistency", app.env)
        return app.statuscode


if __name__ == "__main__":
    sys.exit(count(Path(sys.argv[1])))
