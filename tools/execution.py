"""一章的输出由什么决定：章里的代码，它用到的 book_utils 模块、随书模型、recipes/ 脚本，数据，以及各个包的版本。

这些都没变，上一次的输出就还作数；变了任何一样，都要重新执行。“变没变”只看内容，不看文件的时间，
所以在任何机器、任何一份克隆里结论都一样。凡是要判断输出过没过时的地方，都用这里的 execution_key。

用到什么，由代码看出来：book_utils 的名字在哪个模块，列在 __init__.pyi 里；那个模块又导入哪些模块；
代码里写着名字的随书模型就算用到。所以为第八章添一个模块，不会让前七章都重新执行。
"""

import ast
import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parent.parent
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


def public_names(root: Path) -> dict[str, Path]:
    """``from book_utils import 名字`` 里的名字 → 它所在的模块文件。"""
    stub = root / "book_utils/__init__.pyi"
    if not stub.is_file():
        return {}
    return {
        alias.asname or alias.name: (root / "book_utils").joinpath(*(node.module or alias.name).split(".")).with_suffix(".py")
        for node in ast.parse(stub.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def book_imports(code: str, folder: Path | None, names: dict[str, Path], root: Path) -> set[Path]:
    """一段代码直接用到的 book_utils 模块文件。

    folder 是它所在的文件夹，相对导入由此算起（章里的代码没有）；names 见 :func:`public_names`。
    """
    found: set[Path] = set()
    package = root / "book_utils"

    def module_or_name(base: Path, name: str) -> Path:
        inner = base / name
        if inner.with_suffix(".py").is_file():
            return inner.with_suffix(".py")
        return base.with_suffix(".py") if base != package else names.get(name, package / "__init__.py")

    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level and folder is not None:
                base = folder.joinpath(*[".."] * (node.level - 1), *filter(None, parts)).resolve()
            elif not node.level and parts[0] == "book_utils":
                base = root.joinpath(*parts)
            else:
                continue
            found |= {module_or_name(base, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                root.joinpath(*alias.name.split(".")).with_suffix(".py")
                for alias in node.names if alias.name.startswith("book_utils.")
            }
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "book_utils":
            found.add(module_or_name(package, node.attr))
    return {path for path in found if path.is_file()}


def used_book_files(codes: list[str], root: Path) -> set[Path]:
    """几段代码用到的 book_utils 文件：模块、它们导入的模块，以及与模块同名的样式与脚本（slider.py 的 slider.js）。"""
    names = public_names(root)
    waiting = set().union(*(book_imports(code, None, names, root) for code in codes))
    used: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in used:
            used.add(path)
            waiting |= book_imports(path.read_text(encoding="utf-8"), path.parent, names, root)
    return {sibling for path in used for sibling in path.parent.glob(f"{path.stem}.*") if sibling.suffix != ".pyi"}


def used_models(codes: list[str], root: Path) -> list[Path]:
    """代码里写着名字的随书模型的文件夹。"""
    folders = [folder for folder in (root / "models").glob("*") if folder.is_dir()]
    return sorted(f for f in folders if any(f"{quote}{f.name}" in code for code in codes for quote in "\"'/"))


def execution_key(source: Path, root: Path = ROOT) -> str:
    """一章的执行键：它没有变，从前的输出就还作数。

    参数：
        source: 含代码格的 MyST 源文件。
        root:   仓库根目录。
    返回：
        16 个十六进制数字，在任何机器上相同。
    """
    cells = chapter_code(source)
    scripts = used_recipes("\n".join(cells), root)
    codes = ["\n".join(cells), *(path.read_text(encoding="utf-8") for path in scripts)]
    modules = used_book_files(codes, root)
    codes += [path.read_text(encoding="utf-8") for path in modules if path.suffix == ".py"]
    return digest([
        digest(cell.encode() for cell in cells).encode(),
        digest(file_contents(scripts | modules, root)).encode(),
        *(f"{folder.name} {folder_digest(folder)}".encode() for folder in used_models(codes, root)),
        folder_digest(root / "data").encode(),
        pins_digest(root).encode(),
    ])
