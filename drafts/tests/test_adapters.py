"""ControlNet、LoRA、DreamBooth：达到要求，换别的种子重新量也站得住；坏的输入说得清；训练可以中断。"""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from support.paths import ROOT
from torch import nn

from book_utils import (
    add_difference,
    blank_controlnet,
    butterfly_images,
    canny_edges,
    caption,
    color_blocks,
    draw_prompts,
    edge_f1,
    load_adapter,
    mix_adapters,
    prepare_lines,
    resolve,
    sample_controlled,
)
from book_utils.lora import WEIGHT_NAME, LoRALinear, read_adapter
from book_utils.sketch import SketchPad

SEED = 90_009               # 训练与 recipes/evaluate.py 都没有用过
MODELS = ("mini-controlnet-edges", "mini-controlnet-colors", "mini-lora-glow", "mini-lora-frame", "mini-dreambooth", "adapter-judge")


def records(name: str, file: str = "evaluation.json") -> dict:
    return json.loads((ROOT / "models" / name / file).read_text("utf-8"))


@pytest.fixture(scope="module")
def base():
    pipeline = StableDiffusionPipeline.from_pretrained(resolve("mini-stable-diffusion"))
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    return pipeline


@pytest.fixture
def clean(base):
    """用完就把适配器全部卸下。"""
    yield base
    base.unload_lora_weights()


# —— 模型 ——

def test_models_fit_their_share():
    total = sum(p.stat().st_size for name in MODELS for p in (ROOT / "models" / name).rglob("*") if p.is_file())
    assert total < 16e6


def test_controlnet_reaches_the_bars():
    result = records("mini-controlnet-edges")
    assert result["n_images"] >= 100
    on, off = result["scales"]["1"], result["scales"]["0"]
    assert on["f1"] >= 2 * off["f1"]
    assert min(on[key] for key in ("wing_color", "pattern", "background")) >= 0.9
    assert set(result["prompts"]) == {"none", "insufficient", "conflicting", "perfect"}
    assert set(records("mini-controlnet-edges", "ablation.json")["variants"]) == {"zero", "gaussian", "light"}


@pytest.mark.parametrize("style", ["glow", "frame"])
def test_lora_reaches_the_bars(style):
    result = records(f"mini-lora-{style}")
    assert result["share"] < 0.03 and result["off_is_identical"]
    at_one = result["weights"]["1"]
    assert at_one[style] >= 0.9 and min(at_one["wing_color"], at_one["pattern"]) >= 0.85


def test_dreambooth_reaches_the_bars():
    result = records("mini-dreambooth")
    assert result["adapter"]["subject"] >= 0.8
    for key in ("wing_color", "pattern", "background"):
        assert result["adapter"]["others"][key] >= result["base"]["others"][key] - 0.05, key


def test_judge_is_right():
    result = records("adapter-judge")
    for kind in ("renders", "reconstructions"):
        assert min(result["accuracy"][kind].values()) >= 0.97, kind


def test_control_stands_on_new_edges(base):
    """另外 8 张，步数少些：有控制的比没有的更合边缘。"""
    images, butterflies = butterfly_images(8, 64, seed=SEED)
    edges, prompts = canny_edges(images / 255), [caption(b) for b in butterflies]
    controlnet = ControlNetModel.from_pretrained(resolve("mini-controlnet-edges")).eval()
    noise = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(SEED))
    with_control = sample_controlled(base, [(controlnet, edges, 1.0)], prompts, noise, n_steps=8)
    without = sample_controlled(base, [], prompts, noise, n_steps=8)
    assert edge_f1(canny_edges(with_control), edges).mean() > edge_f1(canny_edges(without), edges).mean() + 0.1
    assert not with_control.requires_grad


def test_color_controlnet_loads(base):
    network = add_difference(blank_controlnet(base.unet), resolve("mini-controlnet-colors"))
    assert any(p.any() for p in network.controlnet_mid_block.parameters())


# —— 控制图 ——

def test_edges_of_a_square():
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 8:24, 8:24] = 1
    edges = canny_edges(image)
    assert edges.shape == image.shape and set(edges.unique().tolist()) == {0.0, 1.0}
    rows, columns = edges[0, 0].nonzero(as_tuple=True)
    assert 6 <= rows.min() <= 9 and 22 <= rows.max() <= 25 and 6 <= columns.min() <= 9
    assert edges[0, 0, 12:20, 12:20].sum() == 0         # 里面没有边缘


