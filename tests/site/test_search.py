"""全文搜索：索引里只有正文，常见的查询第一条就对，界面能用键盘，离开脚本、放进子路径也说得过去。"""

import gzip
import json
import re
import sys
from urllib.parse import unquote

import pytest
import yaml
from support.paths import ROOT
from support.browser import SITE, built_pages, visit

import site_search
import third_party

BUNDLE = SITE / "_static/pagefind"
QUERIES = [
    (group, str(query), wanted)
    for group, pairs in yaml.safe_load((ROOT / "tests/site/search_queries.yml").read_text("utf-8")).items()
    for query, wanted in pairs.items()
]
# 打错的查询 → 建议里该有的词
MISTYPED = {"扩撒模型": "扩散模型", "shceduler": "Scheduler", "UNte": "UNet", "退化过城": "退化过程", "pipline": "Pipeline",
            "Timstep": "Timestep", "diffusres": "diffusers"}
CHAPTER = "chapters/03-from-scratch.html"


@pytest.fixture(scope="module")
def opened(site, browser):
    """打开着的搜索页，逐个查询都在它上面试。"""
    with visit(browser, site, "search.html") as record:
        yield record
        assert record.outside == [] and record.broken == [] and record.errors == []


def ask(page, query: str, scope: str = ".book-search-page") -> dict:
    """在搜索框里输入，等结果出来。"""
    page.locator(f"{scope} .book-search-status").evaluate("status => status.textContent = ''")
    page.fill(f"{scope} input[name=q]", query)
    page.wait_for_function(
        "scope => /找到|没有/.test(document.querySelector(scope + ' .book-search-status').textContent)", arg=scope)
    results = page.eval_on_selector_all(f"{scope} .book-search-page a, {scope} .book-search-list a", """links => links
        .map(a => [a.href, a.querySelector(".book-search-title")?.textContent ?? ""])""")
    root = page.evaluate("document.documentElement.dataset.content_root")
    base = page.evaluate("root => new URL(root, location.href).href", root)
    results = list(dict.fromkeys((unquote(url.removeprefix(base)), title) for url, title in results))
    return {"status": page.text_content(f"{scope} .book-search-status"), "results": results}


def open_dialog(page) -> None:
    page.keyboard.press("/")
    page.wait_for_selector("#pst-search-dialog[open]")


# —— 索引 ——

@pytest.fixture(scope="module")
def fragments() -> list[dict]:
    files = sorted((BUNDLE / "fragment").glob("*.pf_fragment"))
    assert files, f"{BUNDLE} 里没有索引，请先运行 make book"
    return [json.loads(gzip.decompress(path.read_bytes())[len(b"pagefind_dcd"):]) for path in files]


def test_index_holds_every_section(fragments):
    indexed = {fragment["meta"]["url"] for fragment in fragments}
    wanted = set()
    for page in built_pages():
        html = (SITE / page).read_text("utf-8")
        article = html[html.index("<article"):html.index("</article>")]
        if page != "search.html":
            wanted |= {f"{page}#{id}" for id in re.findall(r'<section[^>]* id="([^"]+)"', article)}
    assert wanted and wanted - indexed == set()
    assert {url for url in indexed if not re.search(r"#(term-|id\d)", url)} <= wanted, "索引里有网站上没有的节"


def test_index_holds_only_the_article(fragments):
    noise = ["展开代码", "收起代码", "复制到剪贴板", "本节的链接", "上一页", "切换亮色", "搜索本书", "book-slider", "data:image", "¶"]
    for fragment in fragments:
        text = fragment["content"].replace("\u200b", "")
        prose = text.split(site_search.CODE_BELOW)[0]
        assert [word for word in noise if word in prose] == [], fragment["meta"]["url"]
        assert "\\mathbf" not in prose and "\\(" not in prose, f"{fragment['meta']['url']} 里还有 TeX 源码"
    everything = "".join(fragment["content"] for fragment in fragments).replace("\u200b", "")
    assert "torch.Size" not in everything, "代码的输出不该进索引"


