"""读者用得到的东西：版式、页首、术语释义、复制按钮、夜间、打印，以及同意之后才联网的实时代码。"""

import io
import json
import re
import socket
import sqlite3
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import reading
import yaml
from docutils import nodes
from PIL import Image
from support.browser import SITE, built_pages, visit
from support.paths import ROOT

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
PARTS = {chapter["file"]: part["caption"] for part in TOC["parts"] for chapter in part["chapters"]}
ORDER = [TOC["root"], *PARTS]
# 由源文件生成的页；搜索页等是主题自己的
PAGES = [page for page in built_pages() if page.removesuffix(".html") in ORDER]
CODE_PAGES = [page for page in PAGES if (ROOT / page).with_suffix(".ipynb").is_file()]
CHAPTER = "chapters/03-from-scratch.html"
BINDER = (
    f"https://mybinder.org/build/gh/{CONFIG['repository']['url'].removeprefix('https://github.com/').strip('/')}"
    f"/{CONFIG['repository']['branch']}"
)


@pytest.fixture(scope="module")
def chapter(browser, site):
    """第三章，开着不动；会改动页面的测试自己另开一页。"""
    with visit(browser, site, CHAPTER) as opened:
        yield opened.page


@pytest.fixture(scope="module")
def phone(browser, site):
    with visit(browser, site, CHAPTER, 375) as opened:
        yield opened.page


@pytest.fixture
def own_chapter(browser, site):
    with visit(browser, site, CHAPTER) as opened:
        yield opened


def test_every_page_is_covered():
    assert [page.removesuffix(".html") for page in PAGES] == sorted(ORDER)
    assert CODE_PAGES


# —— 版式 ——

def test_line_holds_about_40_characters(chapter):
    for width in (1440, 1920, 1280):        # 最后回到原来的宽度
        chapter.set_viewport_size({"width": width, "height": 900})
        characters, spacing = chapter.locator("article p:not(.admonition *)").first.evaluate("""p => {
            const style = getComputedStyle(p), size = parseFloat(style.fontSize);
            return [p.clientWidth / size, parseFloat(style.lineHeight) / size];
        }""")
        assert 38 <= characters <= 42.5, width
        assert 1.6 <= spacing <= 2


def test_inline_code_does_not_stretch_its_line(chapter):
    """只含文字和代码名的段落，高度是行高的整数倍。"""
    rests = chapter.eval_on_selector_all("article section > p:has(code):not(:has(.math))", """ps => ps.map(p => {
        const line = parseFloat(getComputedStyle(p).lineHeight);
        return Math.abs(p.getBoundingClientRect().height / line - Math.round(p.getBoundingClientRect().height / line));
    })""")
    assert len(rests) > 5
    assert max(rests) < 0.05


def test_chinese_is_never_slanted(own_chapter):
    slanted = own_chapter.page.evaluate("""() => {
        document.querySelector("article p").innerHTML += "<em>强调</em>";
        return [...document.querySelectorAll("article *")]
            .filter(e => getComputedStyle(e).fontStyle !== "normal" && /[\u4e00-\u9fff]/.test(e.textContent)
                && !e.closest("mjx-container"))
            .map(e => e.outerHTML.slice(0, 80));
    }""")
    assert slanted == []
    assert own_chapter.page.locator("article em").first.evaluate("e => getComputedStyle(e).textEmphasisStyle") == "dot"


def test_punctuation_stays_with_its_formula(phone):
    """行内公式后面的标点不落到下一行的行首。"""
    checked, fallen = phone.evaluate("""() => {
        const punctuated = [...document.querySelectorAll("article span.math")].filter(formula =>
            formula.nextSibling?.nodeType === Node.TEXT_NODE && /^[，。、；：？！）”]/.test(formula.nextSibling.data));
        const fallen = punctuated.filter(formula => {
            const range = document.createRange();
            range.setStart(formula.nextSibling, 0);
            range.setEnd(formula.nextSibling, 1);
            return range.getBoundingClientRect().top > formula.getBoundingClientRect().bottom;
        });
        return [punctuated.length, fallen.map(formula => formula.parentElement.textContent.slice(0, 40))];
    }""")
    assert checked > 20
    assert fallen == []


