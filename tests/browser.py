"""在无界面的 Chromium 里打开建好的网站，记下每一页的请求和报错。"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build/html"
CHROMIUM = Path("/usr/bin/chromium")        # Debian 的软件包；Playwright 自带的要另外下载


def built_pages() -> list[str]:
    """网站的每一页，相对 _build/html 的路径；还没有构建时只有 index.html，测试会因此失败。"""
    pages = sorted(
        path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html")
        if path.relative_to(SITE).parts[0] not in ("_static", "_sources")
    )
    return pages or ["index.html"]


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextmanager
def serve(directory: Path = SITE) -> Iterator[str]:
    """在回环地址的空闲端口上提供网站（或别的文件夹），给出网址。"""
    if not (SITE / "index.html").is_file():
        pytest.fail(f"还没有构建网站：{SITE / 'index.html'} 不存在。请先运行 make book。", pytrace=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_QuietHandler, directory=directory))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@contextmanager
def chromium() -> Iterator[Browser]:
    if not CHROMIUM.is_file():
        pytest.fail(
            f"找不到 {CHROMIUM}。请安装 Debian 软件包 chromium 和 fonts-noto-cjk：apt-get install chromium fonts-noto-cjk",
            pytrace=False,
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@dataclass
class Visit:
    """打开着的一页，和打开它时发生的事。"""

    name: str
    page: Page
    outside: list[str] = field(default_factory=list)    # 发往别的服务器的请求，都已拦下
    broken: list[str] = field(default_factory=list)     # 4xx、5xx 和没有完成的请求
    errors: list[str] = field(default_factory=list)     # 控制台错误和脚本异常


@contextmanager
def visit(browser: Browser, site: str, name: str, width: int = 1280) -> Iterator[Visit]:
    """打开一页，等公式排完、请求都结束。"""
    context = browser.new_context(viewport={"width": width, "height": 900})
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
