"""ControlNet 的消融：零卷积，高斯起点的卷积，轻的版本；各走同样的步数（第 9.1 节）。

结果写进 models/mini-controlnet-edges/ablation.json，权重不留。

用法：python recipes/controlnet_ablation.py
"""

import json
from pathlib import Path

from common import MODELS_ROOT, parser
from controlnet_training import BATCH_SIZE, EMBEDDING_CHANNELS, base_pipeline, new_controlnet, training_tensors
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding, zero_module
from mini_controlnet_edges import COURSE_STEPS, N_COURSE, edge_control, train
from torch import nn
from torch.nn import functional as F

from book_utils import set_seed
from book_utils.training import written_whole

N_ABLATION = 8_000
N_EPOCHS = 6                    # 1,500 步
STOPS = (0, 50, 100, 200, 400, 800, 1200, N_EPOCHS * N_ABLATION // BATCH_SIZE)
# 轻的版本各块的（输入通道，输出通道，步幅），与 UNet 编码器各级的大小一致
BLOCKS = ((64, 64, 1), (64, 64, 2), (64, 128, 1), (128, 128, 2), (128, 192, 1), (192, 192, 1))


class LightControl(nn.Module):
    """轻的版本：每一块的可训练副本换成一个卷积，不看时间步与文字；接口与 ControlNetModel 相同。"""

    def __init__(self):
        super().__init__()
        self.embedding = ControlNetConditioningEmbedding(64, 3, EMBEDDING_CHANNELS)
        self.conv_in = nn.Conv2d(4, 64, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(i, o, 3, stride=stride, padding=1) for i, o, stride in BLOCKS)
        widths = [64, *(o for _, o, _ in BLOCKS)]
        self.outputs = nn.ModuleList(zero_module(nn.Conv2d(width, width, 1)) for width in widths)

    def forward(
        self, sample, timestep, encoder_hidden_states, controlnet_cond, conditioning_scale=1.0, return_dict=False
    ):
        features = [self.conv_in(sample) + self.embedding(controlnet_cond)]
        for block in self.blocks:
            features.append(block(F.silu(features[-1])))
        residuals = [out(h) * conditioning_scale for out, h in zip(self.outputs, features, strict=True)]
        return residuals[:-1], residuals[-1]


def gaussian_start(controlnet):
    """零卷积换成照常起步的卷积：权重取高斯，标准差使输出与输入差不多大。"""
    for conv in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block, controlnet.controlnet_cond_embedding.conv_out):
        nn.init.kaiming_normal_(conv.weight)
    return controlnet


def main(arguments: list[str] | None = None):
    options = parser(__doc__.splitlines()[0], "controlnet-ablation").parse_args(arguments)
    base = base_pipeline(options.device)
    tensors = training_tensors(
        base, options.checkpoint.with_stem(options.checkpoint.stem + "-data"), N_ABLATION, 93, edge_control
    )
    result = {"n_images": N_COURSE, "n_steps": COURSE_STEPS, "variants": {}}
    for key, build in (
        ("zero", lambda: new_controlnet(base.unet)),
        ("gaussian", lambda: gaussian_start(new_controlnet(base.unet))),
        ("light", LightControl),
    ):
        set_seed(0)
        network = build().to(options.device)
        checkpoint = options.checkpoint.with_stem(f"{options.checkpoint.stem}-{key}")
        history, course = train(base, network, tensors, checkpoint, options.device, STOPS, N_EPOCHS, options.max_steps)
        result["variants"][key] = {
            "n_parameters": sum(p.numel() for p in network.parameters()), "course": course,
            "seconds": round(history.seconds) if history else 0,
            "losses": [round(loss, 5) for loss in history.losses[::10]] if history else [],
        }
    if options.max_steps is None:
        target = Path(MODELS_ROOT) / "mini-controlnet-edges" / "ablation.json"
        with written_whole(target) as partial:
            partial.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
        print(f"已写出 {target}")


if __name__ == "__main__":
    main()
