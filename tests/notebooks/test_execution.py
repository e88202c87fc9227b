"""执行键：一章的输出由哪些东西决定，变了哪一样要重新执行，哪一样不必。"""

from pathlib import Path

import executed
import execution
import pytest
from nbclient.exceptions import DeadKernelError

FILES = {
    "book_utils/__init__.py": "", "book_utils/__init__.pyi": "from .a import one\nfrom .b import two\nfrom .world.c import three\n",
    "book_utils/a.py": "from .base import helper\none = 1\n", "book_utils/a.js": "1", "book_utils/base.py": 'helper = "used"\n',
    "book_utils/b.py": 'two = "unused"\n', "book_utils/world/__init__.py": "",
    "book_utils/world/c.py": "from ..base import helper\nthree = 3\n",
    "models/used/model.safetensors": "1", "models/used/README.md": "# 卡", "models/unused/model.safetensors": "1",
    "data/a.gz": "1", "recipes/train.py": "import common", "recipes/common.py": "", "recipes/other.py": "",
    "requirements.txt": "torch==1.0\n", "constraints.txt": "six==1.0\n",
}
CHAPTER = """\
---
jupytext: {text_representation: {extension: .md, format_name: myst}}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# 示例

```{code-cell} ipython3
from book_utils import one
script = "train.py"
```

正文。
"""


@pytest.fixture
def book(tmp_path) -> Path:
    """只有一章的小书，返回它的根目录。"""
    for name, text in FILES.items() | {"chapters/01-sample.md": CHAPTER}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def key(book: Path) -> str:
    execution.folder_digest.cache_clear()
    execution.pins_digest.cache_clear()
    return execution.execution_key(book / "chapters/01-sample.md", book)


def edit(book: Path, name: str, text: str) -> None:
    path = book / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text((path.read_text(encoding="utf-8") if path.exists() else "") + text, encoding="utf-8")


@pytest.mark.parametrize("name, text", [
    ("book_utils/a.py", "\nx = 1"), ("book_utils/base.py", "\nx = 1"), ("book_utils/a.js", "2"),
    ("models/used/model.safetensors", "2"), ("models/used/README.md", "改"), ("data/a.gz", "2"),
    ("recipes/train.py", "\nx = 1"), ("recipes/common.py", "\nx = 1"),
    ("requirements.txt", "numpy==2.0\n"), ("constraints.txt", "attrs==2.0\n"),
])
def test_whatever_the_outputs_come_from_changes_the_key(book, name, text):
    before = key(book)
    edit(book, name, text)
    assert key(book) != before


@pytest.mark.parametrize("name, text", [
    ("book_utils/b.py", "\nx = 1"), ("book_utils/new.py", "x = 1"), ("book_utils/__init__.pyi", "from .new import x\n"),
    ("book_utils/__pycache__/a.pyc", "1"), ("models/unused/model.safetensors", "2"), ("models/used/.cache", "1"),
    ("data/raw/train-images-idx3-ubyte", "1"), ("recipes/other.py", "x = 1"), ("requirements.txt", "# 注释\n"),
    ("chapters/01-sample.md", "改过的正文。\n"),
])
def test_what_the_outputs_do_not_come_from_keeps_the_key(book, name, text):
    before = key(book)
    edit(book, name, text)
    assert key(book) == before


@pytest.mark.parametrize("line, name", [
    ("from book_utils import two", "b.py"), ("import book_utils\nbook_utils.two", "b.py"),
    ("from book_utils.b import two", "b.py"), ("import book_utils.b", "b.py"), ("from book_utils import b", "b.py"),
    ("from book_utils import three", "c.py"), ("from book_utils.world.c import three", "c.py"),
])
def test_every_way_to_import_is_seen(book, line, name):
    assert name in {path.name for path in execution.used_book_files([line], book)}


def test_code_counts_in_the_key(book):
    before = key(book)
    path = book / "chapters/01-sample.md"
    path.write_text(CHAPTER.replace("one\n", "one as 1st\n".replace("1st", "first")), encoding="utf-8")
    assert key(book) != before


def test_result_is_kept_while_the_key_holds(book, monkeypatch):
    monkeypatch.setattr(executed, "fill_site_cache", lambda *_: None)
    source = book / "chapters/01-sample.md"
    source.write_text(CHAPTER.replace("from book_utils import one\n", "print(1 + 1)\n"), encoding="utf-8")
    assert executed.current_result(source, book) is None
    assert executed.bring_up_to_date([source], root=book)[0].startswith("01-sample：执行用了")
    assert executed.current_result(source, book).cells[0].outputs[0].text == "2\n"
    assert executed.bring_up_to_date([source], root=book) == []
    assert executed.bring_up_to_date([source], force=True, root=book) != []


def test_failing_cell_is_named_and_the_old_result_stays(book, monkeypatch):
    monkeypatch.setattr(executed, "fill_site_cache", lambda *_: None)
    source = book / "chapters/01-sample.md"
    source.write_text(CHAPTER.replace("from book_utils import one\n", "print(1)\n"), encoding="utf-8")
    executed.bring_up_to_date([source], root=book)
    old = executed.executed_path(source, book).read_bytes()
    source.write_text(CHAPTER.replace("from book_utils import one\n", "1 / 0\n"), encoding="utf-8")
    with pytest.raises(executed.BookError, match="(?s)01-sample.md：执行出错.*ZeroDivisionError"):
        executed.bring_up_to_date([source], root=book)
    assert executed.executed_path(source, book).read_bytes() == old


def test_dead_kernel_is_reported(book, monkeypatch):
    def die(*_):
        raise DeadKernelError("Kernel died")

    monkeypatch.setattr(executed, "run_cells", die)
    with pytest.raises(executed.BookError, match="01-sample.md：执行出错"):
        executed.bring_up_to_date([book / "chapters/01-sample.md"], root=book)
