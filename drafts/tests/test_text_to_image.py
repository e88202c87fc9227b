"""文生图：成批地画与逐张画相同，手写的循环与管线逐位相同，特别的提示词画得出，写错的输入用中文拒绝。"""

import math

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from transformers import CLIPTokenizer

from book_utils import draw_prompts, prompt_notes, rescale_guidance, resolve, sample_prompts, saturation

PROMPTS = ["一只蓝色的条纹蝴蝶", "a large red butterfly on a white background", ""]


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(resolve("mini-stable-diffusion"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(resolve("mini-stable-diffusion"), subfolder="tokenizer")


def start_noise(count: int, seed: int = 0) -> torch.Tensor:
    """与管线逐张抽取的相同：第 i 张的种子是 seed + i。"""
    return torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)])


class Recorder:
    """代替管线：记下每次收到的参数，图像全是灰的。"""

    def __init__(self):
        self.calls = []
        config = type("Config", (), {"num_train_timesteps": 1000})()
        self.scheduler = type("Scheduler", (), {"config": config})()

    def __call__(self, prompts, **options):
        self.calls.append((prompts, options))
        return type("Output", (), {"images": np.full((len(prompts), 8, 8, 3), 0.5, dtype=np.float32)})()


# —— 成批地画 ——

def test_each_image_has_its_own_seed(pipeline):
    """谁和谁一批不影响画的是什么；第 i 张的种子是 seeds + i。"""
    together = draw_prompts(pipeline, PROMPTS, seeds=5, n_steps=2)
    assert together.shape == (3, 3, 64, 64) and together.dtype == torch.float32
    assert 0 <= together.min() and together.max() <= 1
    for i, prompt in enumerate(PROMPTS):
        alone = draw_prompts(pipeline, [prompt], seeds=[5 + i], n_steps=2)
        assert torch.allclose(alone[0], together[i], atol=1e-3)
    assert not torch.allclose(draw_prompts(pipeline, PROMPTS[:1], seeds=6, n_steps=2)[0], together[0], atol=1e-2)


def test_many_prompts_are_drawn_in_parts():
    recorder = Recorder()
    prompts = [f"第 {i} 句" for i in range(60)]
    images = draw_prompts(recorder, prompts, seeds=100, n_steps=7, guidance_scale=3.0, negative_prompt="不要", height=8)
    assert images.shape == (60, 3, 8, 8)
    assert [len(part) for part, _ in recorder.calls] == [25, 25, 10]
    assert [prompt for part, _ in recorder.calls for prompt in part] == prompts
    seeds = [generator.initial_seed() for _, options in recorder.calls for generator in options["generator"]]
    assert seeds == list(range(100, 160))
    for part, options in recorder.calls:
        assert options["negative_prompt"] == ["不要"] * len(part)
        assert (options["num_inference_steps"], options["guidance_scale"], options["height"]) == (7, 3.0, 8)


@pytest.mark.parametrize(("options", "words"), [
    ({"prompts": []}, "prompts"),
    ({"prompts": "一只蝴蝶"}, "prompts"),
    ({"prompts": ["一只蝴蝶", None]}, "prompts"),
    ({"n_steps": 0}, "n_steps.*1 到 1000.*0"),
    ({"n_steps": 1001}, "n_steps.*1 到 1000.*1001"),
    ({"guidance_scale": math.nan}, "guidance_scale.*nan"),
    ({"guidance_scale": math.inf}, "guidance_scale.*inf"),
    ({"height": 60}, "8 的正整数倍.*60"),
    ({"width": 0}, "8 的正整数倍.*0"),
    ({"width": -8}, "8 的正整数倍.*-8"),
    ({"seeds": [1, 2]}, "有 1 句提示词，种子却有 2 个"),
])
def test_bad_requests_are_refused(options, words):
    recorder = Recorder()
    with pytest.raises(ValueError, match=words):
        draw_prompts(recorder, **{"prompts": ["一只蝴蝶"]} | options)
    assert recorder.calls == []                                 # 一步也没有走


# —— 特别的提示词与设置 ——

@pytest.mark.parametrize("prompt", ["", "霓虹色的龙 🦋", "un papillon rouge", "，".join(["一只大个头的红色斑点蝴蝶"] * 20)])
def test_unusual_prompts_still_give_images(pipeline, prompt):
    images = draw_prompts(pipeline, [prompt], n_steps=2)
    assert images.shape == (1, 3, 64, 64) and torch.isfinite(images).all()


def test_what_is_cut_off_changes_nothing(pipeline):
    long_prompt = "，".join(["一只大个头的红色斑点蝴蝶，在画面左边"] * 5)
    first, second = (draw_prompts(pipeline, [long_prompt + tail], n_steps=2) for tail in ("，黑色背景", "，白色背景"))
    assert torch.equal(first, second)


def test_one_step_and_another_size(pipeline):
    assert torch.isfinite(draw_prompts(pipeline, PROMPTS[:1], n_steps=1)).all()
    assert draw_prompts(pipeline, PROMPTS[:1], n_steps=1, height=96, width=72).shape == (1, 3, 96, 72)


def test_guidance_not_above_one_is_no_guidance(pipeline):
    def draw(**options):
        return draw_prompts(pipeline, PROMPTS[:1], n_steps=2, **options)

    plain = draw(guidance_scale=1.0)
    for scale in (0.5, 0.0, -3.0):
        assert torch.equal(draw(guidance_scale=scale), plain)
    assert torch.equal(draw(guidance_scale=1.0, negative_prompt="蓝色的翅膀"), plain)
    guided = draw(guidance_scale=2.0)
    assert not torch.equal(guided, plain)
    assert not torch.equal(draw(guidance_scale=2.0, negative_prompt="蓝色的翅膀"), guided)
    assert torch.equal(draw(guidance_scale=2.0, negative_prompt=""), guided)        # 空的就是默认的


