"""无障碍：用 axe-core 检查每一页，亮色与暗色、电脑与手机各一遍，平时收起的也展开来查。"""

import pytest
from axe_playwright_python.sync_playwright import Axe
from support.browser import built_pages, visit

# axe-core 的四级里，最低的 minor 不算
LEVELS = {"moderate": "中等", "serious": "严重", "critical": "致命"}
THEMES = ["light", "dark"]
WIDTHS = {"电脑": 1280, "手机": 375}

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


def findings(page, inside: str | None = None) -> list[str]:
    """不合要求的地方，一处一段，说明在哪、为什么；inside 把检查限在页面的一部分。"""
    # 排好的公式里，给读屏软件的是旁边的 MathML；画出来的字形有几千个元素，查它们只费时间
    context = inside or {"exclude": [["mjx-math"]]}
    found = Axe().run(page, context, {"resultTypes": ["violations"]}).response["violations"]
    return [
        f"\n[{LEVELS[rule['impact']]}] {rule['id']}：{rule['help']}\n"
        f"  位置：{' '.join(map(str, node['target']))}\n"
        f"  内容：{' '.join(node['html'].split())[:200]}\n"
        f"  原因：{'；'.join(check['message'] for check in node['any'] + node['all'] + node['none'])}"
        for rule in found if rule["impact"] in LEVELS for node in rule["nodes"]
    ]


@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", built_pages())
def test_page_is_accessible(name, theme, device, site, browser):
    with visit(browser, site, name, width=WIDTHS[device], theme=theme) as opened:
        page = opened.page
        assert page.evaluate("document.documentElement.dataset.theme") == theme, "没有换成要检查的配色"
        page.evaluate(REVEAL)
        bad = findings(page)
    assert not bad, f"{name}（{theme}，{device}）有 {len(bad)} 处：" + "\n".join(bad)


@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
def test_dialogs_are_accessible(theme, device, site, browser):
    """搜索框、下拉菜单，以及手机上的目录：打开了再查。"""
    with visit(browser, site, "index.html", width=WIDTHS[device], theme=theme) as opened:
        page = opened.page
        bad = []
        for button in page.locator(".article-header-buttons .dropdown-toggle").all():
            button.click()
            bad += findings(page, ".dropdown-menu.show")
            page.keyboard.press("Escape")
        page.locator(".search-button__button:visible").first.click()
        page.keyboard.type("扩散模型")
        page.wait_for_timeout(1000)             # 边输入边给出结果时，等它出来
        bad += findings(page, "dialog[open]")
        page.keyboard.press("Escape")
        if device == "手机":
            for toggle in (".primary-toggle", ".secondary-toggle"):
                page.locator(toggle).click()
                bad += findings(page, "dialog[open]")
                page.keyboard.press("Escape")
    assert not bad, "\n".join(bad)


def test_checker_can_fail(site, browser):
    """检查本身有效：故意放进看不清的字和没有名字的按钮，都要查得出来。"""
    with visit(browser, site, "index.html") as opened:
        opened.page.locator("article p").first.evaluate("""p => {
            p.style.color = "#ccc";
            p.insertAdjacentHTML("afterend", "<button></button>");
        }""")
        bad = "".join(findings(opened.page))
    assert "color-contrast" in bad and "button-name" in bad


def test_wide_formulas_scroll_by_keyboard(site, browser):
    """手机上，比屏幕宽的公式能选中并用方向键滚动；装得下的不占一次 Tab 键。"""
    with visit(browser, site, "chapters/03-from-scratch.html", width=375) as opened:
        stops = opened.page.eval_on_selector_all(
            "div.math mjx-container", "all => all.map(f => [f.scrollWidth > f.clientWidth, f.tabIndex])"
        )
    assert {wide for wide, _ in stops} == {True, False}, "这一章宽窄公式都有，页面可能没有排好"
    assert all(index == (0 if wide else -1) for wide, index in stops)
