"""第 8.2.1 节的声音世界：由属性合成一段一秒的声音，种类、音高、快慢都是已知的。

各种声音都用几行算式合成：拨弦是 Karplus–Strong 算法，钟声是几个不成整数比的正弦，琶音是方波，鸟鸣是滑动的正弦，
鼓点是下滑的正弦与噪声，蛙鸣是一串脉冲。真相已知，所以生成的声音可以测量。
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..audio import SAMPLE_RATE, mel_picture, wav_bytes
from .common import check_names

if TYPE_CHECKING:
    import datasets

N_SAMPLES = 16_384              # 一段的长度：1.024 秒，正好是 64 帧
# 各属性的取值：英文名 →（中文，合成用的数）
KINDS = {"pluck": "拨弦", "bell": "钟声", "arpeggio": "琶音", "bird": "鸟鸣", "drum": "鼓点", "frog": "蛙鸣"}
# 五声音阶的八个音，数是 MIDI 音符编号：69 是 440 Hz，每加 12 频率加倍
PITCHES = {"C4": 60, "D4": 62, "E4": 64, "G4": 67, "A4": 69, "C5": 72, "D5": 74, "E5": 76}
# 一段里敲、拨、叫几下；都能整除，首尾相接时节拍不乱
TEMPOS = {"slow": ("慢", 2), "medium": ("中速", 4), "fast": ("快", 8)}
# 这一种从不用于训练 audio-ddpm，留给第 8.2.4 节的微调
NEW_KIND = "frog"
BASE_KINDS = tuple(kind for kind in KINDS if kind != NEW_KIND)

CHOICES = {"kind": KINDS, "pitch": PITCHES, "tempo": TEMPOS}
_BELL = np.array([0.5, 1.0, 1.19, 1.5, 2.0, 2.52, 3.01, 4.17])          # 钟的各个分音与基音之比，不成整数比
_CHORDS = {"major": (0, 4, 7, 12), "minor": (0, 3, 7, 12)}              # 大三、小三和弦，半音


@dataclass(frozen=True)
class Sound:
    """一段声音的属性。

    属性：
        kind:  种类，KINDS 的键之一。
        pitch: 音高，PITCHES 的键之一；鸟鸣与鼓点各自移到合适的音区，次序不变。
        tempo: 快慢，TEMPOS 的键之一。
    异常：
        ValueError: 取值不在允许的范围里。
    来源：第 8.2.1 节。
    """

    kind: str = "pluck"
    pitch: str = "A4"
    tempo: str = "medium"

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} 应是 {'、'.join(allowed)} 之一，收到的是 {value!r}。")


def frequency(pitch: str) -> float:
    """音名（PITCHES 的键）→ 频率，赫兹；十二平均律，A4 = 440 Hz。

    异常：
        ValueError: 没有这个音名。
    来源：第 8.2.1 节。
    """
    if pitch not in PITCHES:
        raise ValueError(f"pitch 应是 {'、'.join(PITCHES)} 之一，收到的是 {pitch!r}。")
    return 440.0 * 2 ** ((PITCHES[pitch] - 69) / 12)


def random_sound(rng: np.random.Generator, kinds: tuple[str, ...] = BASE_KINDS, **fixed) -> Sound:
    """随机抽一段声音的属性：种类在 kinds 里均匀，音高与快慢各自均匀，互相独立。

    参数：
        rng:   NumPy 随机数生成器。
        kinds: 从哪几种里抽；默认不含留给微调的那一种。
        fixed: 固定不变的属性，如 ``kind="frog"``，名字与取值见 :class:`Sound`。
    异常：
        ValueError: 属性的名字或取值不对，或 kinds 是空的。
    来源：第 8.2.1 节。
    """
    check_names(Sound, "声音", fixed)
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ValueError(f"kinds 里应是 {'、'.join(KINDS)} 中的一种或几种，收到的是 {tuple(kinds)}。")
    chosen = {
        name: choices[rng.integers(len(choices))]
        for name, choices in (("kind", tuple(kinds)), ("pitch", tuple(PITCHES)), ("tempo", tuple(TEMPOS)))
    }
    return Sound(**chosen | fixed)


def random_sounds(n_sounds: int, seed: int = 0, kinds: tuple[str, ...] = BASE_KINDS, **fixed) -> list[Sound]:
    """随机抽 n_sounds 段声音的属性；同一个 seed 总是同样的，见 :func:`random_sound`。

    异常：
        ValueError: n_sounds 不是正整数，或 seed 是负数。
    来源：第 8.2.1 节。
    """
    if n_sounds < 1 or seed < 0:
        raise ValueError(f"n_sounds 应是正整数，seed 应是非负整数，收到的是 {n_sounds} 和 {seed}。")
    rng = np.random.default_rng(seed)
    return [random_sound(rng, kinds, **fixed) for _ in range(n_sounds)]


def render_sound(sound: Sound, seed: int = 0) -> np.ndarray:
    """按属性合成一段声音；音准、音色、余音长短与响度有少许随 seed 而定的变化。

    参数：
        sound: 属性。
        seed:  非负整数；属性与种子都相同，合成的声音就相同。
    返回：
        波形，float32，形状 (16384,)，取值 −1 到 1，采样率 16,000 Hz。
    异常：
        ValueError: seed 是负数。
    来源：第 8.2.1 节。
    """
    if seed < 0:
        raise ValueError(f"seed 应是非负整数，收到的是 {seed}。")
    rng = np.random.default_rng(seed)
    base = frequency(sound.pitch) * 2 ** (rng.uniform(-0.15, 0.15) / 12)        # 音准差在 15 音分之内
    count = TEMPOS[sound.tempo][1]
    gap = N_SAMPLES // count
    play = _INSTRUMENTS[sound.kind](rng, base)
    wave = np.zeros(N_SAMPLES)
    for index in range(count):
        note = play(index, gap)[: N_SAMPLES - index * gap]
        wave[index * gap : index * gap + len(note)] += note * rng.uniform(0.85, 1.0)
    wave[-160:] *= np.linspace(1, 0, 160)                       # 末尾 10 毫秒淡出，接起来没有咔嗒声
    return (wave / np.abs(wave).max() * rng.uniform(0.5, 0.9)).astype(np.float32)


def _seconds(count: int) -> np.ndarray:
    return np.arange(count) / SAMPLE_RATE


def _pluck(rng, base):
    """拨弦（Karplus–Strong）：一小段噪声反复走过“延时一个周期、与旁边的样本平均”。"""
    period = SAMPLE_RATE / base
    delay = int(period)
    share = np.clip(period - delay, 0.25, 0.75)                 # 平均的两份各占多少，由它微调音高
    loss = rng.uniform(0.990, 0.998)

    def play(_index, gap):
        buffer, carry = rng.uniform(-1, 1, delay), 0.0
        parts = []
        for _ in range(min(2 * gap + 2048, N_SAMPLES) // delay):
            parts.append(buffer)
            shifted = np.concatenate([[carry], buffer[:-1]])    # 前一个样本；第一个取自上一个周期的末尾
            carry = buffer[-1]
            buffer = loss * ((1 - share) * buffer + share * shifted)
        note = np.concatenate(parts)
        note[-256:] *= np.linspace(1, 0, 256)
        return note

    return play


def _bell(rng, base):
    """钟声：各分音同时起，高的先停。"""
    ratios = _BELL * (1 + rng.uniform(-0.004, 0.004, len(_BELL)))
    loudness = rng.uniform(0.5, 1.0, len(_BELL)) / np.arange(1, len(_BELL) + 1) ** 0.5
    decay = rng.uniform(0.35, 0.6) / ratios**0.6                # 秒
    phases = rng.uniform(0, 2 * np.pi, len(_BELL))

    def play(_index, _gap):
        t = _seconds(N_SAMPLES)
        partials = np.sin(2 * np.pi * base * ratios[:, None] * t + phases[:, None]) * np.exp(-t / decay[:, None])
        return (1 - np.exp(-t / 0.002)) * (loudness @ partials)

    return play


def _arpeggio(rng, base):
    """老式游戏机的琶音：脉冲波依次走过和弦的四个音；只合成 7 kHz 以下的谐波，所以没有混叠。"""
    chord = _CHORDS[("major", "minor")[rng.integers(2)]]
    duty = (0.125, 0.25, 0.5)[rng.integers(3)]                  # 一个周期里高电平占多少

    def play(index, gap):
        t = _seconds(gap)
        tone = base * 2 ** (chord[index % 4] / 12)
        k = np.arange(1, int(7000 / tone) + 1)
        note = (np.sin(np.pi * k * duty) / k) @ np.cos(2 * np.pi * tone * k[:, None] * t)
        return note * np.minimum(t / 0.003, 1) * np.minimum((t[-1] - t) / 0.008, 1) * np.exp(-t / 0.4)

    return play


def _bird(rng, base):
    """鸟鸣：频率在短短一声里滑上去或滑下来。"""
    center = 6 * base
    sweep = rng.uniform(0.12, 0.25) * (1, -1)[rng.integers(2)]
    wobble = rng.uniform(0.0, 0.05)                             # 颤音的深浅

    def play(_index, gap):
        t = _seconds(min(int(0.7 * gap), 4096))
        across = t / t[-1] * 2 - 1                              # −1 到 1
        pitch = center * (1 + sweep * across + wobble * np.sin(2 * np.pi * 30 * t))
        phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
        return np.cos(np.pi / 2 * across) ** 2 * np.sin(phase)

    return play


def _drum(rng, base):
    """鼓点：一下低音鼓（迅速下滑的正弦），一下踩镲（只剩高频的噪声），交替。"""
    decay = rng.uniform(0.06, 0.12)
    hiss = rng.uniform(0.02, 0.04)

    def play(index, gap):
        t = _seconds(gap)
        if index % 2 == 0:
            pitch = base / 2 * (1 + 1.5 * np.exp(-t / 0.02))
            note = np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE) * np.exp(-t / decay)
        else:
            noise = rng.normal(0, 1, gap)
            note = 0.12 * np.diff(np.diff(noise, prepend=0), prepend=0) * np.exp(-t / hiss)
        return note * np.minimum((t[-1] - t) / 0.004, 1)

    return play


def _frog(rng, base):
    """蛙鸣：一串脉冲，每个脉冲激起一小段很快停下的振动。"""
    rate = rng.uniform(45, 65)                                  # 每秒多少个脉冲
    ring = rng.uniform(0.003, 0.006)

    def play(_index, gap):
        t = _seconds(min(int(0.75 * gap), 6144))
        since = (t * rate) % 1 / rate                           # 距上一个脉冲多少秒
        body = np.sin(2 * np.pi * 2 * base * since) + 0.5 * np.sin(2 * np.pi * 5 * base * since)
        return np.sin(np.pi * t / t[-1]) ** 0.7 * body * np.exp(-since / ring)

    return play


_INSTRUMENTS = {"pluck": _pluck, "bell": _bell, "arpeggio": _arpeggio, "bird": _bird, "drum": _drum, "frog": _frog}

CAPTIONS = {"zh": "{tempo}的{kind}，{pitch}", "en": "{tempo} {kind}, {pitch}"}


def sound_caption(sound: Sound, language: str = "zh") -> str:
    """声音的说明文字，三个属性都说，如“快的拨弦，A4”；播放器的名字也用它。

    异常：
        ValueError: language 不是 zh 或 en。
    来源：第 8.2.1 节。
    """
    if language not in CAPTIONS:
        raise ValueError(f"language 应是 zh 或 en，收到的是 {language!r}。")
    words = asdict(sound)
    if language == "zh":
        words |= {"kind": KINDS[sound.kind], "tempo": TEMPOS[sound.tempo][0]}
    return CAPTIONS[language].format(**words)


def sound_waves(
    n_sounds: int, seed: int = 0, kinds: tuple[str, ...] = BASE_KINDS, **fixed
) -> tuple[np.ndarray, list[Sound]]:
    """一次合成许多段声音，供训练与测量用。不同的 seed，各段的种子不重复。

    返回：
        waves:  float32，形状 (n_sounds, 16384)，取值 −1 到 1；
        sounds: 各段的属性。与同样参数的 :func:`sound_dataset` 逐段相同（后者存成了 16 位整数）。
    来源：第 8.2.1 节。
    """
    sounds = random_sounds(n_sounds, seed, kinds, **fixed)
    waves = np.empty((n_sounds, N_SAMPLES), dtype=np.float32)
    for index, sound in enumerate(sounds):
        waves[index] = render_sound(sound, seed * 10_000_000 + index)
    return waves, sounds


def to_bytes(pictures: np.ndarray) -> torch.Tensor:
    """梅尔图 (N, 64, 帧)，取值 −1 到 1 → uint8，形状 (N, 1, 64, 帧)；一级是 0.31 分贝。

    来源：第 8.2.4 节。
    """
    return torch.from_numpy(((pictures + 1) * 127.5).round().clip(0, 255).astype(np.uint8))[:, None]


def sound_pictures(
    n_sounds: int, seed: int = 0, kinds: tuple[str, ...] = BASE_KINDS, **fixed
) -> tuple[torch.Tensor, list[Sound]]:
    """一次得到许多段声音的梅尔图，供训练用；波形合成一段丢一段，不占内存。

    返回：
        pictures: uint8，形状 (n_sounds, 1, 64, 64)，0 到 255 对应 −80 到 0 分贝；
        sounds:   各段的属性。与同样参数的 :func:`sound_waves` 逐段相同。
    来源：第 8.2.4 节。
    """
    sounds = random_sounds(n_sounds, seed, kinds, **fixed)
    pictures = np.stack([
        mel_picture(render_sound(sound, seed * 10_000_000 + index)) for index, sound in enumerate(sounds)
    ])
    return to_bytes(pictures), sounds


def sound_dataset(
    n_sounds: int = 200, seed: int = 0, kinds: tuple[str, ...] = BASE_KINDS, **fixed
) -> "datasets.Dataset":
    """声音世界的数据集，用法与 ``datasets.load_dataset`` 得到的相同。

    参数：
        n_sounds: 段数，正整数。
        seed:     非负整数；不同的 seed 是互不重复的数据集。
        kinds:    从哪几种里抽；默认不含留给微调的那一种。
        fixed:    固定不变的属性，如 ``kind="frog"``。
    返回：
        ``datasets.Dataset``，列为 audio（WAV 文件的内容，不自动解码）、caption_zh、caption_en、
        attributes（字典）。把 ``row["audio"]["bytes"]`` 交给 :func:`book_utils.read_sound` 得到波形。
    异常：
        ValueError: 参数超出范围。
    来源：第 8.2.1 节。
    """
    import datasets  # 导入它要两秒，只在这里用到

    waves, sounds = sound_waves(n_sounds, seed, kinds, **fixed)
    return datasets.Dataset.from_dict(
        {
            "audio": [
                {"bytes": wav_bytes(wave), "path": f"{index:05d}.wav"} for index, wave in enumerate(waves)
            ],
            "caption_zh": [sound_caption(sound, "zh") for sound in sounds],
            "caption_en": [sound_caption(sound, "en") for sound in sounds],
            "attributes": [asdict(sound) for sound in sounds],
        }
    ).cast_column("audio", datasets.Audio(sampling_rate=SAMPLE_RATE, decode=False))
