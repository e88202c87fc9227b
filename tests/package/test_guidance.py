"""引导：梯度对得上差分，裁块与颜色损失合乎定义，写错的输入用中文拒绝。"""

import math

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from transformers import CLIPTokenizer

from book_utils import (
    angle_loss,
    color_loss,
    color_number,
    guided_sample,
    loss_gradient,
    predicted_x0,
    random_cutouts,
    resolve,
    sample_classes,
    unseen_words,
)


def small_unet(**options) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4, **options,
    ).eval().requires_grad_(False)


def scheduler(prediction_type="v_prediction") -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, timestep_spacing="trailing"
    )


def noise(count=2, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_predicted_x0_undoes_the_noise(prediction_type):
    noisy_scheduler, x0, eps, t = scheduler(prediction_type), noise(seed=1), noise(seed=2), torch.tensor(300)
    alpha_bar = noisy_scheduler.alphas_cumprod[t]
    x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    truth = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0 if prediction_type == "v_prediction" else eps
    assert torch.allclose(predicted_x0(noisy_scheduler, truth, x, t), x0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("through_unet", [True, False])
def test_gradient_agrees_with_differences(through_unet, prediction_type):
    unet, rule, x = small_unet().double(), scheduler(prediction_type), noise(1).double()

    def loss(images):
        return color_loss(images, (0.1, 0.9, 0.5))

    for t in (100, 500, 900):
        gradient, prediction = loss_gradient(unet, rule, x, t, loss, through_unet)

        @torch.no_grad()
        def loss_at(point, t=t, prediction=prediction):
            output = unet(point, t).sample if through_unet else prediction
            return loss(predicted_x0(rule, output, point, t)).item()

        directions = torch.nn.functional.normalize(torch.randn(8, x.numel(), dtype=torch.float64)).view(8, *x.shape)
        numbers = torch.tensor([(loss_at(x + 1e-5 * d) - loss_at(x - 1e-5 * d)) / 2e-5 for d in directions])
        exact = torch.tensor([(gradient * d).sum().item() for d in directions])
        assert (numbers - exact).norm() < 1e-3 * numbers.norm()


def test_guidance_lowers_the_loss_and_zero_changes_nothing():
    unet, rule = small_unet(), scheduler()

    def loss(images):
        return color_loss(images, (0.1, 0.9, 0.5))

    def reached(scale):
        return loss(guided_sample(unet, rule, noise(4), 5, loss, scale) * 2 - 1).mean().item()

    assert reached(30) < reached(0) < reached(-30)
    rule.set_timesteps(5)
    x = noise(4)
    with torch.no_grad():
        for t in rule.timesteps:
            x = rule.step(unet(x, t).sample, t, x).prev_sample
    assert torch.allclose((x / 2 + 0.5).clamp(0, 1), guided_sample(unet, rule, noise(4), 5, loss, 0), atol=1e-6)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 1001, -1e9])
def test_absurd_scales_are_refused(scale):
    with pytest.raises(ValueError, match="引导的强度应在"):
        guided_sample(small_unet(), scheduler(), noise(), 2, lambda x: x.mean(dim=(1, 2, 3)), scale)
    with pytest.raises(ValueError, match="引导的强度应在"):
        sample_classes(
            small_unet(num_class_embeds=3), scheduler(), noise(), torch.tensor([0, 1]), 2, scale
        )


@pytest.mark.parametrize("target", [(0.1, 0.2), (0.1, 0.2, 1.5), (-0.1, 0, 0)])
def test_impossible_colors_are_refused(target):
    with pytest.raises(ValueError, match="三个 0 到 1 的数"):
        color_loss(noise(), target)


def test_color_loss_is_the_mean_distance():
    assert torch.allclose(color_loss(torch.ones(1, 3, 4, 4), (0.5, 0.5, 0.5)), torch.ones(1))


@pytest.mark.parametrize("theta", [0.01, 1.2, 3.0])
def test_angle_loss_is_the_squared_angle(theta):
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.cos(theta), math.sin(theta)]])
    assert torch.allclose(angle_loss(a, b), torch.tensor([theta**2]), rtol=1e-3)


def test_cutouts_are_square_pieces_of_the_image():
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(2, 3, -1, -1)       # 亮度随位置线性变化
    pieces = random_cutouts(images, 5, torch.Generator().manual_seed(0), smallest=0.5)
    assert pieces.shape == (10, 3, 8, 8)
    assert pieces.min() >= 0 and pieces.max() <= 63
    across = (pieces[:, 0, 4, 5] - pieces[:, 0, 4, 3]) / 2                  # 横向的斜率就是裁出的边长占几分之几
    down = (pieces[:, 0, 5, 4] - pieces[:, 0, 3, 4]) / 16
    assert torch.allclose(across, down, atol=1e-3) and across.min() >= 0.5 - 1e-3 and across.max() <= 1 + 1e-3
    assert torch.equal(pieces, random_cutouts(images, 5, torch.Generator().manual_seed(0), smallest=0.5))
    assert torch.allclose(random_cutouts(images, 1, smallest=1.0), images, atol=1e-3)


