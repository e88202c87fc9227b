"""含代码的页面：构建时怎样执行，网页上留什么。"""

import os
from pathlib import Path

from reading import has_notebook


def prepare_kernel(app):
    """内核在 chapters/ 里启动，要让它能 import 仓库根目录下的 book_utils。"""
    paths = [str(Path(app.srcdir)), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # 网页没有内核：滑块只输出 HTML 一面，不建 ipywidgets 控件
    os.environ.setdefault("BOOK_SLIDERS", "static")


def drop_widget_state(app, pagename, templatename, context, doctree):
    """去掉 ipywidgets 的状态 JSON：没有控件脚本，它只会让页面变大。"""
    context["script_files"][:] = [
        asset for asset in context["script_files"]
        if asset.attributes.get("type") != "application/vnd.jupyter.widget-state+json"
    ]


def arrange_buttons(app, pagename, templatename, context, doctree):
    """页头按钮只留读者用得上的，文字用中文。

    主题给每页都放 Colab、Binder 和源文件的下载；没有配对笔记本的页用不上前两个，读者用不上后一个。
    """
    groups = {button["label"]: button for button in context["header_buttons"]}
    arranged = []
    paired = has_notebook(app, pagename)
    if paired:
        launch = groups["launch-buttons"]
        launch["tooltip"] = "在线运行本章"
        for button in launch["buttons"]:
            button["tooltip"] = f"在 {button['text']} 中打开本章的笔记本"
        arranged.append(launch)
    if "download-buttons" in groups:
        download = groups["download-buttons"]
        download["tooltip"] = "下载或打印"
        texts = {
            "download-notebook-button": ("笔记本", "下载本章的笔记本（.ipynb）"),
            "download-pdf-button": ("打印", "打印本页，或存成 PDF"),
        }
        if not paired:
            del texts["download-notebook-button"]
        download["buttons"] = [b for b in download["buttons"] if b["label"] in texts]
        for button in download["buttons"]:
            button["text"], button["tooltip"] = texts[button["label"]]
        arranged.append(download)
    if "source-buttons" in groups:
        source = groups["source-buttons"]
        source |= {"tooltip": "仓库", "icon": "fas fa-code-branch"}
        texts = {
            "source-repository-button": ("仓库", "本书的源代码", "fas fa-code-branch"),
            "source-issues-button": ("纠错", "报告本页的错误", "fas fa-bug"),
        }
        for button in source["buttons"]:
            button["text"], button["tooltip"], button["icon"] = texts[button["label"]]
        arranged.append(source)
    context["header_buttons"] = arranged


def setup(app):
    app.connect("builder-inited", prepare_kernel)
    app.connect("html-page-context", drop_widget_state, priority=900)
    app.connect("html-page-context", arrange_buttons, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
