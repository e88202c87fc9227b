"""把笔记本里 MyST 独有的写法换成普通 Markdown。

Colab、GitHub 和没有装扩展的 JupyterLab 只认普通 Markdown：提示框、图、编号的公式、引用若原样留着，
读者看到的就是一堆花括号。编号与网站上的一致：图、式都按章从 1 数起。
"""

import base64
import mimetypes
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import yaml
from nbformat import NotebookNode
from pybtex.database import parse_file

FENCE = re.compile(r"(`{3,}|:{3,}|~{3,})\s*\{([\w:.-]+)\}\s*(.*)")
ROLE = re.compile(r"\{([\w:]+)\}`([^`]+)`")
TITLES = {
    "note": "说明", "tip": "提示", "hint": "提示", "important": "重要", "warning": "注意",
    "caution": "注意", "attention": "注意", "danger": "危险", "error": "错误", "seealso": "参见",
}


class PlainMarkdown:
    """一章的编号与文献，以及据此进行的转换。

    参数：
        notebook: 由 MyST 转来的笔记本，:meth:`convert` 就地改写它。
        source:   这一章的源文件；章号取自文件名开头的数字，图的相对路径从它算起。
        root:     仓库根目录，从那里读 _config.yml 与 references.bib。
    """

    def __init__(self, notebook: NotebookNode, source: Path, root: Path):
        self.notebook, self.source = notebook, source
        config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
        sphinx = (config.get("sphinx") or {}).get("config") or {}
        self.equation_format = sphinx.get("math_eqref_format", "({number})")
        self.figure_format = (sphinx.get("numfig_format") or {}).get("figure", "图 %s")
        bibliography = root / "references.bib"
        self.entries = parse_file(str(bibliography), "bibtex").entries if bibliography.exists() else {}
        chapter = re.match(r"\d+", source.stem)
        self.prefix = f"{int(chapter[0])}." if chapter else ""
        self.equations: dict[str, str] = {}
        self.figures: dict[str, str] = {}
        self._number()

    # —— 编号 ——

    def _number(self) -> None:
        """按先后次序给带标签的公式与图编号。"""
        n_figures = 0
        for cell in self.notebook.cells:
            if cell.cell_type == "code":
                figure = cell.metadata.get("mystnb", {}).get("figure")
                if figure:
                    n_figures += 1
                    self.figures[figure.get("name", "")] = f"{self.prefix}{n_figures}"
            elif cell.cell_type == "markdown":
                for kind, label in self._labels(cell.source.split("\n")):
                    if kind == "math":
                        self.equations[label] = f"{self.prefix}{len(self.equations) + 1}"
                    else:
                        n_figures += 1
                        self.figures[label] = f"{self.prefix}{n_figures}"

    def _labels(self, lines: list[str]) -> list[tuple[str, str]]:
        found = []
        for name, _argument, options, body in blocks(lines):
            if name == "math" and "label" in options:
                found.append(("math", options["label"]))
            elif name == "figure":
                found.append(("figure", options.get("name", "")))
            elif name == "$$" and options:
                found.append(("math", options["label"]))
            elif body and name not in ("", "code"):
                found += self._labels(body)
        return found

    # —— 转换 ——

    def convert(self) -> None:
        """就地改写：Markdown 格换成普通写法；带图题的代码格后面添一格图题。"""
        cells = []
        for cell in self.notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = self.text(cell.source)
            cells.append(cell)
            figure = cell.metadata.get("mystnb", {}).get("figure") if cell.cell_type == "code" else None
            if figure and figure.get("caption"):
                cells.append(nbformat.v4.new_markdown_cell(self._caption(figure.get("name", ""), figure["caption"])))
        self.notebook.cells = cells

    def text(self, source: str) -> str:
        """一格 Markdown 的转换。"""
        parts = [self._block(*block) for block in blocks(source.split("\n"))]
        text = "\n".join(part for part in parts if part is not None)
        return re.sub(r"\n{3,}", "\n\n", text).strip("\n")

    def _block(self, name: str, argument: str, options: dict[str, str], body: list[str]) -> str | None:
        inner = "\n".join(body)
        if name == "code":
            return inner
        if name == "":
            return None if re.fullmatch(r"\([\w-]+\)=|%.*|\+\+\+.*", inner.strip()) else self._roles(inner)
        if name in ("math", "$$"):
            return self._math(inner.strip(), options.get("label"))
        if name in ("figure", "image"):
            image = f"![{options.get('alt', '')}]({self._embed(argument)})"
            caption = inner.strip()
            return f"{image}\n\n{self._caption(options.get('name', ''), caption)}" if caption else image
        if name == "literalinclude":            # 书里照抄的文件：笔记本里放进它的内容
            code = (self.source.parent / argument).read_text(encoding="utf-8").rstrip("\n")
            return f"```{options.get('language', '')}\n{code}\n```\n"
        if name == "dropdown":
            return f"<details>\n<summary>{argument}</summary>\n\n{self.text(inner)}\n\n</details>\n"
        if name in TITLES or name in ("admonition", "margin", "sidebar", "topic"):
            title = self._roles(argument) or TITLES.get(name, "")
            return f"**{title}**\n\n{self.text(inner)}\n" if title else self.text(inner)
        if name in ("bibliography", "tableofcontents"):
            return None
        return self.text(inner)

    def _math(self, body: str, label: str | None) -> str:
        if r"\\" in body and r"\begin" not in body:
            body = f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"
        tag = f"\n\\tag{{{self.equations[label]}}}" if label in self.equations else ""
        return f"$$\n{body}{tag}\n$$"

    def _caption(self, label: str, caption: str) -> str:
        return f"*{self.figure_format % self.figures.get(label, '')}　{self._roles(caption)}*"

    def _embed(self, target: str) -> str:
        """把图放进笔记本：Colab 不认相对路径。网址原样返回。"""
        path = (self.source.parent / target).resolve()
        if "://" in target or not path.is_file():
            return target
        kind = mimetypes.guess_type(path.name)[0] or "image/png"
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

    def _roles(self, text: str) -> str:
        text = re.sub(r"(?<=\S) ?(\{cite:p\}`[^`]+`) ?(?=\S)", r"\1", text)       # 全角括号两边不要空格
        return ROLE.sub(lambda match: self._role(match[1], match[2]), text)

    def _role(self, name: str, content: str) -> str:
        shown = re.fullmatch(r"(.*?)\s*<([^<>]*)>", content, re.S)
        title, target = (shown[1], shown[2]) if shown else ("", content)
        if name.startswith("cite"):
            return self._cite([key.strip() for key in content.split(",")], textual=name in ("cite:t", "cite:ts"))
        if name == "eq":
            return self.equation_format.format(number=self.equations.get(target, target))
        if name == "numref":
            number = self.figures.get(target, target)
            return title.replace("%s", number).replace("{number}", number) if title else self.figure_format % number
        if name == "newterm":
            return f"**{title or content}**"
        return title or content                 # term、sec、ref、doc 等：只留文字

    def _cite(self, keys: list[str], textual: bool) -> str:
        shown = []
        for key in keys:
            entry = self.entries.get(key)
            if entry is None:
                shown.append(key)
                continue
            names = [" ".join(person.last_names).strip("{}") for person in entry.persons.get("author", [])]
            authors = names[0] + " 等" if len(names) > 2 else " 和 ".join(names)
            year = entry.fields.get("year", "")
            label = f"{authors}（{year}）" if textual else f"{authors}，{year}"
            doi = entry.fields.get("doi")
            url = f"https://doi.org/{doi}" if doi else entry.fields.get("url")
            shown.append(f"[{label}]({url})" if url else label)
        return "；".join(shown) if textual else f"（{'；'.join(shown)}）"


