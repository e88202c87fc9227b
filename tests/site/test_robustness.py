"""不如意的浏览器：禁用 Cookie、没有 bfcache、很窄的屏幕、旧的 Safari、不执行脚本的笔记本。"""

import json
import re

import pytest
from PIL import Image
from support.browser import CHROMIUM, SITE, built_pages, visit
from support.paths import ROOT

from book_utils import Slider

LIGHT = "publishing.html"
SLIDERS = "chapters/02-hugging-face.html"


# —— 禁用 Cookie ——

@pytest.fixture(scope="module")
def without_storage(browser, tmp_path_factory):
    """设成“不允许任何网站保存数据”的 Chromium：碰一下 localStorage 就抛出异常。"""
    profile = tmp_path_factory.mktemp("profile")
    (profile / "Default").mkdir()
    preferences = {"profile": {"default_content_setting_values": {"cookies": 2}}}
    (profile / "Default" / "Preferences").write_text(json.dumps(preferences), encoding="utf-8")
    context = browser.browser_type.launch_persistent_context(
        profile, executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        viewport={"width": 1280, "height": 900})
    context.set_default_timeout(120_000)
    yield context
    context.close()


def test_everything_works_without_cookies(site, without_storage):
    page = without_storage.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(site + "404.html")        # 这一页没有本书的脚本，看看浏览器真的不许
    assert page.evaluate("() => { try { localStorage; return 'allowed'; } catch (error) { return error.name; } }") == "SecurityError"

    page.goto(site + LIGHT)
    page.locator(".search-button__button:visible").first.click()
    page.wait_for_selector("#pst-search-dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#pst-search-dialog:not([open])", state="attached")
    page.keyboard.press("Control+k")
    page.wait_for_selector("#pst-search-dialog[open]")
    page.keyboard.type("采样")
    page.locator("#pst-search-dialog .book-search-list a").first.click()
    page.wait_for_url("**#*")

    page.goto(site + LIGHT)
    themes = []
    for _ in range(3):                  # 自动、亮、暗，转一圈
        page.locator(".article-header-buttons .theme-switch-button").click()
        themes.append(page.locator("html").get_attribute("data-mode"))
    assert sorted(themes) == ["auto", "dark", "light"]
    page.set_viewport_size({"width": 375, "height": 900})
    page.locator(".primary-toggle").click()
    page.wait_for_selector("dialog[open] nav")
    assert errors == []
    page.close()


def test_storage_still_works_where_allowed(site, browser):
    """允许保存时不换掉：配色记得住。"""
    with visit(browser, site, LIGHT) as opened:
        opened.page.locator(".article-header-buttons .theme-switch-button").click()
        chosen = opened.page.locator("html").get_attribute("data-mode")
        opened.page.reload()
        assert opened.page.locator("html").get_attribute("data-mode") == chosen != "auto"


# —— 滑块 ——

def test_slider_agrees_with_its_picture_after_going_back(site, browser):
    """没有 bfcache 时，浏览器返回后把滑块放回原处，图也要跟上。"""
    with visit(browser, site, SLIDERS) as opened:
        page = opened.page
        page.evaluate("addEventListener('unload', () => {})")            # 有这个监听的页面不进 bfcache
        control = page.locator(".book-slider input").first
        control.focus()
        control.press("Home")
        page.goto(site + LIGHT)
        page.go_back()
        page.wait_for_load_state("load")
        shown = page.evaluate("""() => {
            const slider = document.querySelector(".book-slider");
            const {frames, labels} = JSON.parse(slider.querySelector('script[type="application/json"]').textContent);
            const value = slider.querySelector("input").value;
            return {value, label: labels[0][value], output: slider.querySelector("output").textContent,
                    same: slider.querySelector("img").src === frames[value]};
        }""")
    assert shown["same"] and shown["label"] == shown["output"], shown
    assert shown["value"] == "0", "浏览器没有恢复滑块的位置，这一项没有检查到什么"


@pytest.fixture(scope="module")
def slider_page() -> str:
    return Slider(lambda v: Image.new("L", (8, 8), v), {"灰度": [0, 100, 200]}, alt="灰块").html()


def test_slider_without_scripts_says_so(browser, slider_page):
    """不信任的笔记本去掉 script 与 style：滑块不能拖，旁边写明为什么、怎么办。"""
    page = browser.new_page()
    page.set_content(re.sub(r"<(script|style)\b.*?</\1>", "", slider_page, flags=re.DOTALL))
    assert page.locator("input").is_disabled()
    assert page.locator(".book-slider-still").is_visible()
    said = page.locator(".book-slider-still").inner_text()
    assert "信任" in said and "运行这一格" in said
    page.close()


def test_slider_with_scripts_says_nothing(browser, slider_page):
    page = browser.new_page()
    page.set_content(slider_page)
    assert page.locator("input").is_enabled() and page.locator(".book-slider-still").count() == 0
    before = page.locator("img").get_attribute("src")
    page.locator("input").press("ArrowRight")
    assert page.locator("img").get_attribute("src") != before
    page.close()


@pytest.mark.parametrize("name", built_pages())
def test_every_frame_is_different(name):
    """书里的每个滑块，图都随值而变：没有两帧相同，帧数等于取值的组合数。"""
    html = (SITE / name).read_text(encoding="utf-8")
    data = re.findall(r'<div class="book-slider".*?<script type="application/json">(.*?)</script>', html, re.DOTALL)
    assert len(data) == html.count('class="book-slider"')
    for text in data:
        slider = json.loads(text)
        combinations = 1
        for labels in slider["labels"]:
            combinations *= len(labels)
        assert len(slider["frames"]) == len(slider["alts"]) == combinations
        assert len(set(slider["frames"])) == combinations, f"{slider['alts'][0]}：只有 {len(set(slider['frames']))} 种图"


# —— 旧的浏览器 ——

@pytest.mark.parametrize("path", [
    *sorted((ROOT / "_static").glob("*.js")), ROOT / "_ext/search_rank.js", ROOT / "book_utils/slider.js"], ids=lambda path: path.name)
def test_scripts_have_no_lookbehind(path):
    """Safari 16.4 之前不认正则表达式的向后断言，整个文件都会作废。"""
    assert re.findall(r"\(\?<[=!]", path.read_text(encoding="utf-8")) == []


# —— 很窄的屏幕 ——

@pytest.mark.parametrize("name", [name for name in built_pages() if 'class="math' in (SITE / name).read_text(encoding="utf-8")])
def test_inline_formulas_fit_a_narrow_phone(name, site, browser):
    with visit(browser, site, name, width=320) as opened:
        for width in (320, 360):
            opened.page.set_viewport_size({"width": width, "height": 800})
            # 两帧之后，窗口大小变化的处理都已做完
            opened.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))")
            wide = opened.page.evaluate("""() => [...document.querySelectorAll("article span.math mjx-container")]
                .filter(formula => !formula.closest("table"))
                .map(formula => [formula.getBoundingClientRect().right - formula.closest("p, li, dd, dt, figcaption, h1, h2, h3, h4")
                    .getBoundingClientRect().right, formula.textContent]).filter(([over]) => over > 1)""")
            assert wide == [], f"{name} 在 {width} 像素宽时有公式伸出"
            assert opened.page.evaluate("document.scrollingElement.scrollWidth") <= width
