"""建好的网站在真实浏览器里的样子：只访问本站，没有报错，滑块能用，手机上不横向滚动。"""

import re

import pytest
import yaml
from fontTools.ttLib import TTFont
from support.browser import SITE, as_phone, serve, visit
from support.paths import ROOT

CHAPTERS = sorted(path.stem for path in (ROOT / "chapters").glob("*.md") if "kernelspec:" in path.read_text("utf-8"))


def test_requests_stay_on_own_origin(opened):
    assert opened.outside == [], f"{opened.name} 请求了别的服务器"


def test_nothing_is_broken(opened):
    assert opened.broken == [], f"{opened.name} 有没取到的文件"
    assert opened.errors == [], f"{opened.name} 的控制台有错误"


def test_controls_stay_on_own_origin(opened, site, browser):
    """用遍页面上的按钮，也不请求别的服务器，没有取不到的文件和报错。"""
    with visit(browser, site, opened.name) as used:
        page, root = used.page, used.page.locator("html")
        before = root.get_attribute("data-mode")
        page.locator(".article-header-buttons .theme-switch-button").click()
        assert root.get_attribute("data-mode") != before, "换配色的按钮没有用"
        for button in page.locator(".article-header-buttons .dropdown-toggle").all():
            button.click()
            assert button.get_attribute("aria-expanded") == "true", "下拉菜单没有打开"
            page.keyboard.press("Escape")
        for summary in page.locator("article details:not(details details) > summary").all():
            summary.click()
        assert page.locator("article details:not(details details):not([open])").count() == 0, "有的折叠块点不开"
        for button in page.locator("button.copybtn").all()[:1]:
            button.click()
            assert "success" in button.get_attribute("class"), "复制按钮没有用"
        for control in page.locator(".book-slider input").all():
            control.press("End")
        page.locator(".search-button__button:visible").first.click()
        assert page.evaluate("document.activeElement.type") == "search", "搜索按钮没有用"
        page.keyboard.press("Escape")
        page.set_viewport_size({"width": 375, "height": 900})
        page.locator(".primary-toggle").click()
        assert page.locator("dialog[open] nav").count(), "手机上的目录没有打开"
        page.keyboard.press("Escape")
        page.wait_for_load_state("networkidle")
    assert (used.outside, used.broken, used.errors) == ([], [], [])


def test_site_at_the_root(browser):
    """其余测试都在子路径下，这里看放在根上也一样。"""
    with serve("/") as root, visit(browser, root, "index.html") as opened:
        assert (opened.outside, opened.broken, opened.errors) == ([], [], [])


@pytest.mark.parametrize("missing", ["没有.html", "chapters/没有/没有"])
def test_not_found_page_leads_home(missing, site, browser):
    """在任何一级目录、任何子路径下，404 页都能回到首页。"""
    with visit(browser, site, missing) as opened:
        link = opened.page.get_by_role("link")
        assert link.inner_text().endswith("首页") and link.get_attribute("href") == site
        link.click()
        opened.page.locator("article").wait_for()
    assert opened.outside == []


def test_language_is_chinese(opened):
    assert opened.page.evaluate("document.documentElement.lang") == "zh-CN"


def test_interface_is_chinese(opened):
    """正文以外的按钮、提示和无障碍标签里都有汉字，没有漏译的英文。"""
    texts = opened.page.evaluate("""() => [...document.querySelectorAll("[title], [aria-label], [placeholder]")]
        .filter(element => !element.closest("article, head"))
        .flatMap(element => ["title", "aria-label", "placeholder"].map(name => element.getAttribute(name)))
        .filter(text => text)""")
    assert texts, "没有找到任何界面文字，选择器可能已经过时"
    assert [text for text in texts if not re.search(r"[\u4e00-\u9fff]", text)] == []


