"""安装脚本：每一种失败都有看得懂的说明，半途而废的安装不会被当成装好了。"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions
from pathlib import Path

import pytest
import repair_venv
from packaging.specifiers import SpecifierSet
from support.paths import ROOT

from book_utils.environment import OLDEST_PYTHON


@pytest.fixture
def book(tmp_path) -> Path:
    """一个只有安装脚本和空的 requirements.txt 的小书；文件夹名里特意带空格。"""
    folder = tmp_path / "a book"
    (folder / "tools").mkdir(parents=True)
    for name in ("Makefile", "tools/setup.sh", "tools/repair_venv.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "requirements.txt").write_text("", encoding="utf-8")
    (folder / "constraints.txt").write_text("", encoding="utf-8")
    # npm 的包当作已经装好；它装不上时的说明见 test_npm_failure_suggests_a_mirror
    (folder / "node_modules").mkdir()
    for name in ("package.json", "package-lock.json", "node_modules/.package-lock.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def fake_python(folder: Path, script: str) -> Path:
    """造一个名叫 python3 的脚本，返回它所在的文件夹。"""
    folder.mkdir()
    (folder / "python3").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / "python3").chmod(0o755)
    return folder


def make_setup(book: Path, **environment: str) -> subprocess.CompletedProcess:
    """运行 make setup；不等 pip 反复重试。"""
    settings = {"BOOK_MIN_DISK_GB": "0", "PIP_RETRIES": "0", "PYTHON_BOOTSTRAP": sys.executable}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PIP_", "PYTHON"))}
    return subprocess.run(
        ["make", "--no-print-directory", "setup"], cwd=book, env=clean | settings | environment,
        capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL,
    )


def is_ready(book: Path) -> bool:
    return (book / ".venv" / ".ready").exists()


def assert_fails(result: subprocess.CompletedProcess, book: Path, *words: str) -> None:
    assert result.returncode != 0
    assert "安装没有完成" in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert not is_ready(book)


def test_old_python_is_named_with_its_version(book, tmp_path):
    old = fake_python(tmp_path / "bin", "echo 3.9.2")
    result = make_setup(book, PYTHON_BOOTSTRAP="python3", PATH=f"{old}:{os.environ['PATH']}")
    assert_fails(result, book, "3.9.2", "3.11", "PYTHON_BOOTSTRAP")
    assert not (book / ".venv").exists()


def test_missing_python_is_named(book):
    assert_fails(make_setup(book, PYTHON_BOOTSTRAP="python3.99"), book, "找不到 python3.99", "3.11")


def test_missing_ensurepip_names_the_debian_package(book, tmp_path):
    without = fake_python(
        tmp_path / "bin", f'case "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"'
    )
    assert_fails(make_setup(book, PYTHON_BOOTSTRAP=str(without / "python3")), book, "python3-venv")
    assert not (book / ".venv").exists()


def test_low_disk_gives_found_and_needed(book):
    result = make_setup(book, BOOK_MIN_DISK_GB="999999")
    assert_fails(result, book, "磁盘空间不够", "999999 GB")
    assert re.search(r"还有 \d+ GB", result.stderr)
    assert not (book / ".venv").exists()


def test_failing_download_suggests_a_mirror_and_rerun_continues(book):
    # 9 是 discard 端口，没有人听：立即拒绝连接。第一次连 pip 自己都下载不到
    unreachable = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull}
    (book / "requirements.txt").write_text("six==1.17.0\n", encoding="utf-8")
    result = make_setup(book, **unreachable)
    assert_fails(result, book, "PIP_INDEX_URL=https://", "再运行一次")

    # 再运行一次：虚拟环境沿用，不从头建；装的东西不需要下载时就能走到底
    (book / "requirements.txt").write_text("", encoding="utf-8")
    marker = book / ".venv" / "kept"
    marker.touch()
    pinned = subprocess.check_output([book / ".venv/bin/python", "-m", "pip", "--version"], encoding="utf-8").split()[1]
    script = book / "tools" / "setup.sh"
    script.write_text(re.sub(r"(?m)^PIP_VERSION=.*$", f"PIP_VERSION={pinned}", script.read_text(encoding="utf-8")), encoding="utf-8")
    result = make_setup(book, **unreachable)
    assert result.returncode == 0, result.stderr
    assert is_ready(book) and marker.exists()
    assert not (book / ".venv" / ".tmp").exists()

    # 装好之后，任何文件夹里都能 import 仓库根目录下的包
    (book / "some_module.py").write_text("here = __file__", encoding="utf-8")
    found = subprocess.check_output(
        [book / ".venv/bin/python", "-c", "import some_module; print(some_module.here)"], cwd="/", encoding="utf-8"
    )
    assert Path(found.strip()).samefile(book / "some_module.py")

    # 没有改动：什么也不做；requirements.txt 变了：重新安装，失败时旧标记也作废
    assert "建立" not in make_setup(book, **unreachable).stdout
    (book / "requirements.txt").write_text("six==1.17.0\n", encoding="utf-8")
    os.utime(book / "requirements.txt", (2**32, 2**32))
    assert_fails(make_setup(book, **unreachable), book, "PIP_INDEX_URL")


def test_half_made_environment_is_rebuilt(book):
    (book / ".venv" / "bin").mkdir(parents=True)
    (book / ".venv" / "bin" / "python").symlink_to("/nonexistent/python3.11")
    result = make_setup(book, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_CONFIG_FILE=os.devnull)
    assert "建立虚拟环境" in result.stdout
    assert (book / ".venv" / "bin" / "pip").exists()
    assert not is_ready(book)


# —— 装到一半的包 ——

@pytest.fixture
def dist_info(tmp_path) -> Path:
    (tmp_path / "pkg.py").write_text("x = 1\n", encoding="utf-8")
    folder = tmp_path / "pkg-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: pkg\n", encoding="utf-8")
    (folder / "RECORD").write_text(
        "pkg.py,sha256=x,6\npkg-1.0.dist-info/METADATA,sha256=x,10\npkg-1.0.dist-info/RECORD,,\n__pycache__/pkg.pyc,,\n", encoding="utf-8"
    )
    return folder


def test_complete_package_is_kept(dist_info):
    assert repair_venv.is_complete(dist_info)


@pytest.mark.parametrize("damage", [
    lambda info: (info / "RECORD").unlink(),
    lambda info: (info / "METADATA").unlink(),
    lambda info: (info.parent / "pkg.py").unlink(),
    lambda info: (info.parent / "pkg.py").write_text("x", encoding="utf-8"),
], ids=["没有清单", "没有元数据", "缺文件", "文件被截断"])
def test_incomplete_package_is_found(dist_info, damage):
    damage(dist_info)
    assert not repair_venv.is_complete(dist_info)


def test_this_environment_is_complete():
    incomplete = [
        folder.name for folder in Path(sysconfig.get_path("purelib")).glob("*.dist-info")
        if not repair_venv.is_complete(folder)
    ]
    assert incomplete == []


# —— 版本 ——

def pins(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if line and line[0] not in "#-")


def test_every_requirement_is_pinned_and_agrees_with_constraints():
    wanted, all_pins = pins(ROOT / "requirements.txt"), pins(ROOT / "constraints.txt")
    assert {name: all_pins.get(name) for name in wanted} == wanted


def test_the_promised_python_can_install_every_pin():
    """README、安装脚本和自检都说 3.11 就够：锁定的每个包都要装得上 3.11 的第一版。"""
    promised = ".".join(map(str, OLDEST_PYTHON)) + ".0"
    for name in ("README.md", "tools/setup.sh", "chapters/02-hugging-face.md"):
        assert f"Python {promised[:-2]} 或更新的版本" in (ROOT / name).read_text(encoding="utf-8"), name
    too_new = {}
    for name in pins(ROOT / "constraints.txt") | pins(ROOT / "requirements.txt"):
        try:
            wanted = metadata(name).get("Requires-Python")
        except PackageNotFoundError:            # 别的系统才有的包
            continue
        if wanted and promised not in SpecifierSet(wanted):
            too_new[name] = wanted
    assert too_new == {}, f"这些包装不上 Python {promised}"


def test_conflicting_pins_are_not_blamed_on_the_network(book):
    (book / "requirements.txt").write_text("six==1.17.0\n", encoding="utf-8")
    (book / "constraints.txt").write_text("six==1.16.0\n", encoding="utf-8")
    script = book / "tools" / "setup.sh"
    text = script.read_text(encoding="utf-8")
    bundled = subprocess.check_output([sys.executable, "-c", "import ensurepip; print(ensurepip.version())"], encoding="utf-8")
    script.write_text(re.sub(r"(?m)^PIP_VERSION=.*$", f"PIP_VERSION={bundled.strip()}", text), encoding="utf-8")
    # 不联网：包就在旁边的文件夹里
    wheels = book / "wheels"
    wheels.mkdir()
    for version in ("1.16.0", "1.17.0"):
        with zipfile.ZipFile(wheels / f"six-{version}-py3-none-any.whl", "w") as wheel:
            info = f"six-{version}.dist-info"
            wheel.writestr("six.py", "")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: six\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    result = make_setup(book, PIP_NO_INDEX="1", PIP_FIND_LINKS=wheels.as_uri(), PIP_CONFIG_FILE=os.devnull)
    assert_fails(result, book, "ResolutionImpossible", "不是网络的问题", "PYTHON_BOOTSTRAP=python3.12")
    assert "PIP_INDEX_URL" not in result.stderr


def imported_modules() -> set[str]:
    """仓库里所有 Python 文件直接导入的顶层模块，不含标准库和本书自己的。"""
    files = [path for name in ("book_utils", "recipes", "tools", "_ext", "tests") for path in (ROOT / name).rglob("*.py")]
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    own = {path.stem for path in files} | {"book_utils", "tools", "recipes", "support"}
    return found - own - set(sys.stdlib_module_names)


def test_every_direct_import_is_a_requirement():
    providers, wanted = packages_distributions(), pins(ROOT / "requirements.txt")
    missing = {
        module: providers.get(module) for module in imported_modules()
        if not any(name.lower().replace("_", "-") in wanted for name in providers.get(module, []))
    }
    assert missing == {}, "这些模块的包没有写进 requirements.txt"


def test_binder_has_the_same_versions_built_for_cpu():
    book, binder = pins(ROOT / "requirements.txt"), pins(ROOT / "binder" / "requirements.txt")
    assert {name: version.removesuffix("+cpu") for name, version in binder.items()} == {n: book[n] for n in binder}
    assert binder["torch"].endswith("+cpu") and binder["torchvision"].endswith("+cpu")


# —— npm ——

def test_every_npm_package_is_locked_by_hash():
    lock = json.loads((ROOT / "package-lock.json").read_text("utf-8"))["packages"]
    assert lock[""]["dependencies"] == json.loads((ROOT / "package.json").read_text("utf-8"))["dependencies"]
    assert all(package["integrity"].startswith("sha512-") for name, package in lock.items() if name)
    # 锁文件里不写下载地址，换镜像才有用
    assert not any("resolved" in package for package in lock.values())


def test_npm_failure_suggests_a_mirror(tmp_path):
    for name in ("package.json", "package-lock.json"):
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"), encoding="utf-8")
    code = f"import sys, npm_packages, pathlib; sys.exit(npm_packages.main(pathlib.Path({str(tmp_path)!r})))"
    settings = {"npm_config_registry": "http://127.0.0.1:9/", "npm_config_fetch_retries": "0",
                "npm_config_cache": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT / "tools")}
    result = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, encoding="utf-8")
    assert result.returncode == 1
    assert "安装没有完成" in result.stderr and "npm_config_registry=https://" in result.stderr
    assert not (tmp_path / "node_modules/.package-lock.json").exists()


# —— make ——

def test_help_is_the_default_and_lists_every_target():
    text = subprocess.check_output(["make", "--no-print-directory"], cwd=ROOT, encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split()
    assert phony == [line.split()[1] for line in text.splitlines() if line.startswith("  make ")]
