"""读 MyST 源文件里的公式，以及公式里的符号。"""

import re

FONTS = ("mathbf", "boldsymbol", "mathcal", "mathbb")
ACCENTS = ("bar", "hat", "tilde")
GREEK = set("alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi varphi chi psi omega "
            "ell Delta Sigma Theta Lambda Phi Psi Omega varnothing nabla".split())
DECORATED = re.compile(rf"\\({'|'.join(FONTS + ACCENTS)})\{{")


def formulas(text: str) -> list[str]:
    """一篇源文件里的全部公式：math 指令的在前，其余的在后；代码格和行内代码里的不算，提示框、折叠答案里的算。"""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    found, fences, rest = [], [], []        # fences：还没有结束的围栏，与它的指令名（代码块没有）
    for line in text.split("\n"):
        fence = re.match(r"(`{3,})\s*(?:\{([\w:-]+)\})?", line)
        if fences and re.fullmatch(r"`{3,}\s*", line) and len(line.strip()) >= len(fences[-1][0]):
            fences.pop()
        elif fences and fences[-1][1] in (None, "code-cell"):
            continue
        elif fence:
            fences.append((fence[1], fence[2]))
            if fence[2] == "math":
                found.append("")
        elif fences and fences[-1][1] == "math":
            found[-1] += line + "\n"
        else:
            rest.append(line)
    text = "\n".join(rest)
    found += re.findall(r"\$\$(.+?)\$\$", text, flags=re.S)
    text = re.sub(r"\$\$.+?\$\$", "", text, flags=re.S)
    text = re.sub(r"(?<!`)`[^`\n]+`(?!`)", "", text)
    return found + re.findall(r"\$([^$\n]+)\$", text)


def symbols(formula: str) -> list[str]:
    """公式里的字母，连同字体和头上的记号，按出现的次序：\\hat{\\mathbf{x}}_0 里是 \\hat{\\mathbf{x}}；下标里的字母也算。"""
    formula = re.sub(r"^:label:.*$|\\\\\[\w+\]", "", formula, flags=re.M)
    formula = re.sub(r"\\(?:text|operatorname|mathrm|mathsf|begin|end)\*?\s*\{[^{}]*\}", " ", formula)
    tokens = re.findall(r"\\[A-Za-z]+|\\.|\S", formula)

    def read(position: int) -> tuple[str, int]:
        """从 position 读一个记号或一对花括号，返回写法统一的文字和下一个位置。"""
        token = tokens[position]
        if token == "{":
            inside, position = "", position + 1
            while tokens[position] != "}":
                piece, position = read(position)
                inside += piece
            return inside, position + 1
        if token[1:] in FONTS + ACCENTS:
            inside, position = read(position + 1)
            return f"{token}{{{inside}}}", position
        return token, position + 1

    found, position = [], 0
    while position < len(tokens):
        if tokens[position] == "{":
            position += 1
            continue
        piece, position = read(position)
        if re.fullmatch("[A-Za-z]", piece) or piece[1:] in GREEK or DECORATED.match(piece):
            found.append(piece)
    return found
