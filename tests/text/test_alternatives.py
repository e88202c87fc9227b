"""替代文字：看不见图的读者靠它。每幅图、每个滑块都有，不是敷衍的“图”“示意图”，也不是从别处抄来的。"""

import ast
import re
from collections import Counter

import pytest
import yaml
from support.paths import ROOT
from support.prose import CHAPTERS

PAGES = [*CHAPTERS, *sorted(ROOT.glob("*.md"))]
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
DIRECTIVE = re.compile(r"^(`{3,}|:{3,})\{(?:figure|image)\}[^\n]*\n(.*?)^\1", re.DOTALL | re.MULTILINE)
# 图里画的东西：至少要说出一样。“图”“图像”不算，它们什么也没有说
THINGS = re.compile(
    "曲线|[实虚]线|折线|直方图|热图|热力图|条纹|箭头|时间轴|结构图|直线|散点|光点|噪点|噪声|噪点|数字|蝴蝶|鱼|月牙|密度|分布|权重|"
    "数据|比例|预测|输入|网页|仓库|滑块|先后|像素|颜色|翅膀|轨迹|句子|词|照片|掩膜|深度|频谱|波形"
)


def cell_parts(cell: str) -> tuple[dict, str]:
    """代码格 → 开头的设置，代码。"""
    front = re.match(r"---\n(.*?)\n---\n?", cell, re.DOTALL)
    if front:
        return yaml.safe_load(front[1]), cell[front.end():]
    return {}, re.sub(r"^(:[\w-]+:.*\n)+", "", cell)


def slider_alternatives(code: str) -> list[str | None]:
    """每次调用 Slider 给出的 alt；没有给，就是 None。"""
    tree = ast.parse("\n".join(line for line in code.split("\n") if not line.startswith(("%", "!"))))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Slider"]
    given = [next((k.value for k in call.keywords if k.arg == "alt"), None) for call in calls]
    return [node.value if isinstance(node, ast.Constant) else None for node in given]


def alternatives(path) -> list[str | None]:
    """一页里所有的替代文字，按出现的次序；该有而没有的是 None。"""
    text = path.read_text("utf-8")
    found = []
    for cell in CELL.findall(text):
        options, code = cell_parts(cell)
        shown = options.get("mystnb", {})
        if "figure" in shown or "image" in shown:
            found.append(shown.get("image", {}).get("alt"))
        found += slider_alternatives(code)
    for _, body in DIRECTIVE.findall(text):
        alt = re.search(r"^:alt:\s*(.+)$", body, re.MULTILINE)
        found.append(alt and alt[1].strip())
    return found + re.findall(r"!\[([^\]]*)\]\(", text)


def test_the_reader_finds_them():
    assert slider_alternatives('%env A=1\nSlider(f, {"t": [0]}, alt="一只蝴蝶")\nSlider(f, {})') == ["一只蝴蝶", None]
    assert sum(len(alternatives(path)) for path in CHAPTERS) >= 60


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_alternatives_say_what_is_drawn(path):
    bad = [alt for alt in alternatives(path) if alt is None or len(alt) < 6 or not THINGS.search(alt)]
    assert bad == [], "替代文字至少六个字，要说出画的是什么"


def test_no_alternative_is_used_twice():
    count = Counter(alt for path in PAGES for alt in alternatives(path))
    assert [alt for alt, times in count.items() if times > 1] == []