def test_images_have_alt_text(opened):
    alts = opened.page.eval_on_selector_all("article img", "images => images.map(i => [i.alt, i.src.slice(0, 80)])")
    # 没有写替代文字时，docutils 会拿文件名充数
    bad = [src for alt, src in alts if not alt.strip() or re.search(r"\.(png|svg|jpe?g|webp)$", alt)]
    assert bad == [], f"{opened.name} 有图没有替代文字"


def test_images_are_loaded(opened):
    """每幅图都画得出来，解不开的图宽度为 0。"""
    widths = opened.page.evaluate("""() => Promise.all([...document.querySelectorAll("article img")].map(
        async image => { image.loading = "eager"; await image.decode(); return image.naturalWidth; }))""")
    assert all(widths)


def test_glyphs_are_in_the_small_font(opened):
    """公式里用到的 AMS 字形（mjx-c.TEX-A 画出的字）都在删减过的字体里。"""
    used = opened.page.evaluate("""() => [...new Set([...document.querySelectorAll("mjx-c.TEX-A")]
        .map(glyph => getComputedStyle(glyph, "::before").content))]""")
    font = SITE / "_static/mathjax/output/chtml/fonts/woff-v2/MathJax_AMS-Regular.woff"
    kept = TTFont(font).getBestCmap()
    assert font.stat().st_size < 10_000          # 没有删减时有 41 KB
    assert {character for content in used for character in content.strip('"') if ord(character) not in kept} == set()
    if opened.name == "chapters/01-principles.html":
        assert used, "第一章有 𝔼，却没有找到一个 AMS 字形：选择器可能已经过时"


def test_icons_are_in_the_small_font(opened):
    """图标字体只含 _ext/local_assets.py 里列出的字符，页面用到的都要在里面。"""
    used = opened.page.evaluate("""() => [...document.querySelectorAll("*")].flatMap(
        element => ["::before", "::after"].map(part => getComputedStyle(element, part)))
        .filter(style => style.fontFamily.includes("Font Awesome") && /^"."$/u.test(style.content))
        .map(style => style.content[1].codePointAt(0))""")
    icons = TTFont(SITE / "_static/book-icons.woff").getBestCmap()
    assert used, f"{opened.name} 没有一个图标，选择器可能已经过时"
    assert {hex(character) for character in used if character not in icons} == set()


def test_math_is_typeset(opened):
    formulas, typeset, wrong = opened.page.evaluate("""() => {
        const formulas = [...document.querySelectorAll("span.math, div.math")];
        return [formulas.length, formulas.filter(f => f.querySelector("mjx-container")).length,
                formulas.filter(f => f.querySelector("mjx-merror")).map(f => f.textContent)];
    }""")
    assert wrong == [], f"{opened.name} 有排错的公式"
    assert typeset == formulas, f"{opened.name} 的 {formulas} 个公式里只排好了 {typeset} 个"


def test_captions_are_numbered_by_chapter(opened):
    found = re.match(r"chapters/(\d+)-", opened.name)
    chapter = int(found[1]) if found else None
    numbers = opened.page.locator("article .caption-number").all_inner_texts()
    equations = opened.page.locator("article .eqno").all_inner_texts()
    if chapter:
        assert all(re.fullmatch(rf"(图|表|代码) {chapter}\.\d+", text.strip()) for text in numbers), numbers
        assert all(re.match(rf"\({chapter}\.\d+\)", text.strip()) for text in equations), equations


def test_chinese_lines_are_joined(opened):
    """源文件里汉字之间的换行没有留在页面上，浏览器会把它显示成空格。"""
    paragraphs = opened.page.eval_on_selector_all("article p", "ps => ps.map(p => p.textContent)")
    assert [text for text in paragraphs if re.search(r"[\u3001-\u9fff\uff00-\uffef]\n[\u3001-\u9fff]", text)] == []


