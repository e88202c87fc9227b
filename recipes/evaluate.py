"""测量随书模型，把结果写进 models/<名字>/evaluation.json 与模型卡 README.md。

用法：python recipes/evaluate.py [名字 …]        不给名字则测量全部
每个数都由固定的种子算出，测试图像与种子都不曾用于训练。
"""

import argparse
import json
import time
from pathlib import Path

import torch
from butterflies_ddpm_32 import training_images
from butterfly_judge import make_negatives, make_shapes
from common import MODELS_ROOT, machine
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from evaluate_butterflies import (
    clip_lines,
    evaluate_clip,
    evaluate_mini_stable_diffusion,
    judge_butterflies,
    mini_stable_diffusion_lines,
)
from torch.nn import functional as F
from tqdm import tqdm

from book_utils import (
    BasicUNet,
    ClassConditionedUnet,
    butterfly_images,
    corrupt,
    digit_classifier,
    epoch_means,
    frechet_distance,
    get_device,
    load_weights,
    mnist_tensors,
    resolve,
)
from book_utils.butterflies import HELD_OUT, WING_COLORS
from book_utils.models import CHECKSUMS

DEVICE = get_device()
SEED = 20_000           # 训练用的种子都在 100 以内
BATCH = 100
DOCUMENT_LOSSES = {     # 本书所依据的文档给出的每轮平均损失，以及允许的相对误差
    "mnist-basic-unet": ([0.026736, 0.020692, 0.018887], 0.05),
    "mnist-unet2d": ([0.018925, 0.012785, 0.011694], 0.10),
}


@torch.no_grad()
def judge(images: torch.Tensor) -> tuple[float, torch.Tensor]:
    """返回（认得出的比例，64 维特征）：分类器有九成以上把握是某个数字，就算认得出。images 取值 0 到 1。"""
    classifier = digit_classifier().to(DEVICE)
    features = torch.cat([classifier.features(part.to(DEVICE)) for part in images.clamp(0, 1).split(500)])
    confidence = classifier.head(features).softmax(dim=1)[:, :10].max(dim=1).values
    return (confidence > 0.9).float().mean().item(), features.cpu()


def evaluate_classifier(name: str) -> dict:
    images, labels = mnist_tensors(train=False)
    classifier = digit_classifier().to(DEVICE)
    with torch.no_grad():
        predictions = torch.cat([classifier(part.to(DEVICE)).argmax(dim=1).cpu() for part in images.split(500)])
    generator = torch.Generator().manual_seed(SEED)
    averages = images[torch.randint(len(images), (1000, 10), generator=generator)].mean(dim=1)
    return {
        "test_accuracy": (predictions == labels).float().mean().item(),
        "recognized_test_images": judge(images)[0],
        "recognized_uniform_noise": judge(torch.rand(1000, 1, 28, 28, generator=generator))[0],
        "recognized_averages": judge(averages)[0],
    }


@torch.no_grad()
def evaluate_clean_image_model(name: str, n_samples: int = 300) -> dict:
    """预测原图的两个网络：三轮损失与文档相比，测试损失，40 步采样的质量。"""
    folder = Path(resolve(name))
    if name == "mnist-basic-unet":
        predict = load_weights(BasicUNet(), folder).to(DEVICE, memory_format=torch.channels_last)
    else:
        model = UNet2DModel.from_pretrained(folder).to(DEVICE).eval()

        def predict(x):
            return model(x, 0).sample

    training = json.loads((folder / "training.json").read_text())
    ours = epoch_means(training["losses"], steps_per_epoch=469)
    theirs, tolerance = DOCUMENT_LOSSES[name]

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
    rate, features = judge(torch.cat(samples))
    return {
        "epoch_losses": ours,
        "document_losses": theirs,
        "relative_difference": [a / b - 1 for a, b in zip(ours, theirs, strict=True)],
        "tolerance": tolerance,
        "test_loss": torch.stack(errors).mean().item(),
        "n_samples": n_samples,
        "recognized": rate,
        "distance": frechet_distance(features, judge(test_images[:n_samples])[1]),
    }


