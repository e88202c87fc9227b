"""图像修补、照着深度画、深度估计三个模型，以及第六章的各项测量：达到要求，换种子重新量也站得住；训练可以中断。"""

import functools
import json

import measuring
import mini_depth_estimator
import mini_stable_diffusion_depth
import mini_stable_diffusion_inpaint
import numpy as np
import pytest
import stable_diffusion_studies
import torch
from diffusers import (
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from measuring import agreement, rank_correlation, ranks, write_prompts
from safetensors.torch import load_file
from support.paths import ROOT
from support.published import allowed, evaluation

from book_utils import add_difference, fit, random_butterflies, random_caption, render_butterfly, resolve

SEED = 90_006               # 训练与 recipes/evaluate.py 都没有用过
VARIANTS = {mini_stable_diffusion_inpaint: 9, mini_stable_diffusion_depth: 5}
each_variant = pytest.mark.parametrize("recipe", VARIANTS, ids=lambda recipe: recipe.__name__)


@pytest.fixture(scope="module")
def base():
    pipeline = StableDiffusionPipeline.from_pretrained(resolve("mini-stable-diffusion"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def variant(recipe, base):
    return add_difference(recipe.build_unet(base), resolve(recipe.NAME))


@pytest.fixture(scope="module")
def inpaint(base):
    unet = variant(mini_stable_diffusion_inpaint, base)
    return StableDiffusionInpaintPipeline(**(base.components | {"unet": unet}), requires_safety_checker=False)


@pytest.fixture(scope="module")
def estimator():
    return mini_depth_estimator.load_model()


@pytest.fixture(scope="module")
def depth2img(base, estimator):
    shared = {name: base.components[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return StableDiffusionDepth2ImgPipeline(
        **shared, unet=variant(mini_stable_diffusion_depth, base), depth_estimator=estimator,
        feature_extractor=mini_depth_estimator.build_processor(),
    )


@pytest.fixture
def other_seed(monkeypatch):
    """测量改用没有用过的种子，在 CPU 上。"""
    for module in (measuring, mini_depth_estimator, mini_stable_diffusion_inpaint, mini_stable_diffusion_depth,
                   stable_diffusion_studies):
        monkeypatch.setattr(module, "SEED", SEED)
        if hasattr(module, "DEVICE"):
            monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))


# —— 文件夹 ——

def test_chapter_6_adds_little_to_models():
    names = ("mini-stable-diffusion-inpaint", "mini-stable-diffusion-depth", "mini-depth-estimator")
    sizes = [path.stat().st_size for name in names for path in (ROOT / "models" / name).rglob("*") if path.is_file()]
    assert sum(sizes) <= 24_000_000


@each_variant
def test_only_the_difference_is_stored(recipe, base):
    folder = ROOT / "models" / recipe.NAME
    assert [path.name for path in folder.rglob("*.safetensors")] == ["difference.safetensors"]
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py")]
    difference = load_file(folder / "difference.safetensors")
    assert {value.dtype for value in difference.values()} == {torch.float8_e4m3fn}
    unet = variant(recipe, base)
    assert unet.config.in_channels == VARIANTS[recipe] and not unet.training
    assert all(torch.isfinite(parameter).all() for parameter in unet.parameters())
    # 新的通道真的学到了东西
    assert unet.conv_in.weight[:, 4:].abs().max() > 0.01


# —— 秩相关 ——

def test_ranks_by_hand():
    values = torch.tensor([[0.3, 0.1, 0.3, 0.9], [5.0, 5.0, 5.0, 5.0]])
    assert ranks(values).tolist() == [[2.5, 1.0, 2.5, 4.0], [2.5] * 4]


def test_rank_correlation_by_hand():
    a = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rank_correlation(a, a.exp() * 5 - 2), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(rank_correlation(a, -a), -torch.ones(3, dtype=torch.float64))
    # 有相同的数时，与照定义算的一样：名次的皮尔逊相关系数
    b, c = (a * 5).round(), (a.roll(7, dims=2) * 3).round()
    by_numpy = [np.corrcoef(ranks(x.flatten()[None])[0], ranks(y.flatten()[None])[0])[0, 1] for x, y in zip(b, c, strict=True)]
    assert np.allclose(rank_correlation(b, c), by_numpy)


# —— 深度估计 ——

def test_estimator_reaches_the_bars():
    result = evaluation("mini-depth-estimator")
    assert result["n_images"] >= 300
    assert result["new"]["rank_correlation"] >= 0.95 and result["held_out"]["rank_correlation"] >= 0.95


@pytest.mark.parametrize(("key", "held_out"), [("new", False), ("held_out", True)])
def test_estimator_is_the_measured_one(estimator, key, held_out):
    images, depths = mini_depth_estimator.pictures_and_depths(60, SEED, held_out)
    estimated = mini_depth_estimator.estimate(estimator, images / 255)
    published = evaluation("mini-depth-estimator")[key]
    assert rank_correlation(estimated, depths.float()).mean() >= max(0.95, published["rank_correlation"] - 0.01)
    assert (estimated - depths.float()).abs().mean() <= 1.3 * published["absolute_error"]


def test_estimator_ignores_color_but_not_shape(estimator):
    """同一只蝴蝶换颜色，深度不变；换一只，深度就变。"""
    butterflies = random_butterflies(20, SEED)
    rng = np.random.default_rng(SEED)
    recolored = [mini_stable_diffusion_inpaint.other_look(b, rng) for b in butterflies]
    before, after = (
        mini_depth_estimator.estimate(estimator, mini_stable_diffusion_depth.render_all(some, SEED))
        for some in (butterflies, recolored)
    )
    assert mini_stable_diffusion_depth.overlap(before, after) > 0.85
    assert mini_stable_diffusion_depth.overlap(before, before.roll(1, dims=0)) < 0.7


# —— 图像修补 ——

def test_inpainting_reaches_the_bars():
    result = evaluation("mini-stable-diffusion-inpaint")
    assert result["n_images"] >= 300
    asked = result["inpaint"]["attributes"]
    assert asked["wing_color"] >= 0.90 and asked["pattern"] >= 0.90
    assert result["inpaint"]["outside"] < 0.02 and result["inpaint"]["outside_pasted"] == 0
    # 掩膜之外变的，大半是自编码器自己的误差
    assert result["inpaint"]["outside"] < 2 * result["outside_of_reconstructions"]


def test_inpainting_is_the_measured_one(inpaint, other_seed):
    recipe, count = mini_stable_diffusion_inpaint, 30
    rng, sources = np.random.default_rng(SEED), random_butterflies(count, SEED)
    wanted = [recipe.other_look(butterfly, rng) for butterfly in sources]
    images, masks = recipe.pictures_and_masks(sources, SEED)
    results = recipe.draw(
        inpaint, write_prompts(wanted, SEED), "重画", image=images, mask_image=masks, guidance_scale=recipe.GUIDANCE_SCALE,
    )
    rates, published = recipe.repaint_rates(results, images, masks, wanted), evaluation(recipe.NAME)["inpaint"]
    for name in ("wing_color", "pattern", "background", "position", "size"):
        assert rates["attributes"][name] >= allowed(published["attributes"][name], count), name
    assert rates["outside"] < 0.02 and rates["outside_pasted"] == 0


def test_network_sees_what_the_pipeline_gives_it(inpaint):
    """训练时拼通道的次序、缩小掩膜的办法，与管线的相同。"""
    recipe = mini_stable_diffusion_inpaint
    images, masks = recipe.pictures_and_masks(random_butterflies(1, SEED), SEED)
    seen = []
    hook = inpaint.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        inpaint.set_progress_bar_config(disable=True)
        inpaint("一只蝴蝶", image=images, mask_image=masks, num_inference_steps=1, output_type="latent")
    finally:
        hook.remove()
    channels = seen[0][-1:]
    assert torch.equal(channels[:, 4:5], masks[..., ::4, ::4])
    covered = (images * 2 - 1) * (masks < 0.5)
    with torch.no_grad():
        mean = inpaint.vae.encode(covered).latent_dist.mean * inpaint.vae.config.scaling_factor
    assert (channels[:, 5:] - mean).abs().mean() < 0.2 * mean.abs().mean()      # 管线从分布里抽，标准差很小

    received = []

    def unet(x, t, text):
        received.append(x)
        return type("Output", (), {"sample": torch.zeros_like(x[:, :4])})

    def text_encoder(tokens):
        return type("Output", (), {"last_hidden_state": torch.zeros(len(tokens), 3, 2)})

    loss = recipe.InpaintLoss(text_encoder, torch.zeros(1, 3, dtype=torch.long), inpaint.scheduler)
    latents = torch.zeros(2, 4, 16, 16)
    small = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)]).expand(2, -1, -1, -1, -1).to(torch.uint8)
    given = torch.stack([torch.full((4, 16, 16), 2.0), torch.full((4, 16, 16), 3.0)]).expand(2, -1, -1, -1, -1)
    loss(unet, latents, small, given, torch.zeros(2, 1, 3, dtype=torch.int16), torch.Generator().manual_seed(0))
    assert received[0].shape == (2, 9, 16, 16)
    for row in received[0]:                                             # 掩膜与盖住的图是同一份
        picked = row[4].unique()
        assert len(picked) == 1 and torch.equal(row[5:].unique(), picked + 2)


