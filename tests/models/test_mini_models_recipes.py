"""butterfly-clip 与 mini-stable-diffusion 的配方：说明、词表、损失，缩小了的完整训练与续训。"""

import functools
import json
import re
import shutil
from collections import Counter
from dataclasses import fields
from types import SimpleNamespace

import butterfly_clip
import evaluate
import loss_guidance
import measuring
import mini_stable_diffusion
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from book_utils import (
    Butterfly,
    ButterflyJudge,
    attribute_labels,
    fit,
    random_attributes,
    random_butterflies,
    random_caption,
)
from book_utils.worlds.butterflies import ATTRIBUTES, CHOICES, HELD_OUT

each_language = pytest.mark.parametrize("language", ["zh", "en"])


def write(butterfly, seed, language, attributes=ATTRIBUTES):
    return random_caption(butterfly, np.random.default_rng(seed), language, attributes)


# —— 说明 ——

@each_language
def test_captions_tell_exactly_what_was_asked(language):
    """同样的随机数：改动说到的属性，句子就变；改动没有说到的，一个字也不变。"""
    for seed, butterfly in enumerate(random_butterflies(60, seed=1)):
        told = random_attributes(np.random.default_rng(seed))
        text = write(butterfly, seed, language, told)
        assert text == write(butterfly, seed, language, told)
        for name in ATTRIBUTES:
            texts = {write(Butterfly(**{**vars(butterfly), name: value}), seed, language, told) for value in CHOICES[name]}
            assert len(texts) == (len(CHOICES[name]) if name in told else 1), (name, texts)


@each_language
def test_captions_vary_and_never_confuse(language):
    texts = {write(Butterfly(), seed, language) for seed in range(300)}
    assert len(texts) > 150
    meanings = {}
    for seed, butterfly in enumerate(random_butterflies(3000, seed=2)):
        told = tuple(getattr(butterfly, name) for name in ATTRIBUTES)
        meanings.setdefault(write(butterfly, seed % 50, language), set()).add(told)
    assert all(len(told) == 1 for told in meanings.values())


def test_english_articles():
    for seed, butterfly in enumerate(random_butterflies(500, seed=3)):
        text = write(butterfly, seed, "en", random_attributes(np.random.default_rng(seed)))
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  | ,|,,|^,|,$", text), text


def test_attributes_are_left_out_at_times():
    rng = np.random.default_rng(0)
    drawn = [random_attributes(rng) for _ in range(1000)]
    assert all(told and list(told) == [name for name in ATTRIBUTES if name in told] for told in drawn)
    assert 0.5 < sum(told == ATTRIBUTES for told in drawn) / 1000 < 0.7
    assert len(set(drawn)) == 31                    # 五个属性的每一种取舍，至少说一个


@pytest.mark.parametrize("options, words", [({"language": "fr"}, "fr"), ({"attributes": ("color",)}, "color")])
def test_bad_caption_options(options, words):
    with pytest.raises(ValueError, match="应是.*收到的") as error:
        random_caption(Butterfly(), np.random.default_rng(0), **options)
    assert words in str(error.value)


# —— 词表 ——

@pytest.fixture(scope="module")
def texts():
    return butterfly_clip.write_captions(random_butterflies(400, seed=4), seed=4)[0]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return butterfly_clip.learn_tokenizer(texts)


def test_tokenizer_gives_the_text_back(tokenizer, texts):
    for text in texts:
        ids = tokenizer(text).input_ids
        assert len(ids) <= butterfly_clip.CONTEXT_LENGTH
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.replace(" ", "")


def test_tokenizer_is_the_same_every_time(tokenizer, texts):
    """续训时词表要重新学一遍，一个编号也不能变。"""
    assert butterfly_clip.learn_tokenizer(texts).get_vocab() == tokenizer.get_vocab()
    # 四对都出现两次，先取字典序最后的
    words = butterfly_clip.Counter({"abc": 2, "bcd": 2})
    merges = [("c", "d</w>"), ("b", "cd</w>"), ("b", "c</w>"), ("a", "bc</w>")]
    assert butterfly_clip.learn_merges(words) == merges == butterfly_clip.learn_merges(words)


