"""在笔记本里画线稿的小画布，给 ControlNet 当控制图（第 9.1 节）。"""

import base64
import html
import io
import os
from pathlib import Path

from PIL import Image

# 与滑块同样的做法：脚本只认自己的父元素，不需要编号，也不依赖任何库
_SCRIPT = Path(__file__).with_name("sketch.js").read_text(encoding="utf-8").strip()
_STYLE = Path(__file__).with_name("sketch.css").read_text(encoding="utf-8").strip()
_PREFIX = "data:image/png;base64,"


class SketchPad:
    """一块可以用鼠标或手指画线的画布。

    - 有内核时：画一笔，``image`` 就跟着变；
    - 没有内核（网站、导出的笔记本）时：也能画，按“存成图片”得到一个 PNG 文件，以后用 ``open_rgb`` 读进来。
    不便用鼠标的，随时可以不用它，改用图片文件。

    参数：
        size:    画布的边长，像素，16 到 512；显示时放大到 320 像素左右。
        initial: 一开始画布上有什么：正方形的 PIL 图像，黑底白线；不给就是空的。
    异常：
        ValueError: size 不在范围里，或 initial 不是正方形的图。
    来源：第 9.1 节。
    """

    def __init__(self, size: int = 64, initial: Image.Image | None = None):
        if not 16 <= size <= 512:
            raise ValueError(f"size 应在 16 到 512 之间，收到的是 {size}。")
        if initial is not None and (not isinstance(initial, Image.Image) or initial.width != initial.height):
            raise ValueError("initial 应是正方形的 PIL 图像。")
        self.size = size
        blank = Image.new("L", (size, size)) if initial is None else initial.convert("L").resize((size, size))
        self._text = _PREFIX + base64.b64encode(_png(blank)).decode()
        self._box = None

    @property
    def image(self) -> Image.Image:
        """画布上现在的样子，模式 L，黑底白线。

        异常：
            ValueError: 画布传来的不是 PNG。
        """
        text = self._box.value if self._box is not None and self._box.value else self._text
        try:
            if not text.startswith(_PREFIX):
                raise ValueError
            picture = Image.open(io.BytesIO(base64.b64decode(text.removeprefix(_PREFIX), validate=True)))
            return picture.convert("L").resize((self.size, self.size))
        except (ValueError, OSError):
            raise ValueError("画布传来的不是一张 PNG 图。请重新运行这一格，再画一次。") from None

    def html(self) -> str:
        """画布的 HTML，自足，不依赖别处的脚本。"""
        return (
            f'<div class="book-sketch"><style>{_STYLE}</style>'
            f'<canvas width="{self.size}" height="{self.size}" data-start="{html.escape(self._text)}" '
            'role="img" aria-label="画线稿的画布，黑底白线，用鼠标或手指画"></canvas>'
            '<p><button type="button" data-do="pen">画笔</button> <button type="button" data-do="eraser">橡皮</button> '
            '<button type="button" data-do="clear">清空</button> <button type="button" data-do="save">存成图片</button></p>'
            f"<script>{_SCRIPT}</script></div>"
        )

    def _ipython_display_(self):
        from IPython.display import HTML, display

        # 构建网站和执行配对笔记本时没有人画，只留画布；有内核时再加一个看不见的文本框，把画的东西传回来
        if os.environ.get("BOOK_SLIDERS") != "static":
            import ipywidgets

            self._box = ipywidgets.Textarea(value=self._text, layout={"display": "none"})
            self._box.add_class("book-sketch-value")
            display(self._box)
        display(HTML(self.html()))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()
