"""蝴蝶世界：画得对、可重复、说明与属性一致；数据集与导出；裁判的输入检查。"""

import json
from dataclasses import astuple

import numpy as np
import pytest
import torch
from datasets import load_dataset

import book_utils
from book_utils import Butterfly, ButterflyJudge, attribute_labels, caption, random_butterflies, render_butterfly
from book_utils.metrics import has_label
from book_utils.worlds.butterflies import (
    BACKGROUNDS,
    CAPTIONS,
    CHOICES,
    HELD_OUT,
    PATTERNS,
    POSITIONS,
    SIZES,
    WING_COLORS,
)

# 种子 → 抽到的第二只。第二只也对，抽每一只用掉的随机数、次序就都没有变
BUTTERFLIES = {
    0: ("red", "spotted", "black", "large", "bottom", "swallowtail", 6.3981465),
    1: ("orange", "spotted", "black", "small", "center", "pointed", 19.6621556),
    2: ("pink", "striped", "gray", "medium", "center", "swallowtail", -18.7259356),
    3: ("pink", "striped", "white", "small", "right", "pointed", -1.2569221),
    4: ("white", "eyespot", "gray", "medium", "right", "pointed", 18.1140724),
}


def test_same_seed_same_pixels():
    first = render_butterfly(Butterfly(), 64, seed=5)
    again = render_butterfly(Butterfly(), 64, seed=5)
    other = render_butterfly(Butterfly(), 64, seed=6)
    for part in ("image", "mask", "depth"):
        assert np.array_equal(getattr(first, part), getattr(again, part))
    assert not np.array_equal(first.image, other.image)


def test_drawing_is_pinned():
    """画法一变，训练过的模型就对不上了：几个像素的值钉在这里，改动要有意为之。"""
    image = render_butterfly(Butterfly(wing_color="red", background="sand", size="large"), 32, seed=0).image
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    # 各处理器的正弦在末位上可能不同，容许一级的差别
    for (row, column), expected in {(0, 0): (215, 191, 142), (10, 8): (214, 28, 21), (16, 16): (26, 18, 15)}.items():
        assert np.abs(image[row, column].astype(int) - expected).max() <= 1
    assert image.mean() == pytest.approx(150.84, abs=0.05)


@pytest.mark.parametrize("seed", BUTTERFLIES)
def test_random_butterflies_are_pinned(seed):
    """颜色与花纹、背景、大小、位置、翅形、角度，依次抽取：次序一变，同一个种子就是另一批训练图。"""
    *expected, rotation = BUTTERFLIES[seed]
    *attributes, turned = astuple(random_butterflies(2, seed=seed)[1])
    assert attributes == expected and turned == pytest.approx(rotation, abs=1e-6)


def test_fixed_attributes_do_not_shift_the_others():
    """固定几样属性时，其余各样仍是原来抽到的；留作检验的组合另抽。"""
    fixed = astuple(random_butterflies(1, seed=5, size="large", position="center")[0])
    assert fixed[:6] == ("purple", "striped", "grass green", "large", "center", "pointed")
    assert astuple(random_butterflies(1, seed=5)[0])[3:5] == ("small", "center")
    held_out = astuple(random_butterflies(1, seed=5, held_out=True)[0])
    assert held_out[:6] == ("blue", "spotted", "grass green", "small", "center", "pointed")
    assert fixed[6] == held_out[6] == pytest.approx(-12.8519172, abs=1e-6)


@pytest.mark.parametrize("image_size", [16, 32, 64, 100])
def test_parts_agree(image_size):
    for i, butterfly in enumerate(random_butterflies(10, seed=image_size)):
        render = render_butterfly(butterfly, image_size, seed=i)
        assert render.image.shape == (image_size, image_size, 3) and render.image.dtype == np.uint8
        assert render.mask.shape == render.depth.shape == (image_size, image_size)
        assert render.mask.dtype == bool and render.depth.dtype == np.float32
        assert 0 <= render.depth.min() and render.depth.max() <= 1
        # 蝴蝶在背景之前
        assert render.depth[render.mask].min() > render.depth[~render.mask].max() - 0.15
        assert render.depth[render.mask].mean() > render.depth[~render.mask].mean()