def test_whole_words_and_single_characters(tokenizer):
    def split(text):
        return [tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False).input_ids]

    assert split("A small Red butterfly, sky blue background") == \
        ["a", "small", "red", "butterfly", ",", "sky", "blue", "background"]
    assert split("一只红色斑点蝴蝶，沙色背景") == list("一只红色斑点蝴蝶，沙色背景")


@pytest.mark.parametrize("text", ["霓虹色的龙", "a neon dragon", "🦋 √2", ""])
def test_unseen_text_is_not_the_end(tokenizer, text):
    """没有见过的字词拆成字节，不会变成句末的标记。"""
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.index(tokenizer.eos_token_id) == len(ids) - 1
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_tokenizer_saved_and_loaded(tokenizer, texts, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded(texts[:50]).input_ids == tokenizer(texts[:50]).input_ids
    assert loaded.model_max_length == butterfly_clip.CONTEXT_LENGTH


def test_write_captions_says_what_is_told():
    butterflies = random_butterflies(50, seed=5)
    texts, told = butterfly_clip.write_captions(butterflies, n_captions=4, seed=5)
    assert len(texts) == 200 and told.shape == (50, 4, 5) and told.any(dim=2).all()
    for i, text in enumerate(texts):
        assert text.isascii() == (i % 4 >= 2)           # 前一半中文，后一半英文
    assert texts == butterfly_clip.write_captions(butterflies, n_captions=4, seed=5)[0]


# —— 对比损失 ——

def test_vague_captions_fit_many_images():
    labels = attribute_labels([Butterfly("red"), Butterfly("blue"), Butterfly("red", size="large")])
    told = torch.tensor([[True] * 5, [False] * 5, [True, False, False, False, False]])
    assert butterfly_clip.fits(labels, told).tolist() == [
        [True, True, True],         # 第一张：全说的、什么都没说的、只说红色的，都说中了
        [False, True, False],
        [False, True, True],
    ]


def test_pairs_differ_in_one_attribute():
    pairs = butterfly_clip.make_pairs(400, seed=6)
    assert pairs == butterfly_clip.make_pairs(400, seed=6) and len(pairs) == 800
    assert not any((b.wing_color, b.pattern) in HELD_OUT for b in pairs)
    differences = []
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        names = [f.name for f in fields(Butterfly) if getattr(one, f.name) != getattr(other, f.name)]
        assert len(names) == 1
        differences += names
    counts = Counter(differences)
    assert set(counts) == set(ATTRIBUTES) and 160 < counts["position"] < 240
    images = butterfly_clip.draw(pairs[:6], seed=6)
    assert images.shape == (6, 3, 64, 64) and images.dtype == torch.uint8
    assert len(images.unique(dim=0)) == 6


def test_attribute_loss_by_hand():
    """线性层的输出恰好指着正确的属性时损失为零，全是零时是各属性类别数的对数之和。"""
    labels = attribute_labels([Butterfly("red"), Butterfly("blue", "striped", size="small", position="left")])
    counts = [len(CHOICES[name]) for name in ATTRIBUTES]
    model = butterfly_clip.ClipWithHeads(torch.nn.Identity())
    model.heads = torch.nn.Identity()
    assert model.attribute_loss(torch.zeros(2, sum(counts)), labels) == pytest.approx(np.log(counts).sum(), rel=1e-5)
    right = torch.cat([torch.nn.functional.one_hot(labels[:, i], n) for i, n in enumerate(counts)], dim=1) * 50.0
    assert model.attribute_loss(right, labels) < 1e-6


def test_equal_captions_are_not_negatives(tokenizer):
    """一批四张，两两属性相同：特征只由属性决定时，损失也能到零。"""
    pair = [Butterfly("red"), Butterfly("blue")]
    labels = attribute_labels(pair * 2).unflatten(0, (2, 2))
    images = torch.zeros(2, 2, 3, 64, 64, dtype=torch.uint8)
    tokens = torch.zeros(2, 2, 1, 8, dtype=torch.int16)
    told = torch.ones(2, 2, 1, 5, dtype=torch.bool)

    class Perfect:
        logit_scale = torch.tensor(4.0)

        def __call__(self, input_ids, pixel_values):
            embeds = torch.eye(2).repeat(2, 1)
            vision = SimpleNamespace(pooler_output=embeds)
            return SimpleNamespace(image_embeds=embeds, text_embeds=embeds, vision_model_output=vision)

    model = SimpleNamespace(clip=Perfect(), attribute_loss=lambda features, labels: 0.0)
    loss = butterfly_clip.batch_loss(model, images, labels, tokens, told, torch.Generator().manual_seed(0))
    assert loss < 1e-6


# —— 扩散的设置 ——

def test_last_step_is_pure_noise():
    scheduler = mini_stable_diffusion.build_scheduler()
    assert scheduler.alphas_cumprod[-1] == 0 and scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999 and len(scheduler.timesteps) == 25


def test_unet_loss_by_hand(monkeypatch):
    """预测全零时，损失是 v 的平方按权重的平均；空提示词按比例换上；纯噪声处的权重是 1。"""
    monkeypatch.setattr(mini_stable_diffusion, "DROP_CAPTION", 0.25)
    scheduler, seen = mini_stable_diffusion.build_scheduler(), {}

    def text_encoder(tokens):
        seen["tokens"] = tokens
        return type("Output", (), {"last_hidden_state": tokens[..., None].float()})

    def unet(noisy, timesteps, text):
        seen["timesteps"] = timesteps
        return type("Output", (), {"sample": torch.zeros_like(noisy)})

    loss_function = mini_stable_diffusion.UNetLoss(text_encoder, torch.zeros(1, 5, dtype=torch.long), scheduler)
    latents = torch.randn(2000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(1, 4)[None, :, None].expand(2000, 3, 5).to(torch.int16)
    loss = loss_function(unet, latents, tokens, torch.Generator().manual_seed(0))

    dropped = (seen["tokens"] == 0).all(dim=1)
    assert abs(dropped.float().mean() - 0.25) < 0.03
    assert set(seen["tokens"][~dropped].flatten().tolist()) == {1, 2, 3}        # 各句说明都用到
    assert torch.equal(seen["timesteps"], torch.arange(2000) // 2)              # 分段抽取：每段恰好一个
    abar = scheduler.alphas_cumprod[seen["timesteps"]]
    snr = abar / (1 - abar)
    weights = torch.minimum(snr + 1, torch.tensor(6.0)) / (snr + 1)
    assert weights[-1] == 1
    # 方差为 1 的 x₀ 与 ε，v 的平方平均是 1
    assert loss == pytest.approx(weights.mean().item(), rel=0.03)


# —— 缩小了的完整训练 ——

def shrink(patch):
    """把两个配方缩小到几秒钟；每一步都存断点。"""
    for name, value in {"N_PAIRS": 24, "N_EPOCHS": 2, "BATCH_SIZE": 8, "WIDTH": 32}.items():
        patch.setattr(butterfly_clip, name, value)
    for name, value in {
        "VAE_CHANNELS": (8, 16, 16), "VAE_IMAGES": 16, "VAE_BATCH": 8,
        "VAE_PASSES": ((1, 1e-3, 4.0, 2e-6), (1, 5e-4, 10.0, 1e-7)),
        "UNET_CHANNELS": (16, 32, 32), "N_IMAGES": 24, "N_EPOCHS": 2, "BATCH_SIZE": 8,
    }.items():
        patch.setattr(mini_stable_diffusion, name, value)
    for recipe in (butterfly_clip, mini_stable_diffusion):
        patch.setattr(recipe, "fit", functools.partial(fit, checkpoint_every=1))


def train(recipe, folder, *options):
    checkpoint = folder / "work" / "checkpoint.safetensors"
    recipe.main(["--device", "cpu", "--output", str(folder / "out"), "--checkpoint", str(checkpoint), *options])
    return folder / "out"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """小 CLIP 与小管线的文件夹。"""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        clip = train(butterfly_clip, tmp_path_factory.mktemp("clip"))
        pipeline = train(mini_stable_diffusion, tmp_path_factory.mktemp("sd"), "--clip", str(clip))
        yield {butterfly_clip: clip, mini_stable_diffusion: pipeline}


def test_clip_folder(small):
    folder = small[butterfly_clip]
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert next(iter(load_file(folder / "model.safetensors").values())).dtype == torch.float16
    pixels = CLIPImageProcessor.from_pretrained(folder)(np.full((64, 64, 3), 255, np.uint8), return_tensors="pt")
    assert pixels.pixel_values.shape == (1, 3, 64, 64) and torch.allclose(pixels.pixel_values, torch.tensor(1.0))
    tokens = tokenizer(["红色的蝴蝶", "a red butterfly"], padding="max_length", return_tensors="pt")
    assert model(**tokens, **pixels).logits_per_image.shape == (1, 2)
    # 句末那个位置的特征代表整句：补在后面的词元不影响它
    short = tokenizer("红色的蝴蝶", return_tensors="pt")
    padded = tokenizer("红色的蝴蝶", padding="max_length", return_tensors="pt")
    features = [model.text_model(item.input_ids).pooler_output for item in (short, padded)]
    assert torch.allclose(*features, atol=1e-5)


def test_pipeline_folder(small):
    folder = small[mini_stable_diffusion]
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert {part.dtype for part in (pipeline.vae, pipeline.unet, pipeline.text_encoder)} == {torch.float32}
    assert pipeline.vae.config.scaling_factor != 0.18215 and pipeline.vae_scale_factor == 4

    def draw(prompt):
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt, num_inference_steps=2, generator=generator, output_type="np").images

    images = draw("一只红色的蝴蝶")
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()
    assert np.array_equal(images, draw("一只红色的蝴蝶")) and not np.array_equal(images, draw("a blue butterfly"))
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert training["steps"] == 6 and training["autoencoder"]["steps"] == 4
    listed = (folder / "SHA256SUMS").read_text(encoding="utf-8")
    assert all(part in listed for part in ("model_index.json", "unet/", "vae/", "text_encoder/", "tokenizer/", "scheduler/"))


@pytest.mark.parametrize("recipe", [butterfly_clip, mini_stable_diffusion], ids=lambda recipe: recipe.__name__)
def test_stopped_training_ends_the_same(small, recipe, tmp_path):
    """走几步就停（不写模型），再运行一次走完：损失与一口气走完的相同，权重只差浮点数的末位。

    自编码器两趟，各 2 步，其余都是 6 步：停在自编码器途中一次，停在 UNet 途中两次。
    """
    options = ["--clip", str(small[butterfly_clip])] if recipe is mini_stable_diffusion else []
    for steps in ("1", "3", "5"):
        assert not train(recipe, tmp_path, "--max-steps", steps, *options).exists()
    folder = train(recipe, tmp_path, *options)
    for path in small[recipe].rglob("*.safetensors"):
        ours, theirs = load_file(folder / path.relative_to(small[recipe])), load_file(path)
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in theirs)
    ours, theirs = (json.loads((path / "training.json").read_text(encoding="utf-8")) for path in (folder, small[recipe]))
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)


