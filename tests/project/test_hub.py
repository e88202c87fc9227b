"""第 4.4.1 节：书里的代码格原样运行，对着本机上的小 Hub（hub_server.py）真的上传、下载、失败、中断。

HF_ENDPOINT 在导入 huggingface_hub 时就定下了，所以每一步都在新的 Python 进程里做，一个字都不改写库里的设置；
进程的 HF_HOME 是临时文件夹，并用 tools/offline 挡住本机以外的一切连接。
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import jupytext
import pytest
import torch
import yaml
from safetensors.torch import save_file
from support.hub_server import READ_TOKEN, USER, WRITE_TOKEN, Hub
from support.paths import ROOT

CHAPTER = ROOT / "chapters" / "04-diffusers.md"
FILES = [
    ".gitattributes", "README.md", "model_index.json",
    "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
]
REPO = f"{USER}/butterflies"
NOTES = """# butterflies-ddpm-32

- 数据：蝴蝶世界 20,000 张
- 配方：`python recipes/butterflies_ddpm_32.py`
- 训练：7,500 步
- 许可：与本书相同

## 测量

500 张里 97.4% 认得出是蝴蝶。

## 校验和（SHA-256）

0000  model_index.json
"""


def hub_cells() -> dict[str, str]:
    """书里以“# Hub：…”开头的代码格，按次序。"""
    cells = [cell.source for cell in jupytext.read(CHAPTER).cells if cell.cell_type == "code"]
    return {cell.splitlines()[0]: cell for cell in cells if cell.startswith("# Hub")}


CELLS = hub_cells()
CARD, PUSH, UPLOAD, BACK = CELLS.values()       # 模型卡、定义上传、上传、装回来


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def write_weights(folder: Path, value: float, dtype=torch.float32) -> None:
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.full((3,), value, dtype=dtype)}, folder / FILES[-1])


@pytest.fixture
def place(tmp_path):
    """一个临时文件夹：假的管线（只看文件，不装入）、随书模型的说明与同样的权重（半精度）、空的 HF_HOME。"""
    for name in FILES[2:]:
        path = tmp_path / "pipeline" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} 的内容", encoding="utf-8")
    write_weights(tmp_path / "pipeline", 0.5)
    write_weights(tmp_path / "model", 0.5, torch.float16)
    (tmp_path / "model" / "README.md").write_text(NOTES, encoding="utf-8")
    return tmp_path


