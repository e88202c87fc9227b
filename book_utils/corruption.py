"""第 3.3 节的退化过程：把图像与均匀噪声按比例混合。"""

import torch


def corrupt(
    x: torch.Tensor, amount: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """退化过程：x·(1 − amount) + noise·amount，noise 是 [0, 1) 上的均匀噪声。

    参数：
        x:      图像，形状 (B, C, H, W)，取值 0 到 1。
        amount: 噪声量，形状 (B,)，每张图像一个，取值 0（原图）到 1（纯噪声）。
        generator: CPU 随机数生成器；不给则用 PyTorch 的全局随机数。
    返回：
        与 x 同形状的退化图像，取值仍在 0 到 1。
    异常：
        ValueError: 形状不合，或 amount 超出 0 到 1。
    来源：第 3.3 节，式 (3.1)。
    """
    if x.ndim != 4:
        raise ValueError(f"x 的形状应是 (B, C, H, W)，收到的是 {tuple(x.shape)}。")
    if amount.shape != x.shape[:1]:
        raise ValueError(
            f"amount 应每张图像一个，形状为 ({x.shape[0]},)，收到的是 {tuple(amount.shape)}。"
        )
    if not bool(((amount >= 0) & (amount <= 1)).all()):
        raise ValueError(
            f"amount 应在 0 到 1 之间，收到的范围是 {amount.min():g} 到 {amount.max():g}。"
        )
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    amount = amount.view(-1, 1, 1, 1)       # (B,) → (B, 1, 1, 1)，才能广播到每个像素
    return x * (1 - amount) + noise * amount