def test_equations_and_tables_fit_the_phone(phone):
    """宽公式从左端看起，表的一列至少放得下四个字；多出来的在自己的框里滚动。"""
    clipped = phone.eval_on_selector_all("article div.math", """equations => equations
        .filter(e => e.querySelector("mjx-math").getBoundingClientRect().left < e.getBoundingClientRect().left - 1)
        .map(e => e.textContent.slice(0, 40))""")
    assert clipped == []
    widths = phone.eval_on_selector_all("article td", """cells => cells.filter(cell => cell.textContent.trim().length > 3)
        .map(cell => cell.clientWidth / parseFloat(getComputedStyle(cell).fontSize))""")
    assert widths and min(widths) >= 4


# —— 页首与页尾 ——

@pytest.mark.parametrize("opened", PAGES, indirect=True)
def test_breadcrumb_names_book_part_and_page(opened, site):
    name = opened.name.removesuffix(".html")
    title = opened.page.locator("article h1").evaluate("h1 => h1.firstChild.textContent")
    crumbs = opened.page.locator('nav[aria-label="所在位置"] li').all_inner_texts()
    home = opened.page.locator(".book-breadcrumb a").evaluate("a => a.href.replace(/#.*/, '')")
    here = opened.page.locator('.book-breadcrumb [aria-current="page"]').inner_text()
    assert crumbs == [text for text in (CONFIG["title"], PARTS.get(name), title) if text]
    assert here == title
    assert home == f"{site}index.html"


@pytest.mark.parametrize("opened", PAGES, indirect=True)
def test_neighbours_are_named(opened):
    """上一页、下一页按目录的次序，写着那一页的标题。"""
    here = ORDER.index(opened.name.removesuffix(".html"))
    wanted = {"left-prev": ORDER[here - 1] if here else None, "right-next": (*ORDER, None)[here + 1]}
    for css, neighbour in wanted.items():
        link = opened.page.locator(f".prev-next-footer a.{css}")
        assert link.count() == bool(neighbour)
        if neighbour:
            source = (ROOT / f"{neighbour}.md").read_text("utf-8")
            assert re.search(r"^# (.+)$", source, re.M)[1] in link.inner_text()
            assert link.evaluate("a => a.href").endswith(f"/{neighbour}.html")


def test_reading_time_follows_the_documented_rule():
    seconds = reading.reading_seconds
    assert seconds(nodes.paragraph("", "字" * reading.CHARACTERS_PER_MINUTE)) == 60
    assert seconds(nodes.paragraph("", "UNet 有 3 层")) == pytest.approx(60 * 6 / reading.CHARACTERS_PER_MINUTE)
    code = nodes.literal_block("a\n\nb", "a\n\nb", language="ipython3")
    assert seconds(code) == 2 * reading.SECONDS_PER_CODE_LINE
    assert seconds(nodes.literal_block("a", "a", language="myst-ansi")) == 0
    assert seconds(nodes.math_block("", r"a \\ b")) == 2 * reading.SECONDS_PER_EQUATION
    assert seconds(reading.dropdown_main("", nodes.paragraph("", "答案"))) == 0
    assert seconds(nodes.figure("", nodes.caption("", "字" * 5))) == reading.SECONDS_PER_FIGURE + 1


@pytest.mark.parametrize("page", CODE_PAGES)
def test_chapter_opens_with_its_facts(page, browser, site):
    """读多久，跑多久（与执行缓存里的记录一致），到哪里去跑。"""
    with visit(browser, site, page) as opened:
        facts = opened.page.locator("h1 + .book-facts li").all_inner_texts()
        links = opened.page.eval_on_selector_all(".book-facts a", "links => links.map(a => a.href)")
        menu = opened.page.eval_on_selector_all(".dropdown-launch-buttons a", "links => links.map(a => a.href)")
    assert re.fullmatch(r"阅读约 \d+ 分钟", facts[0])
    assert re.fullmatch(r"运行约 \d+ (秒|分钟)（(.+核的电脑上)?实测）", facts[1])
    assert facts[2:] == ["下载笔记本", "在 Colab 打开", "在 Binder 打开"]
    assert sorted(links[1:]) == sorted(menu)

    with sqlite3.connect(ROOT / "_build/.jupyter_cache/global.db") as cache:
        records = cache.execute("select uri, data from nbcache").fetchall()
    measured = [json.loads(data)["execution_seconds"] for uri, data in records if uri.endswith(page[:-5] + ".md")]
    amount, unit = re.search(r"(\d+) (秒|分钟)", facts[1]).groups()
    stated = int(amount) * (1 if unit == "秒" else 60)
    assert any(abs(stated - seconds) <= max(6, 0.35 * seconds) for seconds in measured), (stated, measured)


