"""第 3.3 节的退化过程：把图像与均匀噪声按比例混合。"""

import torch


def corrupt(
    x: torch.Tensor, amount: torch.Tensor | float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """退化过程：x·(1 − amount) + noise·amount，noise 是 [0, 1) 上的均匀噪声。

    参数：
        x:      图像，形状 (B, C, H, W)，浮点数，取值 0 到 1。
        amount: 噪声量，取值 0（原图）到 1（纯噪声）：一个数，整批共用；
                或形状为 (B,) 的张量，每张图像一个。
        generator: CPU 随机数生成器；不给则用 PyTorch 的全局随机数。
    返回：
        与 x 同形状、同类型的退化图像，取值仍在 0 到 1。
    异常：
        ValueError: 形状或类型不合，amount 不是数，或超出 0 到 1。
    来源：第 3.3 节，式 (3.1)。
    """
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x 应是形状为 (B, C, H, W) 的浮点数张量，收到的是 {_kind(x)}。")
    if not isinstance(amount, (torch.Tensor, int, float)) or _shape(amount) not in ((), x.shape[:1]):
        raise ValueError(
            f"amount 应是一个数，或每张图像一个、形状为 ({x.shape[0]},) 的张量，收到的是 {_kind(amount)}。"
        )
    if not bool(((torch.as_tensor(amount) >= 0) & (torch.as_tensor(amount) <= 1)).all()):
        raise ValueError(
            "amount 应在 0 到 1 之间，收到的范围是 "
            f"{torch.as_tensor(amount).min():g} 到 {torch.as_tensor(amount).max():g}。"
        )
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    amount = torch.as_tensor(amount, dtype=x.dtype, device=x.device)
    amount = amount.view(-1, 1, 1, 1)       # (B,) → (B, 1, 1, 1)，好广播到每个像素
    return x * (1 - amount) + noise * amount


def _shape(amount: torch.Tensor | float) -> tuple[int, ...]:
    """一个数的形状是 ()。"""
    return tuple(getattr(amount, "shape", ()))


def _kind(value: object) -> str:
    """报错时怎样称呼收到的东西：张量说类型与形状，其余原样。"""
    return f"{value.dtype} 张量 {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
