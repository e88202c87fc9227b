"""交叉注意力的图：与 diffusers 自己算的权重相同，不改动图像，找得到每个词，找不到就说清楚。"""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor

from book_utils import AttentionMaps, attention_map, draw_prompts, resolve, word_positions

PROMPT = "白色背景上，画面左边有一只大个头的红色条纹蝴蝶"
ENGLISH = "a large red butterfly on a red background"


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(resolve("mini-stable-diffusion"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def recorder(pipeline):
    """两步、有引导：每层记下两次调用，一批里有两份。"""
    recorder = AttentionMaps(pipeline.unet)
    draw_prompts(pipeline, [PROMPT], n_steps=2)
    recorder.remove()
    return recorder


def test_every_cross_attention_layer_is_recorded(pipeline, recorder):
    layers = [name for name, _ in pipeline.unet.named_modules() if name.endswith("attn2")]
    assert sorted(recorder.maps) == sorted(layers) and len(layers) >= 5
    length = pipeline.tokenizer.model_max_length
    for recorded in recorder.maps.values():
        assert len(recorded) == 2
        for weights in recorded:
            assert weights.shape[::2] == (2, length) and weights.shape[1] in (16, 64)
            assert torch.allclose(weights.sum(dim=-1), torch.ones(weights.shape[:2]), atol=1e-4)


def test_weights_are_those_of_diffusers(pipeline):
    """换上 diffusers 不用 SDPA 的实现，截下它算的权重来比。"""
    seen = {}

    class Keeping(AttnProcessor):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **options):
            if encoder_hidden_states is not None:
                query = attn.head_to_batch_dim(attn.to_q(hidden_states))
                key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
                scores = attn.get_attention_scores(query, key, None)
                seen[self.name] = scores.unflatten(0, (-1, attn.heads)).mean(dim=1)
            return super().__call__(attn, hidden_states, encoder_hidden_states, **options)

    original = dict(pipeline.unet.attn_processors)
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = pipeline.tokenizer([PROMPT, ENGLISH], padding="max_length", return_tensors="pt").input_ids
    try:
        pipeline.unet.set_attn_processor({name: Keeping(name.removesuffix(".processor")) for name in original})
        recorder = AttentionMaps(pipeline.unet)
        with torch.no_grad():
            pipeline.unet(z, 500, pipeline.text_encoder(tokens)[0])
        recorder.remove()
    finally:
        pipeline.unet.set_attn_processor(original)
    for name, (weights,) in recorder.maps.items():
        assert torch.allclose(weights, seen[name].detach(), atol=1e-5), name


def test_images_are_not_changed(pipeline):
    recorder = AttentionMaps(pipeline.unet)
    watched = draw_prompts(pipeline, [PROMPT], n_steps=2)
    recorder.remove()
    count = sum(len(recorded) for recorded in recorder.maps.values())
    assert torch.equal(watched, draw_prompts(pipeline, [PROMPT], n_steps=2))
    assert sum(len(recorded) for recorded in recorder.maps.values()) == count       # 取下之后不再记


def test_words_are_found(pipeline):
    tokenizer = pipeline.tokenizer

    def words(prompt, word, **options):
        ids = tokenizer(prompt).input_ids
        return tokenizer.decode([ids[i] for i in word_positions(tokenizer, prompt, word, **options)]).replace(" ", "")

    for word in ("白色", "左边", "大个头", "红色", "条纹", "蝴蝶"):
        assert words(PROMPT, word) == word
    assert words(ENGLISH, "butterfly") == "butterfly"
    first, last = (word_positions(tokenizer, ENGLISH, "red", last=last) for last in (False, True))
    assert len(first) == len(last) == 1 and first[0] < last[0] and words(ENGLISH, "red", last=True) == "red"
    assert word_positions(tokenizer, PROMPT, PROMPT[0])[0] == 1                     # 第 0 个是句首的记号


@pytest.mark.parametrize("word", ["紫色", ""])
def test_absent_words_are_named(pipeline, word):
    with pytest.raises(ValueError, match=f"里没有“{word}”"):
        word_positions(pipeline.tokenizer, PROMPT, word)


def test_map_is_the_mean_of_the_layers(pipeline, recorder):
    positions = word_positions(pipeline.tokenizer, PROMPT, "红色")
    heat = attention_map(recorder, positions)
    assert heat.shape == (2, 8, 8) and (heat > 0).all()
    layers = [name for name, recorded in recorder.maps.items() if recorded[0].shape[1] == 64]
    each = torch.stack([attention_map(recorder, positions, layers=[name]) for name in layers])
    assert torch.allclose(heat, each.mean(dim=0), atol=1e-6)
    by_hand = recorder.maps[layers[0]][-1][:, :, positions].sum(dim=-1).view(2, 8, 8)
    assert torch.allclose(each[0], by_hand)
    assert not torch.allclose(heat, attention_map(recorder, positions, call=0))
    assert attention_map(recorder, positions, pixels=16).shape == (2, 4, 4)
    everything = attention_map(recorder, list(range(pipeline.tokenizer.model_max_length)))
    assert torch.allclose(everything, torch.ones(2, 8, 8), atol=1e-4)


@pytest.mark.parametrize(("options", "words"), [
    ({"pixels": 100}, r"没有记下 100 个像素的层；记下的有 \[16, 64\]"),
    ({"layers": ["没有这一层"]}, "没有记下 64 个像素的层"),
    ({"call": 2}, "只记下了 2 次调用，没有第 2 次"),
    ({"call": -3}, "只记下了 2 次调用"),
])
def test_missing_maps_are_named(recorder, options, words):
    with pytest.raises(ValueError, match=words):
        attention_map(recorder, [1], **options)


def test_nothing_recorded_yet(pipeline):
    recorder = AttentionMaps(pipeline.unet)
    recorder.remove()
    with pytest.raises(ValueError, match="什么也没有记下"):
        attention_map(recorder, [1])


def test_network_without_text_is_refused():
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), norm_num_groups=4)
    with pytest.raises(ValueError, match="UNet2DModel 里没有交叉注意力层"):
        AttentionMaps(unet)
