"""代码的写法：ruff 按 pyproject.toml 里的规则检查，一处也不能有。"""

import subprocess
import sys

from support.paths import ROOT


def ruff(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", **options)


def test_no_findings():
    result = ruff("--output-format=concise", ".")
    assert result.returncode == 0, f"请运行 make lint；ruff check --fix 能改掉一部分。\n{result.stdout}{result.stderr}"


def test_the_rules_are_in_force():
    """规则真的管用：没用到的导入、次序不对的导入、未定义的名字都查得出。"""
    result = ruff("--output-format=concise", "--stdin-filename=tools/sample.py", "-", input="import sys\nimport os\nprint(undefined)\n")
    assert result.returncode == 1
    assert all(code in result.stdout for code in ("F401", "I001", "F821")), result.stdout
