"""配方：butterfly-clip，认得中文与英文的小 CLIP：图像塔、文字塔和从说明学来的词表（第五、六章）。

对比学习：一批图像与说明，配对的要比不配对的更相似。单靠它，模型分得清别的属性，位置却完全学不会
（头一个就找对的只有 88%–91%，错的几乎全错在位置）：图像塔一开始的输出里没有位置，文字塔就不知道
“左边”“右边”要分开；文字塔不分，图像塔也得不到要分的消息。所以还做两件事：
训练图两两成对，一对里只差一个属性；图像塔另接一个线性层，同时学着说出五个属性，训练完就丢掉。

用法：python recipes/butterfly_clip.py
"""

import dataclasses
import math
import re
from collections import Counter

import numpy as np
import torch
from common import load_as_float32, parser, save_model
from loss_guidance import loss_guidance_lines, measure_loss_guidance
from measuring import DEVICE, SEED, distinct_butterflies, onnx_difference, onnx_line
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from book_utils import (
    Butterfly,
    attribute_labels,
    caption,
    fit,
    random_attributes,
    random_butterflies,
    random_caption,
    render_butterfly,
    resolve,
    set_seed,
)
from book_utils.metrics import has_label
from book_utils.worlds.butterflies import ATTRIBUTES, CHOICES, HELD_OUT

NAME = "butterfly-clip"
PURPOSE = "认得中文与英文的小 CLIP：图像塔、文字塔与词表（第五、六章）"
DATA = "蝴蝶世界 64×64：10,000 对（seed=21），一对里只差一个属性，每只八句说明，不含留作检验的颜色 × 花纹组合"