def test_masks_cover_what_a_reader_may_cover():
    rng = np.random.default_rng(0)
    outline = torch.from_numpy(render_butterfly(random_butterflies(1, SEED)[0], 64, SEED).mask)
    masks = torch.stack([mini_stable_diffusion_inpaint.random_mask(outline, rng) for _ in range(300)])
    assert masks.shape == (300, 64, 64) and set(masks.unique().tolist()) <= {0.0, 1.0}
    share = masks.mean(dim=(1, 2))
    assert share.min() > 0.01
    assert 0.05 < (share == 1).float().mean() < 0.16                    # 一成是整张图
    covers = masks.bool()[:, outline].all(dim=1)
    assert 0.5 < covers.float().mean() < 0.95                           # 有的盖住整只，有的只盖住一部分


def test_grow_by_hand():
    mask = torch.zeros(1, 1, 9, 9)
    mask[0, 0, 4, 4] = 1
    assert mini_stable_diffusion_inpaint.grow(mask, 2).sum() == 25
    assert torch.equal(mini_stable_diffusion_inpaint.grow(mask.bool(), 0), mask)


def test_change_outside_looks_beyond_the_rim():
    images, masks = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    masks[..., 12:20, 12:20] = 1
    changed = images.clone()
    changed[..., 8:24, 8:24] = 1                                        # 恰好在四个像素以内
    assert mini_stable_diffusion_inpaint.change_outside(changed, images, masks) == 0
    changed[..., 7, 7] = 1
    assert mini_stable_diffusion_inpaint.change_outside(changed, images, masks) > 0


