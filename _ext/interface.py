"""界面文字：主题和扩展里写死的、没有中文翻译的，换成中文。"""

import re

from rewrite import Rule, add_rules

# 原文 → 中文
TEXTS = {
    'title="Toggle primary sidebar"': 'title="目录" aria-label="目录"',
    'title="Toggle secondary sidebar"': 'title="本页内容" aria-label="本页内容"',
    'aria-label="Toggle hidden content"': "",
    'aria-label="Main"': 'aria-label="全书目录"',
    'aria-label="Page"': 'aria-label="本页内容"',
    'aria-label="Color mode"': 'aria-label="切换亮色、暗色"',
    'data-bs-title="Color mode"': 'data-bs-title="切换亮色、暗色"',
    'title="System Settings"': 'title="跟随系统"',
    'alt="Binder logo"': 'alt=""',
    'alt="Colab logo"': 'alt=""',
}
# 标题、图、表……旁边的链接
LINKS = {
    "heading": "本节的链接", "image": "本图的链接", "table": "本表的链接", "code": "本段代码的链接",
    "equation": "本式的链接", "term": "本词的链接", "definition": "本定义的链接", "toctree": "本目录的链接",
}


def setup(app):
    add_rules(app, *(
        Rule(f"界面文字 {english}", re.escape(english), chinese.replace("\\", r"\\")) for english, chinese in TEXTS.items()
    ))
    add_rules(app, Rule(
        "链接的提示 Link to this …", rf'title="Link to this ({"|".join(LINKS)})"', lambda found: f'title="{LINKS[found[1]]}"',
    ))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
