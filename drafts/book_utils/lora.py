"""LoRA：手写的一层，装入与混合适配器之前的核对（第 9.2 节）。"""

import math
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

WEIGHT_NAME = "pytorch_lora_weights.safetensors"        # diffusers 存 LoRA 用的文件名
ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # 注意力里的四个矩阵
WEIGHT_LIMIT = 3.0


class LoRALinear(nn.Module):
    """冻结的线性层，旁边加一对低秩矩阵：y = Wx + b + (alpha / rank) · B A x；B 从零开始。

    参数：
        base:  要适配的线性层，它的参数随即冻结。
        rank:  秩，正整数，不超过两边的宽度。
        alpha: 缩放系数，不写就等于秩。
    来源：第 9.2 节；Hu 等（2022）。
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float | None = None):
        if not 1 <= rank <= min(base.in_features, base.out_features):
            raise ValueError(f"rank 应在 1 与 {min(base.in_features, base.out_features)} 之间，收到的是 {rank}。")
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = (rank if alpha is None else alpha) / rank
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T * self.scaling


def read_adapter(folder: str | Path) -> dict[str, torch.Tensor]:
    """读出一个适配器文件夹里的矩阵：名字（如 ``unet.….to_q.lora_A.weight``）→ 张量。

    异常：
        FileNotFoundError: 没有这个文件。
        ValueError: 文件损坏，或里面不是 LoRA。
    来源：第 9.2 节。
    """
    path = Path(folder) / WEIGHT_NAME
    if not path.is_file():
        raise FileNotFoundError(f"没有找到适配器 {path}。")
    try:
        matrices = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"适配器 {path} 已损坏或不完整：{error}。") from error
    if not matrices or not all(".lora_A." in name or ".lora_B." in name for name in matrices):
        raise ValueError(f"{path} 里不全是 LoRA 的矩阵（名字里应有 lora_A 或 lora_B）。")
    return matrices


def load_adapter(pipeline, folder: str | Path, name: str):
    """把 folder 里的 LoRA 装进管线的 UNet，取名 name；先核对它是不是为这个模型训练的。

    参数：
        pipeline: StableDiffusionPipeline。
        folder:   :func:`book_utils.resolve` 返回的文件夹，或 ``save_lora_weights`` 写的文件夹。
        name:     适配器的名字，以后用它指定强度。
    返回：
        同一个 pipeline。
    异常：
        FileNotFoundError: 没有这个文件。
        ValueError: 文件损坏，名字已经用过，或适配器属于另一个模型；这时 pipeline 没有改动。
    来源：第 9.2 节。
    """
    matrices = read_adapter(folder)
    if name in getattr(pipeline.unet, "peft_config", {}):
        raise ValueError(f"已经装着一个名叫 {name!r} 的适配器。请换一个名字，或先用 pipe.delete_adapters({name!r})。")
    layers = dict(pipeline.unet.named_modules())
    for key, matrix in matrices.items():
        module = key.removeprefix("unet.").split(".lora_")[0]
        layer = layers.get(module)
        layer = getattr(layer, "base_layer", layer)     # 已经装着别的适配器时，原来的层在里面
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"这个适配器属于另一个模型：它要改 {module}，UNet 里没有这样的线性层。")
        width, ours = (matrix.shape[1], layer.in_features) if ".lora_A." in key else (matrix.shape[0], layer.out_features)
        if width != ours:
            raise ValueError(f"这个适配器属于另一个模型：{module} 的宽度是 {ours}，适配器的是 {width}。")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")        # 装第二个时它提醒“已有适配器”，正是要这样
        pipeline.load_lora_weights(str(folder), weight_name=WEIGHT_NAME, adapter_name=name)
    pipeline.unet.to(pipeline.unet.conv_in.weight.dtype)    # 半精度存盘，换成与 UNet 相同的精度
    return pipeline


def mix_adapters(pipeline, weights: dict[str, float]) -> None:
    """让管线同时用几个适配器：名字 → 强度；没有提到的不起作用。秩不同也可以一起用。

    异常：
        ValueError: 没有装这样的适配器，或强度不在 −3 与 3 之间。
    来源：第 9.2 节。
    """
    if not weights or not set(weights) <= set(getattr(pipeline.unet, "peft_config", {})):
        raise ValueError(
            f"没有装着名叫 {'、'.join(weights) or '（空）'} 的适配器；"
            f"装着的有 {'、'.join(getattr(pipeline.unet, 'peft_config', {})) or '（没有）'}。"
        )
    if not all(math.isfinite(weight) and abs(weight) <= WEIGHT_LIMIT for weight in weights.values()):
        raise ValueError(f"适配器的强度应在 −{WEIGHT_LIMIT:g} 与 {WEIGHT_LIMIT:g} 之间，收到的是 {weights}。")
    pipeline.set_adapters(list(weights), adapter_weights=[float(weight) for weight in weights.values()])
