"""记下 UNet 的交叉注意力，看每个词管画面的哪里（第 6.4.2 节）。"""

import math
from functools import partial

import torch


class AttentionMaps:
    """挂在 UNet 的每个交叉注意力层上，记下每次调用的权重（各个头平均）；用完要 ``remove()``。

    不改动原来的计算：用同样的输入把权重另算一遍。有引导时一批里先是无条件的一份，后是有条件的一份。

    参数：
        unet: diffusers 的 UNet2DConditionModel。
    属性：
        maps: 层的名字 → 各次调用的权重，形状 (B, 像素, 词元)，每行的和是 1，在 CPU 上。
    异常：
        ValueError: 网络里没有交叉注意力。
    来源：第 6.4.2 节。
    """

    def __init__(self, unet):
        if not any(name.endswith("attn2") for name, _ in unet.named_modules()):
            raise ValueError(f"{type(unet).__name__} 里没有交叉注意力层，没有什么可记。")
        self.maps = {}          # 层的名字 → 各次调用的权重，形状 (B, 像素, 词元)
        self.hooks = [
            module.register_forward_hook(partial(self._record, name), with_kwargs=True)
            for name, module in unet.named_modules() if name.endswith("attn2")
        ]

    @torch.no_grad()
    def _record(self, name, module, args, kwargs, output):
        q, k = module.to_q(args[0]), module.to_k(kwargs["encoder_hidden_states"])
        q, k = (x.unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in (q, k))
        weights = (q @ k.transpose(-2, -1) * module.scale).softmax(dim=-1)              # (B, 头, 像素, 词元)
        self.maps.setdefault(name, []).append(weights.mean(dim=1).float().cpu())

    def remove(self):
        for hook in self.hooks:
            hook.remove()


def word_positions(tokenizer, prompt: str, word: str, last: bool = False) -> list[int]:
    """word 在 prompt 里占了哪几个词元；出现几次时取头一次，last 则取最后一次。

    参数：
        tokenizer: CLIPTokenizer。
        prompt:    一句提示词。
        word:      其中的一个词，照原样写。
    返回：
        词元在整句里的位置，句首的记号是第 0 个；可以直接交给 :func:`attention_map`。
    异常：
        ValueError: 提示词里没有这个词。
    来源：第 6.4.2 节。
    """
    if not word or word not in prompt:
        raise ValueError(f"提示词“{prompt}”里没有“{word}”。")
    start = prompt.rfind(word) if last else prompt.find(word)
    spans = tokenizer(prompt, return_offsets_mapping=True).offset_mapping
    return [i for i, (left, right) in enumerate(spans) if left < start + len(word) and right > start]


def attention_map(
    recorder: AttentionMaps, positions: list[int], call: int = -1, pixels: int = 64, layers: list[str] | None = None
) -> torch.Tensor:
    """这几个词元分到的权重，排回画面，形状 (B, 边长, 边长)。

    参数：
        recorder:  :class:`AttentionMaps`，已经跑过 UNet。
        positions: 第几个词元，见 :func:`word_positions`。
        call:      第几次调用，默认最后一次。
        pixels:    用有这么多像素的层（画面是正方形），各层平均。
        layers:    只用这几层；不给就是全部。
    异常：
        ValueError: 没有记下这样的层，或没有那么多次调用、那么多个词元。
    来源：第 6.4.2 节。
    """
    if not recorder.maps:
        raise ValueError("recorder 里什么也没有记下：先让 UNet 跑一遍，再来取。")
    if not all(-len(recorded) <= call < len(recorded) for recorded in recorder.maps.values()):
        raise ValueError(f"只记下了 {len(next(iter(recorder.maps.values())))} 次调用，没有第 {call} 次。")
    if not any(
        recorded[call].shape[1] == pixels and (layers is None or name in layers) for name, recorded in recorder.maps.items()
    ):
        raise ValueError(
            f"没有记下 {pixels} 个像素的层；记下的有 {sorted({one[call].shape[1] for one in recorder.maps.values()})} 个像素的。"
        )
    chosen = [
        recorded[call][:, :, positions].sum(dim=-1) for name, recorded in recorder.maps.items()
        if recorded[call].shape[1] == pixels and (layers is None or name in layers)
    ]
    return torch.stack(chosen).mean(dim=0).unflatten(1, (math.isqrt(pixels), -1))
