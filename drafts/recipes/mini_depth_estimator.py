"""配方：mini-depth-estimator，由一张蝴蝶图估计每个像素的远近（第 6.5.3 节）。

网络是 transformers 的 DPT，与 Stable Diffusion 2 的深度管线所用的同类，只是小得多。
答案取自画图的程序：它画每只蝴蝶时就知道深度，所以不必标注。

用法：python recipes/mini_depth_estimator.py
"""

import numpy as np
import torch
from common import parser, save_model
from measuring import DEVICE, SEED, rank_correlation
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

from book_utils import fit, random_butterflies, render_butterfly, resolve, set_seed

NAME = "mini-depth-estimator"
PURPOSE = "由一张 64×64 的蝴蝶图估计深度：DPTForDepthEstimation（第 6.5.3 节）"
DATA = "蝴蝶世界 64×64：12,000 只（seed=61），不含留作检验的颜色 × 花纹组合；答案是画图时的深度"

IMAGE_SIZE = 64
N_IMAGES, N_EPOCHS, BATCH_SIZE = 12_000, 3, 16
WIDTH = 64


def build_model() -> DPTForDepthEstimation:
    """(B, 3, 64, 64)，取值 −1 到 1 → predicted_depth，(B, 128, 128)，越大越近。"""
    return DPTForDepthEstimation(DPTConfig(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, intermediate_size=2 * WIDTH,
        image_size=IMAGE_SIZE, patch_size=8, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 32, 64, 64], fusion_hidden_size=24, use_auxiliary_head=False,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))


def build_processor() -> DPTImageProcessor:
    """缩放到 64 × 64，取值 −1 到 1。"""
    return DPTImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )


def pictures_and_depths(n_images: int, seed: int, held_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """（图像 uint8 (N, 3, 64, 64)，深度 float16 (N, 64, 64)，取值约 0 到 1）。"""
    renders = [
        render_butterfly(butterfly, IMAGE_SIZE, seed * 10_000_000 + index)
        for index, butterfly in enumerate(random_butterflies(n_images, seed, held_out))
    ]
    images = torch.from_numpy(np.stack([one.image for one in renders])).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(np.stack([one.depth for one in renders])).half()


def depth_of(model: DPTForDepthEstimation, images: torch.Tensor) -> torch.Tensor:
    """images（取值 0 到 1，(B, 3, 64, 64)）的深度，缩放到同样的边长，(B, 64, 64)；可以求导。"""
    depth = model(pixel_values=images * 2 - 1).predicted_depth
    return F.interpolate(depth[:, None], size=images.shape[2:], mode="area")[:, 0]


def batch_loss(model, images, depths, generator):
    """绝对误差，另加相邻像素之差的绝对误差，使边缘分明。

    图上加少许噪声：以后估计的是生成的图，总有些不干净。
    """
    x = images / 255
    noise = torch.randn(x.shape, generator=generator) * 0.03
    error = depth_of(model, (x + noise.to(x.device)).clamp(0, 1)) - depths.float()
    edges = error.diff(dim=1).abs().mean() + error.diff(dim=2).abs().mean()
    return error.abs().mean() + edges


@torch.no_grad()
def estimate(model: DPTForDepthEstimation, images: torch.Tensor) -> torch.Tensor:
    """逐批估计深度，(N, 64, 64)；images 取值 0 到 1。"""
    device = next(model.parameters()).device
    parts = tqdm(images.split(64), desc="估计深度", unit="批")
    return torch.cat([depth_of(model, part.to(device)).cpu() for part in parts])


def load_model() -> DPTForDepthEstimation:
    """随书的深度估计网络，评估模式。"""
    return DPTForDepthEstimation.from_pretrained(resolve(NAME), dtype=torch.float32).eval()


def main(arguments: list[str] | None = None):
    options = parser(__doc__.splitlines()[0], NAME).parse_args(arguments)
    set_seed(0)
    model = build_model()
    history = fit(
        model, pictures_and_depths(N_IMAGES, seed=61), batch_loss, n_epochs=N_EPOCHS, batch_size=BATCH_SIZE, lr=1e-3,
        lr_decay=True, device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        def save(folder):
            model.cpu().half().save_pretrained(folder)
            build_processor().save_pretrained(folder)

        save_model(options.output, save, history, options.device, "python recipes/mini_depth_estimator.py")


def measure(n_images: int = 500) -> dict:
    """新画的图上，估计的深度与真的深度的秩相关（每张图各算，取平均）与绝对误差。"""
    model, result = load_model().to(DEVICE), {"n_images": n_images}
    for key, held_out in (("new", False), ("held_out", True)):
        images, depths = pictures_and_depths(n_images, SEED, held_out)
        estimated, depths = estimate(model, images / 255), depths.float()
        correlations = rank_correlation(estimated, depths)
        result[key] = {
            "rank_correlation": correlations.mean().item(),
            "worst_rank_correlation": correlations.min().item(),
            "absolute_error": (estimated - depths).abs().mean().item(),
        }
    return result


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    return [
        f"{result['n_images']} 张新画的图，估计的深度与真的深度（要求秩相关不低于 0.95）：",
        "",
        "| | 秩相关，平均 | 秩相关，最低 | 绝对误差 |",
        "|---|---|---|---|",
        *(
            f"| {title} | {row['rank_correlation']:.3f} | {row['worst_rank_correlation']:.3f} | {row['absolute_error']:.3f} |"
            for title, row in (("训练过的组合", result["new"]), ("留作检验的组合", result["held_out"]))
        ),
    ]


if __name__ == "__main__":
    main()
