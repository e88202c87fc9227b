"""在无界面的 Chromium 里打开建好的网站，记下每一页的请求和报错。"""

import functools
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from support.paths import ROOT

SITE = ROOT / "_build/html"
CHROMIUM = Path("/usr/bin/chromium")        # Debian 的软件包；Playwright 自带的要另外下载


def built_pages() -> list[str]:
    """网站的每一页，相对 _build/html 的路径；还没有构建时只有 index.html，测试会因此失败。"""
    pages = sorted(
        path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html")
        if path.relative_to(SITE).parts[0] not in ("_static", "_sources", "404.html")      # 404.html 不是书页
    )
    return pages or ["index.html"]


class _Handler(SimpleHTTPRequestHandler):
    """与静态托管一样：网站放在 prefix 下，找不到的网址得到 404.html。"""

    prefix = "/"

    def send_head(self):
        if not self.path.startswith(self.prefix):
            return self.send_error(404)
        self.path = self.path.removeprefix(self.prefix.rstrip("/"))
        return super().send_head()

    def send_error(self, code, *args):
        self.send_response(code)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write((SITE / "404.html").read_bytes())

    def log_message(self, *args):
        pass


@contextmanager
def serve(prefix: str = "/some/sub/path/") -> Iterator[str]:
    """在回环地址的空闲端口上提供网站，给出网址。

    网站默认放在子路径下，像 GitHub Pages 的项目网站那样：页面里若有以“/”开头的网址，测试就会发现。
    """
    if not (SITE / "index.html").is_file():
        pytest.fail(f"还没有构建网站：{SITE / 'index.html'} 不存在。请先运行 make book。", pytrace=False)
    handler = type("Handler", (_Handler,), {"prefix": prefix})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}{prefix}"
    server.shutdown()


_driver = None              # 同一个进程里只能有一个 Playwright：先打开的打开它，各处的 chromium() 共用


@contextmanager
def chromium() -> Iterator[Browser]:
    """打开一个无界面的 Chromium；可以同时打开几个。"""
    global _driver
    if not CHROMIUM.is_file():
        pytest.fail(
            f"找不到 {CHROMIUM}。请安装 Debian 软件包 chromium 和 fonts-noto-cjk：apt-get install chromium fonts-noto-cjk",
            pytrace=False,
        )
    with ExitStack() as stack:
        if _driver is None:
            _driver = stack.enter_context(sync_playwright())
            stack.callback(_forget_driver)
        browser = _driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


def _forget_driver() -> None:
    global _driver
    _driver = None


@dataclass
class Visit:
    """打开着的一页，和打开它时发生的事。"""

    name: str
    page: Page
    outside: list[str] = field(default_factory=list)    # 发往别的服务器的请求，都已拦下
    broken: list[str] = field(default_factory=list)     # 4xx、5xx 和没有完成的请求
    errors: list[str] = field(default_factory=list)     # 控制台错误和脚本异常

    def screenshot(self, name: str) -> str:
        """把现在的样子存成 _build/failures/名字.png，返回路径。"""
        file = re.sub(r"[^\w.-]+", "_", name) + ".png"
        path = ROOT / "_build" / "failures" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)
        return str(path.relative_to(ROOT))


@contextmanager
def as_phone(page: Page, width: int = 375) -> Iterator[Page]:
    """暂时换成手机的宽度，用完还原。"""
    before = page.viewport_size
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")    # 等排好
    try:
        yield page
    finally:
        page.set_viewport_size(before)


@contextmanager
def as_dark(page: Page) -> Iterator[Page]:
    """暂时换成暗色（页面的配色跟随系统），用完还原。"""
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    try:
        yield page
    finally:
        page.emulate_media(color_scheme="light")
        page.wait_for_function("document.documentElement.dataset.theme === 'light'")


@contextmanager
def visit(browser: Browser, site: str, name: str, width: int = 1280, theme: str = "light") -> Iterator[Visit]:
    """打开一页，等公式排完、请求都结束。"""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    context.set_default_timeout(120_000)        # 机器很忙时，打开一页可能要半分钟
    page = context.new_page()
    record = Visit(name, page)

    def guard(route):
        if route.request.url.startswith(site):
            route.continue_()
        else:
            record.outside.append(route.request.url)
            route.abort()

    context.route("**/*", guard)
    page.on("response", lambda r: r.status >= 400 and record.broken.append(f"{r.status} {r.url}"))
    page.on("requestfailed", lambda r: record.broken.append(f"{r.failure} {r.url}"))
    page.on("console", lambda m: m.type == "error" and record.errors.append(m.text))
    page.on("pageerror", lambda e: record.errors.append(str(e)))
    page.goto(site + name, wait_until="load")
    page.evaluate("() => window.MathJax?.startup?.promise")
    page.wait_for_load_state("networkidle")
    try:
        yield record
    finally:
        context.close()
