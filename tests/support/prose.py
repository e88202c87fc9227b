"""读 MyST 源文件：哪些行是正文，有哪些标题。"""

import re
import unicodedata
from pathlib import Path

from markdown_it import MarkdownIt

from support.paths import ROOT

CHAPTERS = sorted((ROOT / "chapters").glob("*.md"))
CODE_DIRECTIVES = ("code-cell", "code-block", "code", "math", "mermaid", "raw", "bibliography", "tableofcontents")


def prose_lines(text: str) -> list[str]:
    """把不是正文的行（元数据、代码、公式块、指令的边框与选项、标签）换成空行，行号不变。

    autocorrect 自己会跳过代码块，但 MyST 的提示框、折叠答案也写成代码块的样子，里面却是正文，所以要先剥开。
    """
    result, fences, in_math, options = [], [], False, False
    lines = text.split("\n")
    front = lines.index("---", 1) if lines[0] == "---" else -1
    for number, line in enumerate(lines):
        stripped = line.strip()
        fence = re.match(r"(`{3,}|:{3,}|~{3,})\s*(?:\{([\w:.-]+)\})?(.*)", stripped)
        keep = ""
        if number <= front:
            pass
        elif fences and len(stripped) >= len(fences[-1][0]) and set(stripped) == set(fences[-1][0]):
            fences.pop()
        elif fences and fences[-1][1]:                  # 代码里的每一行，直到结束的围栏
            pass
        elif fence and not in_math:
            name = fence[2]
            is_code = name is None or name in CODE_DIRECTIVES
            fences.append((fence[1], is_code))
            options = not is_code
            if not is_code and name not in ("figure", "image", "include", "literalinclude"):
                keep = fence[3].strip()                 # 提示框的标题
        elif stripped == "$$" or re.match(r"\\(begin|end)\{", stripped):
            in_math = not in_math
        elif in_math:
            pass
        elif options and re.match(r":[\w-]+:", stripped):
            alternative = re.match(r":(?:alt|caption):\s*(.*)", stripped)
            keep = alternative[1] if alternative else ""
        elif re.fullmatch(r"\([\w-]+\)=|%.*|\+\+\+.*|\$\$.*\$\$.*", stripped):
            pass
        else:
            options = False
            keep = line
        result.append(keep)
    return result


def without_inline_code(line: str) -> str:
    """去掉行内代码、公式、网址、MyST 角色，只留文字。"""
    line = re.sub(r"\{[\w:]+\}`[^`]*`", "", line)
    line = re.sub(r"`[^`]*`|\$[^$]*\$", "", line)
    return re.sub(r"\]\([^)]*\)|<[^>]*>|https?://\S+", "", line)


def plain_lines(path: Path) -> list[tuple[int, str]]:
    lines = prose_lines(path.read_text(encoding="utf-8"))
    return [(number, without_inline_code(line)) for number, line in enumerate(lines, 1) if line.strip()]


def normalize(title: str) -> str:
    """全角半角、大小写、空格的差别不算，“主题-说明”与“主题：说明”算相同，末尾的冒号也不算。"""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", title).casefold()).replace("-", ":").rstrip(":")


def headings(path: Path) -> list[tuple[int, str, str]]:
    """返回 [(级别, 标题, 标题下的正文)]；正文到下一个同级或更高级的标题为止。"""
    text = re.sub(r"\A---\n.*?\n---\n", lambda m: "\n" * m[0].count("\n"), path.read_text(encoding="utf-8"), flags=re.S)
    lines = text.split("\n")
    tokens = MarkdownIt("commonmark").parse(text)
    found = [
        (int(token.tag[1]), inline.content, token.map[0], token.map[1])
        for token, inline in zip(tokens, tokens[1:], strict=False) if token.type == "heading_open"
    ]
    result = []
    for index, (level, title, _start, body_start) in enumerate(found):
        end = next((start for other, _, start, _ in found[index + 1:] if other <= level), len(lines))
        result.append((level, title, "\n".join(lines[body_start:end])))
    return result


def substance(body: str) -> str:
    """正文里去掉标题、标签和空白，剩下的才算内容。"""
    return re.sub(r"^(#+ .*|\(.*\)=|%.*|\+\+\+.*)$|\s", "", body, flags=re.M)


# 每一章的标题
PAGES = {path: headings(path) for path in CHAPTERS}


def numbered_sections() -> dict[str, str]:
    """章节号 → 标题与正文，如“3.6.1”；一章的正文记在“第三章”名下。"""
    found = {}
    for pages in PAGES.values():
        for _, title, body in pages:
            number = re.match(r"第[一二三四五六七八九]章|\d+(?:\.\d+)+", title)
            if number:
                found[number[0]] = f"{title}\n{body}"
    return found
