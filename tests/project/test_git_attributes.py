"""用 core.autocrlf=true 克隆（Windows 上 git 的默认设置），每个文件仍逐字节不变，随书模型核对得过，脚本能运行。"""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT

from book_utils.checksums import verify_model

MODEL = "models/mnist-ddpm"
COPIED = [
    ".gitattributes", "Makefile", "tools/setup.sh", ".ci/run", "README.md", "requirements.txt", "package-lock.json",
    "_static/figures/hub-map.svg", "_static/figures/space-app.png", "data/MNIST/raw/t10k-labels-idx1-ubyte.gz",
]


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "core.safecrlf=false"]
    return subprocess.check_output(["git", *settings, *arguments], cwd=folder, encoding="utf-8", stderr=subprocess.STDOUT)


def clone(folder: Path, attributes: bool) -> tuple[Path, list[str]]:
    """造一个只有几个文件的仓库，再以 CRLF 克隆；返回克隆与其中的文件。"""
    origin, copy = folder / "origin", folder / "copy"
    names = [*COPIED, *(path.relative_to(ROOT).as_posix() for path in (ROOT / MODEL).rglob("*") if path.is_file())]
    if not attributes:
        names.remove(".gitattributes")
    for name in names:
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, origin / name)
    git(origin, "init", "--quiet")
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "-m", "全部")
    git(folder, "clone", "--quiet", "--config", "core.autocrlf=true", str(origin), str(copy))
    return copy, names


def test_clone_with_crlf_is_byte_for_byte_the_same(tmp_path):
    copy, names = clone(tmp_path, attributes=True)
    assert [name for name in names if (copy / name).read_bytes() != (ROOT / name).read_bytes()] == []
    verify_model(copy / MODEL)
    subprocess.run(["sh", "-n", "tools/setup.sh"], cwd=copy, check=True)


def test_without_the_attributes_it_would_not_be(tmp_path):
    """没有 .gitattributes 时真的会坏：上一项测试不是白做；报错也说得出缘故。"""
    copy, _ = clone(tmp_path, attributes=False)
    assert b"\r\n" in (copy / "tools/setup.sh").read_bytes()
    with pytest.raises(ValueError, match="CRLF.*core.autocrlf false.*git checkout -- " + MODEL):
        verify_model(copy / MODEL)


def test_every_tracked_text_file_has_lf():
    if not (ROOT / ".git").exists():
        pytest.skip("不是 git 仓库")
    lines = git(ROOT, "ls-files", "--eol").splitlines()
    assert [line for line in lines if line.split()[0] in ("i/crlf", "i/mixed")] == []
