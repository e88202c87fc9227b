"""运行环境自检（第 2.3 节）：哪些齐全，哪些太旧或缺少，怎样补上。

最需要自检的时候，往往正是 Python 太旧、缺包或 PyTorch 装坏了的时候，所以这里：
· 只用标准库，写法也让 Python 3.8 读得懂；
· 包的版本只看安装信息，不导入；只有 torch 与 torchvision 会试着导入一次，没导入过时在另一个进程里试，崩溃也不要紧；
· 每一项各自出错、各自成一行，自检本身不会中断。

`import book_utils` 会导入 PyTorch，没装好时用不了，命令行因此用 tools/check_environment.py：它绕开那一步，只装入这个模块。
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .checksums import CHECKSUMS, DATA_ROOT, MNIST_MD5, MODELS_ROOT, ROOT, unpack_folder, verify_model

STATES = ("正常", "可用", "太旧", "缺少", "有误")
FAILING = ("太旧", "缺少", "有误")
OLDEST_PYTHON = (3, 11)
SETUP_DISK_GIB = 10             # 与 tools/setup.sh 一致：6 GB 环境，加上装完之前的安装包
DAILY_DISK_GIB = 2              # 装好之后：解压 MNIST、建网站、存训练的断点
# 没有 requirements.txt（只拿到了 book_utils 文件夹）时，至少要有这些包
CORE_PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "safetensors", "numpy", "pillow",
                 "matplotlib", "mplfonts", "ipywidgets", "tqdm", "lazy-loader", "datasets", "accelerate")
TRUE_VALUES = ("1", "ON", "YES", "TRUE")            # huggingface_hub 认得的“是”，其余一律当作“否”
FALSE_VALUES = ("", "0", "OFF", "NO", "FALSE")
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")     # httpx 与 huggingface_hub 认得的代理
# 缺了也不妨碍读书的包，以及什么时候才用得到
OPTIONAL = {"socksio": "只有经由 SOCKS 代理连接 Hub 时才用得到"}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Check:
    """自检的一行。状态是 STATES 之一；“可用”指不妨碍读书，但有更好的办法或值得知道的事。"""

    项目: str
    状态: str
    现状: str
    怎样解决: str = ""


# —— 系统与硬件 ——

def check_python(version: tuple = tuple(sys.version_info[:3])) -> Check:
    """Python 够不够新；只分主、次版本。"""
    found = ".".join(str(number) for number in version)
    if tuple(version[:2]) >= OLDEST_PYTHON:
        return Check("Python", "正常", found)
    return Check("Python", "太旧", f"{found}，本书需要 3.11 或更新的版本",
                 "装一个新的 Python，然后用它重建环境：make setup PYTHON_BOOTSTRAP=python3.12")


def system_name() -> str:
    """Linux 发行版的名字；读不到时返回空串。"""
    try:
        text = Path("/etc/os-release").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', text, re.M)
    return found[1] if found else ""


def check_system(system: str, release: str, machine: str, name: str = "") -> Check:
    """操作系统；参数依次是 platform 的 system()、release()、machine() 和发行版名字。"""
    found = f"{name or f'{system} {release}'}，{machine}"
    if system == "Linux":
        return Check("操作系统", "正常", f"{found}（WSL）" if "microsoft" in release.lower() else found)
    if system == "Darwin" and machine == "x86_64":
        return Check("操作系统", "有误", f"{found}：PyTorch 从 2.3 起没有 Intel 芯片 Mac 的安装包",
                     "改用 Colab 或 Binder，或者换一台电脑")
    if system == "Darwin":
        return Check("操作系统", "正常", f"macOS {platform.mac_ver()[0]}，{machine}")
    return Check("操作系统", "可用", f"{found}：make 和安装脚本没有在这里试过",
                 "Windows 上建议用 WSL2：wsl --install，然后在 Ubuntu 里按 Linux 的办法做")


def cpu_cores() -> int:
    """本进程能用的 CPU 核数：集群与容器里可能比整台机器少。"""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory() -> float:
    """返回本进程能用的内存总量（GiB）：在 Binder、Docker 等容器里是容器的上限，不是整台机器的。"""
    if hasattr(os, "sysconf"):
        amounts = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    else:                       # Windows
        import ctypes
        kib = ctypes.c_ulonglong()
        ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kib))
        amounts = [kib.value * 1024]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            amounts.append(int(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            pass                # 不在容器里，或者写着 max：没有上限
    return min(amounts) / 2**30


def check_memory(gib: float) -> Check:
    """内存够不够：一章至多用 4 GiB。"""
    found = f"共 {gib:.1f} GiB"
    if gib >= 4:
        return Check("内存", "正常", found)
    advice = "一次只开一个笔记本，关掉别的程序，把代码里的 batch_size 调小"
    if gib >= 1.9:              # Binder 的上限是 2 GiB
        return Check("内存", "可用", f"{found}，采样够用，训练较紧", advice)
    return Check("内存", "缺少", f"{found}，至少要 2 GiB，最好有 4 GiB", f"{advice}；或者改用 Colab")


def check_disk(free_gib: float, installed: bool) -> Check:
    """空闲磁盘够不够；installed 指各章的包是否已经装好。"""
    needed = DAILY_DISK_GIB if installed else SETUP_DISK_GIB
    if free_gib >= needed:
        return Check("磁盘", "正常", f"空闲 {free_gib:.0f} GiB")
    return Check("磁盘", "缺少", f"空闲 {free_gib:.1f} GiB，{'运行' if installed else '安装'}本书需要 {needed} GiB",
                 "腾出空间：python -m pip cache purge 清安装包，hf cache prune 清不再被引用的模型")


def check_git(path: str | None) -> Check:
    """有没有 git。"""
    if path:
        return Check("git", "正常", "已安装")
    return Check("git", "可用", "没有安装：克隆本书、恢复损坏的文件时才用得到",
                 "Debian、Ubuntu：sudo apt-get install git；macOS：xcode-select --install")


# —— 包的版本 ——

def chapter_pins(path: Path = ROOT / "requirements.txt") -> dict[str, str]:
    """返回各章用到的包和书里写死的版本；没有 requirements.txt 时版本是空串，只查有没有。"""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return dict.fromkeys(CORE_PACKAGES, "")
    section = re.search(r"^# —— 各章的代码.*?(?=^# ——|\Z)", text, re.M | re.S)
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", section[0] if section else text, re.M))
    return pins or dict.fromkeys(CORE_PACKAGES, "")


def installed_version(name: str) -> str | None:
    """返回已装的版本；没有装是 None，装坏了、读不出版本是空串。"""
    try:
        return importlib.metadata.version(name) or ""
    except importlib.metadata.PackageNotFoundError:
        return None
    except Exception:           # 安装信息残缺时，各版本 Python 抛出的异常不同
        return ""


def release(version: str) -> tuple:
    """``"2.12.1+cu130"`` → ``(2, 12, 1)``；不是版本号时返回空元组。"""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def pip_install(pins: dict[str, str], *names: str, options: str = "") -> str:
    """拼出安装命令，版本取自 pins。"""
    wanted = [f"{name}=={pins[name]}" if pins.get(name) else name for name in names]
    return " ".join(filter(None, ["python -m pip install", options, *wanted]))


def check_package(name: str, installed: str | None, pins: dict[str, str]) -> Check:
    """一个包的版本与书里的相比。"""
    wanted = pins.get(name, "")
    if installed is None and name in OPTIONAL:
        return Check(name, "可用", f"没有安装：{OPTIONAL[name]}", pip_install(pins, name))
    if installed is None:
        return Check(name, "缺少", "没有安装", pip_install(pins, name))
    if not release(installed):
        return Check(name, "有误", "装坏了，读不出版本", pip_install(pins, name, options="--force-reinstall"))
    if not wanted or release(installed) == release(wanted):
        return Check(name, "正常", installed)
    if release(installed) > release(wanted):
        return Check(name, "可用", f"{installed}，比书里的 {wanted} 新",
                     f"多半能用；结果与书里对不上时再换：{pip_install(pins, name)}")
    if release(installed)[:2] == release(wanted)[:2]:
        return Check(name, "可用", f"{installed}，书里是 {wanted}，只差修订号")
    return Check(name, "太旧", f"{installed}，书里是 {wanted}", pip_install(pins, name))


# —— PyTorch 与加速设备 ——

def torch_report() -> dict:
    """导入 torch 与 torchvision，返回版本与能用的加速设备；失败时 ``error`` 是报错。

    它自成一体，不用模块里的其他名字：源码会送到另一个进程里执行（见 probe_torch）。
    """
    import warnings
    report = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # 驱动太旧之类的警告，由自检用中文说
            import torch
            import torchvision
            report["torch"] = str(torch.__version__)
            report["torchvision"] = str(torchvision.__version__)
            # 能导入还不够：编译好的算子要真的在
            torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
            report["cuda"] = torch.version.cuda or getattr(torch.version, "hip", None)
            report["mps"] = torch.backends.mps.is_available()
            report["gpus"] = []
            for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
                device = torch.cuda.get_device_properties(index)
                report["gpus"].append([device.name, device.total_memory / 2**30])
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"
    return report


def probe_torch(seconds: int = 300) -> dict:
    """返回 torch_report()：已经导入过就在本进程里做，否则另开一个进程，免得装坏的库拖垮自检。"""
    if "torch" in sys.modules and "torchvision" in sys.modules:
        return torch_report()
    code = f"import json\n{inspect.getsource(torch_report)}\nprint(json.dumps(torch_report()))"
    try:
        # 源码由标准输入送去：写成 -c 的参数，在默认编码没有汉字的系统上会报错
        result = subprocess.run([sys.executable, "-"], input=code, capture_output=True, encoding="utf-8", timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"{seconds} 秒还没有导入完"}
    except OSError as error:
        return {"error": f"开不了新的进程（{type(error).__name__}）"}
    try:
        return json.loads(result.stdout.splitlines()[-1])
    except (ValueError, IndexError):                # 没有打印出结果
        return {"error": f"导入时进程崩溃（退出码 {result.returncode}）"}


def torch_wanted_by_torchvision() -> str:
    """torchvision 的安装信息里要求的 torch 版本；没有写明时是空串。"""
    try:
        needs = importlib.metadata.requires("torchvision") or []
    except Exception:
        return ""
    found = [re.match(r"torch\s*\(?==\s*([\d.]+)", need) for need in needs]
    return next((match[1] for match in found if match), "")


def check_torch_pair(pins: dict[str, str], versions: dict[str, str | None], wanted: str, report: dict) -> Check:
    """torch 与 torchvision 配不配：两者必须成对，否则报 operator torchvision::nms does not exist。

    参数：
        pins:     书里的版本。
        versions: 已装的版本。
        wanted:   torchvision 要求的 torch 版本，见 torch_wanted_by_torchvision。
        report:   probe_torch 的结果。
    """
    item, names = "torch 与 torchvision", ("torch", "torchvision")
    torch, vision = versions.get("torch"), versions.get("torchvision")
    missing = [name for name in names if versions.get(name) is None]
    if missing:
        return Check(item, "缺少", f"没有 {'、'.join(missing)}", pip_install(pins, *names))
    reinstall = pip_install(pins, *names, options="--force-reinstall")
    if wanted and release(torch or "") != release(wanted):
        return Check(item, "有误", f"torchvision {vision} 要配 torch {wanted}，装的却是 {torch}", reinstall)
    error = report.get("error", "")
    if "torchvision::nms" in error:
        return Check(item, "有误", f"torch {torch} 与 torchvision {vision} 不是一对（operator torchvision::nms does not exist）",
                     f"{reinstall}（两个要来自同一个下载地址：都是 CPU 版，或都是 CUDA 版）")
    if error:
        return Check(item, "有误", f"不能导入：{error.splitlines()[0][:120]}", reinstall)
    stale = [name for name in names if report.get(name) and release(report[name]) != release(versions[name] or "")]
    if stale:
        return Check(item, "有误", f"内核里的 {'、'.join(stale)} 还是旧的，磁盘上已经换了版本", "重启内核，再从第一格运行")
    return Check(item, "正常", "成对，能导入")


def nvidia_gpus() -> tuple[list[dict], str]:
    """问 nvidia-smi 有哪些 NVIDIA 显卡；返回（显卡的列表, 出了什么问题）。不依赖 PyTorch。"""
    tool = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    if tool is None:
        return [], ""
    command = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=30)
        if result.returncode != 0:
            return [], (result.stdout + result.stderr).strip().split("\n")[0][:120] or f"退出码 {result.returncode}"
        rows = [[field.strip() for field in line.split(",")] for line in result.stdout.splitlines() if line.strip()]
        return [{"name": name, "memory": memory, "driver": driver} for name, memory, driver in rows], ""
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return [], type(error).__name__


def check_accelerator(pins: dict[str, str], report: dict, gpus: list[dict], problem: str, system: str) -> Check:
    """有没有 GPU，用不用得上。用不上也不妨碍读书，所以至多是“可用”。

    参数：
        report:        probe_torch 的结果。
        gpus, problem: nvidia_gpus 的结果。
        system:        platform.system()。
    """
    item = "加速设备"
    if report.get("gpus"):
        found = "；".join(f"{name}，{memory:.0f} GiB 显存" for name, memory in report["gpus"])
        driver = f"，驱动 {gpus[0]['driver']}" if gpus else ""
        return Check(item, "正常", f"{found}{driver}，PyTorch 自带 CUDA {report['cuda']}")
    if report.get("mps"):
        return Check(item, "正常", "Apple 芯片的 GPU（MPS）")
    if problem:
        return Check(item, "可用", f"有 nvidia-smi，但它报错：{problem}", "重装或更新 NVIDIA 驱动，再重启电脑；在此之前用 CPU")
    if not gpus:
        return Check(item, "可用", "只有 CPU：全书都能运行，训练慢一些")
    gpu = f"{gpus[0]['name']}（驱动 {gpus[0]['driver']}）"
    if not report or "error" in report:
        return Check(item, "可用", f"{gpu}，等 torch 能导入了才知道用不用得上")
    if not report.get("cuda"):
        # Windows 上，PyPI 里的 torch 就是 CPU 版
        index = " --index-url https://download.pytorch.org/whl/cu130" if system == "Windows" else ""
        return Check(item, "可用", f"有 {gpu}，但装的 PyTorch 是 CPU 版，用不上它",
                     pip_install(pins, "torch", "torchvision", options="--force-reinstall") + index)
    return Check(item, "可用", f"有 {gpu}，但自带 CUDA {report['cuda']} 的 PyTorch 用不上它",
                 "更新 NVIDIA 驱动（CUDA 13 要 580 以上）再重启；若设置了 CUDA_VISIBLE_DEVICES，先去掉它")


# —— 随书的字体、数据与模型 ——

def check_font(pins: dict[str, str]) -> Check:
    """图里的汉字用的字体：由 mplfonts 自带的思源黑体，与 use_book_style 用的是同一批文件。"""
    spec = importlib.util.find_spec("mplfonts")         # 只找文件，不导入
    folder = Path(spec.origin).parent / "fonts" if spec and spec.origin else Path("/nonexistent")
    if any(path.stat().st_size > 1e6 for path in folder.glob("NotoSansCJKsc-*.otf")):
        return Check("中文字体", "正常", "思源黑体（mplfonts）")
    return Check("中文字体", "缺少", "没有找到思源黑体，图里的汉字会变成方框",
                 pip_install(pins, "mplfonts", options="--force-reinstall"))


def check_data(raw: Path = DATA_ROOT / "MNIST" / "raw") -> Check:
    """MNIST 的四个压缩文件在不在、完不完整。"""
    remedy = "git checkout -- data；下载的压缩包则重新下载"
    missing = [name for name in MNIST_MD5 if not (raw / f"{name}.gz").is_file()]
    if missing:
        return Check("MNIST 数据", "缺少", f"没有 {'、'.join(f'{name}.gz' for name in missing)}", remedy)
    damaged = []
    for name, md5 in MNIST_MD5.items():
        try:
            content = gzip.decompress((raw / f"{name}.gz").read_bytes())
        except (EOFError, OSError, ValueError):
            content = b""
        if hashlib.md5(content).hexdigest() != md5:
            damaged.append(f"{name}.gz")
    if damaged:
        return Check("MNIST 数据", "有误", f"{'、'.join(damaged)} 已损坏", remedy)
    try:
        folder = unpack_folder(raw)
    except PermissionError as error:
        return Check("MNIST 数据", "有误", str(error), f"让 {raw} 可写，或用 XDG_CACHE_HOME 指定一个可写的文件夹")
    elsewhere = "" if folder == raw else f"；仓库不可写，会解压到 {folder}"
    return Check("MNIST 数据", "正常", f"4 个文件，都完整{elsewhere}")


def check_models(root: Path = MODELS_ROOT) -> Check:
    """随书模型的文件在不在、SHA-256 对不对；resolve 用的是同一个核对函数。"""
    folders = sorted(path for path in root.glob("*") if path.is_dir())
    missing, damaged = [], []
    for folder in folders:
        try:
            verify_model(folder)
        except FileNotFoundError:
            missing.append(folder.name)
        except (OSError, ValueError):
            damaged.append(folder.name)
    remedy = "git checkout -- models；下载的压缩包则重新下载"
    if missing or not folders:
        return Check("随书模型", "缺少", f"{'、'.join(missing) or 'models 文件夹'} 缺少文件", remedy)
    if damaged:
        return Check("随书模型", "有误", f"{'、'.join(damaged)} 已损坏或被改动（{CHECKSUMS} 对不上）", remedy)
    return Check("随书模型", "正常", f"{len(folders)} 个，都完整")


# —— 环境变量与网络 ——

def check_variables(environment: dict[str, str]) -> list[Check]:
    """与本书有关的三个环境变量，值写得对不对。"""
    checks = []
    mode = environment.get("BOOK_MODE")
    if mode in (None, "embedded", "hub"):
        checks.append(Check("BOOK_MODE", "正常", mode or "没有设置，用随书的模型"))
    else:
        checks.append(Check("BOOK_MODE", "有误", f"是 {mode!r}，只能是 embedded 或 hub", "unset BOOK_MODE，或改成其中之一"))

    endpoint = environment.get("HF_ENDPOINT")
    if not endpoint:
        checks.append(Check("HF_ENDPOINT", "正常", "没有设置，用 https://huggingface.co"))
    elif not re.fullmatch(r"https?://[\w.-]+(:\d+)?/?", endpoint):
        checks.append(Check("HF_ENDPOINT", "有误", f"是 {endpoint!r}，不像一个网址", "例如：export HF_ENDPOINT=https://hf-mirror.com"))
    elif environment.get("HF_TOKEN") and "huggingface.co" not in endpoint:
        checks.append(Check("HF_ENDPOINT", "可用", f"{endpoint}，又设置了 HF_TOKEN：令牌会一并发给它",
                            "只下载公开模型时不需要令牌：unset HF_TOKEN"))
    else:
        checks.append(Check("HF_ENDPOINT", "正常", endpoint))

    offline = environment.get("HF_HUB_OFFLINE", "")
    if offline.upper() in TRUE_VALUES:
        checks.append(Check("HF_HUB_OFFLINE", "正常", "已打开：只用缓存里有的模型"))
    elif offline.upper() in FALSE_VALUES:
        checks.append(Check("HF_HUB_OFFLINE", "正常", "没有打开"))
    else:
        checks.append(Check("HF_HUB_OFFLINE", "有误", f"是 {offline!r}，会被当作没有打开", "export HF_HUB_OFFLINE=1，或者 unset 它"))
    return checks


def proxies(environment: dict[str, str]) -> dict[str, str]:
    """环境变量里设了哪些代理：变量名 → 地址。小写的一份优先，空的等于没有设。"""
    found = {}
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        value = environment.get(name, environment.get(name.upper(), ""))
        if value:
            found[name] = value
    return found


def without_password(address: str) -> str:
    """代理的地址，去掉其中的用户名和密码：自检的表常被贴出来提问。"""
    return re.sub(r"//[^/@]*@", "//", address)


def proxy_problem(environment: dict[str, str]) -> str:
    """代理的写法有没有毛病；没有时是空串，否则是一句原因和办法。"""
    for name, address in proxies(environment).items():
        scheme = address.split("://")[0].lower() if "://" in address else "http"
        shown = f"代理 {name}={without_password(address)}"
        if scheme not in PROXY_SCHEMES:
            return f"不认得{shown}，只能是 {'、'.join(f'{known}://' for known in PROXY_SCHEMES)} 开头的地址"
        if scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
            return f"{shown} 是 SOCKS 代理，要先安装 socksio：python -m pip install socksio"
    return ""


def check_proxies(environment: dict[str, str]) -> Check:
    """有没有设置代理，写法对不对；只在连接 Hub 或镜像时用得到，所以不联网时至多是“可用”。"""
    found = proxies(environment)
    if not found:
        return Check("代理", "正常", "没有设置")
    problem = proxy_problem(environment)
    if problem:
        state = "有误" if environment.get("BOOK_MODE") == "hub" else "可用"
        return Check("代理", state, problem, "照上面说的改；或者去掉它：unset " + " ".join(
            name for lower in found for name in (lower, lower.upper()) if name in environment))
    return Check("代理", "正常", "、".join(sorted({without_password(address) for address in found.values()})))


def exempt_loopback(environment=os.environ) -> None:
    """让本机的地址不走代理（就地改 no_proxy）：代理到不了 127.0.0.1 上的程序，去了只会失败。"""
    hosts = [host.strip() for host in (environment.get("no_proxy") or environment.get("NO_PROXY") or "").split(",")]
    hosts = [host for host in hosts if host]
    if "*" not in hosts:
        hosts += [host for host in LOOPBACK if host not in hosts]
        environment["no_proxy"] = environment["NO_PROXY"] = ",".join(hosts)


def hub_problem(endpoint: str, seconds: float = 5) -> str:
    """连不连得上 Hub 或镜像；连得上时是空串，否则是一句原因。

    自检与 resolve 都用它，走的也是 huggingface_hub 走的路（同样的代理、同样的证书），一处说通，另一处就通。
    """
    exempt_loopback()
    problem = proxy_problem(dict(os.environ))
    if problem:
        return problem
    through = proxies(dict(os.environ))
    hint = f"，经由代理 {'、'.join(sorted({without_password(a) for a in through.values()}))}" if through else ""
    try:
        import httpx
    except ImportError:             # 缺包时自检照样要能说话：退而用标准库，它不认 SOCKS 代理
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            pass                    # 有回应就是连得上
        except (OSError, ValueError) as error:
            return f"连不上 {endpoint}（{type(error).__name__}{hint}）"
        return ""
    try:
        httpx.head(endpoint, timeout=seconds, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        return f"连不上 {endpoint}（{type(error).__name__}{hint}）"
    return ""


def check_hub(environment: dict[str, str], seconds: float = 5) -> Check:
    """BOOK_MODE=hub 时看 Hub（或镜像）连不连得上；其他时候不联网。"""
    if environment.get("BOOK_MODE") != "hub":
        return Check("Hub", "正常", "没有检查：用随书的模型，不需要联网")
    if environment.get("HF_HUB_OFFLINE", "").upper() in TRUE_VALUES:
        return Check("Hub", "正常", "没有检查：HF_HUB_OFFLINE 已打开")
    endpoint = environment.get("HF_ENDPOINT") or "https://huggingface.co"
    problem = hub_problem(endpoint, seconds)
    if problem:
        return Check("Hub", "有误", problem,
                     "检查网络；换镜像：export HF_ENDPOINT=https://hf-mirror.com；或者 unset BOOK_MODE，用随书的模型")
    return Check("Hub", "正常", f"连得上 {endpoint}")


# —— 汇总 ——

def attempt(item: str, check: Callable, *arguments) -> list[Check]:
    """执行一项检查；意料之外的错误也只占一行。"""
    try:
        result = check(*arguments)
    except Exception as error:
        return [Check(item, "有误", f"没能检查：{type(error).__name__}: {error}", "把这一行报告给本书的作者")]
    return result if isinstance(result, list) else [result]


def display_width(text: str) -> int:
    """文字在等宽字体里占几列：汉字与全角标点占两列。"""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def pad(text: str, width: int) -> str:
    return text + " " * (width - display_width(text))


def format_table(checks: list[Check]) -> str:
    """排成对齐的表；怎样解决另起一行，与“现状”一列对齐。"""
    item_width = max(display_width(check.项目) for check in checks)
    indent = " " * (item_width + 8)
    lines = [f"{pad('项目', item_width)}  状态  现状", f"{'-' * item_width}  ----  {'-' * 40}"]
    for check in checks:
        lines.append(f"{pad(check.项目, item_width)}  {check.状态}  {check.现状}")
        if check.怎样解决:
            lines.append(f"{indent}办法：{check.怎样解决}")
    return "\n".join(lines)


def summary(checks: list[Check], pins: dict[str, str]) -> str:
    """一句话的结论；缺包时给出一次装齐的命令。"""
    failing = [check.项目 for check in checks if check.状态 in FAILING]
    if not failing:
        return f"{len(checks)} 项中没有要处理的，可以开始了。"
    text = f"{len(checks)} 项中有 {len(failing)} 项要处理：{'、'.join(failing)}。"
    packages = [name for name in failing if name in pins]
    if len(packages) > 1:
        text += f"\n缺的、旧的包可以一次装齐：{pip_install(pins, *packages)}\n用本书的 .venv 时，运行 make setup 也可以。"
    return text


def check_environment() -> list[Check]:
    """检查运行环境，打印一张表，返回其中的每一行。

    全部检查约 1 秒；还没有导入过 PyTorch 时，另加导入它的时间。不会抛出异常，除 ``BOOK_MODE=hub`` 外不联网。

    返回：
        Check 的列表。状态是“太旧”“缺少”“有误”的那些要处理。
    来源：第 2.3 节。
    """
    pins = chapter_pins()
    versions = {name: installed_version(name) for name in pins}
    report = probe_torch() if versions.get("torch") and versions.get("torchvision") else {}
    gpus, problem = nvidia_gpus()
    environment = dict(os.environ)
    checks = [
        *attempt("Python", check_python),
        *attempt("操作系统", check_system, platform.system(), platform.release(), platform.machine(), system_name()),
        *attempt("CPU", lambda: Check("CPU", "正常", f"能用 {cpu_cores()} 核")),
        *attempt("内存", lambda: check_memory(total_memory())),
        *attempt("磁盘", lambda: check_disk(shutil.disk_usage(ROOT).free / 2**30, None not in versions.values())),
        *attempt("git", lambda: check_git(shutil.which("git"))),
    ]
    for name, installed in versions.items():
        checks += attempt(name, check_package, name, installed, pins)
    checks += [
        *attempt("torch 与 torchvision", check_torch_pair, pins, versions, torch_wanted_by_torchvision(), report),
        *attempt("加速设备", check_accelerator, pins, report, gpus, problem, platform.system()),
        *attempt("中文字体", check_font, pins),
        *attempt("MNIST 数据", check_data),
        *attempt("随书模型", check_models),
        *attempt("环境变量", check_variables, environment),
        *attempt("代理", check_proxies, environment),
        *attempt("Hub", check_hub, environment),
    ]
    print(format_table(checks))
    print()
    print(summary(checks, pins))
    return checks


def speak_chinese() -> None:
    """让这个程序打印得出汉字：终端的编码装不下汉字时改用 UTF-8，装得下就不动，个别字符换成问号。"""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            try:
                "汉字".encode(stream.encoding or "ascii")
                stream.reconfigure(errors="replace")
            except (LookupError, UnicodeEncodeError):
                stream.reconfigure(encoding="utf-8", errors="replace")


def main() -> int:
    """命令行：有要处理的项目时返回 1。"""
    speak_chinese()
    return int(any(check.状态 in FAILING for check in check_environment()))


if __name__ == "__main__":
    sys.exit(main())