@pytest.mark.parametrize("images, options, message", [
    (torch.zeros(3, 8, 8), {}, "形状"), (torch.full((1, 3, 8, 8), torch.nan), {}, "NaN"),
    (torch.zeros(1, 3, 8, 8), {"low": 9, "high": 3}, "阈值"),
])
def test_canny_refuses(images, options, message):
    with pytest.raises(ValueError, match=message):
        canny_edges(images, **options)


def test_f1_by_hand():
    line, shifted, half = torch.zeros(3, 1, 1, 12, 12)
    line[..., 5], shifted[..., 6], half[..., :6, 5] = 1, 1, 1
    assert edge_f1(line, line).item() == pytest.approx(1)
    assert edge_f1(shifted, line).item() == pytest.approx(1) and edge_f1(shifted, line, 0).item() == 0
    assert edge_f1(half, line, 0).item() == pytest.approx(2 / 3)
    assert edge_f1(torch.zeros_like(line), line).item() == 0
    for drawn, wanted, message in ((line, line[..., :5], "形状"), (line * 0.5, line, "0 或 1"), (line, line * 0, "空的")):
        with pytest.raises(ValueError, match=message):
            edge_f1(drawn, wanted)
    with pytest.raises(ValueError, match="tolerance"):
        edge_f1(line, line, -1)


def test_blocks_are_means():
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    blocks = color_blocks(image, 2)
    assert torch.allclose(blocks[0, :, :4, :4].mean(dim=(1, 2)), image[0, :, :4, :4].mean(dim=(1, 2)), atol=1e-6)
    with pytest.raises(ValueError, match="n_blocks"):
        color_blocks(image, 0)


@pytest.mark.parametrize("mode, background, line", [
    ("L", 0, 255), ("L", 255, 0), ("RGB", (255, 255, 255), (0, 0, 0)), ("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), ("1", 0, 1),
])
def test_lines_of_every_kind(mode, background, line):
    picture = Image.new(mode, (256, 256), background)
    ImageDraw.Draw(picture).line((128, 20, 128, 236), fill=line, width=3)
    edges = prepare_lines(picture, 64)
    assert edges.shape == (1, 3, 64, 64) and set(edges.unique().tolist()) == {0.0, 1.0}
    columns = edges[0, 0].any(dim=0).nonzero()[:, 0].tolist()
    assert 1 <= len(columns) <= 2 and all(abs(c - 32) <= 1 for c in columns)


@pytest.mark.parametrize("picture, size, message", [
    (np.zeros((64, 64)), 64, "PIL"), (Image.new("L", (64, 32)), 64, "正方形"),
    (Image.new("L", (64, 64)), 64, "一条线也没有"), (Image.new("RGB", (64, 64), "white"), 64, "一条线也没有"),
    (Image.new("L", (64, 64)), 0, "size"),
])
def test_lines_refuses(picture, size, message):
    with pytest.raises(ValueError, match=message):
        prepare_lines(picture, size)


def test_loop_refuses(base):
    noise = torch.zeros(1, 4, 16, 16)
    for options, message in (
        ({"prompts": ["a", "b"]}, "个数"), ({"n_steps": 0}, "n_steps"), ({"guidance_scale": 1.0}, "guidance_scale"),
        ({"start": 0.8, "end": 0.2}, "start"), ({"controls": [(None, torch.zeros(1, 3, 64, 64), -1.0)]}, "强度"),
    ):
        arguments = {"controls": [], "prompts": ["a"], "latents": noise} | options
        with pytest.raises(ValueError, match=message):
            sample_controlled(base, **arguments)


# —— 画布 ——

def test_sketch_pad_keeps_what_it_was_given():
    start = Image.new("L", (64, 64))
    ImageDraw.Draw(start).line((3, 5, 40, 5), fill=255)
    pad = SketchPad(64, start)
    assert np.array_equal(np.asarray(pad.image), np.asarray(start))
    page = pad.html()
    assert "<canvas" in page and "aria-label" in page and "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize("text", ["", "data:image/png;base64,!!!", "data:text/html;base64,AAAA"])
def test_sketch_pad_refuses_what_is_not_a_picture(text):
    pad = SketchPad(32)
    pad._text = text or "x"
    with pytest.raises(ValueError, match="PNG"):
        _ = pad.image
    with pytest.raises(ValueError, match="size"):
        SketchPad(8)


# —— LoRA ——

def test_lora_layer():
    layer = LoRALinear(nn.Linear(6, 4), rank=2)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), layer.base(x))
    assert [p.requires_grad for p in layer.base.parameters()] == [False, False]
    for rank in (0, 5):
        with pytest.raises(ValueError, match="rank"):
            LoRALinear(nn.Linear(6, 4), rank)