@pytest.mark.parametrize("page", CODE_PAGES)
def test_download_is_the_committed_notebook(page, browser, site):
    """下载的笔记本就是仓库里配对的那一份，一个字节不差；页头的按钮和章首的链接都是它。"""
    with visit(browser, site, page) as opened:
        links = opened.page.eval_on_selector_all(
            ".btn-download-notebook-button, .book-facts a[download]", "links => links.map(a => a.href)"
        )
        assert len(links) == 2 and len(set(links)) == 1
        content = opened.page.request.get(links[0]).body()
    assert content == (ROOT / page).with_suffix(".ipynb").read_bytes()


# —— 术语释义 ——

def tip_of(page):
    return page.locator("#book-tip[role=tooltip]")


def first_term(page):
    link = page.locator("article a:has(> .std-term)").first
    link.scroll_into_view_if_needed()
    return link


def test_glossary_tip_on_focus_and_escape(own_chapter):
    page = own_chapter.page
    link, tip = first_term(page), tip_of(page)
    assert not tip.is_visible()
    link.focus()
    assert tip.is_visible()
    assert link.get_attribute("aria-describedby") == tip.get_attribute("id")
    definition = re.search(r"退化过程\nCorruption Process\n {2}(.+)", (ROOT / "glossary.md").read_text("utf-8"))[1]
    assert "退化过程 Corruption Process" in tip.inner_text() and definition in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    assert link.get_attribute("aria-describedby") is None
    link.blur()
    link.focus()
    page.keyboard.press("Tab")
    tip.wait_for(state="hidden")


def test_glossary_tip_on_hover_can_be_reached_with_the_mouse(own_chapter):
    page = own_chapter.page
    link, tip = first_term(page), tip_of(page)
    link.hover()
    tip.wait_for(state="visible")
    tip.hover()
    page.wait_for_timeout(600)
    assert tip.is_visible(), "鼠标移到释义上时它不该消失"
    page.mouse.move(5, 5)
    tip.wait_for(state="hidden")


def test_glossary_tip_on_touch(browser, site):
    """手指第一次轻触看释义，第二次才去术语表；释义不超出屏幕，里面有到术语表的链接。"""
    context = browser.new_context(viewport={"width": 375, "height": 700}, has_touch=True)
    page = context.new_page()
    page.goto(site + CHAPTER)
    for link in page.locator("article a:has(> .std-term)").all():
        link.scroll_into_view_if_needed()
        link.tap()
        tip_of(page).wait_for(state="visible")
        box = tip_of(page).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 375
        assert box["y"] >= 0 and box["y"] + box["height"] <= 700
        assert page.url.endswith(CHAPTER)
        assert tip_of(page).get_by_text("到术语表").get_attribute("href") == link.evaluate("a => a.href")
        page.touchscreen.tap(5, 690)        # 轻触别处，收起
        tip_of(page).wait_for(state="hidden")
    link.tap()
    tip_of(page).wait_for(state="visible")
    link.tap()
    page.wait_for_url(re.compile(r"glossary\.html#term-"))
    context.close()


def test_glossary_tip_typesets_its_formula(own_chapter):
    page = own_chapter.page
    link = page.locator("article a", has_text="时间步").first
    link.focus()
    page.locator("#book-tip mjx-container").nth(1).wait_for()      # 释义里有两个 t
    assert "\\(" not in tip_of(page).inner_text()


def test_glossary_data_is_small():
    text = (SITE / CHAPTER).read_text("utf-8")
    data = re.search(r'<script type="application/json" id="book-terms">(.*?)</script>', text)[1]
    assert set(json.loads(data)) == set(re.findall(r'#(term-[^"]+)"><span class="xref std std-term"', text))
    assert len(data.encode()) < 10_000


# —— 复制按钮 ——

def test_copy_buttons_are_for_code_only(chapter):
    blocks = chapter.eval_on_selector_all("article div.highlight > pre", """pres => pres.map(pre =>
        [!!pre.closest(".cell_output"), pre.parentElement.querySelectorAll("button.copybtn").length])""")
    assert [count for is_output, count in blocks if is_output] == [0] * sum(out for out, _ in blocks)
    assert [count for is_output, count in blocks if not is_output] == [1] * sum(not out for out, _ in blocks)


