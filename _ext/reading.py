"""帮读者读下去的几样东西：所在位置、阅读与运行的时间、配对笔记本的下载，术语的释义。"""

import json
import re
import shutil
from html import escape
from pathlib import Path

from docutils import nodes
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx_design.dropdown import dropdown_main

# 阅读时间的估计办法。教材要边读边想，所以取默读速度的下限；折叠的答案和代码的输出不算。
CHARACTERS_PER_MINUTE = 300     # 汉字；一个西文单词或数字算两个汉字
SECONDS_PER_CODE_LINE = 3       # 空行不算
SECONDS_PER_FORMULA = 2         # 行内的
SECONDS_PER_EQUATION = 20       # 独占一行的，有几行算几行
SECONDS_PER_FIGURE = 10         # 图和表


def reading_seconds(node: nodes.Node) -> float:
    """读完 node 大约要多少秒，规则见文件开头。"""
    if isinstance(node, (dropdown_main, nodes.raw)):
        return 0
    if isinstance(node, nodes.literal_block):
        is_output = node.get("language") == "myst-ansi"
        return 0 if is_output else SECONDS_PER_CODE_LINE * len(re.findall(r"(?m)^\s*\S", node.astext()))
    if isinstance(node, nodes.math):
        return SECONDS_PER_FORMULA
    if isinstance(node, nodes.math_block):
        return SECONDS_PER_EQUATION * (node.astext().count(r"\\") + 1)
    if isinstance(node, nodes.Text):
        text = node.astext()
        characters = len(re.findall(r"[\u4e00-\u9fff]", text)) + 2 * len(re.findall(r"[A-Za-z0-9][\w.,-]*", text))
        return characters * 60 / CHARACTERS_PER_MINUTE
    own = SECONDS_PER_FIGURE if isinstance(node, (nodes.figure, nodes.table)) else 0
    return own + sum(reading_seconds(child) for child in node.children)


def reading_time(doctree: nodes.document) -> str:
    minutes = reading_seconds(doctree) / 60
    return f"阅读约 {5 * max(1, round(minutes / 5))} 分钟"


def running_time(app, docname: str) -> str | None:
    """上一次执行各格共用多久，在几核的机器上；执行结果取自缓存时，是当时的用时与机器。"""
    record = NbMetadataCollector.get_exec_data(app.env, docname)
    if not record or not record["runtime"]:
        return None
    seconds = record["runtime"]
    length = f"{max(1, round(seconds / 10)) * 10} 秒" if seconds < 90 else f"{round(seconds / 60)} 分钟"
    cores = executed_on(app, docname)
    where = {None: "", 2: "两核的电脑上"}.get(cores, f"{cores} 核的电脑上")
    return f"运行约 {length}（{where}实测）"


def executed_on(app, docname: str) -> int | None:
    """执行这一章的机器有几核，由 tools/executed.py 记下；没有记录时不说，建网站的机器不一定是那一台。"""
    path = Path(app.srcdir, "_build/executed", f"{Path(docname).name}.ipynb")
    return json.loads(path.read_text("utf-8"))["metadata"].get("cores") if path.is_file() else None


def parts(app) -> dict[str, str]:
    """每一页 → 它在目录里所属的部分。"""
    root = app.env.get_doctree(app.config.root_doc)
    return {
        docname: toctree["caption"] for toctree in root.findall(addnodes.toctree)
        for docname in toctree["includefiles"] if toctree["caption"]
    }


def breadcrumb(app, pagename: str, context: dict) -> str:
    """书名 › 部分 › 本页。部分没有自己的页，所以不是链接。"""
    home = f'<a href="{context["pathto"](app.config.root_doc)}">{escape(app.config.html_title)}</a>'
    part = parts(app).get(pagename)
    here = f'<span aria-current="page">{context["title"]}</span>'
    items = "".join(f"<li>{item}</li>" for item in (home, part and escape(part), here) if item)
    return f'<nav class="book-breadcrumb" aria-label="所在位置"><ol>{items}</ol></nav>'


