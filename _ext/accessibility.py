"""无障碍：主题和 docutils 写出的页面里，读屏软件会读错或跳过的几处。

tests/test_accessibility.py 用 axe-core 检查每一页；颜色在 _static/contrast.css，键盘滚动在 _static/accessibility.js。
"""

import re

from rewrite import rewrite_pages

FIXES = [
    # 书名不在任何地标里，读屏软件的用户跳不到
    (re.compile(r'<div class="sidebar-primary-item">(\s*<a class="navbar-brand)'),
     r'<div class="sidebar-primary-item" role="banner">\1'),
    # 主题的页头是空的，却也是一个地标
    (re.compile(r'<header id="pst-header" class'), '<header id="pst-header" role="presentation" class'),
    # 文献表标成了列表，各条却用着已经废弃的角色，不算列表项
    (re.compile(r'role="doc-biblioentry"'), 'role="listitem"'),
    # 空的表头格什么也没有说，算普通的格
    (re.compile(r"<th\b([^>]*)>\s*(?:<p>\s*</p>)?\s*</th>"), r"<td\1></td>"),
]


def fix(text: str) -> str:
    for wrong, right in FIXES:
        text = wrong.sub(right, text)
    return text


def fix_pages(app, exception):
    if exception is None and app.builder.format == "html":
        rewrite_pages(app.outdir, fix)


def setup(app):
    app.connect("build-finished", fix_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
