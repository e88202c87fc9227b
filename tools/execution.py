"""一章的输出由什么决定：章里的代码、book_utils、随书模型与数据、章里运行的训练脚本、各个包的版本。

这些都没变，上一次的输出就还作数；变了任何一样，都要重新执行。“变没变”只看内容，不看文件的时间，
所以在任何机器、任何一份克隆里结论都一样。凡是要判断输出过没过时的地方，都用这里的 execution_key。
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parent.parent
# 名字 → 向作者说起它时的叫法
INPUTS = {
    "cells": "章里的代码", "book_utils": "book_utils", "recipes": "章里运行的 recipes/ 脚本",
    "models": "随书模型", "data": "数据", "pins": "包的版本",
}
# 由 data/MNIST/raw/*.gz 解压而来，内容已由 .gz 决定
UNPACKED = "*-ubyte"


def digest(parts: Iterable[bytes]) -> str:
    """若干段内容的 SHA-256，取前 16 个十六进制数字；段与段的分界也算在内。"""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:16]


def file_contents(paths: Iterable[Path], root: Path) -> Iterable[bytes]:
    """依次给出各文件相对 root 的路径与内容。"""
    for path in sorted(paths):
        yield path.relative_to(root).as_posix().encode()
        yield path.read_bytes()


def folder_files(folder: Path) -> list[Path]:
    """文件夹里决定输出的文件：隐藏文件、Python 的缓存与解压出来的数据不算。"""
    return [
        path for path in folder.rglob("*")
        if path.is_file() and not path.match(UNPACKED)
        and not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
    ]


@cache
def folder_digest(folder: Path) -> str:
    """文件夹全部内容的摘要；一次运行里只算一次。"""
    return digest(file_contents(folder_files(folder), folder))


@cache
def pins_digest(root: Path) -> str:
    """两个文件里写死的版本的摘要；注释与次序不算。"""
    pins: set[str] = set()
    for name in ("requirements.txt", "constraints.txt"):
        path = root / name
        pins |= set(re.findall(r"^[\w.-]+==\S+", path.read_text(encoding="utf-8"), re.M)) if path.exists() else set()
    return digest(pin.encode() for pin in sorted(pins))


def used_recipes(code: str, root: Path) -> set[Path]:
    """代码里提到文件名的 recipes/ 脚本，连同它们导入的同一文件夹里的模块。"""
    scripts = {path.stem: path for path in (root / "recipes").glob("*.py")}
    waiting = [path for path in scripts.values() if path.name in code]
    used: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in used:
            used.add(path)
            waiting += [scripts[name] for name in imported_modules(path.read_text(encoding="utf-8")) if name in scripts]
    return used


def imported_modules(code: str) -> set[str]:
    """一段 Python 代码导入的顶层模块；相对导入不算，函数里的导入也算。"""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def chapter_code(source: Path) -> list[str]:
    """一章的各个代码格，依次；不含生成笔记本时加在前面的那一格。"""
    notebook = jupytext.reads(source.read_text(encoding="utf-8"), fmt="md:myst")
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def execution_inputs(source: Path, root: Path = ROOT) -> dict[str, str]:
    """决定一章输出的各样东西（INPUTS 的键）→ 各自内容的摘要。

    参数：
        source: 一章的 MyST 源文件。
        root:   仓库根目录。
    """
    cells = chapter_code(source)
    return {
        "cells": digest(cell.encode() for cell in cells),
        "book_utils": folder_digest(root / "book_utils"),
        "recipes": digest(file_contents(used_recipes("\n".join(cells), root), root)),
        "models": folder_digest(root / "models"),
        "data": folder_digest(root / "data"),
        "pins": pins_digest(root),
    }


def execution_key(source: Path, root: Path = ROOT) -> str:
    """一章的执行键：它没有变，从前的输出就还作数。"""
    return digest([json.dumps(execution_inputs(source, root), sort_keys=True).encode()])


def changed_inputs(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """两次之间变了什么，用向作者说起时的叫法；从前没有记录时，全部算变了。"""
    return [label for name, label in INPUTS.items() if old.get(name) != new.get(name)]