# —— 图生图 ——

def test_img2img_reaches_the_bars():
    result = evaluation("mini-stable-diffusion-inpaint")
    middle = [rows["0.5"] for rows in result["img2img"].values()]
    assert any(row["place_and_size"] >= 0.85 and row["as_asked"] >= 0.70 for row in middle)
    for rows in result["img2img"].values():
        assert rows["0.1"]["place_and_size"] > rows["1"]["place_and_size"]      # 强度越大，原图留下的越少
        assert rows["0.1"]["as_asked"] < rows["1"]["as_asked"]


def test_img2img_is_the_measured_one(base, other_seed):
    recipe, count = mini_stable_diffusion_inpaint, 30
    published = evaluation(recipe.NAME)["img2img"]
    scale = max(published, key=lambda key: published[key]["0.5"]["as_asked"])
    rng, sources = np.random.default_rng(SEED), random_butterflies(count, SEED)
    wanted = [recipe.other_color(butterfly, rng) for butterfly in sources]
    images, _ = recipe.pictures_and_masks(sources, SEED)
    prompts = [random_caption(b, rng, ("zh", "en")[i % 2], ("wing_color",)) for i, b in enumerate(wanted)]
    pipeline = StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    results = recipe.draw(pipeline, prompts, "图生图", image=images, strength=0.5, guidance_scale=float(scale))
    rates = recipe.img2img_rates(results, sources, wanted)
    for name in ("is_butterfly", "as_asked", "place_and_size", "background"):
        assert rates[name] >= allowed(published[scale]["0.5"][name], count), name