N_PAIRS = 10_000
IMAGE_SIZE = 64
N_CAPTIONS = 8              # 每张图预先写好几句说明，一半中文，一半英文
CONTEXT_LENGTH = 48         # 一句说明至多几个词元；训练用的最长 40 个，读者写的可以再长一些
WIDTH = 128
N_EPOCHS, BATCH_SIZE = 16, 64     # 一批 64 对，128 张
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def make_pairs(n_pairs: int, seed: int) -> list[Butterfly]:
    """2 × n_pairs 只蝴蝶，第 2i 与第 2i + 1 只恰好差一个说明里会提到的属性：一半差在位置，一半差在别处。

    没有留作检验的组合。
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for butterfly in random_butterflies(n_pairs, seed):
        name = "position" if rng.random() < 0.5 else ATTRIBUTES[rng.integers(len(ATTRIBUTES) - 1)]
        others = [dataclasses.replace(butterfly, **{name: value}) for value in CHOICES[name]]
        others = [b for b in others if b != butterfly and (b.wing_color, b.pattern) not in HELD_OUT]
        pairs += [butterfly, others[rng.integers(len(others))]]
    return pairs


def draw(butterflies: list[Butterfly], seed: int) -> torch.Tensor:
    """画出各只蝴蝶，uint8，形状 (N, 3, 64, 64)。"""
    pictures = [render_butterfly(b, IMAGE_SIZE, seed * 1_000_000 + i).image for i, b in enumerate(butterflies)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def write_captions(
    butterflies: list[Butterfly], n_captions: int = N_CAPTIONS, seed: int = 0
) -> tuple[list[str], torch.Tensor]:
    """给每只蝴蝶写 n_captions 句说明，前一半中文，后一半英文。

    返回：
        texts: 长度 N × n_captions，同一只蝴蝶的排在一起；
        told:  bool，形状 (N, n_captions, 5)，各句说出了 ATTRIBUTES 中的哪些属性。
    """
    rng = np.random.default_rng(seed)
    texts, told = [], []
    for butterfly in butterflies:
        for i in range(n_captions):
            language = "zh" if i < n_captions / 2 else "en"
            if rng.random() < 0.2:              # 也用书里写法固定的说明：前三种写法五个属性都说
                attributes = ATTRIBUTES
                texts.append(caption(butterfly, language, int(rng.integers(3))))
            else:
                attributes = random_attributes(rng)
                texts.append(random_caption(butterfly, rng, language, attributes))
            told.append([name in attributes for name in ATTRIBUTES])
    return texts, torch.tensor(told).view(len(butterflies), n_captions, len(ATTRIBUTES))


def learn_merges(words: Counter) -> list[tuple[str, str]]:
    """字节对编码（BPE）：反复把最常相邻的两个符号并成一个，直到每个词都是一个词元。

    参数：
        words: 词 → 出现次数；词由字节的代号组成，词尾的符号另带 ``</w>``。
    返回：
        依次合并的符号对。同样的 words 总得到同样的次序（次数相同时取字典序最后的），续训时词表才不会变；
        tokenizers 库的 BpeTrainer 没有这个保证。
    """
    splits = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while True:
        pairs = Counter()
        for word, parts in splits.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for parts in splits.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1


def learn_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """由说明学出词表：英文用字节对编码，学到整词；每个汉字是一个词元。

    汉字之间没有空格，BPE 会学出“色的”这样跨词的词元，同一个词于是有几种切法；一字一词元就没有这回事。
    词表以 256 个字节打底（词尾的另算），没有见过的字也切得开，不会变成未知词。
    """
    blank = CLIPTokenizer().backend_tokenizer           # 只借它的大小写、空白与断词规则
    english = " ".join(re.sub(r"[^\x00-\x7f]+", " ", text) for text in texts)
    pieces = blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(english))
    merges = learn_merges(Counter(piece for piece, _ in pieces))

    symbols = bytes_to_unicode()                        # 字节 → 代号，一个可见的字符
    for character in sorted(set("".join(texts))):
        if not character.isascii():                     # UTF-8 里一个汉字三个字节：合并两次
            first, second, third = (symbols[byte] for byte in character.encode())
            merges += [(first, second), (first + second, third), (first + second, third + "</w>")]
    merges = list(dict.fromkeys(merges))                # 有些汉字的头两个字节相同

    tokens = [*symbols.values(), *(symbol + "</w>" for symbol in symbols.values()), *map("".join, merges)]
    tokens = [*dict.fromkeys(tokens), BOS, EOS]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=CONTEXT_LENGTH
    )


def encode(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """说明 → 词元编号，int64，形状 (len(texts), CONTEXT_LENGTH)；短的补齐，长的截断。"""
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """文字塔 3 层、图像塔 4 层，都是 128 宽；图像切成 8 × 8 个小块，每块 8 × 8 像素。"""
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "hidden_act": "gelu"}
    special = {
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPModel(CLIPConfig(
        text_config=tower | special | {
            "num_hidden_layers": 3, "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length, "projection_dim": WIDTH,
        },
        vision_config=tower | {
            "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": 8, "projection_dim": WIDTH,
        },
        projection_dim=WIDTH,
    ))


class ClipWithHeads(nn.Module):
    """小 CLIP，图像塔上另接一个线性层，由 128 维的特征说出 ATTRIBUTES 中的五个属性。"""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip
        self.heads = nn.Linear(WIDTH, sum(len(CHOICES[name]) for name in ATTRIBUTES))

    def attribute_loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """features：(B, 128)；labels：(B, 5)。五个属性的交叉熵之和。"""
        scores = self.heads(features).split([len(CHOICES[name]) for name in ATTRIBUTES], dim=1)
        return sum(F.cross_entropy(s, label) for s, label in zip(scores, labels.T, strict=True))


def fits(labels: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """第 j 句说明说出的属性，第 i 只蝴蝶是不是都有：bool，形状 (B, B)，行是图像。

    参数：
        labels: 各只蝴蝶的属性编号，(B, 5)；第 j 句写的是第 j 只。
        told:   各句说出了哪些属性，bool (B, 5)。
    """
    same = labels[:, None] == labels[None, :]
    return (same | ~told[None, :]).all(dim=2)


def batch_loss(model, images, labels, tokens, told, generator):
    """一批成对的图像与说明的对比损失，加上图像塔认属性的交叉熵；model 是 :class:`ClipWithHeads`。

    images：uint8 (P, 2, 3, 64, 64)，P 对；labels：(P, 2, 5)；tokens：(P, 2, K, L)；told：(P, 2, K, 5)。
    """
    images, labels, tokens, told = (tensor.flatten(0, 1) for tensor in (images, labels, tokens, told))
    rows = torch.arange(len(images), device=images.device)
    picks = torch.randint(tokens.shape[1], (len(images),), generator=generator).to(images.device)
    tokens, told = tokens[rows, picks].long(), told[rows, picks]
    x = images / 127.5 - 1
    # 一半大的蝴蝶缩到 32 × 32 再放大：第四、五章的模型生成的就是这么大的图
    large = has_label(labels, "size", "large") & (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
    small = F.interpolate(F.interpolate(x, size=(32, 32), mode="area"), size=x.shape[-2:], mode="bilinear")
    x = torch.where(large[:, None, None, None], small, x)

    outputs = model.clip(input_ids=tokens, pixel_values=x)
    scale = model.clip.logit_scale.clamp(max=math.log(100)).exp()        # CLIP 论文的上限
    logits = scale * outputs.image_embeds @ outputs.text_embeds.T
    # 同一批里别的说明可能也说中了这张图（属性相同，或只说了一部分）：它们不是负例，不参加比较
    also = fits(labels, told) & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    logits = logits.masked_fill(also, -math.inf)
    contrastive = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
    return contrastive + model.attribute_loss(outputs.vision_model_output.pooler_output, labels)


def main(arguments: list[str] | None = None):
    options = parser(__doc__.splitlines()[0], NAME).parse_args(arguments)
    set_seed(0)
    butterflies = make_pairs(N_PAIRS, seed=21)
    texts, told = write_captions(butterflies, seed=21)
    tokenizer = learn_tokenizer(texts)
    tokens = encode(tokenizer, texts).to(torch.int16)
    model = ClipWithHeads(build_model(tokenizer))
    history = fit(
        model,
        (
            draw(butterflies, seed=21).unflatten(0, (N_PAIRS, 2)),
            attribute_labels(butterflies).unflatten(0, (N_PAIRS, 2)),
            tokens.view(N_PAIRS, 2, N_CAPTIONS, -1),
            told.unflatten(0, (N_PAIRS, 2)),
        ),
        batch_loss,
        n_epochs=N_EPOCHS, batch_size=BATCH_SIZE, lr=1e-3, lr_decay=True,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        processor = CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=[0.5] * 3, image_std=[0.5] * 3,
        )

        def save_weights(folder):
            for part in (model.clip.cpu().half(), tokenizer, processor):
                part.save_pretrained(folder)
            load_as_float32(folder / "config.json")

        save_model(options.output, save_weights, history, options.device, "python recipes/butterfly_clip.py")


# —— 测量 ——

def clip_onnx_differences(model: CLIPModel, tokens: torch.Tensor, pixels: torch.Tensor) -> dict[str, float]:
    """小 CLIP 两座塔的特征；tokens (B, L) 与 pixels (B, 3, 64, 64) 是新的说明与图像。"""
    return {
        "text_features": onnx_difference(model, lambda m, ids: m.get_text_features(ids).pooler_output, (tokens,)),
        "image_features": onnx_difference(model, lambda m, x: m.get_image_features(x).pooler_output, (pixels,)),
    }


@torch.no_grad()
def measure_retrieval(model, tokenizer, processor, n_sets: int = 5, set_size: int = 100) -> dict:
    """在 set_size 句说明里找图像的那一句，在 set_size 张图像里找说明的那一张：找对的比例，n_sets 组的平均。"""
    def compare(butterflies, language, seed):
        rng = np.random.default_rng(seed)
        texts = [random_caption(b, rng, language) for b in butterflies]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        pictures = [Image.fromarray(render_butterfly(b, 64, seed * 1000 + i).image) for i, b in enumerate(butterflies)]
        pixels = processor(pictures, return_tensors="pt").pixel_values
        logits = model(**tokens.to(model.device), pixel_values=pixels.to(model.device)).logits_per_image.cpu()
        right = torch.arange(len(logits))
        return [(scores.argmax(dim=1) == right).float().mean().item() for scores in (logits, logits.T)]

    retrieval = {}
    for language in ("zh", "en"):
        for key, held_out in ((language, False), (language + "_held_out", True)):
            seeds = range(SEED, SEED + n_sets)
            scores = [compare(distinct_butterflies(set_size, seed, held_out), language, seed) for seed in seeds]
            retrieval[key] = dict(zip(("image_to_text", "text_to_image"), np.mean(scores, axis=0).tolist(), strict=True))
    return retrieval


def measure(name: str = NAME, n_sets: int = 5, set_size: int = 100) -> dict:
    folder = resolve(name)
    model = CLIPModel.from_pretrained(folder).to(DEVICE).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(folder)
    tokens = tokenizer(["一只红色的蝴蝶，靠左", "a small blue butterfly"], padding="max_length", return_tensors="pt")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(SEED)) * 2 - 1
    return {
        "set_size": set_size,
        "n_sets": n_sets,
        "retrieval": measure_retrieval(model, tokenizer, processor, n_sets, set_size),
        "guidance": measure_loss_guidance(model, tokenizer),
        "onnx_difference": clip_onnx_differences(model, tokens.input_ids, pixels),
    }


def card_lines(result: dict) -> list[str]:
    """测量结果，写进模型卡。"""
    titles = {"zh": "中文", "en": "英文", "zh_held_out": "中文，留作检验的组合", "en_held_out": "英文，留作检验的组合"}
    return [
        f"在 {result['set_size']} 句各不相同的说明（或 {result['set_size']} 张新画的图）里，头一个就找对的比例，"
        f"{result['n_sets']} 组平均（要求不低于 90%；留作检验的组合另计）：",
        "",
        "| | 由图找文 | 由文找图 |",
        "|---|---|---|",
        *(
            f"| {title} | {scores['image_to_text']:.1%} | {scores['text_to_image']:.1%} |"
            for title, scores in ((title, result["retrieval"][key]) for key, title in titles.items())
        ),
        "",
        *loss_guidance_lines(result["guidance"]),
        "",
        onnx_line(result),
    ]


if __name__ == "__main__":
    main()
