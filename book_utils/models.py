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
        _require_hub()
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


def _require_hub() -> None:
    """确认 Hub（或镜像）连得上，免得读者在长长的重试之后才看到英文报错。"""
    import httpx

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return                  # 读者声明只用本地缓存，由 from_pretrained 去缓存里找
    try:
        httpx.head(endpoint, timeout=5, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConnectionError(
            f"BOOK_MODE=hub 需要联网，但连不上 {endpoint}（{type(error).__name__}）。"
            "可以用环境变量 HF_ENDPOINT 指定镜像，或去掉 BOOK_MODE 改用随书模型。"
        ) from error


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