# —— 照着深度画 ——

def test_depth_model_reaches_the_bars():
    result = evaluation("mini-stable-diffusion-depth")
    assert result["n_images"] >= 300 and result["depth"]["rank_correlation"] >= 0.8
    assert min(result["depth"]["attributes"][name] for name in ("wing_color", "pattern", "background")) >= 0.90
    # 尺子的次序：别的图、不看深度的 < 照着深度画的 ≤ 形状相同的真图
    for name in ("rank_correlation", "outline_overlap"):
        assert result["unrelated"][name] < result["depth"][name] <= result["renders"][name] + 0.01
    assert result["plain"]["outline_overlap"] < result["depth"]["outline_overlap"]


def test_depth_model_is_the_measured_one(depth2img, estimator, other_seed):
    recipe, count = mini_stable_diffusion_depth, 30
    rng, sources = np.random.default_rng(SEED), random_butterflies(count, SEED)
    wanted = [recipe.other_coat(butterfly, rng) for butterfly in sources]
    images = recipe.render_all(sources, SEED)
    depths = mini_depth_estimator.estimate(estimator, images)
    results = recipe.draw(
        depth2img, write_prompts(wanted, SEED), "照着深度画", image=images, depth_map=depths, strength=1.0,
        guidance_scale=recipe.GUIDANCE_SCALE,
    )
    published, rates = evaluation(recipe.NAME)["depth"], agreement(results, wanted)
    for name in ("is_butterfly", "wing_color", "pattern", "background"):
        assert rates[name] >= allowed(published["attributes"][name], count), name
    against = recipe.against(depths, mini_depth_estimator.estimate(estimator, results))
    assert against["rank_correlation"] >= max(0.8, published["rank_correlation"] - 0.04)
    assert against["outline_overlap"] >= published["outline_overlap"] - 0.06


def test_coats_keep_the_shape():
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        for butterfly in random_butterflies(50, SEED):
            coat = mini_stable_diffusion_depth.other_coat(butterfly, rng, held_out)
            for name in ("size", "position", "wing_shape", "rotation"):
                assert getattr(coat, name) == getattr(butterfly, name)
            for name in ("wing_color", "pattern", "background"):
                assert getattr(coat, name) != getattr(butterfly, name)
            assert ((coat.wing_color, coat.pattern) in mini_stable_diffusion_inpaint.HELD_OUT) == held_out


def test_depth_channel_is_the_one_of_the_pipeline(depth2img):
    depths = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = mini_stable_diffusion_depth.depth_channel(depths)
    images = torch.zeros(3, 3, 64, 64)
    theirs = depth2img.prepare_depth_map(images, depths, 3, False, torch.float32, torch.device("cpu"))
    assert ours.shape == (3, 1, 16, 16) and torch.allclose(ours, theirs, atol=1e-6)
    assert ours.amin(dim=(1, 2, 3)).tolist() == [-1] * 3 and ours.amax(dim=(1, 2, 3)).tolist() == [1] * 3


# —— 第六章的各项测量 ——

def test_studies_reach_the_bars():
    studies = evaluation("mini-stable-diffusion")["studies"]
    assert studies["attention"]["ratio"]["wing_color"] >= 1.5
    assert studies["attention"]["ratio"]["background"] < studies["attention"]["ratio"]["wing_color"]
    plain = studies["guidance"]["plain"]
    assert plain["7.5"]["saturation"] > plain["2"]["saturation"]
    for remedy in ("rescale", "interval"):
        assert studies["guidance"][remedy]["7.5"]["saturation"] < plain["7.5"]["saturation"]
    table = studies["schedulers"]["table"]
    assert set(table) == set(stable_diffusion_studies.SCHEDULERS)
    assert all(set(rows) == {"5", "10", "25", "50"} for rows in table.values())
    assert set(studies["terminal"]["table"]) == {"trailing+zero", "trailing", "leading+zero", "leading"}