@pytest.mark.parametrize(("count", "smallest"), [(0, 0.5), (2, 0.0), (2, 1.5)])
def test_impossible_cutouts_are_refused(count, smallest):
    with pytest.raises(ValueError, match="n_cutouts"):
        random_cutouts(noise(), count, smallest=smallest)


def test_unseen_words_are_found():
    tokenizer = CLIPTokenizer.from_pretrained(resolve("butterfly-clip"))
    assert unseen_words(tokenizer, "一只红色的蝴蝶，在画面左边；A big Blue butterfly") == []
    assert unseen_words(tokenizer, "一只青色的蝴蝶") == ["青"]
    assert unseen_words(tokenizer, "un papillon rouge") == ["un", "papillon", "rouge"]
    assert unseen_words(tokenizer, "") == []


def test_color_names_in_two_languages():
    assert [color_number(name) for name in ("红色", "红", "red", "white")] == [0, 0, 0, 7]
    with pytest.raises(ValueError, match="没有“青色”这个类别；可以要的颜色是红色"):
        color_number("青色")


class Recorder:
    """记下每次调用时的时间步与类别，预测全是 0。"""

    def __init__(self, n_classes=3):
        self.config = type("Config", (), {"num_class_embeds": n_classes})()
        self.calls = []

    def __call__(self, x, t, class_labels):
        self.calls.append((int(t), class_labels.tolist()))
        return type("Output", (), {"sample": torch.zeros_like(x)})()


def test_guidance_calls_the_network_twice_and_only_in_the_interval():
    def calls(**options):
        unet, guide = Recorder(), Recorder()
        if options.pop("auto", False):
            options["guide"] = guide
        sample_classes(unet, scheduler(), noise(), torch.tensor([0, 1]), 10, **options)
        return unet.calls, guide.calls

    assert len(calls(scale=1.0)[0]) == 10                               # w = 1 不必算第二次
    both, _ = calls(scale=2.0)
    assert [labels for _, labels in both] == [[0, 1], [2, 2]] * 10
    middle, _ = calls(scale=2.0, interval=(0.2, 0.8))
    twice = [t for t, labels in middle if labels == [2, 2]]
    assert twice and all(200 <= t <= 800 for t in twice) and len(twice) == 6
    own, guide = calls(scale=2.0, auto=True)
    assert len(own) == len(guide) == 10 and all(labels == [0, 1] for _, labels in guide)


def test_extrapolation_is_what_the_formula_says():
    """一步 DDIM：结果对预测是线性的（没有截断时），w 倍的外推就是 w 倍的差。"""
    rule = scheduler()
    rule.register_to_config(clip_sample=False)
    unet, labels = small_unet(num_class_embeds=3), torch.tensor([0, 1])
    x = noise() * 0.1

    at0, at1, at2 = (sample_classes(unet, rule, x, labels, 1, scale) for scale in (0.0, 1.0, 1.5))
    inside = torch.stack([at0, at1, at2]).sub(0.5).abs().amax(dim=0) < 0.5      # 没有碰到 0 或 1 的像素
    assert inside.float().mean() > 0.5
    assert torch.allclose((at2 - at0)[inside], 1.5 * (at1 - at0)[inside], atol=1e-5)
    assert not torch.allclose(at1, at0)


@pytest.mark.parametrize(("labels", "options", "reason"), [
    ([0, 5], {}, "0 到 2 的编号"), ([0, -1], {}, "0 到 2 的编号"), ([0], {}, "2 个"),
    ([0, 1], {"scale": 2.0, "interval": (0.8, 0.2)}, "interval"),
])
def test_bad_requests_are_refused(labels, options, reason):
    with pytest.raises(ValueError, match=reason):
        sample_classes(small_unet(num_class_embeds=3), scheduler(), noise(), torch.tensor(labels), 2, **options)


@pytest.mark.parametrize("scale", [0.0, -3.0, 1000.0])
def test_unusual_scales_still_give_images(scale):
    images = sample_classes(small_unet(num_class_embeds=3), scheduler(), noise(), torch.tensor([0, 1]), 3, scale)
    assert torch.isfinite(images).all() and 0 <= images.min() and images.max() <= 1