@pytest.mark.parametrize("color", WING_COLORS)
def test_wings_have_their_color(color):
    """素面的翅膀上，最常见的颜色离标称的颜色最近。"""
    render = render_butterfly(Butterfly(wing_color=color, background="gray", size="large"), 64, seed=1)
    pixels = render.image[render.mask] / 255
    distances = {name: np.abs(pixels - np.array(rgb)).sum(axis=1) for name, (_, rgb) in WING_COLORS.items()}
    nearest = np.array(list(distances))[np.argmin(list(distances.values()), axis=0)]
    bright = pixels.max(axis=1) > 0.3               # 身体与翅缘是深色的，不算
    names, counts = np.unique(nearest[bright], return_counts=True)
    assert names[counts.argmax()] == color


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_background_has_its_color(background):
    render = render_butterfly(Butterfly(background=background), 64, seed=1)
    corner = render.image[:4, :4].reshape(-1, 3).mean(axis=0) / 255
    errors = {name: np.abs(corner - np.array(rgb)).sum() for name, (_, rgb) in BACKGROUNDS.items()}
    assert min(errors, key=errors.get) == background


def test_patterns_differ():
    dark = {}
    for pattern in PATTERNS:
        render = render_butterfly(Butterfly(pattern=pattern, wing_color="white", size="large"), 64, seed=2)
        dark[pattern] = (render.image[render.mask].max(axis=1) < 110).mean()
    assert dark["plain"] < dark["eyespot"] < dark["striped"] and dark["plain"] < dark["spotted"]


def test_size_and_position():
    areas = [render_butterfly(Butterfly(size=size), 64, seed=s).mask.sum() for size in SIZES for s in range(5)]
    assert max(areas[:5]) < min(areas[5:10]) and max(areas[5:10]) < min(areas[10:])
    for name, (_, (x, y)) in POSITIONS.items():
        rows, columns = np.nonzero(render_butterfly(Butterfly(position=name, size="small"), 64, seed=3).mask)
        assert abs((columns.mean() + 0.5) / 32 - 1 - x) < 0.1, name
        assert abs(1 - (rows.mean() + 0.5) / 32 - y) < 0.1, name


def test_left_right_symmetry():
    """不转动时，蝴蝶左右对称：掩膜绕自己的竖轴翻转后几乎不变。"""
    mask = render_butterfly(Butterfly(size="medium"), 128, seed=0).mask
    columns = np.nonzero(mask)[1]
    shift = round(columns.min() + columns.max() - 127)
    assert (np.roll(mask[:, ::-1], shift, axis=1) == mask).mean() > 0.99


def test_rotation_is_counterclockwise():
    tilted = render_butterfly(Butterfly(rotation=30.0, size="large"), 64, seed=0).mask
    rows, columns = np.nonzero(tilted)
    right, left = rows[columns > columns.mean()], rows[columns < columns.mean()]
    assert right.mean() < left.mean()               # 逆时针转：右边的翅膀升高（行号变小）


@pytest.mark.parametrize("name", CHOICES)
def test_unknown_value_says_what_is_allowed(name):
    with pytest.raises(ValueError) as error:
        Butterfly(**{name: "不存在"})
    assert name in str(error.value) and "不存在" in str(error.value)
    assert all(choice in str(error.value) for choice in CHOICES[name])


