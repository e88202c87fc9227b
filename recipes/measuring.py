"""各模型的测量共用的部分：裁判、采样、几种指标、导出成 ONNX。

每个数都由固定的种子 SEED 算出；测试图像、提示词与种子都不曾用于训练。
"""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch.nn import functional as F
from tqdm import tqdm

from book_utils import (
    Butterfly,
    butterfly_judge,
    corrupt,
    digit_classifier,
    epoch_means,
    frechet_distance,
    get_device,
    mnist_tensors,
    random_butterflies,
    random_caption,
    resolve,
)
from book_utils.metrics import require_finite
from book_utils.worlds.butterflies import (
    ATTRIBUTES,
    BACKGROUNDS,
    ENGLISH_POSITIONS,
    PATTERNS,
    POSITIONS,
    SIZES,
    WING_COLORS,
)

DEVICE = get_device()
SEED = 20_000           # 训练用的种子都在 100 以内
BATCH = 100
MNIST_DATA = "MNIST 训练集 60,000 张（`data/MNIST`）"
NAMES = {"wing_color": "颜色", "pattern": "花纹", "background": "背景", "size": "大小", "position": "位置"}


# —— 采样 ——

def samplers(config, spacing: str = "trailing") -> dict:
    """第 3.7.2 节比较的四种采样方法：名字 →（调度器，step 的选项）；spacing 是挑时间步的办法。"""
    options = {"timestep_spacing": spacing}
    return {
        "DDPM": (DDPMScheduler.from_config(config, **options), {}),
        "DDIM（η = 0）": (DDIMScheduler.from_config(config, **options), {"eta": 0.0}),
        "DDIM（η = 1）": (DDIMScheduler.from_config(config, **options), {"eta": 1.0}),
        "DPM-Solver++": (DPMSolverMultistepScheduler.from_config(config, **options), {}),
    }


@torch.no_grad()
def draw(unet, scheduler, n_steps: int, n_samples: int, **options) -> torch.Tensor:
    """生成 n_samples 张图像，取值 0 到 1。"""
    generator = torch.Generator().manual_seed(SEED)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = torch.randn(n_samples, *shape, generator=generator)
    done = []
    for x in noise.split(BATCH):
        scheduler.set_timesteps(n_steps)
        x = x.to(DEVICE) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            prediction = unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(prediction, t, x, generator=generator, **options).prev_sample
        require_finite(x, "生成的图像")      # 截断会把无穷变成好端端的黑与白
        done.append(x.cpu())
    return (torch.cat(done) / 2 + 0.5).clamp(0, 1)


# —— 数字 ——

@torch.no_grad()
def judge_digits(images: torch.Tensor) -> tuple[float, torch.Tensor]:
    """返回（认得出的比例，64 维特征）：分类器有九成以上把握是某个数字，就算认得出。images 取值 0 到 1。"""
    require_finite(images, "images ")
    classifier = digit_classifier().to(DEVICE)
    features = torch.cat([classifier.features(part.to(DEVICE)) for part in images.clamp(0, 1).split(500)])
    confidence = classifier.head(features).softmax(dim=1)[:, :10].max(dim=1).values
    return (confidence > 0.9).float().mean().item(), features.cpu()


@torch.no_grad()
def measure_clean_image_model(
    name: str, predict: Callable[[torch.Tensor], torch.Tensor], document: tuple[list[float], float], n_samples: int = 300,
) -> dict:
    """预测原图的网络 predict：三轮损失与文档相比，测试损失，40 步采样的质量。

    document 是本书所依据的文档给出的每轮平均损失，以及允许的相对误差。
    """
    training = json.loads((Path(resolve(name)) / "training.json").read_text(encoding="utf-8"))
    ours = epoch_means(training["losses"], steps_per_epoch=469)
    theirs, tolerance = document

    generator = torch.Generator().manual_seed(SEED)
    test_images, _ = mnist_tensors(train=False)
    errors = []
    for batch in tqdm(test_images.split(500), desc=f"{name}：测试损失"):
        amount = torch.rand(len(batch), generator=generator)
        prediction = predict(corrupt(batch, amount, generator).to(DEVICE)).cpu()
        errors.append(F.mse_loss(prediction, batch))

    x = torch.rand(n_samples, 1, 28, 28, generator=generator)
    samples = []
    for part in tqdm(x.split(BATCH), desc=f"{name}：40 步采样"):
        part = part.to(DEVICE)
        for i in range(40):
            part = part + (predict(part) - part) / (40 - i)
        samples.append(part.cpu())
    rate, features = judge_digits(torch.cat(samples))
    return {
        "epoch_losses": ours,
        "document_losses": theirs,
        "relative_difference": [a / b - 1 for a, b in zip(ours, theirs, strict=True)],
        "tolerance": tolerance,
        "test_loss": torch.stack(errors).mean().item(),
        "n_samples": n_samples,
        "recognized": rate,
        "distance": frechet_distance(features, judge_digits(test_images[:n_samples])[1]),
    }


