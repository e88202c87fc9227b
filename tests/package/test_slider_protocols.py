"""滑块在 ipywidgets 7 与 8 里都是活的。

两套版本显示自己的办法不同：8 的控件用 ``_repr_mimebundle_`` 交出内容，7 的控件（Colab）没有它，
只有 ``_ipython_display_`` 当场发布。这里把装着的 8 换成 7 的办法，再由 IPython 真的去显示。
整本书在 ipywidgets 7.7.1 里的执行见 make colab。
"""

import ipywidgets
import pytest
from IPython.core.formatters import DisplayFormatter
from IPython.display import display
from PIL import Image

from book_utils import Slider

VIEW = "application/vnd.jupyter.widget-view+json"


def show_as_version_7(self, **kwargs):
    """与 ipywidgets 7.7.1 的 Widget._ipython_display_ 发布的内容相同。"""
    display({"text/plain": repr(self)[:110], VIEW: {"version_major": 2, "version_minor": 0, "model_id": self._model_id}},
            raw=True)


@pytest.fixture(params=[7, 8], ids=["ipywidgets 7", "ipywidgets 8"])
def version(request, monkeypatch):
    monkeypatch.delenv("BOOK_SLIDERS", raising=False)
    if request.param == 7:
        monkeypatch.delattr(ipywidgets.Widget, "_repr_mimebundle_")
        monkeypatch.setattr(ipywidgets.Widget, "_ipython_display_", show_as_version_7, raising=False)
    return request.param


def test_slider_is_shown_live_with_its_html_face(version):
    drawn = []

    def draw(value):
        drawn.append(value)
        return Image.new("L", (4, 4), round(255 * value))

    made = []
    slider = Slider(draw, {"值": [0.0, 0.5, 1.0]}, alt="灰块")
    slider.widget = lambda: made.append(Slider.widget(slider)) or made[-1]
    data, _ = DisplayFormatter().format(slider)

    assert {VIEW, "text/html", "text/plain"} <= set(data)
    assert data["text/plain"].startswith("滑块：值") and "data:image/webp" in data["text/html"]
    (box,) = made
    assert data[VIEW] == {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    # 显示的确实是那个会重画的控件，能停在预先画好的帧之间
    picture, control = box.children
    before = picture.value
    control.value = 0.3
    assert drawn[-1] == 0.3 and picture.value != before


def test_static_slider_needs_no_widget_at_all(version, monkeypatch):
    monkeypatch.setenv("BOOK_SLIDERS", "static")
    monkeypatch.setattr(Slider, "widget", lambda self: pytest.fail("不该造控件"))
    data, _ = DisplayFormatter().format(Slider(lambda v: Image.new("L", (4, 4)), {"值": [0, 1]}, alt="图"))
    assert set(data) == {"text/html", "text/plain"}
