"""无障碍：主题和 docutils 写出的页面里，读屏软件会读错或跳过的几处。

tests/site/test_accessibility.py 用 axe-core 检查每一页；用键盘滚动宽公式的脚本在 _static/accessibility.js。
"""

from rewrite import Rule, add_rules


def setup(app):
    add_rules(
        app,
        Rule("书名不在任何地标里，读屏软件的用户跳不到",
             r'<div class="sidebar-primary-item">(\s*<a class="navbar-brand)',
             r'<div class="sidebar-primary-item" role="banner">\1'),
        Rule("主题的页头是空的，却也是一个地标",
             r'<header id="pst-header" class', r'<header id="pst-header" role="presentation" class'),
        Rule("文献表标成了列表，各条却用着已经废弃的角色，不算列表项",
             r'role="doc-biblioentry"', 'role="listitem"'),
        Rule("空的表头格什么也没有说，算普通的格",
             r"<th\b([^>]*)>\s*(?:<p>\s*</p>)?\s*</th>", r"<td\1></td>"),
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
