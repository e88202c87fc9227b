"""随书的蝴蝶裁判与蝴蝶管线：用别的种子重新量一遍，卡片里的数要站得住。"""


import pytest
import torch
from diffusers import DDPMPipeline
from support.published import evaluation

from book_utils import butterfly_images, butterfly_judge, resolve

SEED = 90_001               # 训练与 recipes/evaluate.py 都没有用过


@pytest.fixture(scope="module")
def judge():
    return butterfly_judge()


@pytest.mark.parametrize(("size", "options"), [(64, {}), (64, {"held_out": True}), (32, {"size": "large"})])
def test_judge_reads_new_butterflies(judge, size, options):
    images, butterflies = butterfly_images(400, size, seed=SEED, **options)
    probability, found = judge.describe(images / 255)
    assert (probability > 0.9).float().mean() >= 0.99
    for name in judge.ATTRIBUTES:
        right = sum(a[name] == getattr(b, name) for a, b in zip(found, butterflies, strict=True))
        assert right / len(butterflies) >= 0.99, name


def test_judge_rejects_what_is_not_a_butterfly(judge):
    generator = torch.Generator().manual_seed(SEED)
    images = butterfly_images(200, 64, seed=SEED + 1)[0] / 255
    others = {
        "噪声": torch.rand(200, 3, 64, 64, generator=generator),
        "平均": images.view(25, 8, 3, 64, 64).mean(dim=1),
        "纯色": torch.rand(200, 3, 1, 1, generator=generator).expand(-1, -1, 64, 64),
    }
    for name, batch in others.items():
        assert (judge.describe(batch)[0] > 0.9).float().mean() <= 0.05, name


def test_published_figures_reach_the_bars():
    result = evaluation("butterflies-ddpm-32")
    assert result["n_samples"] >= 500
    assert result["recognized"] >= 0.95
    assert all(count > 0 for count in result["wing_colors"].values()) and len(result["wing_colors"]) == 8
    # 生成的图到训练图的距离不比新画的图近：没有背下训练图
    assert result["nearest_training_image"] >= result["nearest_training_image_of_new_renders"]


def test_pipeline_draws_as_well_as_the_card_says(judge):
    """另一个种子的 30 张。认得出的比例与卡片相差不应超过三倍标准误差。"""
    pipeline = DDPMPipeline.from_pretrained(resolve("butterflies-ddpm-32"))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=30, num_inference_steps=100, generator=torch.Generator().manual_seed(SEED), output_type="np",
    ).images
    probability, found = judge.describe(torch.from_numpy(images).permute(0, 3, 1, 2))
    recognized = probability > 0.9
    published = evaluation("butterflies-ddpm-32")["recognized"]
    error = (published * (1 - published) / len(images)) ** 0.5
    assert recognized.float().mean() >= published - 3 * error - 1 / len(images)
    assert len({a["wing_color"] for a, keep in zip(found, recognized.tolist(), strict=True) if keep}) >= 5
