"""各章要哪些包：由代码里的 import 得出，版本取自 requirements.txt，不另写清单。

笔记本的第一格（tools/notebooks.py）据此知道缺哪个包要装哪个；Binder 的清单、环境自检与 requirements.txt 里
“各章的代码”一段，由 tests/project/test_dependencies.py 与这里核对。
"""

import re
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

from execution import chapter_code, imported_modules, used_recipes

ROOT = Path(__file__).resolve().parent.parent
# 没有人导入、却离不了的模块：用到键里的模块时，值里的也要有
IMPLIED = {
    "diffusers": {"accelerate"},        # from_pretrained 靠它省内存地装入权重，没有就警告
    "httpx": {"socksio"},               # 读者的代理是 SOCKS 时，httpx 要它
}


class DependencyError(Exception):
    """写给作者看的错误：导入的模块没有对应的、写死版本的包。"""


def normalized(name: str) -> str:
    """包名的标准写法：huggingface_hub 与 HuggingFace-Hub 是同一个包。"""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned_packages(path: Path) -> dict[str, str]:
    """一个 requirements.txt 里各包的写法，键是标准写法，依先后次序；没有这个文件时为空。"""
    names = re.findall(r"^([\w.-]+)==", path.read_text(encoding="utf-8"), re.M) if path.exists() else []
    return {normalized(name): name for name in names}


@cache
def providers() -> dict[str, list[str]]:
    """顶层模块 → 提供它的包。"""
    return {module: [normalized(name) for name in names] for module, names in packages_distributions().items()}


def book_modules(root: Path = ROOT) -> set[str]:
    """book_utils 自己要导入的顶层模块。"""
    found: set[str] = set()
    for path in (root / "book_utils").rglob("*.py"):
        found |= imported_modules(path.read_text(encoding="utf-8"))
    return third_party(found, root)


def chapter_modules(source: Path, root: Path = ROOT) -> set[str]:
    """一章要导入的顶层模块：章里的代码、它运行的 recipes/ 脚本，连同 book_utils 的。"""
    code = "\n".join(chapter_code(source))
    found = imported_modules(code)
    for path in used_recipes(code, root):
        found |= imported_modules(path.read_text(encoding="utf-8"))
    return third_party(found, root) | book_modules(root)


def third_party(modules: set[str], root: Path) -> set[str]:
    """去掉标准库和本书自己的模块，添上它们暗中要用的（IMPLIED）。"""
    own = {"book_utils"} | {path.stem for path in (root / "recipes").glob("*.py")}
    modules = modules - own - set(sys.stdlib_module_names)
    return modules.union(*(IMPLIED[module] for module in modules & set(IMPLIED)))


def packages_of(modules: set[str], root: Path = ROOT) -> dict[str, str]:
    """模块 → 它所在的包，依 requirements.txt 里的次序。

    异常：
        DependencyError: 没有装这个模块，或者它的包没有写进 requirements.txt。
    """
    pinned = pinned_packages(root / "requirements.txt")
    found = {}
    for module in sorted(modules):
        names = providers().get(module, [])
        package = next((name for name in names if name in pinned), None)
        if package is None:
            where = f"它在 {'、'.join(names)} 里，requirements.txt 却没有写这个包" if names else "环境里没有这个模块"
            raise DependencyError(f"导入了 {module}：{where}。请把它的包与版本写进 requirements.txt，再运行 make setup。")
        found[module] = package
    order = list(pinned)
    return {module: pinned[name] for module, name in sorted(found.items(), key=lambda item: order.index(item[1]))}


def chapter_packages(source: Path, root: Path = ROOT) -> dict[str, str]:
    """一章要的模块 → 包，见 :func:`chapter_modules` 与 :func:`packages_of`。"""
    return packages_of(chapter_modules(source, root), root)
