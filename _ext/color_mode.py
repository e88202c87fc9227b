"""首次打开时主题等脚本加载完才分亮暗，夜间会闪一下白；在页面开头就照系统的设置定下来。"""

import re

from rewrite import Rule, add_rules


def setup(app):
    add_rules(app, Rule(
        "首次打开时的亮暗", re.escape('localStorage.getItem("theme") || "auto"'),
        'localStorage.getItem("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")',
    ))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