@pytest.mark.parametrize("call, words", [
    (lambda: Butterfly(rotation=31), "31"),
    (lambda: render_butterfly(Butterfly(), 8), "8"),
    (lambda: render_butterfly(Butterfly(), 64, seed=-1), "-1"),
    (lambda: caption(Butterfly(), "fr"), "fr"),
    (lambda: caption(Butterfly(), "zh", 6), "6"),
    (lambda: random_butterflies(0), "0"),
    (lambda: random_butterflies(3, legs="six"), "legs"),
    (lambda: random_butterflies(3, size="huge"), "huge"),
    (lambda: random_butterflies(3, held_out=True, wing_color="green"), "green"),
    (lambda: random_butterflies(3, wing_color="blue", pattern="spotted"), "blue"),
    (lambda: ButterflyJudge()(torch.zeros(1, 1, 64, 64)), "(1, 1, 64, 64)"),
])
def test_bad_input_is_explained(call, words):
    with pytest.raises(ValueError, match="应|没有|抽不到") as error:
        call()
    assert words in str(error.value)


def test_held_out_pairs_never_mix():
    def pairs(held_out):
        return {(b.wing_color, b.pattern) for b in random_butterflies(2000, seed=1, held_out=held_out)}

    assert pairs(True) == HELD_OUT
    assert len(pairs(False)) == len(WING_COLORS) * len(PATTERNS) - len(HELD_OUT)
    assert not pairs(False) & HELD_OUT


def test_attributes_are_uniform():
    butterflies = random_butterflies(6000, seed=2)
    for name in ("background", "size", "position", "wing_shape"):
        counts = [sum(getattr(b, name) == choice for b in butterflies) for choice in CHOICES[name]]
        expected = 6000 / len(counts)
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts), name


@pytest.mark.parametrize("language", CAPTIONS)
def test_captions_tell_the_attributes(language):
    """前三种说法说出全部五个属性：属性不同的两只蝴蝶，说明也不同；没有漏填的空。"""
    butterflies = random_butterflies(300, seed=4)
    for variant in range(6):
        texts = {}
        for butterfly in butterflies:
            text = caption(butterfly, language, variant)
            assert "{" not in text
            told = tuple(getattr(butterfly, n) for n in ("wing_color", "pattern", "background", "size", "position"))
            texts.setdefault(text, set()).add(told)
        if variant < 3:
            assert all(len(told) == 1 for told in texts.values())


def test_dataset_and_images_agree():
    dataset = book_utils.butterfly_dataset(5, image_size=32, seed=7)
    images, butterflies = book_utils.butterfly_images(5, image_size=32, seed=7)
    assert dataset.column_names == ["image", "caption_zh", "caption_en", "attributes"]
    for row, image, butterfly in zip(dataset, images, butterflies, strict=True):
        assert np.array_equal(np.asarray(row["image"]), image.permute(1, 2, 0).numpy())
        assert row["caption_zh"] == caption(butterfly, "zh") and row["caption_en"] == caption(butterfly, "en")
        assert Butterfly(**row["attributes"]) == butterfly


def test_fixed_attributes():
    assert {b.size for b in random_butterflies(50, size="large", rotation=5.0)} == {"large"}
    assert {b.rotation for b in random_butterflies(50, rotation=5.0)} == {5.0}


def test_imagefolder_round_trip(tmp_path):
    dataset = book_utils.butterfly_dataset(4, image_size=32)
    folder = book_utils.export_imagefolder(dataset, tmp_path / "mine")
    back = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(back) == 4 and back["caption_zh"][2] == dataset["caption_zh"][2]
    assert np.array_equal(np.asarray(back[2]["image"]), np.asarray(dataset[2]["image"]))
    with pytest.raises(FileExistsError, match="已经存在"):
        book_utils.export_imagefolder(dataset, folder)


def test_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        book_utils.export_imagefolder(book_utils.butterfly_dataset(2, image_size=32), tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


def test_has_label_finds_rows_by_the_names_of_attribute_and_value():
    labels = attribute_labels([Butterfly("red", size="large"), Butterfly("blue", size="small"), Butterfly("blue", size="large")])
    assert has_label(labels, "size", "large").tolist() == [True, False, True]
    assert has_label(labels, "wing_color", "blue").tolist() == [False, True, True]
    with pytest.raises(ValueError):
        has_label(labels, "size", "huge")
