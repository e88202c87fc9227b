"""环境自检：每一种毛病都单独造出来，看那一行说没说清是什么、怎样解决；健全的环境没有要处理的行。"""

import ast
import gzip
import http.server
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from support.paths import ROOT
from wcwidth import wcswidth

from book_utils import environment
from book_utils.environment import FAILING, STATES, Check

PINS = environment.chapter_pins()
HEALTHY_TORCH = {"torch": PINS["torch"], "torchvision": PINS["torchvision"], "cuda": "13.0", "mps": False, "gpus": []}
H200 = {"name": "NVIDIA H200", "memory": "143771", "driver": "580.95.05"}


def says(check: Check, state: str, *words: str) -> None:
    """这一行的状态是 state，现状或办法里有 words 中的每一个；要处理的行一定写着办法。"""
    assert check.状态 == state, check
    for word in words:
        assert word in check.现状 + "\n" + check.怎样解决, check
    assert check.状态 not in FAILING or check.怎样解决, check


# —— 系统与硬件 ——

def test_old_python():
    says(environment.check_python((3, 9, 2)), "太旧", "3.9.2", "3.11", "PYTHON_BOOTSTRAP")
    says(environment.check_python((3, 11, 0)), "正常", "3.11.0")
    says(environment.check_python((4, 0, 0)), "正常")


@pytest.mark.parametrize("arguments, state, words", [
    (("Linux", "6.1.0", "x86_64", "Debian GNU/Linux 12"), "正常", ["Debian", "x86_64"]),
    (("Linux", "5.15.0-microsoft-standard-WSL2", "x86_64", "Ubuntu 24.04"), "正常", ["WSL"]),
    (("Darwin", "24.0.0", "arm64"), "正常", ["macOS"]),
    (("Darwin", "22.0.0", "x86_64"), "有误", ["Intel", "Colab"]),
    (("Windows", "11", "AMD64"), "可用", ["WSL2", "wsl --install"]),
], ids=["Linux", "WSL", "Mac", "Intel 的 Mac", "Windows"])
def test_system(arguments, state, words):
    says(environment.check_system(*arguments), state, *words)


@pytest.mark.parametrize("gib, state, words", [
    (16, "正常", ["16.0 GiB"]), (2.0, "可用", ["2.0 GiB", "batch_size"]), (1.0, "缺少", ["1.0 GiB", "2 GiB", "Colab"]),
])
def test_memory(gib, state, words):
    says(environment.check_memory(gib), state, *words)


def test_low_disk_depends_on_what_is_still_to_be_installed():
    says(environment.check_disk(5, installed=False), "缺少", "5.0 GiB", "安装", "10 GiB", "pip cache purge")
    says(environment.check_disk(5, installed=True), "正常", "5 GiB")
    says(environment.check_disk(0.5, installed=True), "缺少", "运行", "2 GiB")


def test_disk_needed_for_setup_is_that_of_the_setup_script():
    script = (ROOT / "tools" / "setup.sh").read_text(encoding="utf-8")
    assert f"BOOK_MIN_DISK_GB:-{environment.SETUP_DISK_GIB}}}" in script


def test_container_limit_counts_as_memory(monkeypatch):
    physical = environment.total_memory()
    assert 0.5 < physical < 10_000
    limits = {"/sys/fs/cgroup/memory.max": "2147483648\n"}
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: limits.get(str(path)) or real(path, *a, **k))
    assert environment.total_memory() == 2.0
    limits["/sys/fs/cgroup/memory.max"] = "max\n"
    assert environment.total_memory() == physical


def test_no_git():
    says(environment.check_git(None), "可用", "没有安装", "apt-get install git")
    says(environment.check_git("/usr/bin/git"), "正常")


# —— 包 ——

def test_pins_are_those_of_the_chapters():
    assert set(environment.CORE_PACKAGES) <= set(PINS)
    assert not {"jupyter-book", "pytest", "playwright", "Sphinx"} & set(PINS), "建网站和测试的包不算"
    assert all(environment.release(version) for version in PINS.values())


def test_without_requirements_only_presence_is_checked(tmp_path):
    pins = environment.chapter_pins(tmp_path / "requirements.txt")
    assert set(pins) == set(environment.CORE_PACKAGES)
    says(environment.check_package("tqdm", "1.0", pins), "正常", "1.0")
    check = environment.check_package("tqdm", None, pins)
    says(check, "缺少")
    assert check.怎样解决 == "python -m pip install tqdm"


