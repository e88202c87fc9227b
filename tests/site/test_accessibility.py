"""无障碍：用 axe-core 检查每一页，平时收起的也展开来查。

全部规则在电脑、亮色下查一遍；换了配色，只有对比度会变，所以暗色只查对比度；换到手机，会变的是哪些东西看得见、
能不能滚动、挨得多近，所以手机上只查与版面有关的规则。
代码里的字有成千上万个，颜色却只有几种：不逐字交给 axe，由 test_code_colors_have_contrast 每种查一次。
"""

import pytest
from axe_playwright_python.sync_playwright import Axe
from support.browser import as_dark, visit

# axe-core 的四级里，最低的 minor 不算
LEVELS = {"moderate": "中等", "serious": "严重", "critical": "致命"}
THEMES = ["light", "dark"]
WIDTHS = {"电脑": 1280, "手机": 375}
CONTRAST = "color-contrast"
# 排好的公式里，给读屏软件的是旁边的 MathML；画出来的字形有几千个元素，查它们只费时间
FORMULAS, CODE = "mjx-math", ".highlight pre"
ENOUGH = 4.5                # WCAG 2.2 的 AA 级，一般大小的字

# 展开折叠的答案和代码，显出悬停时才有的链接和按钮，把滑块移到最后一帧
REVEAL = """() => {
    document.querySelectorAll("details").forEach(details => details.open = true);
    document.querySelectorAll(".toggle-hidden").forEach(box => box.classList.remove("toggle-hidden"));
    document.head.insertAdjacentHTML("beforeend", `<style>
        .headerlink, .copybtn { visibility: visible !important; opacity: 1 !important; }
        *, ::before, ::after { transition: none !important; animation: none !important; }</style>`);
    document.querySelectorAll("input[type=range]").forEach(input => {
        input.value = input.max;
        input.dispatchEvent(new Event("input", {bubbles: true}));
    });
}"""
# 代码里出现的每一种（文字颜色，底色）→ 对比度，连同一个例子
CODE_COLORS = """() => {
    const parse = color => color.match(/[\\d.]+/g).map(Number);
    const luminance = rgb => rgb.slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = element => {
        for (let e = element; e; e = e.parentElement) {
            const rgba = parse(getComputedStyle(e).backgroundColor);
            if (rgba.length < 4 || rgba[3] === 1) return rgba;
        }
        return [255, 255, 255];
    };
    const found = {};
    for (const element of document.querySelectorAll(".highlight pre, .highlight pre span")) {
        if (![...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim())) continue;
        const pair = [getComputedStyle(element).color, ground(element)];
        if (pair in found) continue;
        const [a, b] = [luminance(parse(pair[0])), luminance(pair[1])].sort((x, y) => y - x);
        found[pair] = [(a + 0.05) / (b + 0.05), element.className, element.textContent.slice(0, 30)];
    }
    return found;
}"""


def findings(page, options: dict | None = None, inside: str | None = None) -> list[str]:
    """不合要求的地方，一处一段，说明在哪、为什么；inside 把检查限在页面的一部分。"""
    context = inside or {"exclude": [[FORMULAS], [CODE]] if options == ONLY_CONTRAST else [[FORMULAS]]}
    found = Axe().run(page, context, {"resultTypes": ["violations"]} | (options or {})).response["violations"]
    return [
        f"\n[{LEVELS[rule['impact']]}] {rule['id']}：{rule['help']}\n"
        f"  位置：{' '.join(map(str, node['target']))}\n"
        f"  内容：{' '.join(node['html'].split())[:200]}\n"
        f"  原因：{'；'.join(check['message'] for check in node['any'] + node['all'] + node['none'])}"
        for rule in found if rule["impact"] in LEVELS for node in rule["nodes"]
    ]


ONLY_CONTRAST = {"runOnly": {"type": "rule", "values": [CONTRAST]}}
ALL_BUT_CONTRAST = {"rules": {CONTRAST: {"enabled": False}}}
# 换了宽度结果会变的规则：看得见与否、滚动、间距、视口、地标（窄屏收起两侧的栏，另有开关）
LAYOUT = {"runOnly": {"type": "rule", "values": [
    "aria-hidden-focus", "bypass", "button-name", "landmark-banner-is-top-level",
    "landmark-complementary-is-top-level", "landmark-main-is-top-level", "landmark-no-duplicate-banner",
    "landmark-no-duplicate-main", "landmark-one-main", "landmark-unique", "link-name", "meta-viewport",
    "nested-interactive", "page-has-heading-one", "region", "scrollable-region-focusable", "skip-link", "target-size",
]}}


