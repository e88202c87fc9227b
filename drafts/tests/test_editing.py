"""改图：走几步与管线一致，图与掩膜怎样写都认得，给错了说得清；加宽输入的网络起初与原来的一样。"""

import copy
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from book_utils import Butterfly, prepare_edit, render_butterfly, resolve, steps_taken, widen_input


@pytest.fixture(scope="module")
def base():
    pipeline = StableDiffusionPipeline.from_pretrained(resolve("mini-stable-diffusion"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(render_butterfly(Butterfly("red", "spotted", "sand", "large"), 64, seed=3).image)


# —— 图生图走几步 ——

@pytest.mark.parametrize("n_steps", [1, 7, 25, 100])
def test_steps_are_those_of_the_pipeline(base, n_steps):
    """与管线的 get_timesteps 相比；0.29 × 100 那样的舍入也要一样。"""
    img2img = StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    for strength in np.linspace(0, 1, 101).tolist():
        img2img.scheduler.set_timesteps(n_steps)
        theirs = len(img2img.get_timesteps(n_steps, strength, "cpu")[0])
        if theirs:
            assert steps_taken(strength, n_steps) == theirs
        else:
            with pytest.raises(ValueError, match="至少有一步可走"):
                steps_taken(strength, n_steps)


def test_a_known_rounding():
    assert steps_taken(0.29, 100) == 28 and steps_taken(0.3, 30) == 9 and steps_taken(1, 25) == 25


@pytest.mark.parametrize(("strength", "n_steps"), [
    (0, 25), (-0.1, 25), (1.5, 25), (math.nan, 25), (math.inf, 25), (0.03, 25), (0.5, 1), (0.5, 0), (0.5, -4),
])
def test_impossible_strengths_are_refused(strength, n_steps):
    with pytest.raises(ValueError, match=f"strength 应在 0 与 1 之间.*步数 {n_steps} .*收到的是 {strength}"):
        steps_taken(strength, n_steps)


def test_full_strength_forgets_the_picture(base, picture):
    """噪声计划走到最后，原图的系数恰好是 0：强度 1 时换一张原图，结果一位不差；强度 0.5 时不是。"""
    img2img = StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)

    def draw(image, strength):
        return img2img(
            "一只紫色的蝴蝶", image=image, strength=strength, num_inference_steps=4, output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images

    other = Image.new("RGB", picture.size, "white")
    assert torch.equal(draw(picture, 1.0), draw(other, 1.0))
    assert not torch.allclose(draw(picture, 0.5), draw(other, 0.5), atol=0.05)


# —— 图与掩膜 ——

SQUARE = np.zeros((64, 64), dtype=bool)
SQUARE[16:48, 8:40] = True
MASKS = {
    "布尔": SQUARE,
    "0 到 1 的小数": SQUARE.astype(np.float64),
    "0 与 1 的整数": SQUARE.astype(np.uint8),
    "0 到 255 的整数": SQUARE.astype(np.uint8) * 255,
    "0 到 255 的小数": SQUARE.astype(np.float32) * 255,
    "张量": torch.from_numpy(SQUARE),
    "嵌套的列表": SQUARE.tolist(),
    "PIL，L": Image.fromarray(SQUARE.astype(np.uint8) * 255),
    "PIL，L，0 与 1": Image.fromarray(SQUARE.astype(np.uint8)),
    "PIL，1": Image.fromarray(SQUARE),
    "PIL，RGB": Image.fromarray(SQUARE.astype(np.uint8) * 255).convert("RGB"),
    "PIL，RGBA": Image.fromarray(SQUARE.astype(np.uint8) * 255).convert("RGBA"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_may_be_written_in_many_ways(picture, kind):
    image, mask = prepare_edit(picture, MASKS[kind], 64)
    assert image.mode == "RGB" and mask.mode == "L" and image.size == mask.size == (64, 64)
    assert np.array_equal(np.asarray(mask), SQUARE.astype(np.uint8) * 255)
    assert np.array_equal(np.asarray(image), np.asarray(picture))


def test_gray_is_cut_in_the_middle(picture):
    values = np.where(SQUARE, 0.6, 0.4)
    assert np.array_equal(np.asarray(prepare_edit(picture, values, 64)[1]) > 0, SQUARE)
    assert np.array_equal(np.asarray(prepare_edit(picture, (values * 255).astype(np.uint8), 64)[1]) > 0, SQUARE)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "F"])
def test_pictures_may_have_any_mode(picture, mode):
    if mode == "I;16":
        given = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        given = picture.convert(mode)
    image, _ = prepare_edit(given, SQUARE, 64)
    assert image.mode == "RGB" and image.size == (64, 64) and np.asarray(image).std() > 5


def test_transparency_is_white():
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert np.asarray(prepare_edit(clear, SQUARE, 64)[0]).min() == 255


@pytest.mark.parametrize("size", [32, 64, 512])
def test_both_are_resized(picture, size):
    larger = picture.resize((200, 200))
    image, mask = prepare_edit(larger, np.ones((200, 200)), size)
    assert image.size == mask.size == (size, size) and set(mask.tobytes()) == {255}


@pytest.mark.parametrize(("given", "mask", "size", "words"), [
    (np.zeros((64, 64, 3)), SQUARE, 64, "picture 应是 PIL 图像，收到的是 ndarray"),
    ("photo.png", SQUARE, 64, "picture 应是 PIL 图像，收到的是 str"),
    (None, SQUARE, 64, "收到的是 NoneType"),
    ((64, 48), SQUARE, 64, "应是正方形，收到的是 64×48"),
    ((64, 64), SQUARE[:, :10], 64, r"mask 应与图一样大，是高 64、宽 64 .*\(64, 10\)"),
    ((64, 64), SQUARE[None], 64, r"收到的形状是 \(1, 64, 64\)"),
    ((64, 64), np.repeat(SQUARE[..., None], 3, axis=2), 64, r"收到的形状是 \(64, 64, 3\)"),
    ((64, 64), Image.new("L", (32, 32), 255), 64, r"收到的形状是 \(32, 32\)"),
    ((64, 64), np.zeros((64, 64)), 64, "没有要重画的地方.*是不是给反了"),
    ((64, 64), np.full((64, 64), np.nan), 64, "没有要重画的地方"),
    ((64, 64), Image.new("RGB", (64, 64), "black"), 64, "没有要重画的地方"),
    ((64, 64), SQUARE, 0, "size 应是正整数，收到的是 0"),
])
def test_bad_pairs_are_named(given, mask, size, words):
    given = Image.new("RGB", given) if isinstance(given, tuple) else given
    with pytest.raises(ValueError, match=words):
        prepare_edit(given, mask, size)


def test_white_is_repainted_and_black_is_kept(base, picture):
    """掩膜混合：黑的地方，潜变量与原图的一位不差；白的地方变了。"""
    blend = StableDiffusionInpaintPipeline(**base.components, requires_safety_checker=False)
    blend.set_progress_bar_config(disable=True)
    image, mask = prepare_edit(picture, SQUARE, 64)
    latents = blend(
        "一只绿色的蝴蝶", image=image, mask_image=mask, num_inference_steps=3, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
    pixels = base.image_processor.preprocess(image)
    with torch.no_grad():
        z0 = base.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0)) * base.vae.config.scaling_factor
    small = torch.from_numpy(SQUARE[::4, ::4].copy()).expand(1, 4, -1, -1)
    assert torch.equal(latents[~small], z0[~small]) and not torch.allclose(latents[small], z0[small], atol=0.1)


# —— 加宽输入 ——

@pytest.mark.parametrize("in_channels", [4, 5, 9])
def test_wider_network_starts_the_same(base, in_channels):
    before = copy.deepcopy(base.unet.state_dict())
    wider = widen_input(base.unet, in_channels)
    x = torch.randn(2, in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 48, base.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(wider(x, 500, text).sample, base.unet(x[:, :4], 500, text).sample, atol=1e-4)
    assert wider.config.in_channels == in_channels and base.unet.config.in_channels == 4
    assert (wider.conv_in.weight[:, 4:] == 0).all() and wider.training == base.unet.training
    assert all(torch.equal(before[name], value) for name, value in base.unet.state_dict().items())


def test_new_channels_can_learn(base):
    wider = widen_input(base.unet, 9).requires_grad_(True)
    x = torch.randn(1, 9, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(1, 48, base.unet.config.cross_attention_dim)
    wider(x, 500, text).sample.square().mean().backward()
    assert wider.conv_in.weight.grad[:, 4:].abs().max() > 0


@pytest.mark.parametrize("in_channels", [3, 0])
def test_narrowing_is_refused(base, in_channels):
    with pytest.raises(ValueError, match=f"不少于原来的 4，收到的是 {in_channels}"):
        widen_input(base.unet, in_channels)


def test_scheduler_of_the_variants_is_the_base_one(base):
    assert isinstance(base.scheduler, DDIMScheduler) and base.scheduler.alphas_cumprod[-1] == 0