@pytest.mark.parametrize("installed, state, words", [
    (None, "缺少", ["没有安装", "python -m pip install demo==1.4.2"]),
    ("", "有误", ["装坏了", "--force-reinstall demo==1.4.2"]),
    ("1.4.2", "正常", ["1.4.2"]),
    ("1.4.2+cpu", "正常", ["1.4.2+cpu"]),
    ("1.4.1", "可用", ["1.4.1", "1.4.2", "修订号"]),
    ("1.3.9", "太旧", ["1.3.9", "1.4.2", "python -m pip install demo==1.4.2"]),
    ("0.9", "太旧", ["0.9"]),
    ("1.10.0", "可用", ["1.10.0", "1.4.2 新", "demo==1.4.2"]),
])
def test_package_version(installed, state, words):
    says(environment.check_package("demo", installed, {"demo": "1.4.2"}), state, *words)


def test_optional_package_may_be_missing():
    """Colab 没有 socksio：第二章的自检不能因此停下。"""
    says(environment.check_package("socksio", None, PINS), "可用", "SOCKS 代理", f"socksio=={PINS['socksio']}")


def test_installed_version(tmp_path, monkeypatch):
    assert environment.installed_version("numpy") == importlib.metadata.version("numpy")
    assert environment.installed_version("no-such-package") is None
    (tmp_path / "halfmade-1.0.dist-info").mkdir()           # 中断的安装：没有 METADATA
    monkeypatch.syspath_prepend(str(tmp_path))
    assert environment.installed_version("halfmade") == ""


# —— torch 与 torchvision ——

def pair(versions=None, wanted=PINS["torch"], report=HEALTHY_TORCH) -> Check:
    versions = {"torch": PINS["torch"], "torchvision": PINS["torchvision"]} | (versions or {})
    return environment.check_torch_pair(PINS, versions, wanted, report)


def test_matching_pair():
    says(pair(), "正常")
    says(pair({"torch": f"{PINS['torch']}+cu130"}), "正常")


@pytest.mark.parametrize("versions, wanted, report, words", [
    ({"torch": "2.13.0"}, PINS["torch"], {}, ["要配 torch " + PINS["torch"], "2.13.0"]),
    ({}, PINS["torch"], {"error": "RuntimeError: operator torchvision::nms does not exist"},
     ["operator torchvision::nms does not exist", "不是一对", "CPU 版"]),
    ({}, "", {"error": "ImportError: libcudart.so.13: cannot open shared object file\n详情"}, ["不能导入", "libcudart"]),
], ids=["版本不配", "编译的算子不配", "缺动态库"])
def test_broken_pair(versions, wanted, report, words):
    check = pair(versions, wanted, report)
    says(check, "有误", *words)
    assert f"--force-reinstall torch=={PINS['torch']} torchvision=={PINS['torchvision']}" in check.怎样解决


def test_missing_torchvision():
    says(pair({"torchvision": None}), "缺少", "没有 torchvision", f"torchvision=={PINS['torchvision']}")


def test_kernel_with_the_old_torch_must_be_restarted():
    says(pair(report=HEALTHY_TORCH | {"torch": "2.5.0"}), "有误", "内核里的 torch", "重启内核")


def test_torchvision_states_the_torch_it_wants(monkeypatch):
    assert environment.torch_wanted_by_torchvision() == PINS["torch"]
    for needs, wanted in ((["numpy", "torch (==2.1.0)"], "2.1.0"), (["torchaudio==1.0"], ""), (None, "")):
        monkeypatch.setattr(importlib.metadata, "requires", lambda name, needs=needs: needs)
        assert environment.torch_wanted_by_torchvision() == wanted


def test_torch_report_of_this_machine():
    report = environment.torch_report()
    assert "error" not in report
    assert environment.release(report["torch"]) == environment.release(PINS["torch"])
    assert json.loads(json.dumps(report)) == report


@pytest.fixture
def not_imported(monkeypatch):
    """让自检以为 torch 还没有导入，从而另开一个进程。"""
    monkeypatch.setattr(environment.sys, "modules", {k: v for k, v in sys.modules.items() if k != "torch"})


