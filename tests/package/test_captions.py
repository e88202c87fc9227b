"""说明文字与属性相符：对照一张手写的表，两种语言、两种写法都查。

表是照属性的意思写的，不是从代码的输出抄的：左与右、紫与粉若在代码里写反了，这里会发现。
"""

import numpy as np
import pytest

from book_utils import Butterfly, caption, random_caption
from book_utils.worlds.butterflies import BACKGROUNDS, PATTERNS, POSITIONS, SIZES, WING_COLORS

# 属性的值 → （中文里必须有其一，英文里必须有其一）
WORDS = {
    "wing_color": {
        "red": (["红"], ["red"]), "orange": (["橙"], ["orange"]), "yellow": (["黄"], ["yellow"]),
        "green": (["绿"], ["green"]), "blue": (["蓝"], ["blue"]), "purple": (["紫"], ["purple"]),
        "pink": (["粉"], ["pink"]), "white": (["白"], ["white"]),
    },
    "pattern": {
        "plain": (["素面", "纯色", "没有花纹"], ["plain", "unpatterned", "no pattern"]),
        "spotted": (["斑点"], ["spot"]), "striped": (["条纹"], ["stripe"]), "eyespot": (["眼斑"], ["eyespot"]),
    },
    "background": {
        "white": (["白色"], ["white"]), "black": (["黑色"], ["black"]), "gray": (["灰色"], ["gray"]),
        "sky blue": (["天蓝色"], ["sky blue"]), "grass green": (["草绿色"], ["grass green"]), "sand": (["沙色"], ["sand"]),
    },
    "size": {
        "small": (["小"], ["small", "little", "tiny"]),
        "medium": (["中等", "适中", "不大不小"], ["medium"]),
        "large": (["大"], ["large", "big"]),
    },
    "position": {
        "left": (["左"], ["left"]), "right": (["右"], ["right"]), "top": (["上"], ["top", "upper"]),
        "bottom": (["下"], ["bottom", "lower"]), "center": (["中央", "居中", "正中"], ["center", "middle"]),
    },
}
# 只说这一个属性时，句子里不该出现的字：别的值的字
OPPOSITES = {
    "wing_color": {"zh": "红橙黄绿蓝紫粉", "en": ["red", "orange", "yellow", "green", "blue", "purple", "pink"]},
    "position": {"zh": "左右", "en": ["left", "right"]},
}
# 完整的句子（第一种说法）：(颜色，花纹，背景，大小，位置)，中文，英文
SENTENCES = [
    (("red", "plain", "white", "small", "left"),
     "一只小个头的红色素面蝴蝶，在画面左边，白色背景", "a small red plain butterfly on the left, white background"),
    (("purple", "eyespot", "black", "large", "right"),
     "一只大个头的紫色眼斑蝴蝶，在画面右边，黑色背景", "a large purple eyespot butterfly on the right, black background"),
    (("pink", "striped", "sand", "medium", "top"),
     "一只中等个头的粉色条纹蝴蝶，在画面上方，沙色背景", "a medium pink striped butterfly at the top, sand background"),
    (("blue", "spotted", "sky blue", "large", "bottom"),
     "一只大个头的蓝色斑点蝴蝶，在画面下方，天蓝色背景", "a large blue spotted butterfly at the bottom, sky blue background"),
    (("white", "plain", "grass green", "small", "center"),
     "一只小个头的白色素面蝴蝶，在画面中央，草绿色背景", "a small white plain butterfly in the center, grass green background"),
]


@pytest.mark.parametrize("attributes, zh, en", SENTENCES)
def test_sentences_are_as_written_by_hand(attributes, zh, en):
    butterfly = Butterfly(*attributes)
    assert caption(butterfly, "zh") == zh
    assert caption(butterfly, "en") == en


def values():
    return [(name, value) for name, table in WORDS.items() for value in table]


def test_table_covers_every_value():
    real = {"wing_color": WING_COLORS, "pattern": PATTERNS, "background": BACKGROUNDS, "size": SIZES, "position": POSITIONS}
    assert {name: set(table) for name, table in WORDS.items()} == {name: set(table) for name, table in real.items()}


@pytest.mark.parametrize("name, value", values())
@pytest.mark.parametrize("language", ["zh", "en"])
def test_random_captions_say_the_value(name, value, language):
    butterfly = Butterfly(**{name: value})
    wanted = WORDS[name][value][language == "en"]
    for seed in range(60):
        text = random_caption(butterfly, np.random.default_rng(seed), language, (name,))
        assert any(word in text for word in wanted), text
        for other in OPPOSITES.get(name, {}).get(language, ()):
            assert other in " ".join(wanted) or other not in text, text


@pytest.mark.parametrize("name, value", values())
@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("variant", [0, 1, 2])
def test_fixed_captions_say_the_value(name, value, language, variant):
    """写法固定的前三种说法含全部五个属性。"""
    text = caption(Butterfly(**{name: value}), language, variant)
    assert any(word in text for word in WORDS[name][value][language == "en"]), text
