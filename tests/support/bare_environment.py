"""假装环境里只有少数几个包：其余的明明装着，也像没有装一样；“pip install”只是让它们露出来。

used_in_kernel 返回的代码要放在笔记本最前面执行，所以 hide 只用标准库。
"""

import ast
import json
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement


def normalized(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def closure(names: list[str]) -> set[str]:
    """这些包，连同它们必需的包（不含可选的），只算装着的。"""
    found: set[str] = set()
    waiting = [normalized(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            needs = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:        # 别的系统才要的包
            continue
        found.add(name)
        waiting += [normalized(need.name) for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return found


def modules_of(packages: set[str]) -> set[str]:
    """这些包提供的顶层模块。"""
    return {module for module, names in packages_distributions().items() if packages & {normalized(n) for n in names}}


def hide(hidden, brings):
    """在内核里执行：hidden 里的模块都找不到；装 brings 里的一个包，它带来的模块就露出来。"""
    import re
    import subprocess
    import sys

    hidden = set(hidden)
    assert not hidden & set(sys.modules), f"内核已经导入了要藏起来的模块：{hidden & set(sys.modules)}"
    finders = list(sys.meta_path)

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in hidden:
                return None
            return next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)

        def find_distributions(self, context):
            for finder in finders:
                yield from getattr(finder, "find_distributions", lambda _: [])(context)

        def invalidate_caches(self):
            pass

    real_run = subprocess.run

    def run(command, *arguments, **options):
        if list(command[1:4]) != ["-m", "pip", "install"]:
            return real_run(command, *arguments, **options)
        for word in command[4:]:
            if not word.startswith("-"):
                hidden.difference_update(brings[re.sub(r"[-_.]+", "-", word.split("==")[0]).lower()])
        return subprocess.CompletedProcess(command, 0, "", "")

    sys.meta_path[:] = [Finder()]
    subprocess.run = run


def used_in_kernel(present: list[str], installable: list[str]) -> str:
    """返回一段代码：在内核里执行之后，环境里像是只有 present 和它们必需的包，installable 里的可以“装”。"""
    hidden = set(packages_distributions()) - modules_of(closure(present))
    brings = {normalized(name): sorted(modules_of(closure([name]))) for name in installable}
    text = Path(__file__).read_text(encoding="utf-8")
    function = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "hide")
    return f"import json\n{ast.get_source_segment(text, function)}\n\nhide(*json.loads({json.dumps(json.dumps([sorted(hidden), brings]))}))"