def test_copy_button_works_from_the_keyboard(own_chapter, site):
    page = own_chapter.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site)
    button = page.locator("article .cell_input button.copybtn").first
    assert "复制" in button.get_attribute("data-tooltip")
    button.focus()
    page.wait_for_function("button => getComputedStyle(button).opacity === '1'", arg=button.element_handle())
    button.press("Enter")
    page.wait_for_function("async () => (await navigator.clipboard.readText()).includes('import')")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == page.locator("article .cell_input pre").first.inner_text().strip()


# —— 夜间 ——

def test_figures_are_legible_in_the_dark(own_chapter):
    """夜间的每幅图（滑块的帧也在内）：底色浅，最深与最浅处的对比不小于 4.5。"""
    page = own_chapter.page
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    images = page.locator("article img").all()
    assert len(images) > 10
    for image in images:
        image.scroll_into_view_if_needed()
        image.evaluate("image => image.decode()")
        pixels = np.asarray(Image.open(io.BytesIO(image.screenshot())).convert("L")) / 255
        luminance = pixels ** 2.2
        alt = image.get_attribute("alt")
        assert np.quantile(luminance, 0.95) > 0.6, f"{alt}：底色太暗"
        assert (luminance.max() + 0.05) / (luminance.min() + 0.05) >= 4.5, f"{alt}：对比太小"


# —— 打印 ——

def test_printed_chapter_has_answers_and_no_buttons(own_chapter):
    page = own_chapter.page
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    control = page.locator(".book-slider input").first
    control.evaluate("input => { input.value = 0; input.dispatchEvent(new Event('input')); }")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.locator("details:not([open])").count() == 0
    text = page.evaluate("document.body.innerText")
    assert text.count("参考答案") == (ROOT / "chapters/03-from-scratch.md").read_text("utf-8").count("参考答案")
    assert "两边取平方即得" in text, "练习 3.4 的答案没有印出来"
    for word in ("上一页", "下一页", "本页内容", "下载笔记本", "在 Colab 打开", "搜索"):
        assert word not in text
    assert "阅读约" in text
    for selector in ("button", "nav", "input", "a.headerlink", "#book-tip"):
        seen = page.eval_on_selector_all(selector, "all => all.filter(e => e.checkVisibility()).map(e => e.outerHTML)")
        assert seen == [], f"纸上不该有 {selector}"
    middle = control.evaluate("input => Math.ceil(input.max / 2)")
    assert control.input_value() == str(middle), "滑块应印中间一帧"

    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.locator("details:not([open])").count() > 0
    assert control.input_value() == "0"


def test_paper_holds_the_widest_content(browser, site):
    """A4 的版心宽 174 mm：公式、代码、表和图都不超出。"""
    width = round(174 / 25.4 * 96)
    with visit(browser, site, CHAPTER, width) as opened:
        page = opened.page
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        wide = page.eval_on_selector_all("article :is(mjx-container, pre, table, img)", f"""all => all
            .filter(e => e.checkVisibility())
            .filter(e => e.getBoundingClientRect().right > {width} + 1 || e.scrollWidth > e.clientWidth + 1)
            .map(e => e.outerHTML.slice(0, 120))""")
    assert wide == []


def test_pdf_is_a4_and_folds_stay_as_they_were(own_chapter):
    page = own_chapter.page
    closed = page.locator("details:not([open])").count()
    document = page.pdf(prefer_css_page_size=True)
    sizes = set(re.findall(rb"/MediaBox \[0 0 (\d+)[.\d]* (\d+)", document))
    assert sizes in ({(b"594", b"841")}, {(b"595", b"841")}, {(b"595", b"842")})
    pages = len(re.findall(rb"/Type /Page\b", document))
    assert 25 < pages < 70
    assert page.locator("details:not([open])").count() == closed


# —— 实时代码 ——

@contextmanager
def asked(browser, site):
    """打开第三章，点“启用实时代码”，停在征求同意的对话框。"""
    with visit(browser, site, CHAPTER) as opened:
        opened.requests = []
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.locator(".dropdown-launch-buttons > button").click()
        opened.page.get_by_role("button", name="启用实时代码").click()
        opened.page.get_by_role("dialog", name="启用实时代码").wait_for()
        yield opened