def test_weight_zero_and_unloading_leave_no_trace(clean):
    prompt = ["一只蓝色的条纹蝴蝶"]
    plain = draw_prompts(clean, prompt, n_steps=3)
    load_adapter(clean, resolve("mini-lora-glow"), "glow")
    load_adapter(clean, resolve("mini-dreambooth"), "subject")      # 秩不同
    mix_adapters(clean, {"glow": 1.0, "subject": 1.0})
    assert not torch.equal(draw_prompts(clean, prompt, n_steps=3), plain)
    mix_adapters(clean, {"glow": 0.0, "subject": 0.0})
    assert torch.equal(draw_prompts(clean, prompt, n_steps=3), plain)
    clean.unload_lora_weights()
    assert torch.equal(draw_prompts(clean, prompt, n_steps=3), plain)


def test_adapters_that_do_not_fit(clean, tmp_path):
    matrices = read_adapter(resolve("mini-lora-glow"))
    wide = {k: v.repeat(1, 2) if "lora_A" in k else v.repeat(2, 1) for k, v in matrices.items()}
    for name, tensors, message in (
        ("宽一倍", wide, "另一个模型"), ("别的层", {k.replace("attn1", "attn9"): v for k, v in matrices.items()}, "另一个模型"),
        ("不是 LoRA", {"a.weight": torch.zeros(2)}, "lora_A"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHT_NAME)
        with pytest.raises(ValueError, match=message):
            load_adapter(clean, folder, "x")
    (tmp_path / "坏的").mkdir()
    (tmp_path / "坏的" / WEIGHT_NAME).write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ValueError, match="损坏"):
        load_adapter(clean, tmp_path / "坏的", "x")
    with pytest.raises(FileNotFoundError, match="没有找到"):
        load_adapter(clean, tmp_path / "没有", "x")
    assert not getattr(clean.unet, "peft_config", {})

    load_adapter(clean, resolve("mini-lora-glow"), "glow")
    with pytest.raises(ValueError, match="已经"):
        load_adapter(clean, resolve("mini-lora-glow"), "glow")
    for weights, message in (({}, "空"), ({"frame": 1.0}, "没有装着"), ({"glow": 4.0}, "强度"), ({"glow": float("nan")}, "强度")):
        with pytest.raises(ValueError, match=message):
            mix_adapters(clean, weights)


# —— 配方 ——

def test_interrupted_lora_training_is_the_same(base, tmp_path):
    """训练到一半停下、再接着走，与一口气走完，权重相同。"""
    import lora_training as recipe

    from book_utils import fit

    latents = torch.randn(32, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    tokens = base.tokenizer(["一只蝴蝶"] * 32, padding="max_length", truncation=True, return_tensors="pt").input_ids[:, None]

    def train(checkpoint, max_steps=None):
        unet = copy.deepcopy(base.unet)
        recipe.add_lora(unet, rank=2)
        fit(
            recipe.Trainable(unet), (latents, tokens), recipe.AdapterLoss(base, unet), n_epochs=1, batch_size=8, lr=1e-3,
            checkpoint=checkpoint, checkpoint_every=2, max_steps=max_steps,
        )
        return {name: p.detach().clone() for name, p in unet.named_parameters() if p.requires_grad}

    whole = train(tmp_path / "a.safetensors")
    train(tmp_path / "b.safetensors", max_steps=2)
    resumed = train(tmp_path / "b.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(p.any() for name, p in whole.items() if "lora_B" in name)


def test_light_control_has_the_same_interface(base):
    import controlnet_ablation as recipe

    network = recipe.LightControl()
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    edges = torch.zeros(1, 3, 64, 64)
    plain = sample_controlled(base, [], ["一只蝴蝶"], noise, n_steps=2)
    assert torch.equal(sample_controlled(base, [(network, edges, 1.0)], ["一只蝴蝶"], noise, n_steps=2), plain)     # 零卷积还是零