def samplers(config) -> dict:
    """第 3.7.2 节比较的四种采样方法：名字 →（调度器，step 的选项）。"""
    options = {"timestep_spacing": "trailing"}
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
        x = x.to(DEVICE)
        for t in scheduler.timesteps:
            prediction = unet(x, t).sample
            x = scheduler.step(prediction, t, x, generator=generator, **options).prev_sample
        done.append(x.cpu())
    return (torch.cat(done) / 2 + 0.5).clamp(0, 1)


def evaluate_ddpm(name: str, n_samples: int = 300) -> dict:
    pipeline = DDPMPipeline.from_pretrained(resolve(name))
    unet = pipeline.unet.to(DEVICE).eval()
    test_images, _ = mnist_tensors(train=False)
    real_rate, real_features = judge(test_images[:n_samples])
    other_features = judge(test_images[n_samples : 2 * n_samples])[1]

    choices = samplers(pipeline.scheduler.config)
    steps = (5, 10, 20, 50)
    table: dict[str, dict] = {method: {} for method in choices}
    with tqdm(total=len(choices) * sum(steps), desc=f"{name}：采样", unit="步") as progress:
        for method, (scheduler, options) in choices.items():
            for n_steps in steps:
                images = draw(unet, scheduler, n_steps, n_samples, **options)
                rate, features = judge(images)
                table[method][str(n_steps)] = {
                    "recognized": rate,
                    "distance": frechet_distance(features, real_features),
                }
                progress.update(n_steps)
    return {
        "n_samples": n_samples,
        "real_recognized": real_rate,
        "real_distance": frechet_distance(real_features, other_features),
        "samplers": table,
    }