@pytest.mark.parametrize("screen", [375, 768])
def test_no_sideways_scrolling(opened, screen):
    """手机与平板。"""
    with as_phone(opened.page, screen) as page:
        width = page.evaluate("document.scrollingElement.scrollWidth")
    assert width <= screen, f"{opened.name} 在 {screen} 像素宽的屏幕上有 {width} 像素宽"


@pytest.mark.parametrize("chapter", CHAPTERS or ["还没有任何一章"])
def test_launch_buttons_open_the_notebook(chapter, site, browser):
    """Colab 和 Binder 按钮打开的是仓库里配对的笔记本；仓库地址只写在 _config.yml。"""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    owner_and_name = config["repository"]["url"].removeprefix("https://github.com/").strip("/")
    assert re.fullmatch(r"[^/]+/[^/]+", owner_and_name), "repository.url 应形如 https://github.com/所有者/仓库"
    assert config["repository"]["branch"] == "main"
    assert (ROOT / f"chapters/{chapter}.ipynb").is_file(), f"chapters/{chapter}.md 旁边没有配对的笔记本"
    with visit(browser, site, f"chapters/{chapter}.html") as opened:
        links = opened.page.eval_on_selector_all(".dropdown-launch-buttons a", "links => links.map(a => a.href)")
    assert sorted(links) == [
        f"https://colab.research.google.com/github/{owner_and_name}/blob/main/chapters/{chapter}.ipynb",
        f"https://mybinder.org/v2/gh/{owner_and_name}/main?urlpath=lab/tree/chapters/{chapter}.ipynb",
    ]


def test_chapter_3_has_sliders(site, browser):
    with visit(browser, site, "chapters/03-from-scratch.html") as opened:
        assert opened.page.locator(".book-slider").count() >= 1


def test_sliders_move_the_picture(opened):
    """每个滑块都能用键盘和指针移动，图和数值随之改变。"""
    for slider in opened.page.locator(".book-slider").all():
        inputs = slider.locator("input[type=range]").all()
        assert len(inputs) in (1, 2) and slider.locator("img").count() == 1
        for control in inputs:
            check_slider(opened.page, slider, control)


def check_slider(page, slider, control):
    name = control.evaluate("input => [...input.labels].map(label => label.textContent).join()").strip()
    assert name, "滑块没有标签"
    first, last = control.get_attribute("min"), control.get_attribute("max")
    output = control.locator("xpath=ancestor::label").locator("output")

    def state():
        """当前的值、显示的数值和图；图要真的能显示。"""
        assert slider.locator("img").evaluate("async image => { await image.decode(); return image.naturalWidth; }")
        return control.input_value(), output.inner_text(), slider.locator("img").get_attribute("src")

    def press(key):
        control.press(key)
        return state()

    def differ(before, after, what):
        assert before[1] != after[1], f"滑块“{name}”：{what}后显示的数值没有变"
        assert before[2] != after[2], f"滑块“{name}”：{what}后图没有变"

    control.scroll_into_view_if_needed()
    control.focus()
    at_first = press("Home")
    assert at_first[0] == first, f"滑块“{name}”：Home 键没有回到第一帧"
    differ(at_first, press("ArrowRight"), "按右方向键")
    assert press("ArrowLeft") == at_first, f"滑块“{name}”：左方向键没有退回原处"
    at_last = press("End")
    assert at_last[0] == last, f"滑块“{name}”：End 键没有到最后一帧"
    differ(at_first, at_last, "按 End 键")
    differ(at_last, press("ArrowLeft"), "按左方向键")

    at_first = press("Home")
    box = control.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 8, middle)       # 拇指的中心离左端半个拇指宽
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, middle, steps=5)
    differ(at_first, state(), "用指针拖动、还没有松手时")
    page.mouse.move(box["x"] + box["width"] - 2, middle, steps=5)
    page.mouse.up()
    dragged = state()
    assert dragged[0] == last, f"滑块“{name}”：指针拖不到最后一帧"
    differ(at_first, dragged, "用指针拖动")
