"""反转：来回的误差、精确的方法、编辑、水印与标识；写错的输入用中文拒绝。"""

import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from book_utils import (
    Butterfly,
    add_visible_label,
    align_tokens,
    butterfly_images,
    caption,
    decode_latents,
    diffedit_mask,
    direct_offsets,
    draw_prompts,
    edit,
    edit_latents,
    encode_images,
    invert,
    invert_exact,
    lay_tree_ring,
    null_text,
    random_butterflies,
    read_label,
    regenerate,
    regenerate_exact,
    render_butterfly,
    resolve,
    save_labelled,
    silhouette,
    tree_ring_key,
    tree_ring_score,
)
from book_utils.inversion import (
    LABEL_FIELDS,
    SharedAttention,
    attention_processor,
    encode_prompts,
    miss_weights,
    rotate,
    time_grid,
    to_velocity,
)


@pytest.fixture(scope="module")
def pipeline():
    loaded = StableDiffusionPipeline.from_pretrained(resolve("mini-stable-diffusion"))
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def renders():
    """十二张新画的图（种子不曾用于训练），取值 (0, 1)，各一句说明。"""
    images, butterflies = butterfly_images(12, 64, seed=30_700)
    return images / 255, [caption(butterfly, ("zh", "en")[i % 2]) for i, butterfly in enumerate(butterflies)]


@pytest.fixture(scope="module")
def latents(pipeline, renders):
    return encode_images(pipeline, renders[0])


def psnr(a, b, span=1.0):
    return 10 * math.log10(span**2 / (a - b).square().mean().item())


class Calls:
    """数一数 UNet 被调用了几次。"""

    def __init__(self, pipeline):
        self.count = 0
        self.hook = pipeline.unet.register_forward_hook(self.add)

    def add(self, *_):
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


# —— 一步 ——

def test_grid_and_bad_steps(pipeline):
    timesteps, angles = time_grid(pipeline.scheduler, 50)
    pipeline.scheduler.set_timesteps(50)
    assert timesteps == pipeline.scheduler.timesteps.tolist()[::-1]
    assert angles[0] == 0 and abs(angles[-1] - math.pi / 2) < 1e-6
    assert all(a < b for a, b in zip(angles, angles[1:], strict=False))
    for wrong in (0, -5, 30, 1001):
        with pytest.raises(ValueError, match="整除 1000"):
            time_grid(pipeline.scheduler, wrong)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_predictions_give_the_same_velocity(prediction_type):
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    for angle in (0.1, 0.8, 1.5):
        z = math.cos(angle) * x0 + math.sin(angle) * eps
        velocity = math.cos(angle) * eps - math.sin(angle) * x0
        prediction = {"v_prediction": velocity, "epsilon": eps, "sample": x0}[prediction_type]
        assert torch.allclose(to_velocity(prediction, z, angle, prediction_type), velocity)
        assert torch.allclose(rotate(z, velocity, -angle), x0)


def test_velocity_errors():
    z = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="纯噪声里没有原图"):
        to_velocity(z, z, math.pi / 2, "epsilon")
    with pytest.raises(ValueError, match="prediction_type 应是"):
        to_velocity(z, z, 1.0, "velocity")


def test_exact_methods_have_the_stated_order():
    """一维高斯数据，概率流有公式：O-BELM 一步的误差是三阶，BDIA 与 DDIM 是二阶。"""
    mean, std = 1.0, 0.5

    def velocity(x, phi):
        c, s = math.cos(phi), math.sin(phi)
        return (c * x - mean - c * std**2 / (c**2 * std**2 + s**2) * (x - c * mean)) / s

    def solution(phi):
        return math.cos(phi) * mean + math.sqrt(math.cos(phi) ** 2 * std**2 + math.sin(phi) ** 2) * 0.8

    def error(method, h):
        angles = [0.9 - h, 0.9, 0.9 + 1.5 * h]
        gamma = 0.0 if method == "DDIM" else miss_weights(angles, method)[0]
        x, v = torch.tensor(solution(0.9)).double(), torch.tensor(velocity(solution(0.9), 0.9)).double()
        back = solution(angles[2]) - rotate(x, v, angles[2] - angles[1])
        return abs((rotate(x, v, angles[0] - angles[1]) + gamma * back - solution(angles[0])).item())

    for method, order in (("DDIM", 2), ("BDIA", 2), ("O-BELM", 3), ("O-BELM-sigma", 3)):
        assert abs(math.log2(error(method, 0.02) / error(method, 0.01)) - order) < 0.15