def _digit_statistics(images: torch.Tensor, digits: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """画对的比例、同一个数字的各张之间特征距离的平均（只看画对的，免得把错误当成多样）、各张的特征。"""
    features = judge(images)[1]
    right = digit_classifier().head(features).argmax(dim=1) == digits
    variety = torch.stack([torch.pdist(features[right & (digits == digit)]).mean() for digit in range(10)])
    return right.float().mean().item(), variety.mean().item(), features


@torch.no_grad()
def _evaluate_classes(name: str, predictions: dict, n_samples: int = 1000, n_steps: int = 25) -> dict:
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


def evaluate_class_conditional(name: str) -> dict:
    """各种引导强度下画对的比例，以及同一个数字的各张有多不同。"""
    unet = UNet2DModel.from_pretrained(resolve(name), subfolder="unet").to(DEVICE).eval()
    no_class = unet.config.num_class_embeds - 1

    def guided(scale):
        def predict(x, t, labels):
            prediction = unet(x, t, class_labels=labels).sample
            if scale != 1:
                without = unet(x, t, class_labels=torch.full_like(labels, no_class)).sample
                prediction = without + scale * (prediction - without)
            return prediction
        return predict

    return _evaluate_classes(name, {f"{scale:g}": guided(scale) for scale in (1.0, 2.0, 3.0, 5.0, 8.0)})


def evaluate_class_planes(name: str) -> dict:
    """类别铺成通道的网络，没有引导。"""
    unet = load_weights(ClassConditionedUnet(), resolve(name)).to(DEVICE)
    return _evaluate_classes(name, {"1": unet})


def evaluate_judge(name: str, n_images: int = 2000) -> dict:
    """新画的蝴蝶（含留作检验的组合）上各属性的正确率；各种不是蝴蝶的图像被认作蝴蝶的比例。"""
    result = {"n_images": n_images}
    for size, key, options in (
        (64, "accuracy_64", {}),
        (64, "accuracy_held_out", {"held_out": True}),
        (32, "accuracy_32_large", {"size": "large"}),
    ):
        images, butterflies = butterfly_images(n_images, size, seed=SEED, **options)
        is_butterfly, found = judge_butterflies(images / 255)
        result[key] = {"is_butterfly": is_butterfly.float().mean().item()} | {
            attribute: sum(a[attribute] == getattr(b, attribute) for a, b in zip(found, butterflies, strict=True))
            / n_images
            for attribute in found[0]
        }
    images, _ = butterfly_images(n_images, 64, seed=SEED + 1)
    generator = torch.Generator().manual_seed(SEED)
    # make_negatives 依次给出噪声、平均、模糊、打乱，各占十二分之一
    kinds = zip(("noise", "averages", "blurred", "shuffled"), make_negatives(images / 255, generator).chunk(4), strict=True)
    negatives = dict(kinds) | {"other_shapes": make_shapes(1000, SEED) / 255}
    result["wrongly_recognized"] = {
        kind: judge_butterflies(batch)[0].float().mean().item() for kind, batch in negatives.items()
    }
    return result


@torch.no_grad()
def evaluate_butterflies_ddpm(name: str, n_samples: int = 500, n_steps: int = 100) -> dict:
    pipeline = DDPMPipeline.from_pretrained(resolve(name)).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    images = []
    for count in tqdm([50] * (n_samples // 50), desc=f"{name}：采样 {n_steps} 步", unit="批"):
        output = pipeline(batch_size=count, num_inference_steps=n_steps, generator=generator, output_type="np")
        images.append(torch.from_numpy(output.images).permute(0, 3, 1, 2))
    images = torch.cat(images)
    is_butterfly, found = judge_butterflies(images)
    kept = [attributes for attributes, keep in zip(found, is_butterfly.tolist(), strict=True) if keep]
    colors = [attributes["wing_color"] for attributes in kept]
    real, _ = butterfly_images(n_samples, 32, seed=SEED, size="large", position="center")
    real = real / 255
    # 每张生成的图到两万张训练图中最近的一张有多远；与新画的图到训练图的距离相比，太小就是背下来了
    training = training_images()
    training = torch.cat([training, training.flip(-1)]).flatten(1) / 255

    def nearest(batch):
        return torch.cat([torch.cdist(p, training).min(dim=1).values for p in batch.flatten(1).split(50)]).median().item()

    # 步数少时 DDPM 与 DDIM 各能认出多少（第 5.4 节）
    unet, few_steps, n_few = pipeline.unet.eval(), {}, 300
    choices = samplers(pipeline.scheduler.config)
    steps = (5, 10, 20, 50, 100)
    with tqdm(total=2 * sum(steps), desc=f"{name}：比较步数", unit="步") as progress:
        for method, key in (("DDPM", "DDPM"), ("DDIM", "DDIM（η = 0）")):
            scheduler, options = choices[key]
            few_steps[method] = {}
            for count in steps:
                drawn = draw(unet, scheduler, count, n_few, **options)
                few_steps[method][str(count)] = judge_butterflies(drawn)[0].float().mean().item()
                progress.update(count)
    return {
        "n_samples": n_samples,
        "n_steps": n_steps,
        "recognized": is_butterfly.float().mean().item(),
        "wing_colors": {color: colors.count(color) for color in WING_COLORS},
        "held_out_pairs": sum((a["wing_color"], a["pattern"]) in HELD_OUT for a in kept),
        "nearest_training_image": nearest(images),
        "nearest_training_image_of_new_renders": nearest(real),
        "n_few": n_few,
        "few_steps": few_steps,
    }


EVALUATIONS = {
    "butterfly-judge": evaluate_judge,
    "butterflies-ddpm-32": evaluate_butterflies_ddpm,
    "butterfly-clip": evaluate_clip,
    "mini-stable-diffusion": evaluate_mini_stable_diffusion,
    "mnist-classifier": evaluate_classifier,
    "mnist-basic-unet": evaluate_clean_image_model,
    "mnist-unet2d": evaluate_clean_image_model,
    "mnist-ddpm": evaluate_ddpm,
    "mnist-class-conditional": evaluate_class_conditional,
    "mnist-class-planes": evaluate_class_planes,
}
MNIST_DATA = "MNIST 训练集 60,000 张（`data/MNIST`）"
PURPOSES = {            # 名字 →（用途，数据）
    "butterfly-judge": (
        "蝴蝶裁判，认五种属性，也认得出不是蝴蝶的图像（第 4.3.5 节）",
        "蝴蝶世界 64×64：24,000 只，另有留作检验的组合 4,000 只、别的形状 6,000 张",
    ),
    "butterflies-ddpm-32": (
        "DDPM 管线，生成 32×32 的蝴蝶（第四、五、七章）",
        "蝴蝶世界 32×32：20,000 只大的、在中央的蝴蝶（seed=1），不含留作检验的颜色 × 花纹组合",
    ),
    "butterfly-clip": (
        "认得中文与英文的小 CLIP：图像塔、文字塔与词表（第五、六章）",
        "蝴蝶世界 64×64：10,000 对（seed=21），一对里只差一个属性，每只八句说明，不含留作检验的颜色 × 花纹组合",
    ),
    "mini-stable-diffusion": (
        "看中文或英文提示词画 64×64 的蝴蝶：StableDiffusionPipeline（第六、七、九章）",
        "蝴蝶世界 64×64：自编码器用 24,000 只（seed=31），UNet 用 40,000 只（seed=32）、每只八句说明，"
        "都不含留作检验的颜色 × 花纹组合；文字编码器取自 butterfly-clip",
    ),
    "mnist-classifier": ("数字分类器，给生成的数字打分（第 3.5.1、3.7.2 节）", MNIST_DATA),
    "mnist-basic-unet": ("最小 UNet，由退化的数字预测原图（第 3.4 节）", MNIST_DATA),
    "mnist-unet2d": ("diffusers 的 UNet2DModel，做与最小 UNet 相同的事（第 3.5.3 节）", MNIST_DATA),
    "mnist-ddpm": ("DDPM 管线：按高斯退化过程预测噪声（第 3.7 节）", MNIST_DATA),
    "mnist-class-planes": (
        "以数字为条件的 UNet，类别的嵌入铺成通道，与图像拼接（第 5.7 节）", MNIST_DATA,
    ),
    "mnist-class-conditional": (
        "以数字为条件的 UNet 与调度器，类别 10 是“不指定”，用于无分类器引导（第 5.9 节）", MNIST_DATA,
    ),
}


def quality_lines(result: dict) -> list[str]:
    """把测量结果写成模型卡里的几行。"""
    lines = []
    if "retrieval" in result:
        lines += clip_lines(result)
    if "guidance" in result:
        lines += mini_stable_diffusion_lines(result)
    if "test_accuracy" in result:
        lines += [
            f"- 测试集正确率：{result['test_accuracy']:.2%}（要求不低于 99%）",
            f"- 九成以上把握是数字的比例：测试图像 {result['recognized_test_images']:.1%}，"
            f"均匀噪声 {result['recognized_uniform_noise']:.1%}，十张数字的平均 {result['recognized_averages']:.1%}",
        ]
    if "wrongly_recognized" in result:
        titles = {
            "accuracy_64": "训练用的组合，64×64", "accuracy_held_out": "留作检验的组合，64×64",
            "accuracy_32_large": "大的，32×32",
        }
        names = {
            "is_butterfly": "认得是蝴蝶", "wing_color": "颜色", "pattern": "花纹", "background": "背景",
            "size": "大小", "position": "位置",
        }
        lines += [
            f"新画的蝴蝶各 {result['n_images']} 只：",
            "",
            "| | " + " | ".join(names.values()) + " |",
            "|---|" + "---|" * len(names),
            *(f"| {title} | " + " | ".join(f"{result[key][n]:.1%}" for n in names) + " |" for key, title in titles.items()),
            "",
            "不是蝴蝶的图像被认作蝴蝶的比例：" + "，".join(
                f"{title} {result['wrongly_recognized'][key]:.1%}" for key, title in (
                    ("noise", "噪声"), ("averages", "八只的平均"), ("blurred", "模糊的影子"),
                    ("shuffled", "打乱的碎片"), ("other_shapes", "别的形状"))
            ) + "。",
        ]
    if "wing_colors" in result:
        lines += [
            f"- {result['n_samples']} 张（{result['n_steps']} 步）里，裁判有九成以上把握是蝴蝶的占 "
            f"{result['recognized']:.1%}（要求不低于 95%）",
            "- 各种翅膀颜色的张数：" + "，".join(f"{WING_COLORS[c][0]} {n}" for c, n in result["wing_colors"].items()),
            f"- 其中训练时没有见过的颜色 × 花纹组合 {result['held_out_pairs']} 张",
            f"- 到最近的训练图像的距离（中位数）：生成的图 {result['nearest_training_image']:.2f}，"
            f"新画的图 {result['nearest_training_image_of_new_renders']:.2f}",
            "",
            f"步数少时认得出的比例，每格 {result['n_few']} 张：",
            "",
            "| 方法 | " + " | ".join(f"{n} 步" for n in result["few_steps"]["DDPM"]) + " |",
            "|---|" + "---|" * len(result["few_steps"]["DDPM"]),
            *(
                f"| {method} | " + " | ".join(f"{rate:.1%}" for rate in row.values()) + " |"
                for method, row in result["few_steps"].items()
            ),
        ]
    if "epoch_losses" in result:
        lines += ["| 轮 | 本书的平均损失 | 文档的平均损失 | 相差 |", "|---|---|---|---|"]
        rows = zip(result["epoch_losses"], result["document_losses"], result["relative_difference"], strict=True)
        lines += [f"| {i} | {a:.6f} | {b:.6f} | {d:+.1%} |" for i, (a, b, d) in enumerate(rows, start=1)]
        lines += [
            "",
            f"允许相差 {result['tolerance']:.0%}。测试集损失 {result['test_loss']:.6f}。",
            f"40 步采样 {result['n_samples']} 张：{result['recognized']:.1%} 认得出，"
            f"与测试图像的 Fréchet 距离 {result['distance']:.1f}。",
        ]
    if "class_guidance" in result:
        lines += [
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
    if "samplers" in result:
        steps = list(next(iter(result["samplers"].values())))
        lines += [
            f"每格 {result['n_samples']} 张：认得出的比例 / 与测试图像的 Fréchet 距离。"
            f"真图：{result['real_recognized']:.1%} / {result['real_distance']:.2f}（两批测试图像之间）。",
            "",
            "| 方法 | " + " | ".join(f"{n} 步" for n in steps) + " |",
            "|---|" + "---|" * len(steps),
        ]
        for method, row in result["samplers"].items():
            cells = (f"{cell['recognized']:.1%} / {cell['distance']:.1f}" for cell in row.values())
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def write_card(name: str, result: dict) -> None:
    """写模型卡 README.md。"""
    folder = MODELS_ROOT / name
    training = json.loads((folder / "training.json").read_text())
    stages = [
        f"{title}：{stage['steps']:,} 步，{stage['seconds'] / 60:.0f} 分钟"
        for title, stage in (("自编码器", training.get("autoencoder")), ("训练", training)) if stage
    ]
    card = [
        f"# {name}",
        "",
        PURPOSES[name][0] + "。",
        "",
        f"- 数据：{PURPOSES[name][1]}",
        f"- 配方：`{training['command']}`",
        f"- {'；'.join(stages)}，{training['machine']}",
        "- 存盘精度：半精度，safetensors；装入后转成单精度",
        "- 许可：与本书相同" + ("；训练数据的许可见 `data/MNIST/README.md`" if name.startswith("mnist") else ""),
        "",
        "## 测量",
        "",
        f"`python recipes/evaluate.py {name}`（{result['machine']}）：",
        "",
        *quality_lines(result),
        "",
        "## 校验和（SHA-256）",
        "",
        "```",
        (folder / CHECKSUMS).read_text().rstrip(),
        "```",
        "",
    ]
    (folder / "README.md").write_text("\n".join(card))


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("names", nargs="*", choices=[[], *EVALUATIONS], metavar="名字")
    embedded = [name for name in EVALUATIONS if (MODELS_ROOT / name).is_dir()]
    for name in options.parse_args().names or embedded:
        started = time.perf_counter()
        result = EVALUATIONS[name](name) | {"machine": machine(str(DEVICE))}
        (MODELS_ROOT / name / "evaluation.json").write_text(json.dumps(result, ensure_ascii=False, indent=1))
        write_card(name, result)
        print(f"{name}（{time.perf_counter() - started:.0f} 秒）", *quality_lines(result), "", sep="\n")


if __name__ == "__main__":
    main()
