"""随书模型：在哪里、是否完好、怎样换成 Hub 上的大模型。"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .checksums import CHECKSUMS, MODELS_ROOT, verify_model


def resolve(name: str, hub: str | None = None, models_root: str | Path = MODELS_ROOT) -> str:
    """返回模型的位置，可直接交给 ``from_pretrained``。

    默认返回随书小模型的文件夹，并核对其中文件的 SHA-256；
    环境变量 ``BOOK_MODE=hub`` 时返回 Hub 上的模型编号 ``hub``
    （下载由 diffusers 完成，遵从 ``HF_ENDPOINT`` 指定的镜像）。
    没有 Hub 版本的模型（hub 为 None）在两种模式下都用随书版本。

    参数：
        name: 随书模型的名字，即 ``models`` 下的文件夹名。
        hub:  Hub 上对应大模型的编号，如 ``"google/ddpm-cifar10-32"``；没有对应者为 None。
        models_root: 随书模型所在文件夹。
    返回：
        文件夹路径，或 Hub 编号。
    异常：
        ValueError: BOOK_MODE 取值不对，或文件已损坏。
        FileNotFoundError: 没有这个模型，或缺少其中的文件。
        ConnectionError: BOOK_MODE=hub，但连不上 Hub 或镜像。
    来源：第 3.4.2 节。
    """
    mode = os.environ.get("BOOK_MODE", "embedded")
    if mode not in ("embedded", "hub"):
        raise ValueError(f"环境变量 BOOK_MODE 应是 embedded 或 hub，收到的是 {mode!r}。")
    if mode == "hub" and hub is not None:
        require_hub()
        return hub

    folder = Path(models_root) / name
    if not (folder / CHECKSUMS).is_file():
        known = sorted(path.parent.name for path in Path(models_root).glob(f"*/{CHECKSUMS}"))
        raise FileNotFoundError(
            f"没有找到随书模型 {name!r}（{folder}）。现有：{'、'.join(known) or '无'}。"
            "若仓库不完整，请重新克隆。"
        )
    verify_model(folder)
    return str(folder)


def require_hub() -> None:
    """确认 Hub（或镜像）连得上，免得读者在长长的重试之后才看到英文报错。

    凡是要从 Hub 下载的代码格，开头都调用它；:func:`resolve` 已经替你调用了。
    异常：
        ConnectionError: 连不上 Hub 或镜像。
    来源：第 4.2.2 节。
    """
    from .environment import TRUE_VALUES, hub_problem

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in TRUE_VALUES:
        return                  # 读者声明只用本地缓存，由 from_pretrained 去缓存里找
    problem = hub_problem(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if problem:
        raise ConnectionError(
            f"BOOK_MODE=hub 需要联网，但{problem}。"
            "可以用环境变量 HF_ENDPOINT 指定镜像，或去掉 BOOK_MODE 改用随书模型。"
        )


def load_weights(model: torch.nn.Module, folder: str | Path) -> torch.nn.Module:
    """把 ``folder/model.safetensors`` 装入 model（半精度存盘，装入时转成模型自己的精度）。

    参数：
        model:  结构与权重相符的网络。
        folder: :func:`resolve` 返回的文件夹。
    返回：
        同一个 model，已切换到评估模式。
    异常：
        FileNotFoundError: 没有权重文件。
        ValueError: 文件损坏，或权重与网络结构不符。
    来源：第 3.4.2 节。
    """
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"没有找到权重文件 {path}。")
    try:
        model.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"权重文件 {path} 已损坏或不完整：{error}。") from error
    except RuntimeError as error:
        raise ValueError(f"权重文件 {path} 与 {type(model).__name__} 的结构不符：{error}。") from error
    return model.eval()


DIFFERENCE_SCALE = 1024         # 权重之差多在千分之几，乘上它才落在 8 位浮点最准的一段


def weight_difference(before: torch.nn.Module, after: torch.nn.Module) -> dict[str, torch.Tensor]:
    """微调前后权重之差，8 位浮点（float8_e4m3fn，相对误差至多 1/16）；大小是半精度的一半。

    参数：
        before, after: 结构相同的两个网络。
    返回：
        权重名 → 差 × DIFFERENCE_SCALE，可直接交给 safetensors 存盘。
    异常：
        ValueError: 两个网络的权重名或形状不同。
    来源：第 5.5.3 节。
    """
    old, new = before.state_dict(), after.state_dict()
    if {name: w.shape for name, w in old.items()} != {name: w.shape for name, w in new.items()}:
        raise ValueError("两个网络的结构不同，权重不能相减。")
    limit = torch.finfo(torch.float8_e4m3fn).max        # 超出范围的换算成 8 位会变成 NaN
    return {
        name: ((new[name].float() - old[name].float()) * DIFFERENCE_SCALE).clamp(-limit, limit).cpu().to(torch.float8_e4m3fn)
        for name in old
    }


@torch.no_grad()
def add_difference(model: torch.nn.Module, folder: str | Path) -> torch.nn.Module:
    """把 ``folder/difference.safetensors`` 里的差加到 model 的权重上，就地得到微调后的网络。

    参数：
        model:  微调之前的网络。
        folder: :func:`resolve` 返回的文件夹，里面的差由 :func:`weight_difference` 算出。
    返回：
        同一个 model，已切换到评估模式。
    异常：
        FileNotFoundError: 没有这个文件。
        ValueError: 文件损坏，或与网络结构不符；这时 model 没有改动。
    来源：第 5.5.3 节。
    """
    path = Path(folder) / "difference.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"没有找到权重之差 {path}。")
    try:
        difference = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"权重之差 {path} 已损坏或不完整：{error}。") from error
    weights = model.state_dict()
    if {name: w.shape for name, w in weights.items()} != {name: d.shape for name, d in difference.items()}:
        raise ValueError(f"权重之差 {path} 与 {type(model).__name__} 的结构不符。")
    for name, weight in weights.items():
        # 先换精度再搬：不是每种设备都认得 8 位浮点
        weight += difference[name].to(weight.dtype).to(weight.device) / DIFFERENCE_SCALE
    return model.eval()
