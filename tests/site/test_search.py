"""全文搜索：索引里只有正文，常见的查询第一条就对，界面能用键盘，离开脚本、放进子路径也说得过去。"""

import gzip
import json
import re
from urllib.parse import unquote

import pytest
import site_search
import third_party
import yaml
from support.browser import SITE, built_pages, visit
from support.paths import ROOT

INDEX = SITE / "_static/search/index.json"
QUERIES = [
    (group, str(query), wanted)
    for group, pairs in yaml.safe_load((ROOT / "tests/site/search_queries.yml").read_text("utf-8")).items()
    for query, wanted in pairs.items()
]
# 打错的查询 → 建议里该有的词
MISTYPED = {"扩撒模型": "扩散模型", "shceduler": "Scheduler", "UNte": "UNet", "退化过城": "退化过程", "pipline": "Pipeline",
            "Timstep": "Timestep", "diffusres": "diffusers"}
CHAPTER = "chapters/03-from-scratch.html"
PAGE = "publishing.html"         # 没有公式，打开得快


@pytest.fixture(scope="module")
def searching(site, browser):
    """打开着的搜索页，只看结果的检查都在它上面。"""
    with visit(browser, site, "search.html") as record:
        yield record
        assert record.outside == [] and record.broken == [] and record.errors == []


@pytest.fixture(scope="module")
def index() -> dict:
    assert INDEX.is_file(), f"没有 {INDEX}，请先运行 make book"
    return json.loads(INDEX.read_text("utf-8"))


# 不经过输入框，直接用网站的 rank.js 查；data 为空时用网站的索引。返回每一句的结果
RANK = """async ({queries, data}) => {
    const folder = new URL(document.documentElement.dataset.content_root + "_static/search/", location.href);
    const {createSearch} = await import(new URL("rank.js", folder));
    const search = createSearch(data ?? await (await fetch(new URL("index.json", folder))).json());
    return queries.map(query => {
        const {results, instead = null, partial = false} = search(query);
        return {instead, partial, results: results.map(({record}) => [record.url, record.title])};
    });
}"""


def rank(searching, queries: list[str], data: dict | None = None) -> list[dict]:
    return searching.page.evaluate(RANK, {"queries": queries, "data": data})


@pytest.fixture(scope="module")
def answers(searching) -> dict[str, dict]:
    """search_queries.yml 里每一句的结果，一次查完。"""
    queries = [query for _, query, _ in QUERIES]
    return dict(zip(queries, rank(searching, queries), strict=True))


def ask(page, query: str, scope: str = ".book-search-page") -> dict:
    """在搜索框里输入，等这一句的结果显示出来。"""
    page.fill(f"{scope} input[name=q]", query)
    page.wait_for_function(
        "([scope, query]) => document.querySelector(`${scope} .book-search-results`).dataset.shown === query", arg=[scope, query])
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

def test_index_holds_every_section(index):
    indexed = {record["url"] for record in index["records"]}
    wanted = set()
    for page in built_pages():
        html = (SITE / page).read_text("utf-8")
        article = html[html.index("<article"):html.index("</article>")]
        if page != "search.html":
            wanted |= {f"{page}#{id}" for id in re.findall(r'<section[^>]* id="([^"]+)"', article)}
    assert wanted and wanted - indexed == set()
    assert {url for url in indexed if not re.search(r"#(term-|id\d)", url)} <= wanted, "索引里有网站上没有的节"


def test_index_holds_only_the_article(index):
    noise = ["展开代码", "收起代码", "复制到剪贴板", "本节的链接", "上一页", "切换亮色", "搜索本书", "book-slider", "data:image", "¶"]
    for record in index["records"]:
        assert [word for word in noise if word in record["prose"]] == [], record["url"]
        assert "\\mathbf" not in record["prose"] and "\\(" not in record["prose"], f"{record['url']} 里还有 TeX 源码"
        assert "torch.Size" not in record["prose"] + record["code"], f"{record['url']}：代码的输出不该进索引"


def test_index_stays_small():
    """打开搜索时下载一次，压缩之后（静态托管都会压缩）的大小。"""
    size = len(gzip.compress(INDEX.read_bytes()))
    print(f"索引压缩之后 {size / 1024:.0f} KB")
    assert size < 600 * 1024


def test_sphinx_search_is_gone():
    left = [name for name in site_search.SPHINX_SEARCH if (SITE / name).exists()]
    assert left == []
    for page in built_pages():
        assert not re.search(r"searchtools|searchindex|language_data|sphinx_highlight", (SITE / page).read_text("utf-8")), page


def test_glossary_names_mean_the_same(index):
    same = index["same"]
    glossary = yaml.safe_load((ROOT / "tests/text/toc.yml").read_text("utf-8"))["glossary"]
    for term in glossary:
        assert any(group[0] == term["zh"] and term["en"] in group for group in same), term


