"""别的版本（Colab 的、最新的）：清单齐全，毛病查得出来，章里不写只有一套版本才认的调用。"""

import ast
import re
import textwrap

import nbformat
import other_versions
import pytest
from support.paths import ROOT

from book_utils import environment
from book_utils.environment import release

PINS = {name.lower().replace("_", "-"): version for name, version in environment.chapter_pins().items()}


def colab() -> dict[str, str]:
    """requirements-colab.txt 里的包 → 版本；不写版本的是空串。"""
    pairs = (line.partition("==") for line in other_versions.wanted_packages("colab"))
    return {name.lower().replace("_", "-"): version for name, _, version in pairs}


# —— 清单 ——

def test_colab_has_every_package_of_the_chapters_none_newer():
    listed = colab()
    assert {name for name in PINS if name not in listed} <= {"socksio"}, "requirements-colab.txt 里缺这些包"
    newer = {name: version for name, version in listed.items()
             if version and name in PINS and release(version) > release(PINS[name])}
    assert newer == {}, "Colab 的版本比书里的还新了：该升级 requirements.txt"
    assert release(listed["ipywidgets"])[0] == 7 and release(listed["ipython"])[0] == 7     # 滑块的两种显示办法都试到


def test_colab_list_names_its_source():
    text = (ROOT / "requirements-colab.txt").read_text(encoding="utf-8")
    assert "https://github.com/googlecolab/backend-info" in text and re.search(r"20\d\d 年", text)


def test_newest_has_no_versions():
    wanted = other_versions.wanted_packages("newest")
    assert set(PINS) | set(other_versions.RUNNER) == {name.lower().replace("_", "-") for name in wanted}
    assert not any("=" in name for name in wanted)


@pytest.mark.parametrize("call, words", [
    (lambda: other_versions.wanted_packages("oldest"), "没有“oldest”这一套版本，只有 colab 和 newest"),
    (lambda: other_versions.chapters(["99-nothing"]), "没有这样的章：99-nothing。有笔记本的章：01-principles"),
])
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_bad_arguments_on_the_command_line(capsys):
    assert other_versions.main([]) == other_versions.main(["colab", "99-nothing"]) == 2
    assert "只有 colab 和 newest" in capsys.readouterr().err


def test_environments_are_not_committed():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {".venv-colab/", ".venv-newest/"} <= set(ignored)


# —— 执行 ——

def test_errors_and_dead_sliders_are_reported_cell_by_cell(tmp_path, capsys):
    """一格出错，后面的照样执行；活的滑块不算错，只剩文字或 HTML 的滑块算。"""
    slider = "Slider(lambda v: Image.new('L', (4, 4)), {'值': [0.0, 1.0]}, alt='图')"
    cells = [
        "from PIL import Image\nfrom book_utils import Slider",
        "1 / 0",
        slider,
        "import os\nos.environ['BOOK_SLIDERS'] = 'static'",
        slider,
        "Slider._repr_mimebundle_ = property(lambda self: None)\n" + slider,
        "raise RuntimeError('有意的')",
        "assert 1 + 1 == 3, '不对'",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[6].metadata["tags"] = ["raises-exception"]
    # 提交时的输出不算数：执行过的才算
    notebook.cells[0].outputs = [nbformat.v4.new_output("error", ename="Old", evalue="以前的", traceback=[])]
    path = tmp_path / "01-sample.ipynb"
    nbformat.write(notebook, path)
    failed = other_versions.run_all([path], ROOT)
    lines = capsys.readouterr().out.splitlines()
    assert failed == 4 and lines[0].startswith("01-sample：4 处不对")
    assert "第 1 格（1 / 0）：ZeroDivisionError" in lines[1]
    assert "第 4 格" in lines[2] and "滑块不是活的，只有 text/html、text/plain" in lines[2]
    assert "第 5 格" in lines[3] and "滑块不是活的，只有 text/plain" in lines[3]
    assert "第 7 格" in lines[4] and "AssertionError: 不对" in lines[4]


# —— 只有一套版本才认的调用 ——

def python_blocks(text: str) -> list[str]:
    """一章里的代码格与 python 代码块，包括参考答案里的。"""
    return [textwrap.dedent(code) for code in re.findall(
        r"^ *`{3,}(?:\{code-cell\} ipython3|python)\n(?:---\n.*?\n---\n|(?::\w+:[^\n]*\n)*)(.*?)^ *`{3,}", text, re.M | re.S)]


def version_bound_calls(code: str) -> list[str]:
    """``from_pretrained(…, dtype=…)``：diffusers 0.39 叫 torch_dtype，写 dtype 会报错或被悄悄忽略；新版正相反。"""
    return [
        ast.unparse(node) for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained"
        and {"dtype", "torch_dtype"} & {keyword.arg for keyword in node.keywords}
    ]


def test_type_is_changed_by_to_not_by_a_keyword():
    found = {}
    for path in sorted((ROOT / "chapters").glob("*.md")):
        for block in python_blocks(path.read_text(encoding="utf-8")):
            try:
                found.setdefault(path.name, []).extend(version_bound_calls(block))
            except SyntaxError:
                pass                    # 只给人看的片段，如 DDPMPipeline.from_pretrained(…)
    for folder in ("book_utils", "recipes", "tools", "spaces"):
        for path in (ROOT / folder).rglob("*.py"):
            found[path.name] = version_bound_calls(path.read_text(encoding="utf-8"))
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_the_search_finds_what_it_should():
    assert version_bound_calls("a.from_pretrained(b, dtype=torch.float16)")
    assert version_bound_calls("x = A.from_pretrained(b, torch_dtype=c).unet")
    assert not version_bound_calls("a.from_pretrained(b).to(torch.float16)")
    chapter = (ROOT / "chapters/02-hugging-face.md").read_text(encoding="utf-8")
    blocks = python_blocks(chapter)
    assert len(blocks) > 40 and any("disk_offload(" in block for block in blocks)
