"""改写已经写好的页面：有些内容写死在主题的模板里，没有别的接口可改。"""

from collections.abc import Callable
from pathlib import Path


def rewrite_pages(outdir: Path, edit: Callable[[str], str]) -> None:
    """对每一页的 HTML 调用 edit，有变化才写回。edit 重复执行应当结果不变。"""
    for page in Path(outdir).rglob("*.html"):
        if page.relative_to(outdir).parts[0] in ("_static", "_sources"):
            continue
        text = page.read_text("utf-8")
        if (edited := edit(text)) != text:
            page.write_text(edited, "utf-8")