def test_sphinx_search_is_gone():
    left = [name for name in site_search.SPHINX_SEARCH if (SITE / name).exists()]
    assert left == []
    for page in built_pages():
        assert not re.search(r"searchtools|searchindex|language_data|sphinx_highlight", (SITE / page).read_text("utf-8")), page


def test_only_needed_files_are_shipped():
    names = {path.name.split(".")[0] for path in BUNDLE.iterdir()}
    assert names == {"filter", "fragment", "index", "pagefind", "pagefind-entry", "pagefind-worker", "wasm", "words"}


def test_glossary_names_mean_the_same():
    same = json.loads((BUNDLE / "words.json").read_text("utf-8"))["same"]
    glossary = yaml.safe_load((ROOT / "tests/text/toc.yml").read_text("utf-8"))["glossary"]
    for term in glossary:
        assert any(group[0] == term["zh"] and term["en"] in group for group in same), term


def test_formulas_become_what_readers_type():
    assert site_search.plain_math(r"q(\mathbf{x}_t\mid\mathbf{x}_0)") == "q(x_t | x_0)"
    assert site_search.plain_math(r"\boldsymbol\epsilon\sim\mathcal{N}(0, \mathbf{I})") == "ε ~ N(0, I)"
    assert site_search.plain_math(r"\sqrt{\bar\alpha_t}\,\mathbf{x}_0") == "√α_tx_0"


def test_a_failed_index_stops_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(site_search.sys, "executable", "/bin/false")
    with pytest.raises(site_search.ExtensionError, match="应当为 1 节建索引，实际建了 0 节（退出码 1）"):
        site_search.run_pagefind([site_search.Record("a.html#b", "标题", "页", [])], tmp_path / "pagefind")


# —— 查询 ——

def test_there_are_enough_queries():
    assert len(QUERIES) >= 40


@pytest.mark.parametrize("query, wanted", [pytest.param(q, w, id=f"{g}-{q}") for g, q, w in QUERIES])
def test_first_result(opened, query, wanted):
    found = ask(opened.page, query)
    assert found["results"], f"“{query}”没有结果：{found['status']}"
    first = found["results"][0][0]
    right = any(first == place if "#" in place else first.startswith(place) for place in wanted.split("|"))
    assert right, f"“{query}”的第一条是 {first}，应当是 {wanted}"


def test_every_heading_finds_itself(opened, fragments):
    """用一节的标题去查，第一条就是它；几章都有的标题（环境准备），是同名的一节也算。"""
    wrong = []
    for fragment in fragments:
        meta = fragment["meta"]
        if meta["kind"] == "section" and meta["title"] != meta["page"]:
            results = ask(opened.page, meta["title"])["results"]
            bare = re.sub(r"^[\d.]+\s*", "", meta["title"])
            if not results or bare not in results[0][1]:
                wrong.append((meta["title"], results[:1]))
    assert wrong == []


@pytest.mark.parametrize("typed, meant", MISTYPED.items())
def test_mistyped_query_is_corrected(opened, typed, meant):
    found = ask(opened.page, typed)
    assert f"没有找到 {typed}，你是不是想找 {meant}？" in found["status"]
    assert found["results"]
    opened.page.click(".book-search-instead")
    opened.page.wait_for_function("/^找到/.test(document.querySelector('.book-search-page .book-search-status')?.textContent)")
    assert opened.page.input_value(".book-search-page input[name=q]") == meant


@pytest.mark.parametrize("query", ["qwertyuiop", "火星文明", "？？？", "<b>zzzz</b>"])
def test_no_hit_says_what_to_do(opened, query):
    found = ask(opened.page, query)
    assert found["results"] == []
    assert found["status"].startswith(f"没有找到 {query}。") and "换一个说法" in found["status"]


def test_partly_matching_query_says_so(opened):
    found = ask(opened.page, "扩散模型 火星文明 采样")
    assert "没有一处含有" in found["status"] and found["results"]


# —— 界面 ——

