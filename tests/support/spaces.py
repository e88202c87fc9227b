"""在断网的子进程里运行一个演示程序（spaces/ 里的文件夹），并经由 Gradio 的接口调用它。"""

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

from support.paths import ROOT

INSTALLED = Path(sys.prefix) / "space-packages"         # 由 tools/setup.sh 安装
OFFLINE = ROOT / "tools" / "offline"
START_SECONDS = 300                                     # 机器很忙时，光导入就要一分多钟


def environment(**extra: str) -> dict[str, str]:
    """断网，模块先从演示程序的包里找，再从本书的环境里找。"""
    dropped = ("GRADIO_", "HF_", "MODEL_ID", "SPACE_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return clean | {"PYTHONPATH": f"{OFFLINE}{os.pathsep}{INSTALLED}", "OMP_NUM_THREADS": "1"} | extra


@contextmanager
def running(space: Path, folder: Path) -> Iterator[tuple[str, subprocess.Popen, Path]]:
    """在回环地址的空闲端口上运行 space/app.py，给出 (网址, 进程, 日志)；文件都写在 folder 里。"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = folder / "log.txt"
    settings = {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder / "images"), "HF_HOME": str(folder)}
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, space / "app.py"], cwd=folder, env=environment(**settings),
            stdout=file, stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if httpx.get(url, trust_env=False, timeout=30).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        else:
            pytest.fail(f"演示程序没有运行起来：\n{log.read_text('utf-8')[-3000:]}")
        yield url, process, log
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def call(url: str, *values) -> tuple[str, object]:
    """调用演示程序的 draw：先交参数、得到编号，再凭编号取结果。返回（complete 或 error，结果）。"""
    with httpx.Client(base_url=url, trust_env=False, timeout=120) as client:
        event = client.post("gradio_api/call/draw", json={"data": list(values)}).raise_for_status().json()["event_id"]
        answer = client.get(f"gradio_api/call/draw/{event}").raise_for_status().text
    kind = re.findall(r"^event: (\w+)$", answer, re.M)[-1]
    return kind, json.loads(re.findall(r"^data: (.*)$", answer, re.M)[-1])


def picture(url: str, *values) -> Image.Image:
    """调用 draw，取回画好的 PNG。"""
    kind, result = call(url, *values)
    assert kind == "complete", result
    assert result[0]["url"].startswith(url)
    image = Image.open(io.BytesIO(httpx.get(result[0]["url"], trust_env=False).raise_for_status().content))
    assert image.format == "PNG"
    return image


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """进程与它的子进程。"""
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def listening_addresses(process: subprocess.Popen) -> set[tuple[str, int]]:
    """进程与它的子进程在哪些地址与端口上监听。"""
    return {
        tuple(connection.laddr) for member in family(process) for connection in member.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
