"""随书文件的校验和：只用标准库，没有装好 PyTorch 时自检（environment.py）也能核对。"""

import hashlib
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


def verify_model(folder: Path) -> None:
    """核对一个随书模型的文件夹：``SHA256SUMS`` 里列出的文件都在，且没有变过。

    参数：
        folder: ``models`` 下的一个文件夹，其中有 ``SHA256SUMS``。
    异常：
        FileNotFoundError: 缺少文件。
        ValueError: 文件已损坏或被改动。
    来源：第 3.4.2 节。
    """
    for line in (folder / CHECKSUMS).read_text().splitlines():
        expected, file_name = line.split(maxsplit=1)
        path = folder / file_name
        if not path.is_file():
            raise FileNotFoundError(f"随书模型 {folder.name!r} 缺少文件 {path}，请用 git checkout 恢复它。")
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        if actual != expected:
            raise ValueError(
                f"随书模型 {folder.name!r} 的文件 {path} 已损坏或被改动："
                f"SHA-256 应为 {expected[:12]}…，实际为 {actual[:12]}…。请用 git checkout 恢复它。"
            )