def test_latents_are_encoded_once(small, tmp_path):
    cache = tmp_path / "latents.safetensors"
    vae = mini_stable_diffusion.build_autoencoder().requires_grad_(False)
    latents = mini_stable_diffusion.training_latents(vae, cache, "cpu")
    assert latents.shape == (24, 4, 16, 16) and latents.dtype == torch.float16
    written = cache.stat().st_mtime_ns
    assert torch.equal(mini_stable_diffusion.training_latents(vae, cache, "cpu"), latents)
    assert cache.stat().st_mtime_ns == written
    other = mini_stable_diffusion.build_autoencoder().requires_grad_(False)
    assert not torch.equal(mini_stable_diffusion.training_latents(other, cache, "cpu"), latents)


def test_clip_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="没有找到 butterfly-clip"):
        train(mini_stable_diffusion, tmp_path, "--clip", str(tmp_path / "none"))


# —— 测量 ——

class TruthfulJudge:
    """红色通道的左上角写着这是第几只蝴蝶，照着说出它的属性；第 0 只认作不是蝴蝶。"""

    def __init__(self, butterflies):
        self.butterflies = butterflies

    def to(self, device):
        return self

    def describe(self, images):
        indices = [round(value.item() * 255) for value in images[:, 0, 0, 0]]
        return torch.tensor([i > 0 for i in indices]).float(), [vars(self.butterflies[i]) for i in indices]