def test_formulas_become_what_readers_type():
    assert site_search.plain_math(r"q(\mathbf{x}_t\mid\mathbf{x}_0)") == "q(x_t | x_0)"
    assert site_search.plain_math(r"\boldsymbol\epsilon\sim\mathcal{N}(0, \mathbf{I})") == "ε ~ N(0, I)"
    assert site_search.plain_math(r"\sqrt{\bar\alpha_t}\,\mathbf{x}_0") == "√α_tx_0"


def test_an_empty_index_stops_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(site_search, "site_records", lambda app: [])
    app = type("App", (), {"builder": type("Builder", (), {"format": "html"}), "outdir": tmp_path})
    with pytest.raises(site_search.ExtensionError, match="搜索索引是空的"):
        site_search.build_index(app, None)


# —— 查询 ——

def test_there_are_enough_queries():
    assert len(QUERIES) >= 40


@pytest.mark.parametrize("query, wanted", [pytest.param(q, w, id=f"{g}-{q}") for g, q, w in QUERIES])
def test_first_result(answers, query, wanted):
    results = answers[query]["results"]
    assert results, f"“{query}”没有结果"
    first = results[0][0]
    right = any(first == place if "#" in place else first.startswith(place) for place in wanted.split("|"))
    assert right, f"“{query}”的第一条是 {first}，应当是 {wanted}"


def test_every_heading_finds_itself(searching, index):
    """用一节的标题去查，第一条就是它；几章都有的标题（环境准备），是同名的一节也算。"""
    titles = [record["title"] for record in index["records"] if record["kind"] == "section" and record["title"] != record["page"]]
    assert len(titles) > 100
    wrong = []
    for title, answer in zip(titles, rank(searching, titles), strict=True):
        bare = re.sub(r"^[\d.]+\s*", "", title)
        if not answer["results"] or bare not in answer["results"][0][1]:
            wrong.append((title, answer["results"][:1]))
    assert wrong == []


def section(name: str, title: str, prose: str, **more) -> dict:
    return {"url": f"{name}.html#a", "title": title, "page": "页", "above": "", "kind": "section", "defines": [], "prose": prose,
            "code": ""} | more


def order(searching, query: str, *records: dict) -> list[str]:
    data = {"records": list(records), "same": [], "words": [], "traditional": {}}
    return [url.split(".")[0] for url, _ in rank(searching, [query], data)[0]["results"]]


def test_words_standing_together_come_first(searching):
    """各词连在一起的节在前，其次挨得近的，最后是散在各处的，哪怕散的那一节标题里有其中一个词、词又出现得多。"""
    far = section("far", "权重", "权重很多。" * 5 + "别的话。" * 30 + "损失也很多。" * 5)
    near = section("near", "甲", "这里的损失和权重都存下来。")
    together = section("together", "乙", "别的话。" * 60 + "每一项的损失权重不同。")
    assert order(searching, "损失权重", far, near, together) == ["together", "near", "far"]
    split = section("split", "丙", "先看损失。权重以后再说。")                  # 断开的两句不算连在一起
    assert order(searching, "损失权重", split, together) == ["together", "split"]
    english = section("english", "丁", "The loss weight is one."), section("apart", "weight", "A weight here. " * 9 + "And a loss.")
    assert order(searching, "loss weight", *english) == ["english", "apart"]
    # 只在代码里连着，也算
    assert order(searching, "add noise", section("x", "noise", "noise, add"), section("y", "戊", "", code="add_noise(x)")) == ["y", "x"]


@pytest.mark.parametrize("query", ["采样速度", "图像质量", "训练数据", "梯度下降", "高斯噪声"])
def test_book_sections_with_the_words_together_come_first(searching, index, query):
    """书里真有的说法：正文或标题里有这几个字连着的节，都排在没有的前面（文献另算）。"""
    records = {record["url"]: record for record in index["records"]}
    results = [records[url] for url, _ in rank(searching, [query])[0]["results"]]
    together = [query in re.sub(r"\s", "", r["title"] + "。" + r["prose"] + "。" + r["code"]) for r in results if r["kind"] != "citation"]
    assert True in together and False in together, "这一句分不出先后，换一句"
    assert together == sorted(together, reverse=True)


@pytest.mark.parametrize("typed, meant", MISTYPED.items())
def test_mistyped_query_is_corrected(searching, typed, meant):
    answer = rank(searching, [typed])[0]
    assert answer["instead"] == meant and answer["results"]


def test_correction_is_offered(searching):
    found = ask(searching.page, "扩撒模型")
    assert "没有找到 扩撒模型，你是不是想找 扩散模型？" in found["status"] and found["results"]
    searching.page.click(".book-search-instead")
    searching.page.wait_for_function("/^找到/.test(document.querySelector('.book-search-page .book-search-status')?.textContent)")
    assert searching.page.input_value(".book-search-page input[name=q]") == "扩散模型"