@pytest.fixture(scope="module")
def revealed(opened, site, browser):
    """展开了一切的一页：另开，免得打扰别的检查。"""
    with visit(browser, site, opened.name) as record:
        record.page.evaluate(REVEAL)
        yield record


def test_page_is_accessible(revealed):
    bad = findings(revealed.page, ALL_BUT_CONTRAST) + findings(revealed.page, ONLY_CONTRAST)
    assert not bad, f"{revealed.name}（亮色，电脑）有 {len(bad)} 处：" + "\n".join(bad)


def test_dark_page_has_contrast(revealed):
    with as_dark(revealed.page) as page:
        bad = findings(page, ONLY_CONTRAST)
    assert not bad, f"{revealed.name}（暗色）有 {len(bad)} 处：" + "\n".join(bad)


def test_page_is_accessible_on_a_phone(opened, site, browser):
    """另开一页：宽的代码块能不能选中，主题在打开页面时就定下了。"""
    with visit(browser, site, opened.name, width=WIDTHS["手机"]) as phone:
        phone.page.evaluate(REVEAL)
        bad = findings(phone.page, LAYOUT)
    assert not bad, f"{opened.name}（手机）有 {len(bad)} 处：" + "\n".join(bad)


@pytest.mark.parametrize("theme", THEMES)
def test_code_colors_have_contrast(theme, revealed):
    page = revealed.page
    if theme == "dark":
        with as_dark(page):
            colors = page.evaluate(CODE_COLORS)
    else:
        colors = page.evaluate(CODE_COLORS)
    if page.locator(CODE).count():
        assert colors, "有代码，却没有找到一种颜色：选择器可能已经过时"
    assert [seen for seen in colors.values() if seen[0] < ENOUGH] == []


@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
def test_dialogs_are_accessible(theme, device, site, browser):
    """搜索框、下拉菜单，以及手机上的目录：打开了再查。"""
    with visit(browser, site, "index.html", width=WIDTHS[device], theme=theme) as opened:
        page = opened.page
        bad = []
        for button in page.locator(".article-header-buttons .dropdown-toggle").all():
            button.click()
            bad += findings(page, inside=".dropdown-menu.show")
            page.keyboard.press("Escape")
        page.locator(".search-button__button:visible").first.click()
        page.keyboard.type("扩散模型")
        page.locator("dialog[open] a").first.wait_for()             # 边输入边给出结果，等它出来
        bad += findings(page, inside="dialog[open]")
        page.keyboard.press("Escape")
        if device == "手机":
            for toggle in (".primary-toggle", ".secondary-toggle"):
                page.locator(toggle).click()
                bad += findings(page, inside="dialog[open]")
                page.keyboard.press("Escape")
    assert not bad, "\n".join(bad)


def test_checker_can_fail(site, browser):
    """检查本身有效：故意放进看不清的字、没有名字的按钮、看不清的代码，都要查得出来。"""
    with visit(browser, site, "chapters/03-from-scratch.html") as opened:
        opened.page.locator("article p").first.evaluate("""p => {
            p.style.color = "#ccc";
            p.insertAdjacentHTML("afterend", "<button></button>");
        }""")
        opened.page.locator(f"{CODE} span").first.evaluate("span => { span.style.color = '#eee'; span.textContent = '看不清'; }")
        page = opened.page
        bad = "".join(findings(page, ONLY_CONTRAST) + findings(page, ALL_BUT_CONTRAST))
        faint = [seen for seen in page.evaluate(CODE_COLORS).values() if seen[0] < ENOUGH]
    assert CONTRAST in bad and "button-name" in bad
    assert [seen[2] for seen in faint] == ["看不清"]


def test_wide_formulas_scroll_by_keyboard(site, browser):
    """手机上，比屏幕宽的公式能选中并用方向键滚动；装得下的不占一次 Tab 键。"""
    with visit(browser, site, "chapters/03-from-scratch.html", width=375) as opened:
        stops = opened.page.eval_on_selector_all(
            "div.math mjx-container", "all => all.map(f => [f.scrollWidth > f.clientWidth, f.tabIndex])"
        )
    assert {wide for wide, _ in stops} == {True, False}, "这一章宽窄公式都有，页面可能没有排好"
    assert all(index == (0 if wide else -1) for wide, index in stops)