def test_nothing_is_loaded_before_consent(browser, site):
    with asked(browser, site) as opened:
        assert "mybinder.org" in opened.page.get_by_role("dialog").inner_text()
        assert opened.requests == [] and opened.outside == []
        opened.page.get_by_role("button", name="取消").click()
        opened.page.wait_for_timeout(300)
        assert opened.requests == []
        assert opened.page.locator(".book-live-consent, .book-live-bar").count() == 0


def test_unreachable_binder_leaves_the_page_as_it_was(browser, site):
    with asked(browser, site) as opened:
        page = opened.page
        before = page.locator("article").inner_html()
        page.get_by_role("button", name="连接").click()
        page.get_by_text("没有连上 Binder").wait_for()
        assert opened.outside == [BINDER]
        assert page.locator("article").inner_html() == before
        page.get_by_role("button", name="关闭").click()
        assert page.locator(".book-live-bar").count() == 0


def test_connecting_can_be_cancelled(browser, site):
    with asked(browser, site) as opened:
        page = opened.page
        opened.page.context.route(BINDER, lambda route: None)       # 一直不回答
        page.get_by_role("button", name="连接").click()
        page.locator(".book-live-bar").get_by_role("button", name="取消").click()
        page.get_by_text("已经取消").wait_for()
        assert page.locator(".thebe-cell").count() == 0


@pytest.fixture(scope="module")
def jupyter():
    """本机上的 Jupyter 服务器，充当 Binder 开的那台电脑；工作目录是仓库。"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["ip=127.0.0.1", f"port={port}", "port_retries=0", "open_browser=False", "allow_origin=*", "allow_root=True"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyter_server", "--IdentityProvider.token=book", f"--ServerApp.root_dir={ROOT}",
         *(f"--ServerApp.{option}" for option in options)],
        stderr=subprocess.PIPE, encoding="utf-8",
    )
    for line in process.stderr:
        if "is running at" in line:
            break
    # 读走其余的日志，免得管道写满
    drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}/"
    process.terminate()
    process.wait()
    drain.wait()


def test_live_cells_run_in_a_kernel(jupyter, browser, site):
    """连上之后：代码可以改，内核在 chapters/ 里，找得到 book_utils，滑块当场计算，不去任何 CDN。"""
    with asked(browser, site) as opened:
        page = opened.page
        ready = json.dumps({"phase": "ready", "url": jupyter, "token": "book"})
        page.context.route(BINDER, lambda route: route.fulfill(
            headers={"content-type": "text/event-stream", "access-control-allow-origin": "*"}, body=f"data: {ready}\n\n",
        ))
        page.context.route(f"{jupyter}**", lambda route: route.continue_())
        page.get_by_role("button", name="连接").click()
        page.get_by_text("实时代码已启用").wait_for()
        static = page.locator(".cell_output img:visible").count()
        cells = page.locator("article div.cell:has(.thebe-input)")

        def run(i, code):
            cells.nth(i).locator(".CodeMirror").evaluate("(editor, code) => editor.CodeMirror.setValue(code)", code)
            cells.nth(i).get_by_role("button", name="运行", exact=True).click()
            return cells.nth(i).locator(".book-live-output")

        # 本机的环境里到处都能 import book_utils，Binder 上靠的是 sys.path 里的 ..
        where = "import pathlib, sys, book_utils\nprint('在', pathlib.Path().resolve().name, '..' in sys.path)"
        run(0, where).get_by_text("在 chapters True").wait_for()
        assert page.locator(".cell_output img:visible").count() == static, "没有运行的格，原来的输出应该还在"

        output = run(1, "from PIL import Image\nbook_utils.Slider("
                        "lambda a: Image.new('L', (8, 8), int(255 * a)), {'亮度': [0.0, 0.5, 1.0]}, alt='灰色方块')")
        picture = output.locator("img")
        picture.wait_for()
        first = picture.get_attribute("src")
        output.locator(".noUi-handle").press("ArrowRight")
        page.wait_for_function("([image, src]) => image.src !== src", arg=[picture.element_handle(), first])

        page.get_by_role("button", name="重启内核").click()
        page.wait_for_timeout(2000)
        run(0, "import sys\nprint('重启后', '..' in sys.path, 'Image' in globals())").get_by_text("重启后 True False").wait_for()

        assert [url for url in opened.outside if not url.startswith((jupyter, BINDER))] == []
        assert opened.errors == []
