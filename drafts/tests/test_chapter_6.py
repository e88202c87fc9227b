"""第六章的代码格，照读者会做的那样来用：断网、写错的输入、练习的答案。

答案原样执行，只是少画几张、少走几步；要用到的函数与变量，由正文的各格得到。
"""

import ast
import os
import re
import subprocess
import sys

import jupytext
import pytest
from support.paths import ROOT

CHAPTER = ROOT / "chapters/06-stable-diffusion.md"
CELLS = [cell.source for cell in jupytext.read(CHAPTER).cells if cell.cell_type == "code"]


def cell_with(text: str) -> str:
    """含有 text 的那一格，应当只有一格。"""
    found = [cell for cell in CELLS if text in cell]
    assert len(found) == 1, (text, len(found))
    return found[0]


def exercise(title: str) -> str:
    """正文里以“# title”开头的 python 代码块。"""
    return re.search(rf"```python\n(# {title}\n.*?)```", CHAPTER.read_text(encoding="utf-8"), re.S)[1]


def changed(code: str, changes: dict[str, str]) -> str:
    """changes 是 原来的代码 → 读者改成的代码，每一处都要真的有。"""
    for old, new in changes.items():
        assert old in code, old
        code = code.replace(old, new)
    return code


def run(names: dict, *cells: str, **changes: str) -> None:
    """在 names 里依次执行各格。"""
    for cell in cells:
        exec(changed(cell, changes), names)


def define(names: dict, cell: str, **changes: str) -> None:
    """只执行一格里的函数与类的定义，不画图。"""
    tree = ast.parse(changed(cell, changes))
    tree.body = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    exec(compile(tree, "第六章", "exec"), names)


@pytest.fixture(scope="module")
def chapter():
    """执行过正文里定义函数、载入模型的各格，得到的名字空间；画图的格没有执行。"""
    import matplotlib

    matplotlib.use("Agg")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BOOK_MODE", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        patch.setenv("TQDM_DISABLE", "1")
        names = {"display": lambda *things: None}
        run(names, CELLS[0], cell_with('resolve("mini-stable-diffusion", hub='))
        run(names, cell_with("def draw_prompts("), "from book_utils import draw_prompts")
        names["six_prompts"] = ast.literal_eval(
            re.search(r"six_prompts = (\[.*?\n\])", cell_with("six_prompts = ["), re.S)[1]
        )
        run(names, cell_with("def encode_text("))
        run(names, cell_with("def rescale_guidance("), cell_with("def saturation("))
        run(names, cell_with("def render_tensors("), cell_with("mean, std = posterior.mean"))
        run(names, cell_with("factor = vae.config.scaling_factor"))
        run(names, cell_with("def sample_prompts("))
        define(names, cell_with("def own_noise("))
        # 6.5 节
        run(names, cell_with("def draw_pictures("), cell_with("def steps_taken("), "n_steps = 25")
        define(names, cell_with("def img2img_by_hand("))
        run(names, "img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)\n"
                   "img2img.set_progress_bar_config(disable=True)")
        run(names, "sixteen = random_butterflies(16, seed=651)[:2]\nsources, _ = draw_pictures(sixteen, seed=6510)")
        run(names, cell_with("def widen_input("), cell_with("def variant("), cell_with("def prepare_edit("))
        define(names, cell_with("def repaint("), **{"n_steps=25": "n_steps=2"})
        run(names, """
margin = 6 * image_size // 64
prepared = [prepare_edit(picture, grow(outline, margin), image_size) for picture, outline in zip(pictures, outlines)]
images, mask_images = (list(items) for items in zip(*prepared))
prompts = [book_utils.caption(b, language) for b in originals]
""")
        run(names, cell_with("def estimate_depth("), cell_with("def rank_correlation("))
        define(names, cell_with("def draw_from_depth("), **{"n_steps=25": "n_steps=2"})
        define(names, cell_with("def score_bytes("))
        yield names


@pytest.fixture
def reader(chapter):
    """一个读者：有自己的一份名字空间，改了变量也不影响别的测试。"""
    return dict(chapter)


# —— 断网 ——

