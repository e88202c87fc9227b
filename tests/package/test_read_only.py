"""只读的检出：仓库里一个字节都写不了，MNIST 照样取得出来，自检说的与实际一致。"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from book_utils import checksums, environment, mnist_root
from book_utils.checksums import MNIST_MD5, unpack_folder

# 超级用户什么都写得了：放下这两项特权，才和普通用户一样受文件权限的约束
DROP = "-dac_override,-dac_read_search"
CODE = """
import json
from pathlib import Path
from book_utils.environment import check_data
raw = Path({root!r}) / "MNIST" / "raw"
check = check_data(raw)
result = {{"check": [check.状态, check.现状]}}
try:
    from book_utils.data import mnist_root, mnist_tensors
    result["root"] = mnist_root({root!r})
    result["again"] = mnist_root({root!r})
    images, labels = mnist_tensors(train=False, data_root={root!r})
    result["shape"], result["first"] = list(images.shape), labels[:3].tolist()
except Exception as error:
    result["error"] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(result))
"""


@pytest.fixture
def read_only(tmp_path):
    """一个只读的 data 文件夹，里面只有压缩文件。"""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST_MD5:
        shutil.copy(ROOT / "data" / "MNIST" / "raw" / f"{name}.gz", raw)
    raw.chmod(0o555)
    yield tmp_path / "data"
    raw.chmod(0o755)


def ask(root: Path, **variables: str) -> dict:
    command = [sys.executable, "-c", CODE.format(root=str(root))]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("以超级用户运行，又没有 setpriv（util-linux）来放下特权")
        command = ["setpriv", f"--bounding-set={DROP}", f"--inh-caps={DROP}", *command]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
                          capture_output=True, encoding="utf-8", cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_unpacked_elsewhere_and_the_check_says_so(read_only, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    found = ask(read_only, XDG_CACHE_HOME=str(cache))
    place = cache / "diffusion-book"
    assert found["root"] == found["again"] == str(place), found
    assert found["shape"] == [10_000, 1, 28, 28] and found["first"] == [7, 2, 1]
    assert found["check"][0] == "正常" and f"会解压到 {place}" in found["check"][1]
    assert sorted(path.name for path in (read_only / "MNIST" / "raw").iterdir()) == sorted(f"{n}.gz" for n in MNIST_MD5)


def test_no_writable_place_is_said_in_chinese_by_both(read_only, tmp_path, monkeypatch):
    """缓存与临时文件夹也不可写：自检与 mnist_root 说同一件事。"""
    monkeypatch.setattr(checksums.os, "access", lambda *arguments: False)
    raw = read_only / "MNIST" / "raw"
    with pytest.raises(PermissionError, match="没有可写的文件夹来解压 MNIST，试过：" + str(raw)):
        mnist_root(read_only)
    check = environment.check_data(raw)
    assert check.状态 == "有误" and "没有可写的文件夹" in check.现状 and "XDG_CACHE_HOME" in check.怎样解决


def test_an_unpacked_read_only_checkout_is_used_as_it_is(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST_MD5:
        (raw / name).touch()
    raw.chmod(0o555)
    assert unpack_folder(raw) == raw
    raw.chmod(0o755)
