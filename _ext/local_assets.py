"""网页只从本站取文件：公式、图标都在构建时取自已安装的 Python 包，不进仓库，也不用 CDN。

- 公式：MathJax 取自 PyPI 的 django-static-mathjax（只用其中的文件，不需要 Django）；
- 图标：主题用 1.5 MB 的 fontawesome.js 画图标，这里换成只含用到的图标的一个小字体；
- Thebe：主题在每页都放一段从 unpkg.com 加载的脚本，去掉；本书自己的办法见 live_code.py。
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pydata_sphinx_theme
from docutils import nodes
from fontTools import subset
from fontTools.ttLib import TTFont
from rewrite import Rule, add_rules
from sphinx.errors import ExtensionError

# 浏览器用到的部件，见 https://docs.mathjax.org/en/v3.2/web/components/；其余（右键菜单、SVG 字形……）不复制
MATHJAX_FILES = [
    "startup.js", "core.js", "input/tex.js", "input/tex/extensions",
    "output/chtml.js", "output/chtml/fonts", "a11y/assistive-mml.js",
]
MATHJAX_CONFIG = {
    "loader": {"load": ["input/tex", "output/chtml", "a11y/assistive-mml"]},
    "chtml": {
        "mtextInheritFont": True,       # 公式里的中文用正文的字体
        # 默认按小写字母的高度放大公式；中文字体里的小写字母偏高，公式会比正文大一圈
        "matchFontHeight": False,
        "scale": 1.08,
    },
}
# AMS 的字形有 41 KB，书里只用到空心字母（`\mathbb`）与空集（`\varnothing`），只留这几个；
# 公式用到别的，就在这里添上，tests/site/test_site.py 会查
AMS_FONT = "output/chtml/fonts/woff-v2/MathJax_AMS-Regular.woff"
AMS_GLYPHS = {ord(" "), *range(ord("A"), ord("Z") + 1), ord("k"), 0x2205}
THEME_STATIC = Path(pydata_sphinx_theme.__file__).parent / "theme/pydata_sphinx_theme/static"
ICON_FONT = THEME_STATIC / "vendor/fontawesome/webfonts/fa-solid-900.ttf"
# 图标名 → Font Awesome 6 的字符。页面用到别的图标时在这里添上，tests/site/test_site.py 会查
ICONS = {
    "angle-down": 0xF107, "angle-left": 0xF104, "angle-right": 0xF105, "arrow-up": 0xF062, "bars": 0xF0C9,
    "bell": 0xF0F3, "bug": 0xF188, "check": 0xF00C, "circle-exclamation": 0xF06A, "circle-half-stroke": 0xF042,
    "circle-info": 0xF05A, "circle-xmark": 0xF057, "code": 0xF121, "code-branch": 0xF126, "download": 0xF019,
    "file-pdf": 0xF1C1, "lightbulb": 0xF0EB, "list": 0xF03A, "magnifying-glass": 0xF002,
    "magnifying-glass-minus": 0xF010, "moon": 0xF186, "outdent": 0xF03B, "pencil": 0xF303, "play": 0xF04B, "rocket": 0xF135,
    "share": 0xF064, "sun": 0xF185, "triangle-exclamation": 0xF071, "up-right-from-square": 0xF35D, "xmark": 0xF00D,
}


def configure_mathjax(app, config):
    config.mathjax_path = "mathjax/startup.js"
    config.mathjax3_config = MATHJAX_CONFIG


def find_mathjax() -> Path:
    """返回 MathJax 的 es5 目录；没有安装时说明怎么办。"""
    spec = find_spec("mathjax")
    es5 = Path(spec.origin).parent / "static/mathjax/es5" if spec and spec.origin else None
    if es5 is None or not es5.is_dir():
        raise ExtensionError("找不到 MathJax：请用 make book 构建，它会安装 django-static-mathjax。")
    return es5


def copy_mathjax(app):
    """把 MathJax 用得到的文件复制进 _static。"""
    es5, target = find_mathjax(), Path(app.outdir, "_static/mathjax")
    sources = [es5.parent / "LICENSE"]
    for name in MATHJAX_FILES:
        sources += sorted((es5 / name).rglob("*.*")) if (es5 / name).is_dir() else [es5 / name]
    for source in sources:
        copied = target / (source.relative_to(es5) if source.is_relative_to(es5) else source.name)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copied)


def write_part_of_font(source: Path, glyphs, target: Path):
    """从字体 source 里取出 glyphs（字符的编号），存成 target。"""
    font = TTFont(source)
    subsetter = subset.Subsetter(subset.Options(layout_features=[]))
    subsetter.populate(unicodes=glyphs)
    subsetter.subset(font)
    font.flavor = "woff"            # woff2 还要另装 brotli，字体这么小，不值得
    target.parent.mkdir(parents=True, exist_ok=True)
    font.save(target)


def write_fonts(app):
    """主题的图标字体（Font Awesome）与 MathJax 的 AMS 字形，只留用到的，都只剩几 KB。"""
    static = Path(app.outdir, "_static")
    write_part_of_font(ICON_FONT, ICONS.values(), static / "book-icons.woff")
    write_part_of_font(find_mathjax() / AMS_FONT, AMS_GLYPHS, static / "mathjax" / AMS_FONT)


def prepare(app):
    if app.builder.format == "html":
        copy_mathjax(app)
        write_fonts(app)


def drop_thebe_scripts(app, pagename, templatename, context, doctree):
    """从页面要加载的文件里去掉 Thebe。"""
    def is_thebe(asset):
        return "thebe" in str(asset.filename) or "THEBE_JS_URL" in asset.attributes.get("body", "")

    for key in ("script_files", "css_files"):
        context[key][:] = [asset for asset in context[key] if not is_thebe(asset)]


def drop_thebe_config(app, doctree, docname):
    """从正文末尾去掉 Thebe 的配置。"""
    for node in list(doctree.findall(nodes.raw)):
        if "x-thebe-config" in node.astext() or node.astext().startswith("<script>kernelName"):
            node.parent.remove(node)


def drop_icon_files(app, exception):
    """主题自带的图标脚本和完整的图标字体，不随网站发布。"""
    if exception or app.builder.format != "html":
        return
    static = Path(app.outdir, "_static")
    shutil.rmtree(static / "vendor/fontawesome", ignore_errors=True)
    for unused in static.glob("scripts/fontawesome.js*"):
        unused.unlink()


def setup(app):
    app.connect("config-inited", configure_mathjax, priority=100)
    app.connect("builder-inited", prepare)
    app.connect("html-page-context", drop_thebe_scripts, priority=900)
    app.connect("doctree-resolved", drop_thebe_config, priority=900)
    add_rules(app, Rule(
        "加载 fontawesome.js 的脚本，图标改用小字体",
        r'\s*<!-- So that users can add custom icons -->\s*<script [^>]*fontawesome\.js[^>]*></script>', "",
    ))
    app.connect("build-finished", drop_icon_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
