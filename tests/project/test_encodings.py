"""文字文件一律写明编码：在 GBK、Latin-1 的系统上，Python 默认的编码读不了本书的中文。

先逐个看源码里的调用，再真的换一种语言环境运行自检与配方的读写。
"""

import ast
import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

FOLDERS = ("book_utils", "recipes", "tools", "_ext", "spaces", "tests")
BINARY_OPENERS = ("Image", "gzip", "os", "wave")         # 这些模块的 open 不是打开文字文件


def text_call_without_encoding(call: ast.Call) -> bool:
    """这个调用读写文字，却没有写明编码。"""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords or None in keywords:      # **选项 里有没有，看不出来
        return False
    mode = keywords.get("mode")
    if name == "read_text":
        return not call.args
    if name == "write_text":
        return len(call.args) < 2
    if name in ("run", "Popen", "check_output", "check_call"):
        wanted = [keywords.get(key) for key in ("text", "universal_newlines")]
        return any(isinstance(value, ast.Constant) and value.value is True for value in wanted)
    if name == "NamedTemporaryFile":
        return isinstance(mode, ast.Constant) and "b" not in mode.value
    if name not in ("open", "fdopen"):
        return False
    is_method = isinstance(function, ast.Attribute) and name == "open"
    if is_method and getattr(function.value, "id", "") in BINARY_OPENERS:
        return False
    if is_method and getattr(function.value, "id", "") not in ("io", "tokenize"):
        position = 0                                    # Path.open(mode)
    else:
        position = 1                                    # open(file, mode)
    if mode is None and len(call.args) > position:
        mode = call.args[position]
    return mode is None or (isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value)


def offences(source: str) -> list[int]:
    """源码里这样的调用所在的行。"""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return sorted(call.lineno for call in calls if text_call_without_encoding(call))


def test_every_text_file_is_read_and_written_as_utf8():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in offences(path.read_text(encoding="utf-8"))]
    assert found == [], "请写明 encoding=\"utf-8\"（子进程的 text=True 也换成它）"


@pytest.mark.parametrize("code, caught", [
    ("path.read_text()", True), ("path.read_text('utf-8')", False), ("path.read_text(encoding='utf-8')", False),
    ("path.write_text(text)", True), ("path.write_text(text, 'utf-8')", False),
    ("open(path)", True), ("open(path, 'w')", True), ("open(path, mode='a')", True), ("open(path, 'rb')", False),
    ("path.open()", True), ("path.open('wb')", False), ("Image.open(path)", False), ("gzip.open(path)", False),
    ("os.fdopen(handle, 'w')", True), ("os.fdopen(handle, 'wb')", False),
    ("subprocess.run(command, text=True)", True), ("subprocess.run(command)", False),
    ("subprocess.run(command, encoding='utf-8')", False), ("tempfile.NamedTemporaryFile('wb')", False),
])
def test_the_search_finds_what_it_should(code, caught):
    assert bool(offences(code)) == caught


# —— 真的换一种语言环境 ——

@pytest.fixture(scope="module", params=[("zh_CN", "GBK"), ("en_US", "ISO-8859-1")], ids=["GBK", "Latin-1"])
def other_locale(request, tmp_path_factory) -> dict[str, str]:
    """在临时文件夹里造一种语言环境，返回用它的环境变量。"""
    language, charmap = request.param
    definitions = Path("/usr/share/i18n")
    if not shutil.which("localedef") or not (definitions / "charmaps" / f"{charmap}.gz").is_file():
        pytest.skip("这台机器上没有 localedef 或字符集的定义（Debian 的 locales 包）")
    folder = tmp_path_factory.mktemp("locale")
    # 有的 localedef 不会自己解压字符集
    plain = folder / charmap
    plain.write_bytes(gzip.decompress((definitions / "charmaps" / f"{charmap}.gz").read_bytes()))
    name = f"{language}.{charmap}"
    subprocess.run(["localedef", "-c", "-i", language, "-f", plain, folder / name], check=False, capture_output=True)
    clean = {key: value for key, value in os.environ.items()
             if not key.startswith(("LC_", "PYTHON", "BOOK_", "HF_")) and key not in ("LANG", "LANGUAGE")}
    return clean | {"LOCPATH": str(folder), "LC_ALL": name, "OMP_NUM_THREADS": "1"}


def python(environment: dict[str, str], *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True)


def test_the_locale_is_really_another_one(other_locale):
    done = python(other_locale, "-c", "import locale; print(locale.getpreferredencoding(False))")
    assert done.stdout.decode().strip().lower() in ("gbk", "iso-8859-1")


def test_self_check_works_in_another_locale(other_locale):
    done = python(other_locale, "tools/check_environment.py")
    # 终端装得下汉字就照终端的编码；装不下时改用 UTF-8
    text = done.stdout.decode("gbk" if "GBK" in other_locale["LC_ALL"] else "utf-8")
    assert done.returncode == 0 and done.stderr == b"", done.stderr.decode("utf-8", "replace")
    assert "没有要处理的，可以开始了" in text and "没能检查" not in text


def test_recipes_read_and_write_in_another_locale(other_locale, tmp_path):
    """存模型、写训练记录、续写日志，再核对。"""
    script = tmp_path / "task.py"
    script.write_text("""
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from book_utils import History
from book_utils.checksums import verify_model
sys.path.insert(0, "recipes")
import common
from train_unconditional import open_log

folder = Path(sys.argv[1])
weights = lambda target: save_file({"w": torch.zeros(1)}, Path(target) / "model.safetensors")
common.save_model(folder, weights, History([0.5], 1.0), "cpu", "python 配方.py")
assert "配方" in json.loads((folder / "training.json").read_text(encoding="utf-8"))["command"]
verify_model(folder)
log = folder / "日志.jsonl"
log.write_text("第一行\\n第二行\\n", encoding="utf-8")
with open_log(log, 1) as file:
    file.write("新的一行\\n")
assert log.read_text(encoding="utf-8") == "第一行\\n新的一行\\n"
""", encoding="utf-8")
    # 文件夹用西文名：Latin-1 的系统上，文件名本来就写不了汉字；日志的名字在那里换成西文
    if "8859" in other_locale["LC_ALL"]:
        script.write_text(script.read_text(encoding="utf-8").replace("日志.jsonl", "log.jsonl"), encoding="utf-8")
    (tmp_path / "model").mkdir()
    done = python(other_locale | {"PYTHONPATH": str(ROOT)}, str(script), str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
