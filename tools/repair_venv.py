"""把上次装到一半的包从虚拟环境里除名，好让 pip 重新装它。

pip 被强行结束或机器断电时，一个包可能已经写下了元数据、文件却不全；pip 只看元数据，会以为它已装好。
这里按每个包的清单（RECORD）核对文件是否都在、大小是否相符。
用法：.venv/bin/python tools/repair_venv.py（由 tools/setup.sh 调用）
"""

import csv
import shutil
import sysconfig
from pathlib import Path


def is_complete(dist_info: Path) -> bool:
    """清单在，且清单上的每个文件都在、大小相符。

    字节码缓存（.pyc）除外：它由 Python 随时重写，与安装无关。
    """
    record = dist_info / "RECORD"
    if not record.is_file() or not (dist_info / "METADATA").is_file():
        return False
    with open(record, newline="", encoding="utf-8") as file:
        for name, _digest, size in csv.reader(file):
            if name.endswith(".pyc"):
                continue
            path = dist_info.parent / name
            if not path.is_file() or (size and path.stat().st_size != int(size)):
                return False
    return True


def main() -> None:
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for leftover in Path(folder).glob("~*"):        # pip 卸载到一半时留下的改名文件
            shutil.rmtree(leftover, ignore_errors=True)
        for dist_info in sorted(Path(folder).glob("*.dist-info")):
            if not is_complete(dist_info):
                print(f"  {dist_info.name.removesuffix('.dist-info')} 没有装完整，将重新安装")
                shutil.rmtree(dist_info)


if __name__ == "__main__":
    main()
