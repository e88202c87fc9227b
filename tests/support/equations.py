"""读 MyST 源文件里单占一行的公式：math 指令、$$…$$，有编号的与没有编号的。"""

import re

FENCE = re.compile(r"\s*(`{3,}|~{3,}|:{3,})\s*(?:\{([\w:.-]+)\})?")
NOT_PROSE = ("code-cell", "code-block", "code", "literalinclude", "mermaid", "raw")


def displayed(text: str) -> tuple[dict[str, str], list[str]]:
    """返回 {标签: TeX} 与没有标签的各个 TeX，按出现的次序；代码里的不算，提示框、折叠答案里的算。

    认得的写法：math 指令（选项不限次序，围栏用反引号或冒号）、``$$ … $$``、``$$ … $$ (标签)``。
    """
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    labelled: dict[str, str] = {}
    unlabelled: list[str] = []
    fences: list[tuple[str, str | None]] = []           # 还没有结束的围栏与它的指令名（代码块没有）
    body: list[str] = []
    dollars = False                                     # 在 $$ … $$ 之中

    def finish(tex: list[str], label: str | None):
        joined = "\n".join(line.rstrip() for line in tex).strip("\n")
        if label is None:
            unlabelled.append(joined)
        else:
            assert label not in labelled, f"标签 {label} 用了两次"
            labelled[label] = joined

    for line in text.split("\n"):
        stripped = line.strip()
        inside = fences[-1][1] if fences else ""
        closes = bool(fences) and set(stripped) == {fences[-1][0][0]} and len(stripped) >= len(fences[-1][0])
        if closes:
            if inside == "math":
                options = [option for option in body if re.match(r"\s*:[\w-]+:", option)]
                label = next((found[1] for option in options if (found := re.match(r"\s*:label:\s*(\S+)", option))), None)
                finish([row for row in body if row not in options], label)
            fences.pop()
        elif inside == "math":
            body.append(line)
        elif fences and (inside is None or inside in NOT_PROSE):
            continue
        elif dollars:
            if end := re.fullmatch(r"(.*)\$\$\s*(?:\(([\w-]+)\))?", stripped):
                finish([*body, *([end[1]] if end[1] else [])], end[2])
                dollars = False
            else:
                body.append(line)
        elif fence := FENCE.match(line):
            fences.append((fence[1], fence[2]))
            body = []
        elif whole := re.fullmatch(r"\$\$(.+?)\$\$\s*(?:\(([\w-]+)\))?", stripped):
            finish([whole[1].strip()], whole[2])
        elif stripped.startswith("$$"):
            dollars, body = True, [stripped[2:]] if stripped[2:] else []
        else:
            assert not re.match(r"\\begin\{", stripped), f"公式请写进 math 指令：{stripped}"
    assert not fences and not dollars, "有围栏或 $$ 没有结束"
    return labelled, unlabelled
