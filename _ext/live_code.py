"""实时代码：读者点了“启用实时代码”并同意之后，页面才连接 Binder，代码格变得可以修改和运行。

页面上只放一个按钮和几项设置；其余见 _static/live.js。Thebe（编辑器与内核的连接）由 npm 安装，
从本站加载，也只在同意之后。
"""

import json
import shutil
from pathlib import Path

from sphinx.errors import ExtensionError


def copy_thebe(app):
    """把 Thebe 打包好的脚本复制进 _static/thebe；源码映射只供调试，不要。"""
    if app.builder.format != "html":
        return
    source = Path(app.srcdir, "node_modules/thebe/lib")
    if not source.is_dir():
        raise ExtensionError("找不到 Thebe：请用 make book 构建，它会按 package-lock.json 安装。")
    target = Path(app.outdir, "_static/thebe")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("types", "*.map"))


def settings(app, pagename: str, pathto) -> dict[str, str]:
    """live.js 要知道的：连哪个 Binder 的哪个仓库，本页配对的笔记本在仓库的哪里。"""
    options = app.config.html_theme_options
    repository = options["repository_url"].removeprefix("https://github.com/").strip("/")
    return {
        "binder": options["launch_buttons"]["binderhub_url"].rstrip("/"),
        "repository": repository,
        "branch": options["repository_branch"],
        "notebook": f"{pagename}.ipynb",
        "thebe": pathto("_static/thebe/", 1),
    }


def add_live_code(app, pagename, templatename, context, doctree):
    launch = next((group for group in context["header_buttons"] if group["label"] == "launch-buttons"), None)
    if doctree is None or launch is None:
        return
    launch["buttons"].append({
        "type": "javascript", "javascript": "bookLive.ask()", "label": "live-code", "icon": "fas fa-play",
        "text": "启用实时代码", "tooltip": "在本页上修改、运行代码",
    })
    data = json.dumps(settings(app, pagename, context["pathto"]), ensure_ascii=False)
    context["body"] += f'<script type="application/json" id="book-live">{data}</script>'


def setup(app):
    app.connect("builder-inited", copy_thebe)
    # 在 notebook_pages 整理页头按钮之后
    app.connect("html-page-context", add_live_code, priority=950)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