def test_agreement_counts(monkeypatch):
    butterflies = [Butterfly(), Butterfly(), Butterfly("red"), Butterfly(pattern="spotted", background="black")]
    monkeypatch.setattr(measuring, "butterfly_judge", lambda: TruthfulJudge(butterflies))
    images = torch.zeros(4, 3, 8, 8)
    images[:, 0, 0, 0] = torch.arange(4) / 255
    # 所要的都是橙色、素面、白背景；第 0 张认不出是蝴蝶，每一项都算错
    rates = measuring.agreement(images, [Butterfly()] * 4)
    assert rates == {
        "is_butterfly": 0.75, "wing_color": 0.5, "pattern": 0.5, "background": 0.5, "size": 0.75, "position": 0.75,
        "color_and_pattern": 0.25,
    }


def test_figures_by_hand():
    black, gray = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.1)
    assert torch.allclose(measuring.psnr(gray, black), torch.tensor(20.0))
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    assert measuring.sharpness(blurred) < 0.5 * measuring.sharpness(noise)
    assert measuring.sharpness(gray) == 0
    pair = torch.stack([torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)], dim=1)     # 每行一黑一白
    assert measuring.spread(pair) == pytest.approx(1)
    training = torch.nn.functional.interpolate(noise, size=(32, 32), mode="area").flatten(1)
    assert measuring.nearest(noise, training) < 1e-2 < measuring.nearest(1 - noise, training)


