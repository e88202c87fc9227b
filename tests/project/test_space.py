"""第 2.1 节的演示程序：在断网的子进程里真的运行起来，只听回环地址，由它的接口和网页都能得到图像。"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler
from support.browser import chromium
from support.paths import ROOT
from support.spaces import INSTALLED, call, environment, listening_addresses, picture, running

from book_utils import resolve

SPACE = ROOT / "spaces" / "mnist-ddpm"
PACKAGES = ROOT / "spaces" / "packages.txt"


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text("utf-8").splitlines()
    found = [re.match(r"([\w.-]+)==([^\s;]+)", line) for line in lines]
    return {match[1].lower().replace("_", "-"): match[2] for match in found if match}


# —— 装得齐不齐，写得对不对 ——

def test_packages_are_installed_and_complete():
    assert (INSTALLED / "packages.txt").read_text("utf-8") == PACKAGES.read_text("utf-8"), "请运行 make setup"
    code = """
import json, sys
from importlib.metadata import PackageNotFoundError, requires, version
from packaging.requirements import Requirement
problems = []
for name in json.loads(sys.argv[1]):
    for line in requires(name) or []:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            if not wanted.specifier.contains(version(wanted.name), prereleases=True):
                problems.append(f"{name} 要 {wanted}，装的是 {version(wanted.name)}")
        except PackageNotFoundError:
            problems.append(f"{name} 要 {wanted}，没有装")
print(json.dumps(problems))
"""
    names = [name for name in pins(PACKAGES) if (name != "audioop-lts" or sys.version_info >= (3, 13))]
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(names)], env=environment(), capture_output=True, encoding="utf-8", check=True
    )
    assert json.loads(result.stdout) == []


def test_space_is_described_as_it_is():
    _, header, body = (SPACE / "README.md").read_text("utf-8").split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["sdk"] == "gradio" and card["sdk_version"] == pins(PACKAGES)["gradio"]
    assert (SPACE / card["app_file"]).is_file() and card["license"] == "apache-2.0" and "MODEL_ID" in body
    book = pins(ROOT / "requirements.txt")
    wanted = pins(SPACE / "requirements.txt")
    assert wanted and wanted == {name: book[name] for name in wanted}


def test_app_is_shown_in_the_chapter():
    chapter = (ROOT / "chapters" / "02-hugging-face.md").read_text("utf-8")
    assert "```{literalinclude} ../spaces/mnist-ddpm/app.py" in chapter


# —— 运行起来 ——

@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """在回环地址的空闲端口上运行 app.py，给出 (网址, 进程, 日志)。"""
    with running(SPACE, tmp_path_factory.mktemp("space")) as started:
        yield started


def ask(url: str, seed: int, steps: int) -> np.ndarray:
    """经由 Gradio 的接口要一张图。"""
    image = picture(url, seed, steps)
    assert image.size == (4 * 112, 2 * 112)
    return np.asarray(image.convert("L"))


def test_returns_what_the_pipeline_draws(space):
    answer = ask(space[0], seed=3, steps=4)
    pipeline = DDIMPipeline.from_pretrained(resolve("mnist-ddpm"))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=8, generator=torch.Generator().manual_seed(3), num_inference_steps=4).images
    rows = [np.hstack([np.asarray(image) for image in images[i:i + 4]]) for i in (0, 4)]
    expected = 255 - np.vstack(rows).astype(int)
    assert np.abs(answer[::4, ::4].astype(int) - expected).max() <= 2
    assert (answer < 64).mean() > 0.02, "应当有笔画"


def test_answers_depend_on_the_seed_only(space):
    first = ask(space[0], seed=5, steps=2)
    assert np.array_equal(first, ask(space[0], seed=5, steps=2))
    assert not np.array_equal(first, ask(space[0], seed=6, steps=2))


def test_bad_values_are_refused(space):
    kind, _ = call(space[0], 0, 10_000)                 # 超出滑块的范围，不能让人一次要它走一万步
    assert kind == "error"


def test_listens_on_loopback_only(space):
    url, process, _ = space
    addresses = listening_addresses(process)
    assert {ip for ip, _ in addresses} == {"127.0.0.1"}
    assert any(f":{port}/" in url for _, port in addresses)


def test_page_works_without_leaving_the_machine(space):
    url, _, log = space
    outside = []
    with chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(120_000)

        def guard(route):
            if route.request.url.startswith((url, "blob:", "data:")):
                route.continue_()
            else:
                outside.append(route.request.url)
                route.abort()

        page.route("**/*", guard)
        page.goto(url, wait_until="load")
        slider = page.get_by_role("slider", name=re.compile("步数"))
        slider.wait_for()
        slider.fill("2")
        page.get_by_role("button", name="生成").click()
        image = page.locator("img[src*='gradio_api/file']").first
        image.wait_for()
        page.wait_for_function("image => image.naturalWidth > 0", arg=image.element_handle())
        assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [4 * 112, 2 * 112]
        page.close()
    assert outside == []
    assert "断网状态" not in log.read_text("utf-8"), "演示程序自己也不该去联网"