Block = tuple[str, str, dict[str, str], list[str]]


def blocks(lines: list[str]) -> list[Block]:
    """把若干行切成块：(名字, 参数, 选项, 正文)。

    普通的一行，名字为空；普通的代码块，名字是 code、正文含围栏；``$$`` 公式的名字是 ``$$``；指令的名字是它自己的。
    """
    result: list[Block] = []
    index = 0
    while index < len(lines):
        line = lines[index]
        directive = FENCE.match(line.strip())
        plain = re.match(r"(`{3,}|~{3,})", line.strip())
        if directive or plain:
            fence = (directive or plain)[1]
            end = _end(lines, index + 1, lambda text: set(text) == {fence[0]} and len(text) >= len(fence))
            if directive:
                options, body = _options(lines[index + 1:end])
                result.append((directive[2], directive[3].strip(), options, body))
            else:
                result.append(("code", "", {}, lines[index:end + 1]))
            index = end + 1
        elif line.strip() == "$$":
            end = _end(lines, index + 1, lambda text: text.startswith("$$"))
            label = re.fullmatch(r"\$\$\s*\(([\w-]+)\)", lines[end].strip()) if end < len(lines) else None
            result.append(("$$", "", {"label": label[1]} if label else {}, lines[index + 1:end]))
            index = end + 1
        else:
            result.append(("", "", {}, [line]))
            index += 1
    return result


def _end(lines: list[str], start: int, closes: Callable[[str], bool]) -> int:
    return next((i for i in range(start, len(lines)) if closes(lines[i].strip())), len(lines))


def _options(lines: list[str]) -> tuple[dict[str, str], list[str]]:
    """取出指令开头的 ``:名字: 值`` 或 ``---`` 之间的 YAML，返回 (选项, 正文)。"""
    if lines and lines[0].strip() == "---" and "---" in (text.strip() for text in lines[1:]):
        end = next(i for i in range(1, len(lines)) if lines[i].strip() == "---")
        options = yaml.safe_load("\n".join(lines[1:end])) or {}
        return {key: str(value) for key, value in options.items()}, lines[end + 1:]
    options, index = {}, 0
    while index < len(lines) and (option := re.match(r"\s*:([\w-]+):\s*(.*)", lines[index])):
        options[option[1]] = option[2].strip()
        index += 1
    return options, lines[index:]
