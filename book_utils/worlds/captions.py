"""蝴蝶的自然说法：同一只蝴蝶，中文与英文各有许多种说法，也可以只说其中几个属性（第六章）。

读者写提示词时不会照着模板。所以训练用的说明随机组合：哪些属性说、哪些不说，
放在“蝴蝶”前面还是另起一个小句，用哪个近义词，小句的次序。
"""

import numpy as np

from .butterflies import ATTRIBUTES, BACKGROUNDS, ENGLISH_POSITIONS, PATTERNS, WING_COLORS, Butterfly

# 每个属性的说法：before 放在“蝴蝶”前面，after 是后面的小句；{} 里是属性值的名字
ZH_BEFORE = {
    "size": {
        "small": ("小", "小小的", "很小的", "小个头的"),
        "medium": ("中等个头的", "中等大小的", "不大不小的"),
        "large": ("大", "大大的", "很大的", "大个头的"),
    },
    "wing_color": {name: (zh, zh + "的", zh[:-1] + "翅膀的") for name, (zh, _) in WING_COLORS.items()},
    "pattern": {name: (zh, f"带{zh}的", f"有{zh}的") for name, zh in PATTERNS.items()}
    | {"plain": ("素面", "纯色", "没有花纹的")},
}
ZH_AFTER = {
    "size": {
        "small": ("个头小", "个头很小"), "medium": ("个头中等", "大小适中"), "large": ("个头大", "个头很大"),
    },
    "wing_color": {name: (f"翅膀是{zh}的", f"{zh}的翅膀") for name, (zh, _) in WING_COLORS.items()},
    "pattern": {name: (f"翅膀上有{zh}", f"花纹是{zh}") for name, zh in PATTERNS.items()}
    | {"plain": ("翅膀上没有花纹", "花纹是素面")},
    "position": {
        "left": ("在画面左边", "在左边", "靠左", "画面左侧"),
        "right": ("在画面右边", "在右边", "靠右", "画面右侧"),
        "top": ("在画面上方", "在上方", "靠上", "画面上面"),
        "bottom": ("在画面下方", "在下方", "靠下", "画面下面"),
        "center": ("在画面中央", "在中央", "居中", "画面正中间"),
    },
    "background": {name: (f"{zh}背景", f"{zh}的背景", f"背景是{zh}") for name, (zh, _) in BACKGROUNDS.items()},
}
ZH_PLACES = {"left": "左边", "right": "右边", "top": "上方", "bottom": "下方", "center": "中央"}

EN_BEFORE = {
    "size": {"small": ("small", "little", "tiny"), "medium": ("medium", "medium-sized"), "large": ("large", "big")},
    "wing_color": {name: (name, f"{name}-winged") for name in WING_COLORS},
    "pattern": {
        "plain": ("plain", "unpatterned"), "spotted": ("spotted",), "striped": ("striped",), "eyespot": ("eyespot",),
    },
}
# 这两个属性放在后面时接在 with 之后：with red wings and spots
EN_WITH = {
    "wing_color": {name: (f"{name} wings",) for name in WING_COLORS},
    "pattern": {
        "plain": ("no pattern", "plain wings"), "spotted": ("spots",), "striped": ("stripes",),
        "eyespot": ("eyespots",),
    },
}
EN_AFTER = {
    "size": {"small": ("small in size",), "medium": ("medium in size",), "large": ("large in size",)},
    "position": {
        "left": ("to the left", "on the left side"), "right": ("to the right", "on the right side"),
        "top": ("near the top", "in the upper part"), "bottom": ("near the bottom", "in the lower part"),
        "center": ("in the middle", "centered"),
    },
    "background": {
        name: (f"on a {name} background", f"{name} background", f"against a {name} background", f"the background is {name}")
        for name in BACKGROUNDS
    },
}


