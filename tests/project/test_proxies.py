"""代理：SOCKS 的能用，写错的说得清，本机的地址不走代理；自检与 resolve 说法一致。"""

import json
import os
import subprocess
import sys

import pytest
from support.hub_server import USER, WRITE_TOKEN, Hub
from support.paths import ROOT
from support.socks_server import SocksProxy

from book_utils import environment

# 同一个进程里：自检怎么说，resolve 怎么做，huggingface_hub 自己又怎样
CODE = """
import json, os, sys
if "no-socksio" in sys.argv:
    sys.modules["socksio"] = None
    import importlib.util
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "socksio" else find(name, *rest)
from book_utils.environment import check_hub, check_proxies
from book_utils.models import resolve
row = lambda check: [check.状态, check.现状, check.怎样解决]
result = {"proxies": row(check_proxies(dict(os.environ))), "hub": row(check_hub(dict(os.environ)))}
try:
    result["resolved"] = resolve("mnist-ddpm", hub="someone/model")
except Exception as error:
    result["error"] = f"{type(error).__name__}: {error}"
if "whoami" in sys.argv:
    from huggingface_hub import whoami
    result["user"] = whoami()["name"]
print(json.dumps(result))
"""


def ask(*arguments: str, **variables: str) -> dict:
    clean = {key: value for key, value in os.environ.items()
             if not key.startswith(("HF_", "BOOK_")) and "proxy" not in key.lower()}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=ROOT, capture_output=True, encoding="utf-8",
        env=clean | {"BOOK_MODE": "hub", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.mark.parametrize("name", ["ALL_PROXY", "http_proxy"])
def test_socks_proxy_is_used(hub, name, tmp_path):
    """Hub 的域名在这台机器上解析不了，只有经由代理才到得了。"""
    with SocksProxy(hub.server_port) as proxy:
        found = ask("whoami", HF_ENDPOINT="http://hub.example", HF_TOKEN=WRITE_TOKEN, HF_HOME=str(tmp_path),
                    **{name: proxy.url})
    assert found["resolved"] == "someone/model" and found["user"] == USER
    assert found["hub"][0] == "正常" and found["proxies"] == ["正常", proxy.url, ""]
    assert set(proxy.hosts) == {"hub.example"} and len(proxy.hosts) >= 3


def test_socks_proxy_without_socksio_is_explained(tmp_path):
    found = ask("no-socksio", HF_ENDPOINT="http://hub.example", ALL_PROXY="socks5://user:secret@127.0.0.1:9")
    assert found["error"].startswith("ConnectionError: BOOK_MODE=hub 需要联网，但代理 all_proxy=socks5://127.0.0.1:9 是 SOCKS 代理")
    assert found["hub"][0] == found["proxies"][0] == "有误"
    assert all("pip install socksio" in text for text in (found["error"], found["hub"][1], found["proxies"][1]))
    assert "secret" not in json.dumps(found)


def test_unknown_scheme_is_explained():
    found = ask(HF_ENDPOINT="http://hub.example", all_proxy="socks://127.0.0.1:9")
    assert "ConnectionError: BOOK_MODE=hub 需要联网，但不认得代理 all_proxy=socks://127.0.0.1:9" in found["error"]
    assert "socks5://" in found["error"] and found["hub"][0] == "有误"
    assert "unset all_proxy" in found["proxies"][2]


def test_dead_proxy_is_named_by_both():
    found = ask(HF_ENDPOINT="http://hub.example", http_proxy="http://127.0.0.1:9")
    assert found["hub"][0] == "有误" and "经由代理 http://127.0.0.1:9" in found["hub"][1]
    assert "ConnectionError" in found["error"] and "经由代理 http://127.0.0.1:9" in found["error"]


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9"])
def test_loopback_is_never_proxied(hub, proxy, tmp_path):
    """代理不通，本机上的 Hub 照样连得上。"""
    found = ask("whoami", HF_ENDPOINT=hub.url, HF_TOKEN=WRITE_TOKEN, HF_HOME=str(tmp_path),
                http_proxy=proxy, ALL_PROXY=proxy)
    assert found["resolved"] == "someone/model" and found["user"] == USER and found["hub"][0] == "正常"


@pytest.mark.parametrize("before, after", [
    ({}, "localhost,127.0.0.1,::1"),
    ({"NO_PROXY": "example.com"}, "example.com,localhost,127.0.0.1,::1"),
    ({"no_proxy": "localhost, a.cn", "NO_PROXY": "b.cn"}, "localhost,a.cn,127.0.0.1,::1"),
])
def test_exempting_loopback_keeps_what_was_set(before, after):
    values = dict(before)
    environment.exempt_loopback(values)
    assert values == {"no_proxy": after, "NO_PROXY": after}
    environment.exempt_loopback(values)
    assert values["no_proxy"] == after


def test_everything_exempt_stays_so():
    values = {"no_proxy": "*"}
    environment.exempt_loopback(values)
    assert values == {"no_proxy": "*"}


def test_proxies_row_off_line():
    check = environment.check_proxies
    assert check({}).状态 == check({"http_proxy": "", "HTTP_PROXY": "x"}).状态 == "正常"     # 小写的空值优先：没有代理
    assert check({"https_proxy": "http://a:b@10.0.0.1:80"}).现状 == "http://10.0.0.1:80"
    assert check({"all_proxy": "socks4://10.0.0.1:80"}).状态 == "可用"                       # 不联网时不妨碍读书
    assert check({"all_proxy": "socks4://10.0.0.1:80", "BOOK_MODE": "hub"}).状态 == "有误"


# —— 演示程序 ——

@pytest.mark.parametrize("app", sorted((ROOT / "spaces").glob("*/app.py")), ids=lambda path: path.parent.name)
@pytest.mark.parametrize("exempt", [{}, {"NO_PROXY": "example.com"}], ids=["没有例外", "已有例外"])
def test_own_page_is_reached_without_the_proxy(app, exempt):
    """设有代理时，gradio 启动后要访问自己的网页：app.py 在导入 gradio 之前就让本机的地址不走代理。"""
    before, _, _ = app.read_text("utf-8").partition("import gradio")
    code = before + """
import http.server, threading, httpx
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(httpx.head(f"http://127.0.0.1:{server.server_port}/").status_code, os.environ["NO_PROXY"])
"""
    clean = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    dead = {"http_proxy": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=clean | dead | exempt, capture_output=True, encoding="utf-8")
    hosts = ",".join([*exempt.values(), "localhost", "127.0.0.1"])
    assert done.stdout.split() == ["501", hosts], done.stderr