def fake_torch(folder: Path, monkeypatch, **modules: str) -> None:
    """在 folder 里放假的 torch、torchvision，让新进程先找到它们。"""
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize("code, error", [
    ("raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: operator torchvision::nms"),
    ("import os; os.abort()", "进程崩溃（退出码 -6）"),
    ("import time; time.sleep(60)", "2 秒还没有导入完"),
], ids=["报错", "崩溃", "卡住"])
def test_broken_torch_does_not_break_the_check(code, error, tmp_path, monkeypatch, not_imported):
    fake_torch(tmp_path, monkeypatch, torch=code)
    seconds = 2 if "sleep" in code else 300
    assert error in environment.probe_torch(seconds)["error"]


# —— 加速设备 ——

def accelerator(report=HEALTHY_TORCH, gpus=(), problem="", system="Linux") -> Check:
    return environment.check_accelerator(PINS, report, list(gpus), problem, system)


def test_gpu_with_name_memory_and_driver():
    says(accelerator(HEALTHY_TORCH | {"gpus": [["NVIDIA H200", 139.8]]}, [H200]),
         "正常", "NVIDIA H200", "140 GiB", "580.95.05", "CUDA 13.0")
    says(accelerator(HEALTHY_TORCH | {"mps": True, "cuda": None}), "正常", "MPS")


def test_cpu_is_enough():
    says(accelerator(), "可用", "只有 CPU")


def test_cpu_build_beside_an_nvidia_gpu():
    cpu_build = HEALTHY_TORCH | {"cuda": None}
    linux, windows = accelerator(cpu_build, [H200]), accelerator(cpu_build, [H200], system="Windows")
    says(linux, "可用", "NVIDIA H200", "CPU 版", f"--force-reinstall torch=={PINS['torch']} torchvision==")
    assert "--index-url" not in linux.怎样解决
    assert windows.怎样解决.endswith("--index-url https://download.pytorch.org/whl/cu130")


def test_driver_too_old_or_broken():
    says(accelerator(gpus=[H200 | {"driver": "470.82"}]), "可用", "驱动 470.82", "更新 NVIDIA 驱动", "580")
    says(accelerator(problem="couldn't communicate with the NVIDIA driver"), "可用", "couldn't communicate", "驱动")
    says(accelerator(report={}, gpus=[H200]), "可用", "等 torch 能导入")


def fake_nvidia_smi(folder: Path, monkeypatch, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("script, expected", [
    ("echo 'NVIDIA H200, 143771, 580.95.05'", ([H200], "")),
    ("echo 'NVIDIA-SMI has failed'; exit 9", ([], "NVIDIA-SMI has failed")),
    ("exit 3", ([], "退出码 3")),
    ("echo nonsense", ([], "ValueError")),
], ids=["一块显卡", "驱动不通", "不说原因", "读不懂"])
def test_nvidia_smi(script, expected, tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, script)
    assert environment.nvidia_gpus() == expected


# —— 字体、数据、模型 ——

def test_missing_font(monkeypatch, tmp_path):
    assert environment.check_font(PINS).状态 == "正常"
    for spec in (None, types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))):
        monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name, spec=spec: spec)
        says(environment.check_font(PINS), "缺少", "方框", f"mplfonts=={PINS['mplfonts']}")