def test_results_are_grouped_and_marked(opened):
    found = ask(opened.page, "采样")
    pages = opened.page.locator(".book-search-page .book-search-page > p").all_inner_texts()
    count = re.search(r"找到 (\d+) 页、(\d+) 处", found["status"])
    assert (int(count[1]), int(count[2])) == (len(pages), len(found["results"]))
    assert len(pages) == len(set(pages)) == len({url.split("#")[0] for url, _ in found["results"]})
    marks = opened.page.locator(".book-search-page mark").all_inner_texts()
    assert "采样" in marks and set(marks) <= {"采样", "取样"}


def test_nothing_is_loaded_until_searching(site, browser):
    with visit(browser, site, CHAPTER) as opened:
        sizes = {}
        opened.page.on("response", lambda r: sizes.update({r.url.removeprefix(site): len(r.body())}))
        opened.page.wait_for_timeout(300)
        assert [url for url in sizes if "pagefind" in url] == []
        open_dialog(opened.page)
        ask(opened.page, "采样", "#pst-search-dialog")
        opened.page.wait_for_load_state("networkidle")
        total = sum(size for url, size in sizes.items() if "pagefind" in url)
        print(f"第一次搜索下载 {total / 1024:.0f} KB，{len(sizes)} 个文件")
        assert 0 < total < 600 * 1024
        assert opened.outside == [] and opened.broken == [] and opened.errors == []


def test_keyboard(site, browser):
    with visit(browser, site, CHAPTER) as opened:
        page = opened.page
        page.keyboard.press("Control+k")
        page.wait_for_selector("#pst-search-dialog[open]")
        page.keyboard.press("Escape")
        page.wait_for_selector("#pst-search-dialog:not([open])", state="attached")
        open_dialog(page)
        page.keyboard.type("练习")
        page.wait_for_selector("#pst-search-dialog .book-search-list a")
        assert page.evaluate("document.activeElement.name") == "q"

        def focused():
            return page.evaluate("[...document.querySelectorAll('#pst-search-dialog .book-search-list a')].indexOf(document.activeElement)")

        page.keyboard.press("ArrowDown")
        assert focused() == 0
        page.keyboard.press("ArrowDown")
        assert focused() == 1
        page.keyboard.press("ArrowUp")
        assert focused() == 0
        page.keyboard.press("ArrowUp")
        assert page.evaluate("document.activeElement.name") == "q"
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.wait_for_selector("#pst-search-dialog:not([open])", state="attached")
        assert unquote(page.url).endswith("#练习")
        page.wait_for_function("CSS.highlights.get('book-search')?.size > 0")       # 到了那一节，所查的词要标出来
        page.keyboard.press("Escape")
        assert page.evaluate("CSS.highlights.has('book-search')") is False


def test_words_are_marked_on_another_page(site, browser):
    with visit(browser, site, "index.html") as opened:
        open_dialog(opened.page)
        ask(opened.page, "信噪比", "#pst-search-dialog")
        opened.page.click("#pst-search-dialog .book-search-list a[href*='chapters/'] >> nth=0")
        opened.page.wait_for_url("**/chapters/**")
        opened.page.wait_for_function("CSS.highlights.get('book-search')?.size > 0")


def test_enter_lists_everything_on_the_search_page(site, browser):
    with visit(browser, site, CHAPTER) as opened:
        open_dialog(opened.page)
        ask(opened.page, "采样", "#pst-search-dialog")
        opened.page.keyboard.press("Enter")
        opened.page.wait_for_url("**/search.html?q=*")
        opened.page.wait_for_selector(".book-search-page .book-search-list a")
        assert opened.page.input_value(".book-search-page input[name=q]") == "采样"
        opened.page.wait_for_function("document.activeElement.closest('.book-search-page')")
        assert ask(opened.page, "微调")["results"]
        assert unquote(opened.page.url).endswith("search.html?q=微调"), "网址应随着查询改变，好收藏、转发"


def test_screen_readers_hear_the_count(opened):
    found = ask(opened.page, "调度器")
    assert re.fullmatch(r"找到 \d+ 页、\d+ 处。", found["status"])
    assert opened.page.get_attribute(".book-search-page .book-search-status", "role") == "status"
    assert opened.page.get_attribute(".book-search-page .book-search-list", "aria-label") == "搜索结果"


