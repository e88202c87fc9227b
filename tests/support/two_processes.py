"""两个进程一起训练：只走回环网卡，一个出错就停下另一个，接不上头就带着调用栈再来一次。"""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

from support.spaces import family, listening_addresses

SECONDS = 150           # 平时十几秒；机器很忙时一分多钟
ATTEMPTS = 2


def environment(**more: str) -> dict[str, str]:
    """进程之间的连接只走回环网卡；两个核，每个进程一个线程；收到 SIGABRT 时写下调用栈。"""
    quiet = {
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    return os.environ | quiet | more


def stop(process: subprocess.Popen) -> None:
    """停下进程与它的子进程，让它们写下调用栈。"""
    with suppress(psutil.NoSuchProcess):            # 恰好刚结束
        for member in reversed(family(process)):
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGABRT)
    process.wait()


def train_on_two_processes(command: list, folder: Path) -> tuple[Path, set[str]]:
    """运行 command，补上 --output 与 --rendezvous。返回（写到的文件夹，途中监听过的地址）。

    一个以非零退出就停下另一个，报出两边的输出：只等第一个，看不到另一个为什么死了。
    两个都还在、却过了 SECONDS 还没有结束，是 gloo 没有接上头（在很忙的机器上遇到过一次），
    重来一次；再不行就失败，输出里有两边的调用栈。
    """
    for attempt in range(ATTEMPTS):
        place = folder / f"attempt-{attempt}"
        place.mkdir()
        logs = [place / f"{rank}.txt" for rank in range(2)]
        processes = []
        for rank, log in enumerate(logs):
            with open(log, "w", encoding="utf-8") as file:
                processes.append(subprocess.Popen(
                    [*map(str, command), "--output", str(place / "output"), "--rendezvous", f"file://{place}/rendezvous"],
                    env=environment(
                        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", ACCELERATE_USE_CPU="true",
                    ),
                    stdout=file, stderr=subprocess.STDOUT,
                ))
        listening, stalled, until = set(), False, time.monotonic() + SECONDS
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() for process in processes)
            stalled = time.monotonic() > until
            if failed or stalled:
                for process in processes:
                    stop(process)
                break
            for process in processes:
                with suppress(psutil.Error):        # 恰好刚结束
                    listening |= {address for address, _ in listening_addresses(process)}
            time.sleep(0.02)
        codes = [process.returncode for process in processes]
        if codes == [0, 0]:
            return place / "output", listening
        if not stalled:
            break
    outputs = "\n".join(log.read_text(encoding="utf-8", errors="replace")[-3000:] for log in logs)
    raise AssertionError(f"两个进程的退出码是 {codes}：\n{outputs}")
