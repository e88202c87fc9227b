"""第 5.7 节的演示程序：颜色引导的采样，画得出来，画得及时，写错的输入用中文拒绝。"""

import numpy as np
import psutil
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from support.paths import ROOT
from support.spaces import call, listening_addresses, picture, running

from book_utils import resolve

SPACE = ROOT / "spaces" / "butterfly-color"
BLUE = "#1954d9"


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    with running(SPACE, tmp_path_factory.mktemp("space")) as started:
        yield started


@pytest.fixture(scope="module")
def guided():
    """直接载入的管线，与 5.7 节的做法相同。"""
    pipeline = DiffusionPipeline.from_pretrained(
        resolve("butterflies-ddpm-32"), custom_pipeline=str(SPACE / "pipeline.py"), trust_remote_code=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_space_is_described_as_it_is():
    _, header, body = (SPACE / "README.md").read_text("utf-8").split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["sdk"] == "gradio" and (SPACE / card["app_file"]).is_file() and "MODEL_ID" in body
    packages = (ROOT / "spaces" / "packages.txt").read_text("utf-8")
    assert f"gradio=={card['sdk_version']}" in packages
    book = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert all(line in book for line in (SPACE / "requirements.txt").read_text("utf-8").split())


def test_files_are_shown_in_the_chapter():
    chapter = (ROOT / "chapters" / "05-finetuning-and-guidance.md").read_text("utf-8")
    for name in ("app.py", "pipeline.py"):
        assert f"```{{literalinclude}} ../spaces/butterfly-color/{name}" in chapter


def test_returns_what_the_pipeline_draws(space, guided):
    image = picture(space[0], BLUE, 40, 3)
    drawn = guided(
        tuple(int(BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5)), guidance_scale=40.0, batch_size=4,
        num_inference_steps=15, generator=torch.Generator().manual_seed(3),
    ).images
    expected = np.vstack([np.hstack([np.asarray(b) for b in drawn[i : i + 2]]) for i in (0, 2)]).astype(int)
    assert image.size == (384, 384)
    assert np.abs(np.asarray(image.convert("RGB"))[::6, ::6].astype(int) - expected).max() <= 2


def test_a_picture_takes_less_than_five_seconds(space):
    """量演示程序自己用掉的 CPU 时间（它只用一个线程）：墙上的时间在机器忙的时候不作数。"""
    url, process, _ = space

    def used() -> float:
        times = psutil.Process(process.pid).cpu_times()
        return times.user + times.system

    picture(url, BLUE, 40, 1)                           # 第一次有预热
    before = used()
    picture(url, BLUE, 40, 2)
    seconds = used() - before
    assert 0 < seconds < 5, f"{seconds:.1f} 秒"


def test_color_follows_the_request(space):
    """要蓝色就偏蓝，要红色就偏红；强度 0 不引导，颜色也就不起作用。"""
    def mean_color(color, scale):
        return np.asarray(picture(space[0], color, scale, 5).convert("RGB")).reshape(-1, 3).mean(axis=0)

    blue, red = mean_color(BLUE, 40), mean_color("rgba(217, 33, 30, 1)", 40)
    assert blue[2] > red[2] + 30 and red[0] > blue[0] + 30
    assert np.array_equal(mean_color(BLUE, 0), mean_color("#d9211e", 0))


@pytest.mark.parametrize(("values", "reason"), [
    (("蓝色", 40, 0), "颜色应写成"),
    (("#12345", 40, 0), "颜色应写成"),
    (("rgb(300, 0, 0)", 40, 0), "0 到 255"),
    (("rgb(1.2.3, 0, 0)", 40, 0), "颜色应写成"),
    ((None, 40, 0), "颜色应写成"),
    ((BLUE, -1, 0), "强度应在 0 到 200 之间"),
    ((BLUE, 1e6, 0), "强度应在 0 到 200 之间"),
    ((BLUE, None, 0), "强度应在 0 到 200 之间，收到的是 空的"),
    ((BLUE, 40, -3), "种子应在 0 到 9999 之间"),
])
def test_bad_values_are_refused_in_chinese(space, values, reason):
    kind, result = call(space[0], *values)
    assert kind == "error" and reason in result["error"], result


def test_listens_on_loopback_only(space):
    url, process, log = space
    addresses = listening_addresses(process)
    assert {ip for ip, _ in addresses} == {"127.0.0.1"}
    assert any(f":{port}/" in url for _, port in addresses)
    assert "断网状态" not in log.read_text("utf-8"), "演示程序自己也不该去联网"


@pytest.mark.parametrize(("color", "scale"), [((0.1, 2.0, 0.3), 40.0), ((0.1, 0.2), 40.0), ((0, 0, 1), float("nan"))])
def test_pipeline_refuses_bad_values(guided, color, scale):
    with pytest.raises(ValueError, match="应"):
        guided(color, guidance_scale=scale)
