"""两面滑块：有内核时现算现画，没有内核时用预先画好的帧（第 3.3 节）。"""

import base64
import html
import io
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

MAX_BYTES = 300_000         # 一个滑块的 HTML 上限，免得网页和笔记本过大

# 放在每个滑块里的脚本与样式：脚本只认自己的父元素，不需要编号，也不依赖任何库
_SCRIPT = Path(__file__).with_name("slider.js").read_text(encoding="utf-8").strip()
_STYLE = Path(__file__).with_name("slider.css").read_text(encoding="utf-8").strip()
# 脚本一执行就去掉这句话，放开滑块；不信任的笔记本、GitHub 和禁用脚本的浏览器不执行它
_STILL = (
    "滑块在这里还不能拖动：没有执行它的脚本。请先信任这个笔记本（JupyterLab 的命令面板里选 Trust Notebook），"
    "或者运行这一格；在网站上，请允许本站运行 JavaScript。"
)


class Slider:
    """一个或两个滑块控制一幅图，在有内核和没有内核的地方都能拖动。

    - 有内核（JupyterLab、Colab）：显示 ipywidgets 滑块，每次移动都调用 draw 重画，
      数值滑块可停在两端之间的任意值；
    - 没有内核（网站、导出的笔记本）：显示预先画好的帧和浏览器自带的滑块。
      打印时是中间一帧。

    参数：
        draw:   ``draw(值)`` 或 ``draw(值1, 值2)``，返回 ``PIL.Image`` 或 matplotlib 的 ``Figure``。
                PIL 图像无损保存、放大时保持像素；Figure 有损保存。
        values: 滑块的名字 → 取值列表，一个或两个滑块。列表中的数须递增；也可以都是字符串。
        alt:    给读屏软件的文字说明，会自动加上当前取值。
    异常：
        ValueError: 滑块个数、取值或 draw 的返回值不合要求，或帧太多、太大。
    来源：第 3.3 节。
    """

    def __init__(self, draw: Callable[..., Image.Image | Figure], values: Mapping[str, Sequence], alt: str):
        if not 1 <= len(values) <= 2:
            raise ValueError(f"滑块应有一个或两个，收到的是 {len(values)} 个：{list(values)}。")
        if not alt.strip():
            raise ValueError("请用 alt 写一句话说明图的内容，读屏软件的用户靠它了解这幅图。")
        for name, choices in values.items():
            if len(choices) < 2:
                raise ValueError(f"滑块“{name}”至少要有两个取值，收到的是 {list(choices)}。")
            is_text = [isinstance(choice, str) for choice in choices]
            if any(is_text) != all(is_text):
                raise ValueError(f"滑块“{name}”的取值应都是数或都是字符串，收到的是 {list(choices)}。")
            if not any(is_text) and any(a >= b for a, b in itertools.pairwise(choices)):
                raise ValueError(f"滑块“{name}”的取值应递增，收到的是 {list(choices)}。")
        self.draw = draw
        self.values = {name: list(choices) for name, choices in values.items()}
        self.alt = alt

    def html(self) -> str:
        """没有内核时的样子：一段自足的 HTML，含全部帧。"""
        labels = [[_label(choice) for choice in choices] for choices in self.values.values()]
        pixelated = ""
        frames, alts = [], []
        for choices in itertools.product(*self.values.values()):
            picture = self.draw(*choices)
            if isinstance(picture, Image.Image):
                pixelated = "image-rendering:pixelated"
            frames.append(f"data:image/webp;base64,{base64.b64encode(_encode(picture, 'webp')).decode()}")
            settings = "，".join(f"{name} = {_label(c)}" for name, c in zip(self.values, choices, strict=True))
            alts.append(f"{self.alt}（{settings}）")

        middles = [len(choices) // 2 for choices in self.values.values()]
        first = 0
        for middle, choices in zip(middles, self.values.values(), strict=True):
            first = first * len(choices) + middle
        controls = "".join(
            f'<label>{html.escape(name)} <input disabled type="range" min="0" max="{len(texts) - 1}" step="1" '
            f'value="{middle}" aria-valuetext="{html.escape(texts[middle])}"> '
            f"<output>{html.escape(texts[middle])}</output></label>"
            for name, texts, middle in zip(self.values, labels, middles, strict=True)
        )
        # "</" 会提前结束 script 元素，JSON 里写成 "<\/" 含义不变
        data = json.dumps({"frames": frames, "alts": alts, "labels": labels}, ensure_ascii=False)
        data = data.replace("</", r"<\/")
        page = (
            f'<div class="book-slider" role="group" aria-label="{html.escape(self.alt)}"><style>{_STYLE}</style>'
            f'<img src="{frames[first]}" alt="{html.escape(alts[first])}" style="{pixelated}">{controls}'
            f'<p class="book-slider-still">{_STILL}</p>'
            f'<script type="application/json">{data}</script>'
            f"<script>{_SCRIPT}</script></div>"
        )
        if len(page.encode()) > MAX_BYTES:
            raise ValueError(
                f"滑块有 {len(frames)} 帧，共 {len(page.encode()) / 1000:.0f} KB，"
                f"超过上限 {MAX_BYTES / 1000:.0f} KB。请减少取值，或让 draw 画小一些。"
            )
        return page

    def widget(self):
        """有内核时的样子：ipywidgets 滑块，每次移动都重画。"""
        import ipywidgets

        controls = [_control(name, choices) for name, choices in self.values.items()]
        picture = ipywidgets.Image(format="png", layout={"width": "44rem", "max_width": "100%"})

        def redraw(_change=None):
            picture.value = _encode(self.draw(*(control.value for control in controls)), "png")

        for control in controls:
            control.observe(redraw, names="value")
        redraw()
        return ipywidgets.VBox([picture, *controls])

    def _repr_mimebundle_(self, include=None, exclude=None):
        bundle = {
            "text/plain": "滑块：" + "；".join(
                f"{name}（{_label(choices[0])} 到 {_label(choices[-1])}，{len(choices)} 个值）"
                for name, choices in self.values.items()
            ),
            "text/html": self.html(),
        }
        # 构建网站和执行配对笔记本时没有人拖动控件，只留 HTML 一面
        if os.environ.get("BOOK_SLIDERS") != "static":
            bundle = _view(self.widget()) | bundle
        return bundle


def _view(widget) -> dict:
    """控件要显示的内容。

    ipywidgets 8 的控件自己会交出来；7（如 Colab）的控件只会用 ``_ipython_display_`` 当场显示自己，
    与 HTML 一面合不到一起，所以照它那一种格式写出同样的内容。
    """
    if hasattr(widget, "_repr_mimebundle_"):
        return widget._repr_mimebundle_()
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    return {"application/vnd.jupyter.widget-view+json": view}


def _label(value) -> str:
    """取值的显示文字：小数至多四位有效数字。"""
    return value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _control(name: str, choices: list):
    """为一组取值选一种 ipywidgets 控件，停在中间的取值上。"""
    import ipywidgets

    middle = choices[len(choices) // 2]
    options = {"description": name, "style": {"description_width": "initial"}, "layout": {"width": "44rem"}}
    if isinstance(middle, str):
        return ipywidgets.SelectionSlider(options=choices, value=middle, **options)
    if all(isinstance(choice, int) for choice in choices):
        return ipywidgets.IntSlider(value=middle, min=choices[0], max=choices[-1], **options)
    step = (choices[-1] - choices[0]) / 100
    return ipywidgets.FloatSlider(
        value=middle, min=choices[0], max=choices[-1], step=step, readout_format=".3f", **options
    )


def _encode(picture: Image.Image | Figure, image_format: str) -> bytes:
    """把一帧编码成 WebP 或 PNG。"""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", facecolor="white")
        plt.close(picture)              # 否则 inline 后端会把每一帧再显示一遍
        if image_format == "webp":
            drawn = Image.open(buffer).convert("RGB")
            buffer = io.BytesIO()
            drawn.save(buffer, "webp", quality=80, method=6)
    elif isinstance(picture, Image.Image):
        picture.save(buffer, image_format, **({"lossless": True, "method": 6} if image_format == "webp" else {}))
    else:
        raise ValueError(f"draw 应返回 PIL.Image 或 matplotlib 的 Figure，收到的是 {type(picture).__name__}。")
    return buffer.getvalue()