def start(place: Path, code: str, endpoint: str, token: str | None = None, **variables: str) -> subprocess.Popen:
    """在新的进程里运行 code；pipeline_folder 与 resolve 是章里前面已有的名字。"""
    environment = {
        name: value for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "BOOK_")) and "proxy" not in name.lower()
    } | {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(place / "home"), "PYTHONPATH": str(ROOT / "tools/offline"),
        # hf_xet 的存储协议不在小 Hub 里；关掉它，大文件走标准的 LFS
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1",
    } | ({"HF_TOKEN": token} if token else {}) | variables
    before = f"""
from pathlib import Path
pipeline_folder = Path("pipeline")
resolve = lambda name: {str(place / "model")!r}
"""
    return subprocess.Popen(
        [sys.executable, "-c", before + code], cwd=place, env=environment, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def run(*arguments, **options) -> subprocess.CompletedProcess:
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def push(place, endpoint, token=None, **variables):
    """定义函数的两格，再调用 push_pipeline。"""
    call = "print(*push_pipeline(pipeline_folder, 'butterflies'))"
    return run(place, "\n".join([CARD, PUSH, call]), endpoint, token, **variables)


def history(hub) -> list[str]:
    return [title for _, title, _ in hub.repos[REPO].commits] if REPO in hub.repos else []


def card_of(repo) -> tuple[dict, str]:
    _, metadata, text = repo.files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


# —— 小 Hub 自己 ——

def ask(hub, path, method="GET", body=None, token=None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(hub.url + path, data=body, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_little_hub_refuses_what_the_hub_refuses(hub):
    create = json.dumps({"name": "butterflies"}).encode()
    assert [ask(hub, "/api/whoami-v2", token=token) for token in (None, "hf_wrong", READ_TOKEN)] == [401, 401, 200]
    assert [
        ask(hub, "/api/repos/create", "POST", create, token) for token in (None, READ_TOKEN, WRITE_TOKEN, WRITE_TOKEN)
    ] == [401, 403, 200, 409]
    other = json.dumps({"name": "butterflies", "organization": "other"}).encode()
    assert ask(hub, "/api/repos/create", "POST", other, WRITE_TOKEN) == 403
    assert ask(hub, f"/api/models/{USER}/no-such-repo") == 404
    assert ask(hub, f"/{REPO}/resolve/main/no-such-file") == 404
    assert ask(hub, f"/api/models/{REPO}/revision/v9") == 404
    assert ask(hub, f"/{REPO}/resolve/main/.gitattributes") == 200
    wrong, right = hashlib.sha256(b"other").hexdigest(), hashlib.sha256(b"weights").hexdigest()
    assert ask(hub, f"/lfs/{wrong}", "PUT", b"weights") == 400
    assert ask(hub, f"/lfs/{right}", "PUT", b"weights") == 200 and set(hub.lfs) == {right}


# —— 上传、装回来 ——

ROUND_TRIP = """
import json, os, shutil, sys
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
)
DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20)).save_pretrained(pipeline_folder)
shutil.copytree(pipeline_folder / "unet", Path(resolve("butterflies-ddpm-32"), "unet"))     # 它就是随书模型

{cells}

# 给提交打标签，再只改模型卡；钉住标签的人仍拿到原来的一版
from huggingface_hub import HfApi, create_tag, snapshot_download
create_tag(source, tag="v1.0", revision=revision)
card = make_card(source, pipeline_folder)
card.text += "\\n补充一句。\\n"
card.push_to_hub(source)
result = {{
    "source": source, "revision": revision,
    "files": sorted(HfApi().list_repo_files(source)),
    "tagged": Path(snapshot_download(source, revision="v1.0")).name,
    "main_card": Path(snapshot_download(source), "README.md").read_text(encoding="utf-8"),
}}

# 另一个读者：BOOK_MODE=hub 时 resolve 给出 Hub 上的编号，from_pretrained 装入它
sys.path.insert(0, {root!r})
from book_utils.models import resolve as book_resolve
result["resolved"] = book_resolve("mnist-ddpm", hub=source)
pipe = DDPMPipeline.from_pretrained(result["resolved"])
result["same_weights"] = all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), unet.parameters()))
try:
    DDPMPipeline.from_pretrained("{user}/no-such-repo")
except OSError as error:
    result["wrong_repo"] = type(error.__cause__).__name__

# 勘误：原文的三次上传
api = HfApi()
flat = api.create_repo("flat").repo_id
for folder in ("scheduler", "unet"):
    api.upload_folder(repo_id=flat, folder_path=pipeline_folder / folder, path_in_repo="")
api.upload_file(repo_id=flat, path_or_fileobj=pipeline_folder / "model_index.json", path_in_repo="model_index.json")
pipe = DDPMPipeline.from_pretrained(flat)
result["flat_loads"] = all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), unet.parameters()))
result["config_names"] = [AutoencoderKL.config_name, UNet2DModel.config_name]

# 不上传时，最后两格照样能走完
del os.environ["BOOK_UPLOAD"]
{last_two}
Path("result.json").write_text(json.dumps(result))
"""


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory):
    """一个进程里：做一个极小的管线，运行书里的四格，再做读者接下来会做的事。"""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "model").mkdir()
    (folder / "model" / "README.md").write_text(NOTES, encoding="utf-8")
    code = ROUND_TRIP.format(
        cells="\n".join(CELLS.values()), last_two=UPLOAD + "\n" + BACK, root=str(ROOT), user=USER,
    )
    with Hub() as hub:
        done = run(folder, code, hub.url, WRITE_TOKEN, BOOK_MODE="hub", BOOK_UPLOAD="butterflies")
        assert done.returncode == 0, done.stderr
        yield hub, json.loads((folder / "result.json").read_text(encoding="utf-8")), done.stdout


def test_chapter_uploads_the_pipeline_and_gets_the_same_images(round_trip):
    hub, result, printed = round_trip
    assert result["source"] == REPO and result["files"] == FILES
    assert f"已上传到 {REPO}，提交编号 {result['revision']}" in printed
    uploaded, not_uploaded = printed.split("没有上传")
    assert "同一个种子，图像相同吗？ True" in uploaded and "同一个种子，图像相同吗？ True" in not_uploaded
    # 卡与管线是同一次提交，权重走的是大文件的协议，图像来自 Hub 上的那一份
    assert history(hub)[:2] == ["initial commit", "上传管线与模型卡"]
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1
    assert f"GET /{REPO}/resolve/{result['revision']}/{FILES[-1]}" in hub.requests


def test_model_card_says_what_it_should(round_trip):
    hub, _, _ = round_trip
    metadata, text = card_of(hub.repos[REPO])
    assert metadata["license"] == "apache-2.0" and metadata["library_name"] == "diffusers"
    assert metadata["pipeline_tag"] == "unconditional-image-generation"
    assert {"ddpm", "butterflies"} <= set(metadata["tags"])
    for fact in ("蝴蝶世界 20,000 张", "recipes/butterflies_ddpm_32.py", "7,500 步", "97.4% 认得出是蝴蝶", "不是照片"):
        assert fact in text
    assert f'from_pretrained("{REPO}")' in text and "校验和" not in text


def test_card_of_ones_own_model_does_not_borrow_figures(hub, place):
    write_weights(place / "pipeline", 0.75)
    done = push(place, hub.url, WRITE_TOKEN)
    assert done.returncode == 0, done.stderr
    _, text = card_of(hub.repos[REPO])
    assert "还没有测量" in text
    for figure in ("97.4%", "20,000", "7,500", "recipes/butterflies_ddpm_32.py"):
        assert figure not in text


def test_pinned_version_stays_while_main_moves_on(round_trip):
    hub, result, _ = round_trip
    assert result["tagged"] == result["revision"]
    assert history(hub) == ["initial commit", "上传管线与模型卡", "Upload README.md with huggingface_hub"]
    assert result["main_card"].endswith("补充一句。\n")
    assert "补充一句" not in hub.repos[REPO].at("v1.0")[1]["README.md"].decode()


def test_hub_mode_loads_from_the_hub(round_trip):
    _, result, _ = round_trip
    assert result["resolved"] == REPO and result["same_weights"]
    assert result["wrong_repo"] == "RepositoryNotFoundError"


def test_erratum_about_the_flat_upload(round_trip):
    hub, result, _ = round_trip
    flat = hub.repos[f"{USER}/flat"]
    assert sorted(flat.files) == [
        ".gitattributes", "config.json", "diffusion_pytorch_model.safetensors", "model_index.json",
        "scheduler_config.json",
    ]
    assert result["flat_loads"] and len(flat.commits) == 1 + 3
    assert result["config_names"] == ["config.json"] * 2        # 两个网络的配置在根目录会重名


def test_upload_through_the_streamed_pipeline(hub, place):
    """装有 hf_xet 时 upload_folder 走另一条路；小 Hub 说没有大文件，这条路就不需要 Xet 的服务器。"""
    hub.use_lfs = False
    done = push(place, hub.url, WRITE_TOKEN, HF_HUB_DISABLE_XET="0")
    assert done.returncode == 0, done.stderr
    assert sorted(hub.repos[REPO].files) == FILES
    assert history(hub) == ["initial commit", "上传管线与模型卡"]
    assert done.stdout.split()[-2:] == [REPO, hub.repos[REPO].commits[-1][0]]


# —— 没有明说就不上传 ——

@pytest.mark.parametrize("variables", [{}, {"BOOK_MODE": "hub"}, {"BOOK_UPLOAD": "butterflies"}])
def test_nothing_is_uploaded_unless_asked(hub, place, variables):
    done = run(place, "\n".join([CARD, PUSH, UPLOAD]), hub.url, WRITE_TOKEN, **variables)
    assert done.returncode == 0, done.stderr
    assert "没有上传" in done.stdout and done.stdout.splitlines()[-5:] == FILES[1:]
    assert not [request for request in hub.requests if not request.endswith("/api/agent-harnesses")]
    assert not (place / "pipeline" / "README.md").exists()


# —— 失败说得清楚，仓库不变 ——

@pytest.mark.parametrize("token, exists, error", [
    (None, False, "PermissionError: 没有找到令牌。请先运行 hf auth login"),
    ("hf_wrong", False, "PermissionError: 令牌无效，或者没有写权限"),
    (READ_TOKEN, False, "PermissionError: 令牌无效，或者没有写权限"),
    (READ_TOKEN, True, "PermissionError: 令牌无效，或者没有写权限"),       # 仓库已有时，要到上传那一步才被拒绝
])
def test_bad_tokens(hub, place, token, exists, error):
    if exists:
        assert ask(hub, "/api/repos/create", "POST", b'{"name": "butterflies"}', WRITE_TOKEN) == 200
    done = push(place, hub.url, token)
    assert done.returncode == 1 and error in done.stderr.splitlines()[-1]
    assert history(hub) == (["initial commit"] if exists else []) and not hub.lfs


def test_unreachable_hub(place):
    with Hub() as gone:
        endpoint = gone.url                     # 关掉之后，这个端口没有人听
    done = push(place, endpoint, WRITE_TOKEN)
    assert done.returncode == 1
    assert f"ConnectionError: 与 {endpoint} 的连接不通" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("call, error", [
    ("push_pipeline(Path('model'), 'butterflies')", "FileNotFoundError: model 里没有 model_index.json"),
    (f"push_pipeline(pipeline_folder, '{REPO}')", "ValueError: 只写仓库名"),
])
def test_bad_arguments_never_reach_the_hub(hub, place, call, error):
    done = run(place, "\n".join([CARD, PUSH, call]), hub.url, WRITE_TOKEN)
    assert done.returncode == 1 and error in done.stderr.splitlines()[-1]
    assert not hub.repos


# —— 中断 ——

@pytest.mark.parametrize("earlier", [False, True], ids=["新仓库", "已有一版"])
@pytest.mark.parametrize("moment", ["PUT /lfs/", f"POST /api/models/{REPO}/commit/"], ids=["传权重时", "提交时"])
def test_killed_upload_changes_nothing_and_can_be_repeated(hub, place, moment, earlier):
    if earlier:
        assert push(place, hub.url, WRITE_TOKEN).returncode == 0
        shutil.rmtree(place / "home", ignore_errors=True)
        (place / "pipeline" / "unet" / "config.json").write_text("新的配置", encoding="utf-8")
        write_weights(place / "pipeline", 0.25)
    unchanged = (history(hub) or ["initial commit"], dict(hub.repos[REPO].files) if earlier else None)

    reached, killed = threading.Event(), threading.Event()

    def stop_here(request):
        if request.startswith(moment) and not killed.is_set():
            reached.set()
            killed.wait(60)
            raise ConnectionAbortedError        # 客户端已经不在了：丢掉这个请求，不处理它

    hub.before = stop_here
    hub.handle_error = lambda *details: None
    call = "\n".join([CARD, PUSH, "push_pipeline(pipeline_folder, 'butterflies')"])
    process = start(place, call, hub.url, WRITE_TOKEN)
    assert reached.wait(120), process.communicate()[1]
    process.kill()
    process.communicate()
    killed.set()

    assert history(hub) == unchanged[0]
    assert unchanged[1] is None or hub.repos[REPO].files == unchanged[1]

    again = push(place, hub.url, WRITE_TOKEN)
    assert again.returncode == 0, again.stderr
    assert history(hub) == [*unchanged[0], "上传管线与模型卡"]
    for name in FILES[1:]:
        assert hub.repos[REPO].files[name] == (place / "pipeline" / name).read_bytes()


def test_weights_already_sent_are_not_sent_again(hub, place):
    def cut_before_commit(request):
        if "/commit/" in request:
            raise ConnectionAbortedError        # 不回答就断开

    hub.before = cut_before_commit
    hub.handle_error = lambda *details: None
    failed = push(place, hub.url, WRITE_TOKEN)
    assert f"ConnectionError: 与 {hub.url} 的连接不通" in failed.stderr.splitlines()[-1]
    assert history(hub) == ["initial commit"]
    hub.before = lambda request: None
    assert push(place, hub.url, WRITE_TOKEN).returncode == 0
    assert sum(request.startswith("PUT") for request in hub.requests) == 1


def test_cells_are_the_four_this_file_runs():
    assert list(CELLS) == ["# Hub：模型卡", "# Hub：把管线上传", "# Hub：上传，只在联网模式下进行", "# Hub：装回来"]