@pytest.mark.parametrize("query", ["qwertyuiop", "火星文明", "？？？", "<b>zzzz</b>"])
def test_no_hit_says_what_to_do(searching, query):
    found = ask(searching.page, query)
    assert found["results"] == []
    assert found["status"].startswith(f"没有找到 {query}。") and "换一个说法" in found["status"]


def test_partly_matching_query_says_so(searching):
    found = ask(searching.page, "扩散模型 火星文明 采样")
    assert "没有一处含有" in found["status"] and found["results"]


def test_excerpt_shows_the_words(searching):
    """摘录取自所查的词最密的地方，词标了出来。"""
    ask(searching.page, "图像质量")
    first = searching.page.locator(".book-search-page .book-search-excerpt").first
    assert "图像质量" in first.locator("mark").all_inner_texts()


# —— 界面 ——

def test_results_are_grouped_and_marked(searching):
    found = ask(searching.page, "采样")
    pages = searching.page.locator(".book-search-page .book-search-page > p").all_inner_texts()
    count = re.search(r"找到 (\d+) 页、(\d+) 处", found["status"])
    assert (int(count[1]), int(count[2])) == (len(pages), len(found["results"]))
    assert len(pages) == len(set(pages)) == len({url.split("#")[0] for url, _ in found["results"]})
    marks = searching.page.locator(".book-search-page mark").all_inner_texts()
    assert "采样" in marks and set(marks) <= {"采样", "取样"}


def test_nothing_is_loaded_until_searching(site, browser):
    with visit(browser, site, PAGE) as opened:
        urls = []
        opened.page.on("request", lambda request: urls.append(request.url.removeprefix(site)))
        assert opened.page.evaluate(
            "performance.getEntriesByType('resource').filter(entry => entry.name.includes('_static/search/')).length") == 0
        open_dialog(opened.page)
        ask(opened.page, "采样", "#pst-search-dialog")
        ask(opened.page, "梯度累加", "#pst-search-dialog")
        assert sorted(url for url in urls if "_static/search/" in url) == ["_static/search/index.json", "_static/search/rank.js"]
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
    with visit(browser, site, PAGE) as opened:
        open_dialog(opened.page)
        ask(opened.page, "信噪比", "#pst-search-dialog")
        opened.page.click("#pst-search-dialog .book-search-list a[href*='chapters/'] >> nth=0")
        opened.page.wait_for_url("**/chapters/**")
        opened.page.wait_for_function("CSS.highlights.get('book-search')?.size > 0")


def test_enter_lists_everything_on_the_search_page(site, browser):
    with visit(browser, site, PAGE) as opened:
        open_dialog(opened.page)
        ask(opened.page, "采样", "#pst-search-dialog")
        opened.page.keyboard.press("Enter")
        opened.page.wait_for_url("**/search.html?q=*")
        opened.page.wait_for_selector(".book-search-page .book-search-list a")
        assert opened.page.input_value(".book-search-page input[name=q]") == "采样"
        opened.page.wait_for_function("document.activeElement.closest('.book-search-page')")
        assert ask(opened.page, "微调")["results"]
        assert unquote(opened.page.url).endswith("search.html?q=微调"), "网址应随着查询改变，好收藏、转发"


def test_screen_readers_hear_the_count(searching):
    found = ask(searching.page, "调度器")
    assert re.fullmatch(r"找到 \d+ 页、\d+ 处。", found["status"])
    assert searching.page.get_attribute(".book-search-page .book-search-status", "role") == "status"
    assert searching.page.get_attribute(".book-search-page .book-search-list", "aria-label") == "搜索结果"


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
    with visit(browser, site, PAGE) as opened:
        opened.page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
        open_dialog(opened.page)
        ask(opened.page, "采样", "#pst-search-dialog")
        opened.page.wait_for_timeout(400)       # 等颜色的过渡结束
        ratios = opened.page.evaluate(CONTRAST)
        assert len(ratios) > 10 and [pair for pair in ratios if pair[1] < 4.5] == []


def test_phone(site, browser):
    with visit(browser, site, PAGE, width=375) as opened:
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
    with visit(browser, site, PAGE) as opened:
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
    with visit(browser, site, PAGE) as opened:
        opened.page.context.route("**/search/index.json", lambda route: route.abort())
        open_dialog(opened.page)
        opened.page.keyboard.type("采样")
        opened.page.wait_for_function(
            "document.querySelector('#pst-search-dialog .book-search-status').textContent.startsWith('搜索的索引没有下载成功')")
        opened.page.context.unroute("**/search/index.json")
        assert ask(opened.page, "梯度累加", "#pst-search-dialog")["results"], "网络恢复之后应当能搜"


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
