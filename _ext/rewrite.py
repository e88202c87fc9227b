"""改写写出的页面：有些内容写死在主题的模板里，没有别的接口可改，只好在网页写出之前用正则表达式换掉。

各扩展用 add_rules 登记规则；每一页套好模板之后，依登记的次序套用一遍。一条规则若在整个网站里一处也没有用上，
多半是主题升级之后换了写法，规则悄悄失效：这时构建停下，并说出是哪一条。

只重做几页的构建里，其余各页用上了哪些规则，取自上次的记录（doctree 文件夹里的 rewrites.json）。
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sphinx.errors import ExtensionError
from sphinx.jinja2glue import BuiltinTemplateLoader

RECORD = "rewrites.json"


@dataclass(frozen=True)
class Rule:
    """一条规则：把 pattern 处处换成 replacement（同 re.sub）。name 是出错时说的，写明换的是什么。"""

    name: str
    pattern: str
    replacement: str | Callable[[re.Match], str]

    def apply(self, text: str) -> tuple[str, int]:
        """返回改写之后的页面，与用上的处数。"""
        return re.subn(self.pattern, self.replacement, text)


def add_rules(app, *rules: Rule) -> None:
    """登记规则；在各扩展的 setup 里调用。名字不能重复。"""
    app.setup_extension("rewrite")
    names = [rule.name for rule in (*app.book_rules, *rules)]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ExtensionError(f"有两条改写规则都叫{'、'.join(repeated)}，请改名。")
    app.book_rules.extend(rules)


class RewritingTemplates(BuiltinTemplateLoader):
    """Sphinx 的模板引擎，套好一页之后改写它。"""

    def init(self, builder, theme=None, dirs=None) -> None:
        self.app = builder.app
        super().init(builder, theme, dirs)

    def render(self, template: str, context: dict) -> str:
        text = super().render(template, context)
        if template.endswith(".html") and "pagename" in context:
            counts = {}
            for rule in self.app.book_rules:
                text, counts[rule.name] = rule.apply(text)
            self.app.book_matches[context["pagename"]] = {name: count for name, count in counts.items() if count}
        return text


def use_templates(app, config) -> None:
    config.template_bridge = "rewrite.RewritingTemplates"


def fingerprint(rules: list[Rule]) -> str:
    """各条规则的摘要；替换的办法是函数时，只看规则的名字。"""
    shown = [(rule.name, rule.pattern, rule.replacement if isinstance(rule.replacement, str) else "") for rule in rules]
    return hashlib.sha256(json.dumps(shown, ensure_ascii=False).encode()).hexdigest()


def read_record(app) -> None:
    try:
        record = json.loads(Path(app.doctreedir, RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        record = {}
    app.book_matches = record["pages"] if record.get("rules") == fingerprint(app.book_rules) else {}


def redo_pages_without_record(app, env, added, changed, removed) -> list[str]:
    """规则变了，或者没有上次的记录：各页都要重做，否则不知道它们用上了哪些规则。"""
    return [docname for docname in env.found_docs if docname not in app.book_matches]


def finish(app, exception) -> None:
    """存下记录；整个网站里一处也没有用上的规则，让构建停下。"""
    if app.builder.format != "html":
        return
    written = {page: counts for page, counts in app.book_matches.items() if Path(app.builder.get_outfilename(page)).exists()}
    record = {"rules": fingerprint(app.book_rules), "pages": written}
    Path(app.doctreedir, RECORD).write_text(json.dumps(record, ensure_ascii=False), "utf-8")
    if exception:
        return
    used = {name for counts in written.values() for name in counts}
    if unused := [rule.name for rule in app.book_rules if rule.name not in used]:
        raise ExtensionError(
            f"这些改写网页的规则在整个网站里一处也没有用上：{'；'.join(unused)}。多半是主题升级之后换了写法："
            "请到登记它的扩展（_ext/）里改成新的写法，用不着了就删去。"
        )


def setup(app):
    app.book_rules = []
    app.book_matches = {}
    app.connect("config-inited", use_templates)
    app.connect("builder-inited", read_record)
    app.connect("env-get-outdated", redo_pages_without_record)
    app.connect("build-finished", finish)
    # 各页的记录存在本进程里，分几个进程写网页就不齐了
    return {"parallel_read_safe": True, "parallel_write_safe": False}