def test_missing_and_damaged_data(tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(ROOT / "data" / "MNIST" / "raw", raw, ignore=lambda folder, names: [n for n in names if n[-3:] != ".gz"])
    assert environment.check_data(raw).状态 == "正常"
    victim = raw / "t10k-labels-idx1-ubyte.gz"
    content = victim.read_bytes()
    for damage in (content[:100], b"not gzip", gzip.compress(b"other")):
        victim.write_bytes(damage)
        says(environment.check_data(raw), "有误", victim.name, "已损坏", "git checkout -- data")
    victim.unlink()
    says(environment.check_data(raw), "缺少", victim.name, "git checkout -- data")


def test_missing_and_damaged_model(tmp_path):
    says(environment.check_models(tmp_path), "缺少", "models", "git checkout")
    shutil.copytree(ROOT / "models" / "mnist-basic-unet", tmp_path / "mnist-basic-unet")
    says(environment.check_models(tmp_path), "正常", "1 个")
    weights = tmp_path / "mnist-basic-unet" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    says(environment.check_models(tmp_path), "有误", "mnist-basic-unet", "SHA256SUMS", "git checkout -- models")
    weights.unlink()
    says(environment.check_models(tmp_path), "缺少", "mnist-basic-unet", "缺少文件")
    (tmp_path / "mnist-basic-unet" / "SHA256SUMS").unlink()
    says(environment.check_models(tmp_path), "缺少", "mnist-basic-unet")


# —— 环境变量与 Hub ——

def variable(name: str, **values: str) -> Check:
    return next(check for check in environment.check_variables(values) if check.项目 == name)


def test_variables_unset_or_right():
    assert all(check.状态 == "正常" for check in environment.check_variables({}))
    for values in ({"BOOK_MODE": "hub"}, {"HF_ENDPOINT": "https://hf-mirror.com"}, {"HF_ENDPOINT": "http://127.0.0.1:80/"},
                   {"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "false"}, {"HF_TOKEN": "x"}):
        assert all(check.状态 == "正常" for check in environment.check_variables(values)), values


@pytest.mark.parametrize("mode", ["Hub", "", "online"])
def test_bad_book_mode(mode):
    says(variable("BOOK_MODE", BOOK_MODE=mode), "有误", repr(mode), "embedded 或 hub", "unset")


@pytest.mark.parametrize("endpoint", ["hf-mirror.com", "https://hf-mirror.com/models", "https://hf mirror.com"])
def test_bad_endpoint(endpoint):
    says(variable("HF_ENDPOINT", HF_ENDPOINT=endpoint), "有误", repr(endpoint), "export HF_ENDPOINT=https://")


def test_token_is_not_to_be_given_to_a_mirror():
    says(variable("HF_ENDPOINT", HF_ENDPOINT="https://hf-mirror.com", HF_TOKEN="hf_x"), "可用", "令牌", "unset HF_TOKEN")


def test_bad_offline_switch():
    says(variable("HF_HUB_OFFLINE", HF_HUB_OFFLINE="enabled"), "有误", "当作没有打开", "HF_HUB_OFFLINE=1")


def test_offline_values_are_those_of_huggingface_hub():
    constants = pytest.importorskip("huggingface_hub.constants")        # 由 diffusers 和 transformers 带来
    assert set(environment.TRUE_VALUES) == set(constants.ENV_VARS_TRUE_VALUES)


def test_hub_is_asked_only_in_hub_mode(monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("不应联网")

    monkeypatch.setattr(environment, "hub_problem", no_network)
    for values in ({}, {"BOOK_MODE": "embedded"}, {"BOOK_MODE": "hub", "HF_HUB_OFFLINE": "1"}):
        says(environment.check_hub(values), "正常", "没有检查")


@pytest.fixture(params=["httpx", "标准库"])
def without_proxies(request, monkeypatch):
    """没有代理；缺 httpx 时退而用标准库，说法一样。代理的各种情形见 tests/project/test_proxies.py。"""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    if request.param == "标准库":
        monkeypatch.setitem(sys.modules, "httpx", None)


def test_unreachable_hub(without_proxies):
    check = environment.check_hub({"BOOK_MODE": "hub", "HF_ENDPOINT": "http://127.0.0.1:9"})    # 没有程序在听的端口
    says(check, "有误", "连不上 http://127.0.0.1:9", "HF_ENDPOINT", "unset BOOK_MODE")
    says(environment.check_hub({"BOOK_MODE": "hub", "HF_ENDPOINT": "hf-mirror.com"}), "有误", "连不上")


def test_any_answer_means_reachable(without_proxies):
    """拒绝、出错的回应也是回应。"""
    class Forbidden(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidden) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        says(environment.check_hub({"BOOK_MODE": "hub", "HF_ENDPOINT": endpoint}), "正常", f"连得上 {endpoint}")
        server.shutdown()


# —— 汇总与打印 ——

@pytest.fixture
def clean(monkeypatch):
    for name in ("BOOK_MODE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def assert_aligned(text: str) -> None:
    """每一行的“状态”和“现状”都从同一列开始；宽度由 wcwidth 另行计算。"""
    lines = text.split("\n\n")[0].splitlines()
    start = wcswidth(lines[1].split("  ")[0]) + 2
    for line in lines[2:]:
        if line.lstrip().startswith("办法："):
            assert len(line) - len(line.lstrip()) == start + 6
            continue
        state = next(word for word in STATES if f"  {word}  " in line)
        assert wcswidth(line[: line.index(f"  {state}  ")]) + 2 == start, line


def test_healthy_environment(clean, capsys):
    checks = environment.check_environment()
    assert [check for check in checks if check.状态 in FAILING] == []
    assert all(check.状态 in STATES for check in checks)
    names = [check.项目 for check in checks]
    assert len(names) == len(set(names)) and set(PINS) <= set(names)
    text = capsys.readouterr().out
    assert_aligned(text)
    assert "没有要处理的" in text
    assert str(ROOT) not in text, "本机路径不能进笔记本的输出"


def test_sick_environment_is_printed_in_full(clean, capsys, monkeypatch):
    sick = {"numpy": None, "diffusers": "0.1.0", "tqdm": ""}
    real = environment.installed_version
    monkeypatch.setattr(environment, "installed_version", lambda name: sick[name] if name in sick else real(name))
    monkeypatch.setenv("BOOK_MODE", "online")
    checks = environment.check_environment()
    assert [check.项目 for check in checks if check.状态 in FAILING] == ["diffusers", "numpy", "tqdm", "BOOK_MODE"]
    text = capsys.readouterr().out
    assert_aligned(text)
    assert "4 项要处理：diffusers、numpy、tqdm、BOOK_MODE" in text
    assert f"python -m pip install diffusers=={PINS['diffusers']} numpy=={PINS['numpy']} tqdm==" in text
    for check in checks:
        assert check.怎样解决 in text and check.现状 in text


def test_printed_text_is_chinese(clean, capsys):
    """除了版本号和操作系统的名字，每一行的现状都是中文。"""
    for check in environment.check_environment():
        assert re.search(r"[\u4e00-\u9fff]", check.现状) or environment.release(check.现状) or check.项目 == "操作系统", check
    text = capsys.readouterr().out
    assert re.match(r"项目 +状态  现状\n", text)
    assert not re.search(r"\b(missing|found|error|ok|failed)\b", text, re.I)


@pytest.mark.parametrize("name", ["check_system", "total_memory", "check_package", "check_torch_pair", "check_accelerator",
                                  "check_font", "check_data", "check_models", "check_variables", "check_proxies", "check_hub"])
def test_one_broken_check_is_one_row(clean, monkeypatch, capsys, name):
    def broken(*args, **kwargs):
        raise KeyError("意料之外")

    monkeypatch.setattr(environment, name, broken)
    checks = environment.check_environment()
    failing = [check for check in checks if check.状态 in FAILING]
    assert failing and all("没能检查：KeyError" in check.现状 for check in failing)
    assert len(checks) > 20


def test_command_line_without_any_package():
    """连 site-packages 都没有的 Python：说得出缺什么，退出码是 1。"""
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "BOOK_", "HF_"))}
    result = subprocess.run(
        [sys.executable, "-S", str(ROOT / "tools" / "check_environment.py")],
        env=settings | {"PYTHONIOENCODING": "ascii"}, cwd="/", capture_output=True, encoding="utf-8",
    )
    assert result.returncode == 1 and result.stderr == ""
    assert_aligned(result.stdout)
    for name, version in PINS.items():
        assert f"python -m pip install {name}=={version}" in result.stdout
    assert "make setup" in result.stdout


def test_old_python_can_read_the_check():
    for name in ("book_utils/environment.py", "book_utils/checksums.py", "tools/check_environment.py"):
        source = (ROOT / name).read_text(encoding="utf-8")
        tree = ast.parse(source, feature_version=(3, 8))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)
                    and isinstance(node.left, (ast.Dict, ast.DictComp))], "字典的 | 要 3.9"
        assert not re.search(r"\.removeprefix|\.removesuffix|file_digest|strict=True", source)
        used = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert used - {"torch", "torchvision", "httpx"} <= set(sys.stdlib_module_names)       # 这三个没装也不要紧


def test_old_python_row_on_the_command_line(clean, monkeypatch, capsys):
    monkeypatch.setattr(environment, "check_python", lambda: Check("Python", "太旧", "3.9.2", "装一个新的"))
    assert environment.main() == 1
    assert "3.9.2" in capsys.readouterr().out


def test_healthy_command_line_returns_zero(clean, capsys):
    assert environment.main() == 0