@each_language
def test_prompts_for_measuring_are_distinct(language):
    butterflies = measuring.distinct_butterflies(100, seed=1, held_out=language == "en")
    assert len({tuple(getattr(b, name) for name in ATTRIBUTES) for b in butterflies}) == 100
    prompts = measuring.write_prompts(butterflies, seed=1)
    unseen = measuring.write_unseen_prompts(butterflies)
    for texts in (prompts, unseen):
        assert all(text.isascii() == bool(i % 2) for i, text in enumerate(texts))    # 一半中文
    assert len(set(unseen)) == 100


def test_evaluation_of_small_models(small, tmp_path, monkeypatch):
    """小模型没有学会什么，但每一个数都量得出来，模型卡写得出来。"""
    names = {"butterfly-clip": small[butterfly_clip], "mini-stable-diffusion": small[mini_stable_diffusion]}
    for module in (evaluate, mini_stable_diffusion):
        monkeypatch.setattr(module, "MODELS_ROOT", tmp_path)
    for module in (butterfly_clip, mini_stable_diffusion):
        monkeypatch.setattr(module, "resolve", lambda name: str(tmp_path / name))
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(measuring, "butterfly_judge", lambda: ButterflyJudge().eval())
    monkeypatch.setattr(measuring, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(mini_stable_diffusion, "N_STEPS", 1)
    monkeypatch.setattr(loss_guidance, "N_STEPS", 1)
    monkeypatch.setattr(loss_guidance, "N_IMAGES", 16)
    monkeypatch.setattr(loss_guidance, "DEVICE", torch.device("cpu"))
    for name, folder in names.items():
        shutil.copytree(folder, tmp_path / name)
        options = {"n_sets": 1, "set_size": 8} if name == "butterfly-clip" else {"n_prompts": 12}
        result = evaluate.recipe_of(name).measure(name, **options) | {"machine": "CPU"}
        card = evaluate.card_text(name, json.loads(json.dumps(result)))
        assert "nan" not in card
        assert "训练：6 步" in card and "## 测量" in card
    assert "自编码器：4 步" in card and card.count("| 引导 ") == 9
    assert (tmp_path / "mini-stable-diffusion" / "samples.png").stat().st_size > 10_000