def random_attributes(rng: np.random.Generator) -> tuple[str, ...]:
    """随机决定说出哪些属性：六成的时候全说，其余时候各以一半的机会说，至少说一个。

    返回：
        ATTRIBUTES 中的几个，次序不变。
    来源：第六章。
    """
    if rng.random() < 0.6:
        return ATTRIBUTES
    told = [name for name in ATTRIBUTES if rng.random() < 0.5]
    return tuple(told) or (ATTRIBUTES[rng.integers(len(ATTRIBUTES))],)


def random_caption(
    butterfly: Butterfly, rng: np.random.Generator, language: str = "zh", attributes: tuple[str, ...] = ATTRIBUTES
) -> str:
    """随机写一句说明，恰好说出 attributes 里的属性；rng 的状态相同，写出的句子就相同。

    参数：
        butterfly:  蝴蝶。
        rng:        NumPy 随机数生成器。
        language:   "zh" 或 "en"。
        attributes: 要说出的属性，ATTRIBUTES 中的几个；空的元组得到“一只蝴蝶”之类。
    异常：
        ValueError: 语言或属性不在上述范围。
    来源：第六章；写法固定的说明见 :func:`book_utils.caption`。
    """
    if language not in ("zh", "en"):
        raise ValueError(f"language 应是 zh 或 en，收到的是 {language!r}。")
    unknown = [name for name in attributes if name not in ATTRIBUTES]
    if unknown:
        raise ValueError(f"attributes 应是 {'、'.join(ATTRIBUTES)} 中的几个，收到的还有 {'、'.join(map(str, unknown))}。")
    return (_chinese if language == "zh" else _english)(butterfly, rng, attributes)


def _pick(rng, choices):
    return choices[rng.integers(len(choices))]


def _chinese(butterfly, rng, attributes):
    modifiers, clauses, background, place = "", [], "", ""
    for name in ("size", "wing_color", "pattern"):
        if name in attributes:
            value = getattr(butterfly, name)
            if rng.random() < 0.8:
                modifiers += _pick(rng, ZH_BEFORE[name][value])
            else:
                clauses.append(_pick(rng, ZH_AFTER[name][value]))
    if "background" in attributes:
        if rng.random() < 0.3:
            zh = BACKGROUNDS[butterfly.background][0]
            background = _pick(rng, (f"{zh}背景上，", f"{zh}的背景前，"))
        else:
            clauses.append(_pick(rng, ZH_AFTER["background"][butterfly.background]))
    if "position" in attributes:
        if rng.random() < 0.35:
            place = "画面" + ZH_PLACES[butterfly.position] + _pick(rng, ("有", "停着", "是"))
        else:
            clauses.append(_pick(rng, ZH_AFTER["position"][butterfly.position]))
    opening = "一只" if place else _pick(rng, ("一只", "", "有一只" if background else "画一只"))
    order = rng.permutation(len(clauses))
    return "，".join([background + place + opening + modifiers + "蝴蝶", *(clauses[i] for i in order)])


def _english(butterfly, rng, attributes):
    words, having, clauses, lead = [], [], [], ""
    for name in ("size", "wing_color", "pattern"):
        if name in attributes:
            value = getattr(butterfly, name)
            if rng.random() < 0.75:
                words.append(_pick(rng, EN_BEFORE[name][value]))
            elif name == "size":
                clauses.append(_pick(rng, EN_AFTER[name][value]))
            else:
                having.append(_pick(rng, EN_WITH[name][value]))
    for name in ("background", "position"):
        if name in attributes:
            value = getattr(butterfly, name)
            choices = EN_AFTER[name][value]
            if name == "position":
                choices = (ENGLISH_POSITIONS[value], *choices)
            if rng.random() < 0.25 and not lead:
                lead = choices[0] + ", "
            else:
                clauses.append(_pick(rng, choices))
    noun = " ".join([*words, "butterfly"])
    article = "an " if noun[0] in "aeiou" else "a "
    opening = _pick(rng, (article, "", article if lead else "a picture of " + article))
    if having:
        noun += " with " + " and ".join(having)
    order = rng.permutation(len(clauses))
    return lead + ", ".join([opening + noun, *(clauses[i] for i in order)])