def test_attention_is_the_measured_one(base, other_seed, monkeypatch):
    monkeypatch.setattr(stable_diffusion_studies, "N_ATTENTION", 24)
    monkeypatch.setattr(stable_diffusion_studies, "TIMESTEPS", (800, 400))
    result = stable_diffusion_studies.measure_attention(base)
    published = evaluation("mini-stable-diffusion")["studies"]["attention"]
    expected = np.mean([published["by_timestep"][t] for t in ("800", "400")])
    assert result["ratio"]["wing_color"] == pytest.approx(expected, rel=0.15)
    assert result["ratio"]["wing_color"] > max(1, result["ratio"]["background"])
    assert len(result["by_layer"]) == 3 and 0 < result["not_words"] < 1


def test_rim_and_clipping_by_hand():
    images = torch.full((2, 3, 16, 16), 0.5)
    images[..., 4:-4, 4:-4] = 1
    assert stable_diffusion_studies.rim(images) == pytest.approx(0.5)
    assert stable_diffusion_studies.clipped(images) == pytest.approx(64 / 256)


def test_studies_do_not_change_the_scheduler(base, other_seed, monkeypatch):
    """换过的调度器要换回来；小小地走一遍，结果能写成 JSON，也写得进模型卡。"""
    for name, value in {
        "N_GUIDANCE": 2, "N_SCHEDULERS": 2, "N_TERMINAL": 2, "N_NEGATION": 2, "N_ATTENTION": 2, "N_WALKS": 2,
        "N_STEPS": 2, "STEPS": (2, 4), "PLAIN_SCALES": (1.0, 7.5), "REMEDY_SCALES": (7.5,), "TIMESTEPS": (600,),
    }.items():
        monkeypatch.setattr(stable_diffusion_studies, name, value)
    before = base.scheduler
    result = stable_diffusion_studies.measure_studies(base)
    assert base.scheduler is before
    lines = stable_diffusion_studies.studies_lines(json.loads(json.dumps(result)))
    assert all(isinstance(line, str) for line in lines)


# —— 训练可以中断 ——

@each_variant
def test_stopped_training_ends_the_same(recipe, tmp_path, monkeypatch):
    """走一步就停（不写模型），再运行一次走完：与一口气走完的相同。"""
    for name, value in {"N_IMAGES": 8, "N_EPOCHS": 2, "BATCH_SIZE": 4, "N_CAPTIONS": 2}.items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(recipe, "fit", functools.partial(fit, checkpoint_every=1))

    def train(folder, *options):
        checkpoint = folder / "work" / "checkpoint.safetensors"
        recipe.main(["--device", "cpu", "--output", str(folder / "out"), "--checkpoint", str(checkpoint), *options])
        return folder / "out"

    whole = train(tmp_path / "whole")
    assert not train(tmp_path / "parts", "--max-steps", "1").exists()
    parts = train(tmp_path / "parts")
    ours, theirs = (load_file(folder / "difference.safetensors") for folder in (parts, whole))
    # 续上的训练在浮点数的末位上可能不同，舍入到 8 位时会差一格
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), rtol=0.15, atol=0.02) for name in theirs)
    records = [json.loads((folder / "training.json").read_text(encoding="utf-8")) for folder in (parts, whole)]
    assert records[0]["losses"] == pytest.approx(records[1]["losses"], rel=1e-5) and records[0]["steps"] == 4


def test_stopped_training_of_the_estimator_ends_the_same(tmp_path, monkeypatch):
    for name, value in {"N_IMAGES": 8, "N_EPOCHS": 2, "BATCH_SIZE": 4}.items():
        monkeypatch.setattr(mini_depth_estimator, name, value)
    monkeypatch.setattr(mini_depth_estimator, "fit", functools.partial(fit, checkpoint_every=1))

    def train(folder, *options):
        checkpoint = folder / "work" / "checkpoint.safetensors"
        mini_depth_estimator.main(
            ["--device", "cpu", "--output", str(folder / "out"), "--checkpoint", str(checkpoint), *options]
        )
        return folder / "out"

    whole = train(tmp_path / "whole")
    assert not train(tmp_path / "parts", "--max-steps", "1").exists()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (train(tmp_path / "parts"), whole))
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=1e-3) for name in theirs)