def clean_image_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    lines = ["| 轮 | 本书的平均损失 | 文档的平均损失 | 相差 |", "|---|---|---|---|"]
    rows = zip(result["epoch_losses"], result["document_losses"], result["relative_difference"], strict=True)
    lines += [f"| {i} | {a:.6f} | {b:.6f} | {d:+.1%} |" for i, (a, b, d) in enumerate(rows, start=1)]
    lines += [
        "",
        f"允许相差 {result['tolerance']:.0%}。测试集损失 {result['test_loss']:.6f}。",
        f"40 步采样 {result['n_samples']} 张：{result['recognized']:.1%} 认得出，"
        f"与测试图像的 Fréchet 距离 {result['distance']:.1f}。",
    ]
    return lines


def _digit_statistics(images: torch.Tensor, digits: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """画对的比例、同一个数字的各张之间特征距离的平均（只看画对的，免得把错误当成多样）、各张的特征。"""
    features = judge_digits(images)[1]
    right = digit_classifier().head(features).argmax(dim=1) == digits
    variety = torch.stack([torch.pdist(features[right & (digits == digit)]).mean() for digit in range(10)])
    return right.float().mean().item(), variety.mean().item(), features


@torch.no_grad()
def measure_classes(name: str, predictions: dict, n_samples: int = 1000, n_steps: int = 25) -> dict:
    """用 predictions 里的每个 predict(x, t, 类别) 各画 n_samples 张，十个数字一样多，与真的数字比较。"""
    digits = torch.arange(10).repeat_interleave(n_samples // 10)
    test_images, test_labels = mnist_tensors(train=False)
    picks = torch.cat([(test_labels == digit).nonzero()[: n_samples // 10, 0] for digit in range(10)])
    real_as_asked, real_variety, real_features = _digit_statistics(test_images[picks], digits)

    scheduler = DDIMScheduler.from_pretrained(resolve(name), subfolder="scheduler", timestep_spacing="trailing")
    noise = torch.randn(n_samples, 1, 28, 28, generator=torch.Generator().manual_seed(SEED))
    parts = list(zip(noise.split(BATCH), digits.split(BATCH), strict=True))
    table = {}
    with tqdm(total=len(predictions) * len(parts), desc=f"{name}：采样 {n_steps} 步", unit="批") as progress:
        for key, predict in predictions.items():
            images = []
            for x, labels in parts:
                x, labels = x.to(DEVICE), labels.to(DEVICE)
                scheduler.set_timesteps(n_steps)
                for t in scheduler.timesteps:
                    # 原图截断了，噪声也要跟着改，否则引导一强就不成字（第 5.9 节）
                    x = scheduler.step(predict(x, t, labels), t, x, use_clipped_model_output=True).prev_sample
                require_finite(x, "生成的图像")
                images.append((x.cpu() / 2 + 0.5).clamp(0, 1))
                progress.update()
            as_asked, variety, features = _digit_statistics(torch.cat(images), digits)
            table[key] = {
                "as_asked": as_asked, "variety": variety, "distance": frechet_distance(features, real_features),
            }
    return {
        "n_samples": n_samples,
        "n_steps": n_steps,
        "class_guidance": table,
        "real_as_asked": real_as_asked,
        "real_variety": real_variety,
    }


def class_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    return [
        f"每种引导强度 {result['n_samples']} 张（{result['n_steps']} 步），十个数字一样多：",
        "",
        "| 引导强度 | 画对 | 同一个数字的各张之间，特征的平均距离 | 与测试图像的 Fréchet 距离 |",
        "|---|---|---|---|",
        *(
            f"| {scale} | {row['as_asked']:.1%} | {row['variety']:.2f} | {row['distance']:.1f} |"
            for scale, row in result["class_guidance"].items()
        ),
        f"| 真的数字 | {result['real_as_asked']:.1%} | {result['real_variety']:.2f} | |",
    ]


# —— 蝴蝶 ——

@torch.no_grad()
def judge_butterflies(images: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """（裁判有没有九成以上把握是蝴蝶，各张的属性）；images 取值 0 到 1。"""
    judge = butterfly_judge().to(DEVICE)
    parts = [judge.describe(part.to(DEVICE)) for part in images.split(500)]
    return torch.cat([part[0].cpu() for part in parts]) > 0.9, [item for part in parts for item in part[1]]


def distinct_butterflies(count: int, seed: int, held_out: bool = False) -> list[Butterfly]:
    """count 只蝴蝶，说明里提到的五个属性两两不全相同。"""
    found = {}
    for butterfly in random_butterflies(count * 3, seed, held_out):
        found.setdefault(tuple(getattr(butterfly, name) for name in ATTRIBUTES), butterfly)
    return list(found.values())[:count]


def write_prompts(butterflies: list[Butterfly], seed: int) -> list[str]:
    """每只蝴蝶一句提示词，五个属性都说；中文与英文交替。"""
    rng = np.random.default_rng(seed)
    return [random_caption(b, rng, ("zh", "en")[i % 2]) for i, b in enumerate(butterflies)]


def write_unseen_prompts(butterflies: list[Butterfly]) -> list[str]:
    """训练时没有用过的句式（其中的“飞”“身后”、flying、backdrop 等字词也没有见过）；中文与英文交替。"""
    return [
        f"身后一片{BACKGROUNDS[b.background][0]}，{POSITIONS[b.position][0]}飞着{SIZES[b.size][0]}个子的蝴蝶，"
        f"它是{WING_COLORS[b.wing_color][0]}的，{PATTERNS[b.pattern]}"
        if i % 2 == 0 else
        f"flying {ENGLISH_POSITIONS[b.position]}: one {b.size} {b.wing_color} {b.pattern} butterfly; "
        f"{b.background} backdrop"
        for i, b in enumerate(butterflies)
    ]


def psnr(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """各张的峰值信噪比，分贝，形状 (B,)；两者取值 0 到 1。"""
    return -10 * (decoded - images).square().mean(dim=(1, 2, 3)).log10()


def agreement(images: torch.Tensor, butterflies: list[Butterfly]) -> dict[str, float]:
    """裁判看到的属性与所要的相同的比例；认不出是蝴蝶的算错。"""
    is_butterfly, found = judge_butterflies(images)
    right = torch.tensor([
        [keep and seen[name] == getattr(wanted, name) for name in NAMES]
        for keep, seen, wanted in zip(is_butterfly.tolist(), found, butterflies, strict=True)
    ]).float()
    rates = dict(zip(NAMES, right.mean(dim=0).tolist(), strict=True))
    both = (right[:, 0] * right[:, 1]).mean().item()
    return {"is_butterfly": is_butterfly.float().mean().item()} | rates | {"color_and_pattern": both}


def sharpness(images: torch.Tensor) -> float:
    """相邻像素之差的均方根：模糊的图小，有噪点的图大。"""
    across, down = images.diff(dim=3).square().mean(), images.diff(dim=2).square().mean()
    return (across + down).sqrt().item()


def spread(images: torch.Tensor) -> float:
    """images：(N, K, 3, 64, 64)，每行是同一句提示词的 K 张。各行里两两之差的均方根，再平均。"""
    return torch.stack([F.pdist(row.flatten(1)).mean() for row in images]).div(images[0, 0].numel() ** 0.5).mean().item()


def nearest(images: torch.Tensor, training: torch.Tensor) -> float:
    """各张到最近的训练图的距离的中位数；缩到 32 × 32 再比。"""
    small = F.interpolate(images, size=(32, 32), mode="area").flatten(1)
    return torch.cat([torch.cdist(p, training).min(dim=1).values for p in small.split(50)]).median().item()


@torch.no_grad()
def features(images: torch.Tensor) -> torch.Tensor:
    """裁判的 128 维特征。"""
    judge = butterfly_judge().to(DEVICE)
    return torch.cat([judge.features(part.to(DEVICE)).cpu() for part in images.split(500)])


# —— 导出成 ONNX ——

class Computation(torch.nn.Module):
    """网络与一个算式 ``compute(network, *inputs)``，合成一个模块，好交给 torch.onnx.export。"""

    def __init__(self, network: torch.nn.Module, compute: Callable[..., torch.Tensor]):
        super().__init__()
        self.network, self.compute = network, compute

    def forward(self, *inputs):
        return self.compute(self.network, *inputs)


@torch.no_grad()
def onnx_difference(network: torch.nn.Module, compute: Callable, inputs: tuple[torch.Tensor, ...]) -> float:
    """把 ``compute(network, *inputs)`` 导出成 ONNX，用 onnxruntime 算一遍，返回与 PyTorch 的最大差。都在 CPU 上算。"""
    import onnxruntime  # 只有测量用它：只训练的人不必装

    network = network.cpu().eval()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(Computation(network, compute).eval(), inputs, path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [argument.name for argument in session.get_inputs()]
        output, = session.run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))
    return (torch.from_numpy(output) - compute(network, *inputs)).abs().max().item()


def onnx_line(result: dict) -> str:
    names = {
        "text_features": "文字特征", "image_features": "图像特征",
        "text_encoder": "文本编码器", "unet": "UNet", "vae_decoder": "解码器",
    }
    differences = "，".join(f"{names[part]} {value:.1e}" for part, value in result["onnx_difference"].items())
    return f"- 导出成 ONNX、用 onnxruntime 计算，与 PyTorch 的最大差（要求不超过 1e-3）：{differences}"