CONTRAST = """() => {
    const parse = color => color.match(/[\\d.]+/g).map(Number);
    const background = element => {
        for (; element; element = element.parentElement) {
            const [r, g, b, a = 1] = parse(getComputedStyle(element).backgroundColor);
            if (a > 0) return [r, g, b];
        }
        return [255, 255, 255];
    };
    const light = rgb => rgb.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    return [...document.querySelectorAll("#pst-search-dialog :is(.book-search-status, mark, p, .book-search-above, "
        + ".book-search-title, .book-search-excerpt, .book-search-more a, .book-search-close)")].map(element => {
        const [a, b] = [light(parse(getComputedStyle(element).color)), light(background(element))];
        return [element.className || element.tagName, (Math.max(a, b) + .05) / (Math.min(a, b) + .05)];
    });
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(site, browser, theme):
    with visit(browser, site, CHAPTER) as opened:
        opened.page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
        open_dialog(opened.page)
        ask(opened.page, "采样", "#pst-search-dialog")
        opened.page.wait_for_timeout(400)       # 等颜色的过渡结束
        ratios = opened.page.evaluate(CONTRAST)
        assert len(ratios) > 10 and [pair for pair in ratios if pair[1] < 4.5] == []


def test_phone(site, browser):
    with visit(browser, site, CHAPTER, width=375) as opened:
        page = opened.page
        page.locator(".search-button__button:visible").first.click()
        ask(page, "UNet2DModel", "#pst-search-dialog")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 375
        assert page.evaluate("""() => [...document.querySelectorAll("#pst-search-dialog, #pst-search-dialog *")]
            .every(element => element.getBoundingClientRect().right <= 376)"""), "搜索框里有东西伸出了屏幕"
        page.click(".book-search-close")
        page.wait_for_selector("#pst-search-dialog:not([open])", state="attached")


def test_works_under_a_sub_path(browser, site):
    assert site.endswith("/some/sub/path/")
    with visit(browser, site, CHAPTER) as opened:
        page = opened.page
        open_dialog(page)
        ask(page, "梯度累加", "#pst-search-dialog")
        page.click("#pst-search-dialog .book-search-list a >> nth=0")
        page.wait_for_url("**/some/sub/path/glossary.html#term-*")
        open_dialog(page)
        ask(page, "采样", "#pst-search-dialog")
        page.keyboard.press("Enter")
        page.wait_for_url("**/some/sub/path/search.html?q=*")
        page.wait_for_selector(".book-search-page .book-search-list a")
        assert opened.outside == [] and opened.broken == [] and opened.errors == []


def test_failure_to_load_is_explained(site, browser):
    with visit(browser, site, CHAPTER) as opened:
        opened.page.context.route("**/*.pf_meta", lambda route: route.abort())
        open_dialog(opened.page)
        opened.page.keyboard.type("采样")
        opened.page.wait_for_function(
            "document.querySelector('#pst-search-dialog .book-search-status').textContent.startsWith('搜索的索引没有下载成功')")


def test_without_scripts_the_search_page_says_so(site, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site + "search.html?q=采样")
    assert "搜索需要脚本" in page.inner_text("article")
    assert page.get_attribute("article form.bd-search", "action") in ("#", "search.html")
    context.close()


# —— 第三方软件与许可 ——

def test_every_component_has_a_version_and_a_licence():
    html = (SITE / "third-party.html").read_text("utf-8")
    for component in third_party.COMPONENTS:
        text = (SITE / "_static/licenses" / component.file).read_text("utf-8")
        assert len(text) > 500 and "{copyright}" not in text, component.name
        assert f'href="_static/licenses/{component.file}"' in html
        assert re.fullmatch(r"\d+(\.\d+)+\S*", third_party.find_version(component)), component.name
        assert third_party.find_version(component) in html


def test_a_missing_package_is_named():
    unknown = third_party.Component("某软件", "https://example.org/", "演示", "MIT", "no-such-package")
    with pytest.raises(third_party.ExtensionError, match="某软件 取自 no-such-package"):
        third_party.find_version(unknown)
