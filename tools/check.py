"""只查一章：执行它（没有过时就不执行），建网站，再运行与它有关的测试。写作时用，几分钟就好。

用法：make check CHAPTER=03        或 .venv/bin/python tools/check.py 03
"""

import subprocess
import sys
from pathlib import Path

from executed import BookError, bring_up_to_date
from execution import ROOT

PYTHON = str(ROOT / ".venv/bin/python")


def find_chapter(wanted: str) -> Path:
    """由章号或文件名的开头找到一章的源文件。

    异常：
        BookError: 没有这样的章，或不止一章。
    """
    sources = sorted((ROOT / "chapters").glob("*.md"))
    found = [path for path in sources if path.stem.startswith(Path(wanted).stem.zfill(2))] if wanted else []
    if len(found) != 1:
        known = "、".join(path.stem for path in sources)
        raise BookError(f"请指明一章，例如 make check CHAPTER=03；收到的是 {wanted!r}。现有：{known}。")
    return found[0]


def main(arguments: list[str]) -> int:
    try:
        source = find_chapter(arguments[0] if arguments else "")
        print(*bring_up_to_date([source]), sep="\n")
    except BookError as error:
        print(error, file=sys.stderr)
        return 2
    # 别的章若已过时，用它们上次的输出：这里只查一章
    build = subprocess.run([str(ROOT / ".venv/bin/jupyter-book"), "build", "-W", "--keep-going", str(ROOT)], cwd=ROOT)
    if build.returncode:
        return build.returncode
    tests = [PYTHON, "-m", "pytest", "--rootdir=.", "-q", "-n", "2", "--dist", "loadgroup"]
    about = subprocess.run([*tests, "tests/text", "tests/notebooks", "tests/site", "-k", f"{source.stem} or text"], cwd=ROOT)
    return about.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
