"""第 5.5.3 节：微调模型的模型卡与上传，书里的代码格原样运行，对着本机上的小 Hub。"""

import jupytext
import pytest
from support.hub_server import USER, WRITE_TOKEN, Hub
from support.paths import ROOT
from test_hub import FILES, card_of, place, run  # noqa: F401  place 是 fixture

CHAPTER = ROOT / "chapters" / "05-finetuning-and-guidance.md"
CELL, = (
    cell.source for cell in jupytext.read(CHAPTER).cells
    if cell.cell_type == "code" and cell.source.startswith("# Hub：微调模型的模型卡")
)
REPO = f"{USER}/my-fish"
# 章里前面已有的名字
BEFORE = """
import os
result = {"n_samples": 300, "shares": {"fish": 0.95}}
embedded = os.environ.get("BOOK_MODE") != "hub"
"""


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def test_pushes_the_pipeline_with_its_card(place, hub):  # noqa: F811
    done = run(place, BEFORE + CELL, hub.url, WRITE_TOKEN, BOOK_MODE="hub", BOOK_UPLOAD="my-fish")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "已上传到 " + REPO in done.stdout
    repo = hub.repos[REPO]
    assert sorted(repo.files) == sorted(FILES)
    metadata, text = card_of(repo)
    assert metadata["base_model"] == "johnowhitaker/ddpm-butterflies-32px" and metadata["library_name"] == "diffusers"
    # 上传的是读者刚微调的：卡上不能写随书模型的数，也不能替别人的图写许可
    assert metadata["license"] == "unknown" and "没有量过" in text and "95.0%" not in text
    assert "huggan/wikiart" in text and f'from_pretrained("{REPO}")' in text


def test_uploads_nothing_unless_asked(place, hub):  # noqa: F811
    done = run(place, BEFORE + CELL, hub.url, WRITE_TOKEN)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "没有上传" in done.stdout and "base_model" in done.stdout and REPO not in hub.repos


def test_a_full_name_is_refused(place, hub):  # noqa: F811
    done = run(place, BEFORE + CELL, hub.url, WRITE_TOKEN, BOOK_MODE="hub", BOOK_UPLOAD=REPO)
    assert done.returncode != 0 and "只写仓库名" in done.stderr and REPO not in hub.repos


def test_a_folder_that_is_not_a_pipeline_is_refused(place, hub):  # noqa: F811
    (place / "pipeline" / "model_index.json").unlink()
    done = run(place, BEFORE + CELL, hub.url, WRITE_TOKEN, BOOK_MODE="hub", BOOK_UPLOAD="my-fish")
    assert done.returncode != 0 and "不是管线文件夹" in done.stderr and REPO not in hub.repos