def test_extreme_guidance_is_finite(pipeline):
    images = draw_prompts(pipeline, PROMPTS[:1], n_steps=3, guidance_scale=100.0)
    assert torch.isfinite(images).all() and 0 <= images.min() and images.max() <= 1


# —— 提示词里读不到、读不懂的 ——

def test_notes_about_prompts(tokenizer):
    for fine in ("", "一只红色的蝴蝶，在画面左边", "a large red butterfly, sand background"):
        assert prompt_notes(tokenizer, fine) == []
    assert prompt_notes(tokenizer, "两只青色的蝴蝶") == ["没有学过：两、青"]
    assert prompt_notes(tokenizer, "a red dragon") == ["没有学过：dragon"]
    room = tokenizer.model_max_length - 2
    exactly = "蝴蝶" * (room // 2)
    assert prompt_notes(tokenizer, exactly) == []
    note, = prompt_notes(tokenizer, exactly + "红色")
    assert note == f"太长：共 {room + 2} 个词元，只读前 {room} 个，读不到“红色”"
    assert len(prompt_notes(tokenizer, exactly + "青色")) == 2


# —— 饱和度与标准差的调回 ——

def test_saturation_by_hand():
    colors = torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.8, 0.4, 0.6]])
    images = colors[:, :, None, None].expand(-1, -1, 4, 4)
    assert torch.allclose(saturation(images), torch.tensor([0.0, 1.0, 0.0, 0.5]), atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (2, 4, 16, 16)])
def test_saturation_says_what_it_was_given(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)，收到的是"):
        saturation(torch.zeros(shape))


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.7, 1.0])
def test_rescale_agrees_with_diffusers(amount):
    guided, conditional = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ours = rescale_guidance(3 * guided, conditional, amount)
    assert torch.allclose(ours, rescale_noise_cfg(3 * guided, conditional, amount), atol=1e-5)
    if amount == 1:
        assert torch.allclose(ours.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)), rtol=1e-4)
    if amount == 0:
        assert torch.equal(ours, 3 * guided)


def test_impossible_rescaling_is_refused():
    with pytest.raises(ValueError, match="amount 应在 0 与 1 之间，收到的是 1.5"):
        rescale_guidance(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), 1.5)
    with pytest.raises(ValueError, match="形状应相同"):
        rescale_guidance(torch.zeros(1, 4, 2, 2), torch.zeros(2, 4, 2, 2), 0.5)


# —— 手写的循环 ——

@pytest.mark.parametrize("options", [
    {}, {"guidance_scale": 1.0}, {"guidance_scale": 0.0}, {"guidance_scale": 7.5, "guidance_rescale": 0.7},
])
def test_loop_equals_the_pipeline_bit_for_bit(pipeline, options):
    ours = sample_prompts(pipeline, PROMPTS, start_noise(3, seed=40), n_steps=4, **options)
    assert torch.equal(ours, draw_prompts(pipeline, PROMPTS, seeds=40, n_steps=4, **options))
    assert not ours.requires_grad


def test_loop_works_with_euler(pipeline):
    """EulerDiscreteScheduler 的 init_noise_sigma 不是 1，scale_model_input 也不是原样返回。"""
    original = pipeline.scheduler
    try:
        pipeline.scheduler = EulerDiscreteScheduler.from_config(original.config)
        ours = sample_prompts(pipeline, PROMPTS, start_noise(3, seed=40), n_steps=4)
        assert torch.equal(ours, draw_prompts(pipeline, PROMPTS, seeds=40, n_steps=4))
    finally:
        pipeline.scheduler = original


def test_interval_limits_the_guidance(pipeline):
    calls = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: calls.append((int(inputs[1]), len(inputs[0]))))
    try:
        middle = sample_prompts(pipeline, PROMPTS[:1], start_noise(1), n_steps=10, guidance_scale=7.5, interval=(0.2, 0.8))
    finally:
        hook.remove()
    assert len(calls) == 10
    assert [t for t, count in calls if count == 2] == [t for t, _ in calls if 200 <= t <= 800]
    assert {count for t, count in calls if not 200 <= t <= 800} == {1}
    plain = sample_prompts(pipeline, PROMPTS[:1], start_noise(1), n_steps=10, guidance_scale=1.0)
    never = sample_prompts(pipeline, PROMPTS[:1], start_noise(1), n_steps=10, guidance_scale=7.5, interval=(0.0, 0.0))
    assert torch.equal(never, plain) and not torch.equal(middle, plain)


@pytest.mark.parametrize(("options", "words"), [
    ({"prompts": []}, "prompts"),
    ({"prompts": "一只蝴蝶"}, "prompts"),
    ({"latents": start_noise(2)}, "有 1 句提示词，起点却有 2 份"),
    ({"n_steps": 0}, "n_steps"),
    ({"n_steps": 1001}, "n_steps"),
    ({"guidance_scale": math.nan}, "guidance_scale"),
    ({"guidance_rescale": 2.0}, "guidance_rescale.*2.0"),
    ({"guidance_rescale": -0.1}, "guidance_rescale.*-0.1"),
    ({"interval": (0.8, 0.2)}, "interval"),
    ({"interval": (-0.1, 0.5)}, "interval"),
])
def test_bad_loops_are_refused(pipeline, options, words):
    with pytest.raises(ValueError, match=words):
        sample_prompts(pipeline, **{"prompts": ["一只蝴蝶"], "latents": start_noise(1), "n_steps": 1} | options)
