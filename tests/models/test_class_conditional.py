"""两个以数字为条件的模型：用别的种子重新量一遍；配方丢掉一成标签，能中断、能续。"""

import mnist_class_conditional
import mnist_class_planes
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from support.published import evaluation

from book_utils import ClassConditionedUnet, digit_classifier, fit, load_weights, mnist_tensors, resolve

NAME = "mnist-class-conditional"
SEED = 90_003               # 训练与 recipes/evaluate.py 都没有用过


@torch.no_grad()
def sample(predict, digits, n_steps=20):
    """用 predict(x, t, 类别) 画 digits 里的数字，返回分类器认作的数字。"""
    scheduler = DDIMScheduler.from_pretrained(resolve(NAME), subfolder="scheduler", timestep_spacing="trailing")
    scheduler.set_timesteps(n_steps)
    x = torch.randn(len(digits), 1, 28, 28, generator=torch.Generator().manual_seed(SEED))
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t, digits), t, x, use_clipped_model_output=True).prev_sample
    return digit_classifier()((x / 2 + 0.5).clamp(0, 1)).argmax(dim=1)


def draw(unet, digits, scale):
    """按引导强度 scale 画 digits 里的数字，返回分类器认作的数字。"""
    nothing = torch.full_like(digits, mnist_class_conditional.NO_CLASS)

    def predict(x, t, labels):
        # 强度 0 与 1 只用得到一个预测
        without = unet(x, t, class_labels=nothing).sample if scale != 1 else 0
        prediction = unet(x, t, class_labels=labels).sample if scale else 0
        return (1 - scale) * without + scale * prediction

    return sample(predict, digits)


@pytest.fixture(scope="module")
def unet():
    return UNet2DModel.from_pretrained(resolve(NAME), subfolder="unet").eval()


def test_published_figures_reach_the_bar():
    result = evaluation(NAME)
    assert result["n_samples"] >= 1000 and result["real_as_asked"] >= 0.99
    assert max(row["as_asked"] for row in result["class_guidance"].values()) >= 0.95


def test_draws_the_digit_asked_for_as_often_as_the_card_says(unet):
    """另一个种子的 60 张，画对的比例与卡片相差不应超过三倍标准误差。"""
    digits = torch.arange(10).repeat(6)
    for scale in (1.0, 2.0):
        rate = (draw(unet, digits, scale) == digits).float().mean().item()
        known = evaluation(NAME)["class_guidance"][f"{scale:g}"]["as_asked"]
        assert abs(rate - known) <= 3 * (max(known * (1 - known), 0.01) / len(digits)) ** 0.5, (scale, rate, known)


def test_without_a_class_every_digit_appears(unet):
    digits = torch.zeros(30, dtype=torch.long)
    drawn = draw(unet, digits, scale=0.0)           # 强度 0：不理会所要的 0
    assert len(set(drawn.tolist()) & set(range(10))) >= 8


def test_saved_scheduler_is_the_one_trained_with():
    saved = DDPMScheduler.from_pretrained(resolve(NAME), subfolder="scheduler")
    assert saved.config.prediction_type == "v_prediction"
    assert torch.equal(saved.alphas_cumprod, mnist_class_conditional.noise_scheduler.alphas_cumprod)


def test_a_tenth_of_the_labels_is_dropped():
    seen = []

    def model(noisy, timesteps, class_labels):
        seen.append(class_labels)
        return type("Output", (), {"sample": noisy})

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 10
    mnist_class_conditional.batch_loss(model, torch.rand(4000, 1, 28, 28), labels, generator)
    dropped = seen[0] == mnist_class_conditional.NO_CLASS
    assert 0.08 < dropped.float().mean() < 0.12
    assert torch.equal(seen[0][~dropped], labels[~dropped])


@pytest.mark.parametrize(("recipe", "build"), [
    (mnist_class_conditional, mnist_class_conditional.build_model), (mnist_class_planes, ClassConditionedUnet),
])
def test_recipe_continues_from_its_checkpoint(tmp_path, recipe, build):
    tensors = tuple(tensor[:256] for tensor in mnist_tensors(train=True))

    def train(max_steps, checkpoint=None):
        torch.manual_seed(0)
        history = fit(
            build(), tensors, recipe.batch_loss, n_epochs=1, batch_size=64, lr=1e-3,
            max_steps=max_steps, checkpoint=checkpoint, checkpoint_every=2,
        )
        return history.losses

    whole = train(4)
    train(2, tmp_path / "half.safetensors")
    assert train(4, tmp_path / "half.safetensors") == whole


def test_class_planes_draw_the_digit_asked_for_as_often_as_the_card_says():
    known = evaluation("mnist-class-planes")["class_guidance"]["1"]["as_asked"]
    assert known >= 0.9
    digits = torch.arange(10).repeat(10)
    unet = load_weights(ClassConditionedUnet(), resolve("mnist-class-planes"))
    rate = (sample(unet, digits) == digits).float().mean().item()
    assert abs(rate - known) <= 3 * (known * (1 - known) / len(digits)) ** 0.5, (rate, known)


def test_class_planes_start_from_the_chapter_architecture():
    """铺成通道的嵌入与图像拼接：换一个类别，输出就不同；参数个数与书里说的一致。"""
    torch.manual_seed(0)
    unet = ClassConditionedUnet().eval()
    assert sum(p.numel() for p in unet.parameters()) == 687_385
    x = torch.randn(1, 1, 28, 28).expand(2, -1, -1, -1)
    with torch.no_grad():
        outputs = unet(x, 500, torch.tensor([3, 8]))
    assert outputs.shape == x.shape and not torch.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize(("shape", "n_labels"), [((2, 3, 28, 28), 2), ((2, 28, 28), 2), ((2, 1, 28, 28), 3)])
def test_class_planes_reject_wrong_shapes(shape, n_labels):
    with pytest.raises(ValueError, match="ClassConditionedUnet"):
        ClassConditionedUnet()(torch.zeros(shape), 0, torch.zeros(n_labels, dtype=torch.long))