@pytest.mark.parametrize("text", [
    'hub="stable-diffusion-v1-5/stable-diffusion-v1-5"', 'hub="stable-diffusion-v1-5/stable-diffusion-inpainting"',
    'hub="sd2-community/stable-diffusion-2-depth"',
])
def test_hub_cells_say_in_one_sentence_that_there_is_no_network(text, tmp_path):
    """HF_ENDPOINT 指向没有人听的端口：几秒之内结束，最后一行是一句中文。"""
    code = "\n".join([CELLS[0], "import time; began = time.monotonic()", "try:",
                      *("    " + line for line in ["embedded = False", *cell_with(text).splitlines()]),
                      "finally:", "    print('用时', time.monotonic() - began)"])
    environment = {
        name: value for name, value in os.environ.items()
        if not name.startswith("HF_") and "proxy" not in name.lower()
    } | {
        "BOOK_MODE": "hub", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ConnectionError: BOOK_MODE=hub 需要联网，但") and "HF_ENDPOINT" in last
    assert float(done.stdout.split("用时")[-1]) < 20


# —— 写错的输入，正文里演示的 ——

def test_bad_inputs_in_the_text_are_explained_in_chinese(reader, capsys):
    run(reader, cell_with('for wrong in ({"prompts": []}'))
    assert len(capsys.readouterr().out.strip().splitlines()) == 3
    run(reader, "start_noise = own_noise(range(40, 45))", cell_with('for wrong in ({"n_steps": 0}, {"interval"'))
    assert len(capsys.readouterr().out.strip().splitlines()) == 3
    run(reader, cell_with("np.zeros((64, 64, 3)), outlines[0]"))
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 5 and all("应" in line for line in lines[:3]) and "给反了" in lines[3]


def test_every_strength_in_the_text_is_possible(reader, capsys):
    run(reader, cell_with("for strength in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):"))
    printed = capsys.readouterr().out
    assert printed.count("强度 0.") == 6 and printed.count("至少有一步可走") == 2


# —— 手写的与 diffusers 的 ——

def test_loops_by_hand_equal_the_pipelines(reader):
    loop = changed(cell_with("loop_prompt, w, n_steps ="), {"best_guidance, 25": "best_guidance, 3"})
    run(reader, loop)                                           # 那一格自己断言逐位相同
    picture, torch = reader["pictures"][0], reader["torch"]
    for strength in (0.4, 1.0):
        by_pipeline = reader["img2img"](
            "一只紫色的蝴蝶", image=picture, strength=strength, num_inference_steps=5, guidance_scale=2.0,
            generator=torch.Generator().manual_seed(1), output_type="pt",
        ).images
        by_hand = reader["img2img_by_hand"](
            picture, "一只紫色的蝴蝶", strength, 5, 2.0, torch.Generator().manual_seed(1)
        )
        assert torch.equal(by_hand, by_pipeline)


def test_rank_correlation_in_the_text_is_the_one_of_the_recipes(reader):
    from measuring import rank_correlation

    torch = reader["torch"]
    a, b = (torch.rand(2, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 9).round()
    assert torch.allclose(reader["rank_correlation"](a, b), rank_correlation(a, b))


def test_byte_pair_encoding_in_the_text_is_the_one_of_the_tokenizer(reader):
    run(reader, cell_with("def byte_symbols():"), cell_with("def merge_once("), cell_with("def byte_pair_encode("))
    for text in ("画面下方停着一只很大的绿色没有花纹的蝴蝶，黑色的背景", "龘靐 zebra, café! 🦋🦋", "A1 b22", ""):
        assert reader["tokenize"](text) == reader["pipe"].tokenizer(text).input_ids, text


# —— 练习的答案 ——

def test_exercise_swapping_the_prompts(reader, capsys):
    run(reader, exercise("练习 6.1"))
    assert capsys.readouterr().out == "两种写法相同： True\n"


def test_exercise_counting_the_steps(reader, capsys):
    run(reader, exercise("练习 6.2"))
    assert capsys.readouterr().out == "10 332\n0.267 0.299\n"


def test_exercise_new_channels_learn(reader, capsys):
    run(reader, exercise("练习 6.3"))
    assert capsys.readouterr().out.startswith("新通道的权重是零： True")


def test_exercise_switching_the_prompt(reader, capsys):
    few = {"(0, 2, 4, 8, 12, 25)": "(0, 1, 2)", "n_steps=25": "n_steps=2", "range(100, 108)": "range(100, 102)"}
    run(reader, exercise("练习 6.4"), **few)
    assert capsys.readouterr().out.count("步照第一句") == 3
    # 从头到尾照一句画，就是那一句的图
    torch, noise = reader["torch"], reader["own_noise"](range(100, 102))
    first = reader["both_prompts"][0]
    alone = reader["sample_prompts"](reader["pipe"], [first] * 2, noise, n_steps=2, guidance_scale=reader["best_guidance"])
    assert torch.allclose(reader["switch_prompt"](*reader["both_prompts"], 2, noise, n_steps=2), alone, atol=1e-4)


def test_exercise_five_rounds(reader, capsys):
    few = {"* 16": "* 2", "generators(16": "generators(2", '"num_inference_steps": 25': '"num_inference_steps": 4'}
    run(reader, exercise("练习 6.5"), **few)
    assert capsys.readouterr().out.count("位置与大小都保持") == 2


def test_exercise_outpainting_and_erasing(reader, capsys):
    run(reader, exercise("练习 6.6"))
    assert reader["outpainted"].shape == (1, 3, 64, 64) and reader["erased"].shape == (4, 3, 64, 64)
    assert "擦除之后还认得是蝴蝶" in capsys.readouterr().out


def test_exercise_stopping_the_guidance(reader, capsys):
    calls = []
    hook = reader["pipe"].unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    try:
        run(reader, exercise("练习 6.7").split("\nalways, partly =")[0])
        reader["draw_partly"](reader["stop_guidance"])
    finally:
        hook.remove()
    assert calls == [8] * 16 + [4] * 9                          # 四张图：16 步双份，9 步单份
    run(reader, exercise("练习 6.7"), **{"num_inference_steps=25": "num_inference_steps=5"})
    assert "用时之比" in capsys.readouterr().out


def test_exercise_drawing_a_depth_map(reader):
    run(reader, exercise("练习 6.8"))
    assert len(reader["sketched"]) == 3 and reader["sketched"][0].size == (64, 64)


def test_exercise_mapping_the_two_rates(reader, capsys):
    few = {"count_each = 24": "count_each = 2", "(0.4, 0.6, 0.8)": "(0.6,)", "num_inference_steps=20": "num_inference_steps=2",
           "n_steps=20": "n_steps=2"}
    run(reader, exercise("练习 6.10"), **few)
    assert capsys.readouterr().out.count("位置与大小") == 2 + 2
