"""把笔记本里 MyST 独有的写法换成普通 Markdown。

Colab、GitHub 和没有装扩展的 JupyterLab 只认普通 Markdown：提示框、图、编号的公式、引用若原样留着，
读者看到的就是一堆花括号。图、表、式的编号不在这里数，由 Sphinx 编好（见 numbering.py），所以与网站上的一致。
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
KIND_NAMES = {"figure": "图", "table": "表", "code-block": "代码", "equation": "式"}
# 网站上才有意义的，笔记本里整块略去
OMITTED = ("bibliography", "tableofcontents")
BOXES = (*TITLES, "admonition", "margin", "sidebar", "topic")

Numbers = dict[str, dict[str, str]]


class MarkdownError(Exception):
    """写给作者看的错误：笔记本里表达不了的写法，或找不到的标签。"""


class PlainMarkdown:
    """一章的转换。

    参数：
        notebook: 由 MyST 转来的笔记本，:meth:`convert` 就地改写它。
        source:   这一章的源文件；图的相对路径从它算起。
        root:     仓库根目录，从那里读 _config.yml 与 references.bib。
        numbers:  返回全书编号的函数，格式见 _ext/book_numbers.py；有编号要查时才调用。
    """

    def __init__(self, notebook: NotebookNode, source: Path, root: Path, numbers: Callable[[], Numbers]):
        self.notebook, self.source, self.root = notebook, source, root
        config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
        sphinx = (config.get("sphinx") or {}).get("config") or {}
        self.equation_format = sphinx.get("math_eqref_format", "({number})")
        self.formats = {"figure": "图 %s", "table": "表 %s", "code-block": "代码 %s"} | sphinx.get("numfig_format", {})
        bibliography = root / "references.bib"
        self.entries = parse_file(str(bibliography), "bibtex").entries if bibliography.exists() else {}
        self.numbers = numbers

    # —— 编号 ——

    def _number(self, label: str, *kinds: str) -> tuple[str, str]:
        """标签的（种类，编号）；没有标签，或全书没有这个标签，都报错：编号只有 Sphinx 知道。"""
        if not label:
            raise MarkdownError("有图题、表题的都要有 name，否则笔记本不知道它是几号。")
        numbers = self.numbers()
        for kind in kinds:
            if label in numbers[kind]:
                return kind, numbers[kind][label]
        raise MarkdownError(f"全书没有标签是 {label} 的{'、'.join(KIND_NAMES[kind] for kind in kinds)}。")

    def _title(self, target: str, name: str) -> str:
        """{ref} 与 {doc} 没有写文字时，显示所指的标题。"""
        if name == "doc":
            page = (self.source.parent / target).resolve().relative_to(self.root.resolve())
            target = page.as_posix().removesuffix(".md")
        titles = self.numbers()["title"]
        if target not in titles:
            raise MarkdownError(f"{{{name}}} 指向 {target}，全书没有这个标签或这一页。")
        return titles[target]

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
                caption = self._caption(figure.get("name", ""), figure["caption"], "figure", "table")
                cells.append(nbformat.v4.new_markdown_cell(caption))
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
            return f"{image}\n\n{self._caption(options.get('name', ''), caption, 'figure')}" if caption else image
        if name == "table":                     # 表题在表的上面，与网站上的一样
            body = self.text(inner)
            return f"{self._caption(options.get('name', ''), argument, 'table')}\n\n{body}\n" if argument else body
        if name in ("code-block", "code", "sourcecode"):
            return self._listing(argument, inner, options)
        if name == "literalinclude":            # 书里照抄的文件：笔记本里放进它的内容
            code = (self.source.parent / argument).read_text(encoding="utf-8").rstrip("\n")
            return self._listing(options.get("language", ""), code, options)
        if name == "dropdown":
            return f"<details>\n<summary>{argument}</summary>\n\n{self.text(inner)}\n\n</details>\n"
        if name in BOXES:
            title = self._roles(argument) or TITLES.get(name, "")
            return f"**{title}**\n\n{self.text(inner)}\n" if title else self.text(inner)
        if name in OMITTED:
            return None
        raise MarkdownError(f"不知道怎样在笔记本里写出 {{{name}}}，请在 tools/plain_markdown.py 里加上。")

    def _listing(self, language: str, code: str, options: dict[str, str]) -> str:
        """一段代码；围栏比代码里最长的反引号还长，代码里的围栏就不会把它截断。"""
        longest = max((len(run) for run in re.findall(r"`{3,}", code)), default=2)
        fence = "`" * (longest + 1)
        listing = f"{fence}{language}\n{code}\n{fence}\n"
        caption = options.get("caption")
        return f"{self._caption(options.get('name', ''), caption, 'code-block')}\n\n{listing}" if caption else listing

    def _math(self, body: str, label: str | None) -> str:
        if r"\\" in body and r"\begin" not in body:
            body = f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"
        tag = f"\n\\tag{{{self._number(label, 'equation')[1]}}}" if label else ""
        return f"$$\n{body}{tag}\n$$"

    def _caption(self, label: str, caption: str, *kinds: str) -> str:
        kind, number = self._number(label, *kinds)
        return f"*{self.formats[kind] % number}　{self._roles(caption)}*"

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
            return self.equation_format.format(number=self._number(target, "equation")[1])
        if name == "numref":
            kind, number = self._number(target, "figure", "table", "code-block")
            return title.replace("%s", number).replace("{number}", number) if title else self.formats[kind] % number
        if name == "newterm":
            return f"**{title or content}**"
        if name in ("ref", "doc"):
            return title or self._title(target, name)
        if name in ("term", "sec"):
            return title or content             # 只留文字
        raise MarkdownError(f"不知道怎样在笔记本里写出 {{{name}}}`{content}`，请在 tools/plain_markdown.py 里加上。")

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
            end = _end(lines, index + 1, closes_fence(fence))
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


def closes_fence(fence: str) -> Callable[[str], bool]:
    """一行是不是关得上这个围栏：同样的符号，不比它短。"""
    return lambda text: set(text) == {fence[0]} and len(text) >= len(fence)


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
