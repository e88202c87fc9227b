"""随书文件的校验和：只用标准库，没有装好 PyTorch 时自检（environment.py）也能核对。"""

import hashlib
import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS_ROOT = ROOT / "models"
DATA_ROOT = ROOT / "data"
CHECKSUMS = "SHA256SUMS"        # 与 sha256sum 命令同一格式，可用 sha256sum -c 核对

# MNIST 的四个原始文件（解压后）的 MD5，与官方文件一致
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def unpack_folder(raw: Path) -> Path:
    """MNIST 解压到哪里：``raw`` 自己；它不可写（只读的检出）时，是用户的缓存文件夹，再不行是临时文件夹。

    参数：
        raw: ``data/MNIST/raw``，其中是四个 ``.gz``。
    返回：
        已经解压齐了的文件夹，或第一个可写的文件夹（路径以 ``MNIST/raw`` 结尾）。
    异常：
        PermissionError: 都不可写。
    来源：第 3.2.2 节。
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    private = Path(tempfile.gettempdir()) / f"diffusion-book-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    places = [raw, cache / "diffusion-book" / "MNIST" / "raw", private / "MNIST" / "raw"]
    for place in places:
        if all((place / name).is_file() for name in MNIST_MD5):
            return place
        existing = next((folder for folder in (place, *place.parents) if folder.exists()), place)
        if os.access(existing, os.W_OK | os.X_OK):
            return place
    raise PermissionError(f"没有可写的文件夹来解压 MNIST，试过：{'、'.join(map(str, places))}。")


def verify_model(folder: Path) -> None:
    """核对一个随书模型的文件夹：``SHA256SUMS`` 里列出的文件都在，且没有变过。

    参数：
        folder: ``models`` 下的一个文件夹，其中有 ``SHA256SUMS``。
    异常：
        FileNotFoundError: 缺少文件。
        ValueError: 文件已损坏或被改动。
    来源：第 3.4.2 节。
    """
    for line in (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines():
        expected, file_name = line.split(maxsplit=1)
        path = folder / file_name
        if not path.is_file():
            raise FileNotFoundError(f"随书模型 {folder.name!r} 缺少文件 {path}，请用 git checkout 恢复它。")
        content = path.read_bytes()
        actual = hashlib.sha256(content).hexdigest()
        if actual != expected and hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest() == expected:
            raise ValueError(
                f"随书模型 {folder.name!r} 的文件 {path} 的换行被 git 换成了 CRLF。请运行 git config core.autocrlf false，"
                f"删去这个文件夹，再用 git checkout -- models/{folder.name} 恢复它。"
            )
        if actual != expected:
            raise ValueError(
                f"随书模型 {folder.name!r} 的文件 {path} 已损坏或被改动："
                f"SHA-256 应为 {expected[:12]}…，实际为 {actual[:12]}…。请用 git checkout 恢复它。"
            )