# —— 来回 ——

def test_regenerate_is_the_pipeline(pipeline):
    prompts = ["一只红色的条纹蝴蝶", "a small blue butterfly"]
    noise = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in (5, 6)])
    for guidance_scale in (1.0, 2.0):
        ours = decode_latents(pipeline, regenerate(pipeline, noise, prompts, 10, guidance_scale)[0])
        theirs = draw_prompts(pipeline, prompts, seeds=5, n_steps=10, guidance_scale=guidance_scale)
        assert (ours - theirs).abs().max() < 2e-3


def test_there_and_back(pipeline, renders, latents):
    images, prompts = renders
    there = invert(pipeline, latents, prompts, 50)
    back = decode_latents(pipeline, regenerate(pipeline, there[-1], prompts, 50)[0])
    assert torch.equal(there[0], latents) and there.shape == (51, *latents.shape)
    values = [psnr(a, b) for a, b in zip(back, images, strict=True)]
    assert np.mean(values) >= 25
    assert 0.5 < there[-1].std() < 1.3


@pytest.mark.parametrize("method", ["BDIA", "O-BELM"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_exact_inversion(pipeline, renders, latents, method, guidance_scale):
    prompts, z = renders[1][:4], latents[:4]
    for n_steps in (10, 20):
        path = invert_exact(pipeline, z, prompts, n_steps, method, guidance_scale)
        back = regenerate_exact(pipeline, path[-1], prompts, n_steps, method, guidance_scale, path[-2])
        assert psnr(back[0], z, (z.max() - z.min()).item()) >= 45


def test_network_calls(pipeline, renders, latents):
    prompts, z = renders[1][:1], latents[:1]
    with Calls(pipeline) as calls:
        invert(pipeline, z, prompts, 10)
        assert calls.count == 10
        invert(pipeline, z, prompts, 10, n_iterations=3)
        assert calls.count == 40
        path = invert_exact(pipeline, z, prompts, 10)
        assert calls.count == 50
        regenerate_exact(pipeline, path[-1], prompts, 10, previous=path[-2])
        assert calls.count == 59


def test_fixed_point_is_better(pipeline, renders, latents):
    prompts, z = renders[1][:4], latents[:4]
    gaps = []
    for k in (1, 3, 6):
        path = invert(pipeline, z, prompts, 10, n_iterations=k)
        gaps.append((regenerate(pipeline, path[-1], prompts, 10)[0] - z).square().mean().item())
    assert gaps[2] < gaps[1] < gaps[0]


def test_guided_ways_back(pipeline, renders, latents):
    prompts, z = renders[1][:2], latents[:2]
    path = invert(pipeline, z, prompts, 10)
    plain = regenerate(pipeline, path[-1], prompts, 10)[0]
    negative = regenerate(pipeline, path[-1], prompts, 10, 5.0, prompts)[0]
    assert torch.allclose(plain, negative, atol=1e-2)
    offsets = direct_offsets(pipeline, path, prompts, 5.0)
    assert torch.allclose(regenerate(pipeline, path[-1], prompts, 10, 5.0, offsets=offsets)[0], z, atol=1e-2)
    before = (regenerate(pipeline, path[-1], prompts, 10, 5.0)[0] - z).square().mean()
    learned = null_text(pipeline, path, prompts, 5.0, n_updates=5)
    assert (regenerate(pipeline, path[-1], prompts, 10, 5.0, learned)[0] - z).square().mean() < before
    assert all(parameter.grad is None for parameter in pipeline.unet.parameters())


def test_bad_inversions(pipeline, latents):
    with pytest.raises(ValueError, match="同样多句话"):
        invert(pipeline, latents, ["一只蝴蝶"], 10)
    with pytest.raises(ValueError, match="同样多句话"):
        invert(pipeline, latents[:1], "一只蝴蝶", 10)
    with pytest.raises(ValueError, match="n_iterations 应是正整数"):
        invert(pipeline, latents[:1], [""], 10, n_iterations=0)
    with pytest.raises(ValueError, match="同样多句话"):
        regenerate(pipeline, latents, [""], 10)
    with pytest.raises(ValueError, match="method 应是"):
        invert_exact(pipeline, latents[:1], [""], 10, method="EDICT")
    with pytest.raises(ValueError, match="不能反转；请改用 O-BELM"):
        invert_exact(pipeline, latents[:1], [""], 10, method="O-BELM-sigma")
    with pytest.raises(ValueError, match="有 1 张图"):
        direct_offsets(pipeline, torch.zeros(11, 1, 4, 16, 16), ["", ""], 2.0)
    with pytest.raises(ValueError, match="有 1 张图"):
        null_text(pipeline, torch.zeros(11, 1, 4, 16, 16), ["", ""])


# —— 编辑 ——

SOURCE = Butterfly("red", "spotted", "sky blue", "large", "left", "round", 8)


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(render_butterfly(SOURCE, 64, seed=30_701).image)


def test_same_prompt_returns_the_picture(pipeline, picture):
    prompt = caption(SOURCE, "zh")
    original = np.asarray(picture) / 255
    for options in ({}, {"start_step": 0}, {"start_step": 20}, {"mask": "auto"}, {"attention_share": 0.8}):
        edited = np.asarray(edit(pipeline, picture, prompt, prompt, **options)) / 255
        assert 10 * np.log10(1 / np.mean((edited - original) ** 2)) > 20


def test_last_start_step_changes_nothing(pipeline, picture):
    edited = np.asarray(edit(pipeline, picture, caption(SOURCE), "一只蓝色的蝴蝶", start_step=20))
    z = encode_images(pipeline, torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255)
    only_decoded = (decode_latents(pipeline, z)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(edited, only_decoded)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_other_modes_and_sizes(pipeline, picture, mode):
    edited = edit(pipeline, picture.convert(mode).resize((150, 150)), "", "一只紫色的蝴蝶", n_steps=4, start_step=1)
    assert edited.size == (64, 64) and edited.mode == "RGB"


@pytest.mark.parametrize("wrong, message", [
    ({"image": Image.new("RGB", (64, 48))}, "应是正方形"), ({"image": "a.png"}, "应是 PIL 图像"),
    ({"target_prompt": "  "}, "target_prompt 是空的"), ({"start_step": 21}, "start_step 应在 0 到 20"),
    ({"start_step": -1}, "start_step 应在 0 到 20"), ({"mask": "butterfly"}, "mask 应是 auto"),
    ({"attention_share": 2.0}, "attention_share 应在 0 与 1"), ({"n_steps": 30}, "整除 1000"),
])
def test_bad_edits(pipeline, picture, wrong, message):
    options = {"image": picture, "source_prompt": "", "target_prompt": "一只蝴蝶"} | wrong
    with pytest.raises(ValueError, match=message):
        edit(pipeline, **options)


def test_mask_keeps_the_outside(pipeline, renders, latents):
    prompts, z = renders[1][:2], latents[:2]
    path = invert(pipeline, z, prompts, 10)
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., :8] = 1
    edited = edit_latents(pipeline, path, prompts, ["一只紫色的蝴蝶"] * 2, 0, mask=mask)
    assert torch.equal(edited[..., 8:], z[..., 8:]) and not torch.allclose(edited[..., :8], z[..., :8], atol=0.1)


def test_automatic_mask(pipeline, renders, latents):
    mask = diffedit_mask(pipeline, latents[:2], renders[1][:2], ["一只紫色的蝴蝶"] * 2, n_noises=2)
    assert mask.shape == (2, 1, 16, 16) and set(mask.unique().tolist()) == {0.0, 1.0}
    for wrong, message in (({"strength": 1.0}, "strength"), ({"n_noises": 0}, "n_noises")):
        with pytest.raises(ValueError, match=message):
            diffedit_mask(pipeline, latents[:1], [""], ["一只蝴蝶"], **wrong)


def test_alignment(pipeline):
    tokenizer = pipeline.tokenizer
    same = align_tokens(tokenizer, "一只红色的蝴蝶", "一只红色的蝴蝶")
    assert torch.equal(same, torch.arange(tokenizer.model_max_length))
    added = align_tokens(tokenizer, "一只蝴蝶", "一只小蝴蝶")
    assert added[:6].tolist() == [0, 1, 2, -1, 3, 4]
    swapped = align_tokens(tokenizer, "一只红色的蝴蝶", "一只紫色的蝴蝶")
    assert torch.equal(swapped, same)


def test_shared_attention(pipeline, renders, latents):
    unet = pipeline.unet
    z, text = latents[:1].repeat(3, 1, 1, 1), encode_prompts(pipeline, renders[1][:1]).repeat(3, 1, 1)
    identity = torch.arange(text.shape[1])[None]
    with torch.no_grad():
        usual = unet(z, 500, text).sample
        with attention_processor(unet, SharedAttention(identity)):
            assert torch.allclose(unet(z, 500, text).sample, usual, atol=1e-4)
        with pytest.raises(RuntimeError), attention_processor(unet, SharedAttention(identity)):
            raise RuntimeError
        assert torch.equal(unet(z, 500, text).sample, usual)


def test_silhouette():
    butterflies = [b for b in random_butterflies(60, seed=30_702) if b.background != "black"]
    drawn = [render_butterfly(b, 64, 30_703 + i) for i, b in enumerate(butterflies)]
    images = torch.from_numpy(np.stack([one.image for one in drawn])).permute(0, 3, 1, 2) / 255
    truth = torch.from_numpy(np.stack([one.mask for one in drawn]))
    found = silhouette(images)
    overlap = (found & truth).sum(dim=(1, 2)) / (found | truth).sum(dim=(1, 2))
    assert overlap.median() > 0.9 and overlap.min() > 0.7
    assert not silhouette(torch.full((1, 3, 16, 16), 0.5)).any()


# —— 标记 ——

def test_tree_ring():
    key = tree_ring_key(16, radius=5, seed=3)
    clean = torch.randn(500, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    marked = lay_tree_ring(clean, key)
    assert torch.equal(key, tree_ring_key(16, 5, 3)) and not torch.equal(key, tree_ring_key(16, 5, 4))
    assert torch.allclose(tree_ring_score(marked, key), torch.ones(500), atol=1e-4)
    assert tree_ring_score(clean, key).abs().mean() < 0.15
    assert torch.equal(marked[:, 1:], clean[:, 1:]) and abs(marked[:, 0].std() - 1) < 0.1
    assert tree_ring_score(marked + torch.randn(marked.shape), key).mean() > 0.5
    for radius in (0, 8):
        with pytest.raises(ValueError, match="radius 应在"):
            tree_ring_key(16, radius)


def test_watermark_is_found_in_pictures(pipeline):
    key = tree_ring_key(seed=1)
    prompts = [caption(butterfly) for butterfly in random_butterflies(8, seed=30_704)]
    noise = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    scores = []
    for z in (lay_tree_ring(noise, key), noise):
        images = decode_latents(pipeline, regenerate(pipeline, z, prompts, 20, 2.0)[0])
        scores.append(tree_ring_score(invert(pipeline, encode_images(pipeline, images), [""] * 8, 10)[-1], key))
    assert scores[0].mean() > scores[1].mean() + 0.2


def test_labels_are_written_and_read(tmp_path, picture):
    path = save_labelled(picture, tmp_path / "a.png", '示例 <"公司"> & 人', "编号-1")
    label = read_label(path)
    assert tuple(label) == LABEL_FIELDS
    assert label["ContentProducer"] == '示例 <"公司"> & 人' and label["ProduceID"] == "编号-1" and label["Label"] == "1"
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(picture))
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    picture.save(tmp_path / "b.png")
    assert read_label(tmp_path / "b.png") is None
    for options, message in (
        ({"path": tmp_path / "a.jpg"}, "以 .png 结尾"), ({"producer": " "}, "不能是空的"),
        ({"content_id": ""}, "不能是空的"),
    ):
        with pytest.raises(ValueError, match=message):
            save_labelled(**{"image": picture, "path": path, "producer": "我", "content_id": "1"} | options)


def test_broken_label(tmp_path, picture):
    notes = PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", "<TC260:AIGC>{&quot;Label&quot;: 坏的</TC260:AIGC>")
    picture.save(tmp_path / "a.png", pnginfo=notes)
    with pytest.raises(ValueError, match="内容却读不懂"):
        read_label(tmp_path / "a.png")


def test_visible_label(picture):
    large = picture.resize((256, 256))
    labelled = add_visible_label(large)
    changed = (np.asarray(labelled) != np.asarray(large)).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert labelled.size == large.size and labelled is not large
    assert rows.min() > 200 and columns.min() > 150 and rows.max() - rows.min() >= 0.05 * 256
    with pytest.raises(ValueError, match="图太小"):
        add_visible_label(picture.resize((32, 32)))
    with pytest.raises(ValueError, match="text 是空的"):
        add_visible_label(large, " ")