def chapter_facts(app, pagename: str, context: dict, doctree: nodes.document) -> str:
    """章首的一行：读多久，跑多久，到哪里去跑。"""
    items = [reading_time(doctree), running_time(app, pagename)]
    for button in find_buttons(context, "download-buttons"):
        if button["label"] == "download-notebook-button":
            items.append(f'<a href="{escape(button["url"])}" download>下载笔记本</a>')
    links = {button["text"]: button["url"] for button in find_buttons(context, "launch-buttons") if "url" in button}
    items += [f'<a href="{escape(links[name])}">在 {name} 打开</a>' for name in ("Colab", "Binder") if name in links]
    return f'<ul class="book-facts">{"".join(f"<li>{item}</li>" for item in items if item)}</ul>'


def find_buttons(context: dict, label: str) -> list[dict]:
    groups = {group["label"]: group for group in context["header_buttons"]}
    return groups[label]["buttons"] if label in groups else []


def formatted(paragraph: nodes.Node) -> str:
    """术语释义的 HTML：文字与公式；强调、链接等只留文字。"""
    def one(text):
        is_math = isinstance(text.parent, nodes.math)
        return f'<span class="math notranslate nohighlight">\\({escape(text)}\\)</span>' if is_math else escape(text)

    return "".join(one(text) for text in paragraph.findall(nodes.Text))


def definitions(app) -> dict[str, list[str]]:
    """术语的锚点 → [名称，释义]，取自术语表所在的页。"""
    pages = {docname for _, _, kind, docname, *_ in app.env.get_domain("std").get_objects() if kind == "term"}
    found = {}
    for docname in pages:
        for item in app.env.get_doctree(docname).findall(nodes.definition_list_item):
            names = [term for term in item.findall(nodes.term) if term["ids"]]
            text = f"<p>{formatted(next(item.findall(nodes.paragraph)))}</p>"      # 后一段是讲到它的章节
            for term in names:
                found |= dict.fromkeys(term["ids"], [" ".join(name.astext() for name in names), text])
    return found


def glossary_data(app, doctree: nodes.document) -> str:
    """本页链接到的术语的释义，给 _static/glossary.js 用。"""
    used = {
        link["refid"] if "refid" in link else link["refuri"].rpartition("#")[2]
        for link in doctree.findall(nodes.reference)
        if any("std-term" in child.get("classes", ()) for child in link.findall(nodes.inline))
    }
    terms = {anchor: text for anchor, text in definitions(app).items() if anchor in used}
    if not terms:
        return ""
    data = json.dumps(terms, ensure_ascii=False).replace("</", r"<\/")       # "</" 会提前结束 script 元素
    return f'<script type="application/json" id="book-terms">{data}</script>'


def has_notebook(app, pagename: str) -> bool:
    """有没有配对的笔记本：各章都有，前言虽有代码却没有。"""
    return Path(app.srcdir, f"{pagename}.ipynb").is_file()


def link_paired_notebook(app, pagename: str, context: dict) -> None:
    """主题的下载按钮给的是 myst-nb 转出的笔记本，正文还是 MyST；换成配对的、能直接运行的那一份。"""
    for button in find_buttons(context, "download-buttons"):
        if button["label"] == "download-notebook-button":
            button["url"] = context["pathto"](f"notebooks/{Path(pagename).name}.ipynb", 1)


def add_to_page(app, pagename, templatename, context, doctree):
    if app.builder.format != "html" or doctree is None:
        return
    link_paired_notebook(app, pagename, context)
    body = context["body"]
    terms = glossary_data(app, doctree)
    if has_notebook(app, pagename):
        before, end, after = body.partition("</h1>")
        if not end:
            raise ExtensionError(f"{pagename} 的网页里没有 </h1>，章首的一行（阅读与运行的时间）放不进去。")
        body = before + end + chapter_facts(app, pagename, context, doctree) + after
    context["body"] = breadcrumb(app, pagename, context) + body + terms


def publish_notebooks(app, exception):
    """把配对的笔记本放到网站的 notebooks/；myst-nb 转出的那些没有人用，删去。"""
    if exception or app.builder.format != "html":
        return
    target = Path(app.outdir, "notebooks")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for notebook in Path(app.srcdir, "chapters").glob("*.ipynb"):
        shutil.copy(notebook, target)
    for unused in Path(app.outdir, "_sources").rglob("*.ipynb"):
        unused.unlink()


def setup(app):
    # 在 notebook_pages 整理页头按钮之后
    app.connect("html-page-context", add_to_page, priority=950)
    app.connect("build-finished", publish_notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
