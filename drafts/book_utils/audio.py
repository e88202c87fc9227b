"""第八章的声音工具：短时傅里叶变换、梅尔图、Griffin–Lim、读写声音文件、播放器与会发声的滑块。

声音是 NumPy 数组：波形 float32，取值 −1 到 1，采样率 16,000 Hz，形状 (…, 样本数)；
梅尔图 float32，取值 −1 到 1，形状 (…, 梅尔带, 帧)，第 0 行是最低的频率。
"""

import base64
import html
import io
import json
import math
import warnings
import wave as wave_files
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from .slider import MAX_BYTES, Slider, _control, _encode, _label

SAMPLE_RATE = 16_000
N_FFT = 1024                # 一帧 64 毫秒，频率分辨到 15.6 Hz
HOP = 256                   # 相邻两帧错开 16 毫秒
N_MELS = 64
FLOOR_DB = -80.0            # 比满幅的正弦低 80 分贝以下，都画成一样的黑


def _require_wave(wave: np.ndarray, name: str = "wave ") -> None:
    if wave.ndim < 1 or wave.shape[-1] == 0 or wave.dtype.kind not in "fiu":
        raise ValueError(f"{name}应是非空的数组，最后一维是样本，收到的是 {wave.dtype} {wave.shape}。")
    if not np.isfinite(wave).all():
        raise ValueError(f"{name}里有 NaN 或无穷，不是声音：多半是生成它的网络或采样出了错。")


# —— 波形 ↔ 频谱 ——

@cache
def hann(n_fft: int) -> np.ndarray:
    """汉宁窗：中间是 1，两头是 0，形状 (n_fft,)。

    来源：第 8.1.2 节。
    """
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)


def stft(wave: np.ndarray, n_fft: int = N_FFT, hop: int = HOP) -> np.ndarray:
    """短时傅里叶变换：每隔 hop 个样本取一帧、乘汉宁窗、做傅里叶变换；帧的中心落在 0、hop、2·hop……

    参数：
        wave:  波形，形状 (…, n)。
        n_fft: 一帧的样本数，正偶数。
        hop:   相邻两帧错开的样本数，不超过 n_fft 的一半。
    返回：
        复数，形状 (…, n_fft // 2 + 1, ⌈n / hop⌉)。
    异常：
        ValueError: 波形是空的或不都是有限的数，或 n_fft、hop 不合。
    来源：第 8.1.2 节。
    """
    if n_fft < 2 or n_fft % 2 or not 1 <= hop <= n_fft // 2:
        raise ValueError(f"n_fft 应是正偶数，hop 应在 1 到 n_fft 的一半之间，收到的是 {n_fft} 和 {hop}。")
    if wave.shape[-1] == 0 or not np.isfinite(wave).all():
        raise ValueError(f"wave 应是非空的、有限的数，收到的形状是 {wave.shape}，或者里面有 NaN、无穷。")
    n_frames = math.ceil(wave.shape[-1] / hop)
    right = (n_frames - 1) * hop + n_fft // 2 - wave.shape[-1]
    padded = np.pad(wave, [(0, 0)] * (wave.ndim - 1) + [(n_fft // 2, max(right, 0))])
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft, axis=-1)[..., ::hop, :][..., :n_frames, :]
    return np.fft.rfft(frames * hann(n_fft), axis=-1).swapaxes(-1, -2)


def istft(spectrum: np.ndarray, n_samples: int, hop: int = HOP) -> np.ndarray:
    """:func:`stft` 的逆：各帧变回波形，再乘一次窗，叠加，除以窗的平方之和。

    spectrum 不是任何波形的短时傅里叶变换时（只改了幅度的，一般都不是），得到的是最小二乘意义下最接近的波形。

    参数：
        spectrum:  复数，形状 (…, n_fft // 2 + 1, 帧数)。
        n_samples: 要多长的波形。
        hop:       与 stft 的相同。
    返回：
        波形，形状 (…, n_samples)。
    来源：第 8.1.4 节。
    """
    n_fft, n_frames = 2 * (spectrum.shape[-2] - 1), spectrum.shape[-1]
    window = hann(n_fft)
    frames = np.fft.irfft(spectrum.swapaxes(-1, -2), n=n_fft, axis=-1) * window
    length = max((n_frames - 1) * hop + n_fft, n_fft // 2 + n_samples)
    wave, weight = np.zeros((*spectrum.shape[:-2], length)), np.zeros(length)
    for index in range(n_frames):
        place = slice(index * hop, index * hop + n_fft)
        wave[..., place] += frames[..., index, :]
        weight[place] += window**2
    inside = slice(n_fft // 2, n_fft // 2 + n_samples)
    return wave[..., inside] / np.maximum(weight[inside], 1e-3)


# —— 频谱 ↔ 梅尔图 ——

def hz_to_mel(frequency: np.ndarray | float) -> np.ndarray | float:
    """赫兹 → 梅尔：m = 2595 log₁₀(1 + f / 700)。

    来源：第 8.1.3 节。
    """
    return 2595 * np.log10(1 + np.asarray(frequency) / 700)


def mel_to_hz(mel: np.ndarray | float) -> np.ndarray | float:
    """梅尔 → 赫兹，:func:`hz_to_mel` 的逆。

    来源：第 8.1.3 节。
    """
    return 700 * (10 ** (np.asarray(mel) / 2595) - 1)


@cache
def mel_filters(n_mels: int = N_MELS, n_fft: int = N_FFT, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """梅尔滤波器：n_mels 个三角形，中心在梅尔刻度上等距，峰值都是 1。

    返回：
        形状 (n_mels, n_fft // 2 + 1)，只读；与 ``librosa.filters.mel(…, htk=True, norm=None)`` 相同。
    异常：
        ValueError: 带太多，最窄的三角形里一个频率也没有。
    来源：第 8.1.3 节。
    """
    corners = mel_to_hz(np.linspace(0, hz_to_mel(sample_rate / 2), n_mels + 2))
    frequencies = np.arange(n_fft // 2 + 1) * sample_rate / n_fft
    rise = (frequencies - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    fall = (corners[2:, None] - frequencies) / (corners[2:] - corners[1:-1])[:, None]
    filters = np.minimum(rise, fall).clip(0)
    if (filters.max(axis=1) == 0).any():
        raise ValueError(f"n_mels = {n_mels} 太多：有的梅尔带里一个频率也没有。请减少 n_mels，或加大 n_fft（现在是 {n_fft}）。")
    filters.setflags(write=False)
    return filters


def mel_picture(wave: np.ndarray, n_mels: int = N_MELS) -> np.ndarray:
    """波形 → 梅尔图：各帧的功率归入梅尔带，取分贝，−80 到 0 分贝换成 −1 到 1。

    0 分贝约是一个满幅的正弦（幅度 1）。更响的、更轻的都截断。

    参数：
        wave:   波形，形状 (…, n)，采样率 16,000 Hz。
        n_mels: 多少个梅尔带。
    返回：
        float32，形状 (…, n_mels, ⌈n / 256⌉)，取值 −1 到 1。
    异常：
        ValueError: 同 :func:`stft`、:func:`mel_filters`。
    来源：第 8.1.3 节。
    """
    if wave.ndim == 2 and len(wave) > 32:                       # 分批，省内存
        return np.concatenate([mel_picture(wave[i : i + 32], n_mels) for i in range(0, len(wave), 32)])
    amplitude = np.abs(stft(wave)) / (N_FFT / 4)                # 窗的和是 N_FFT / 2，正弦的能量又分在正负两个频率上
    power = mel_filters(n_mels) @ amplitude**2
    decibels = 10 * np.log10(np.maximum(power, 1e-10))
    return (decibels.clip(FLOOR_DB, 0) * (-2 / FLOOR_DB) + 1).astype(np.float32)


def picture_to_amplitude(picture: np.ndarray, n_iterations: int = 50) -> np.ndarray:
    """梅尔图 → 各频率的幅度：求非负的功率，使它归入梅尔带之后与图相符（Richardson–Lucy 的乘性更新）。

    参数：
        picture:      形状 (…, n_mels, 帧)，取值 −1 到 1；超出的先截断。
        n_iterations: 更新多少次。
    返回：
        形状 (…, 513, 帧)，非负。
    异常：
        ValueError: 形状不合，或有 NaN、无穷。
    来源：第 8.2.3 节。
    """
    if picture.ndim < 2 or not np.isfinite(picture).all():
        raise ValueError(f"picture 的形状应是 (…, 梅尔带, 帧)，里面都是有限的数，收到的形状是 {picture.shape}，或者有 NaN、无穷。")
    filters = mel_filters(picture.shape[-2])
    decibels = (picture.clip(-1, 1).astype(np.float64) - 1) * (-FLOOR_DB / 2)
    wanted = 10 ** (decibels / 10) * (decibels > FLOOR_DB)      # 图上全黑的地方当作没有声音
    share = np.maximum(filters.sum(axis=0), 1e-12)[:, None]
    power = filters.T @ wanted
    for _ in range(n_iterations):
        power *= filters.T @ (wanted / np.maximum(filters @ power, 1e-12)) / share
    return np.sqrt(power) * (N_FFT / 4)


def griffin_lim(
    amplitude: np.ndarray, n_samples: int, n_iterations: int = 32, momentum: float = 0.99, seed: int = 0
) -> np.ndarray:
    """Griffin–Lim：只知道幅度，找一段短时傅里叶变换的幅度与它相符的波形。

    参数：
        amplitude:    形状 (…, n_fft // 2 + 1, 帧)，非负。
        n_samples:    要多长的波形。
        n_iterations: 迭代多少次；0 次就是随机的相位。
        momentum:     0 是原来的算法（误差只降不升），0.99 是快速的算法。
        seed:         起点的随机相位。
    返回：
        波形，形状 (…, n_samples)。
    异常：
        ValueError: n_iterations 是负数，或 momentum 不在 0 与 1 之间。
    来源：第 8.2.3 节。
    """
    if n_iterations < 0 or not 0 <= momentum < 1:
        raise ValueError(f"n_iterations 应是非负整数，momentum 应在 0 与 1 之间，收到的是 {n_iterations} 和 {momentum}。")
    rng = np.random.default_rng(seed)
    angles = np.exp(2j * np.pi * rng.random(amplitude.shape))
    previous = np.zeros_like(angles)
    for _ in range(n_iterations):
        rebuilt = stft(istft(amplitude * angles, n_samples))    # 离它最近的、真有波形的频谱
        angles = rebuilt - momentum / (1 + momentum) * previous
        angles /= np.maximum(np.abs(angles), 1e-12)             # 只留相位，幅度换回想要的
        previous = rebuilt
    return istft(amplitude * angles, n_samples)


def picture_to_wave(picture: np.ndarray, n_iterations: int = 32, seed: int = 0) -> np.ndarray:
    """梅尔图 → 波形：先求幅度，再用 Griffin–Lim 找相位。

    参数：
        picture:      形状 (…, n_mels, 帧)，取值 −1 到 1。
        n_iterations: Griffin–Lim 迭代多少次。
    返回：
        波形，float32，形状 (…, 帧 × 256)，取值 −1 到 1。
    异常：
        ValueError: 同 :func:`picture_to_amplitude`、:func:`griffin_lim`。
    来源：第 8.2.3 节。
    """
    amplitude = picture_to_amplitude(picture)
    return griffin_lim(amplitude, picture.shape[-1] * HOP, n_iterations, seed=seed).clip(-1, 1).astype(np.float32)


# —— 时间上的处理 ——

def resample(wave: np.ndarray, old_rate: int, new_rate: int) -> np.ndarray:
    """换采样率：在频谱上截去新采样率放不下的频率，或补零；不会混叠。

    参数：
        wave: 波形，形状 (…, n)。
    返回：
        形状 (…, round(n · new_rate / old_rate))。
    异常：
        ValueError: 采样率不是正整数，或波形不合。
    来源：第 8.1.1 节。
    """
    if old_rate < 1 or new_rate < 1:
        raise ValueError(f"采样率应是正整数，收到的是 {old_rate} 和 {new_rate}。")
    if wave.shape[-1] == 0 or not np.isfinite(wave).all():
        raise ValueError(f"wave 应是非空的、有限的数，收到的形状是 {wave.shape}，或者里面有 NaN、无穷。")
    n_old = wave.shape[-1]
    n_new = max(1, round(n_old * new_rate / old_rate))
    spectrum = np.fft.rfft(wave, axis=-1)[..., : n_new // 2 + 1]
    if n_new < n_old and n_new % 2 == 0:
        spectrum[..., -1] = 0                                   # 正好一半采样率的频率，相位存不下
    return (np.fft.irfft(spectrum, n=n_new, axis=-1) * (n_new / n_old)).astype(wave.dtype)


def loop(wave: np.ndarray, n_times: int, overlap: int = 800) -> np.ndarray:
    """把一段声音首尾相接放 n_times 遍；接头处前一遍淡出、后一遍淡入，没有咔嗒声。

    参数：
        wave:    波形，形状 (n,)。
        overlap: 重叠多少个样本，0 是直接相接，不超过 n 的一半。
    返回：
        形状 (n_times · (n − overlap) + overlap,)。
    异常：
        ValueError: n_times 不是正整数，或 overlap 太长。
    来源：第 8.2.5 节。
    """
    if n_times < 1 or not 0 <= overlap <= len(wave) // 2:
        raise ValueError(f"n_times 应是正整数，overlap 应在 0 到 {len(wave) // 2} 之间，收到的是 {n_times} 和 {overlap}。")
    step = len(wave) - overlap
    fade = np.sin(np.pi / 2 * (np.arange(overlap) + 0.5) / max(overlap, 1)) ** 2      # 淡入与淡出之和总是 1
    piece = wave.astype(np.float64)
    joined = np.zeros(n_times * step + overlap)
    for index in range(n_times):
        part = piece.copy()
        if index > 0:
            part[:overlap] *= fade
        if index < n_times - 1:
            part[step:] *= fade[::-1]
        joined[index * step : index * step + len(wave)] += part
    return joined.astype(wave.dtype)


# —— 文件 ——

def wav_bytes(wave: np.ndarray, sample_rate: int = SAMPLE_RATE) -> bytes:
    """波形 → WAV 文件的内容：单声道，16 位整数；超出 −1 到 1 的截断。

    异常：
        ValueError: 波形不是一维的，是空的，或有 NaN、无穷。
    来源：第 8.2.1 节。
    """
    if wave.ndim != 1:
        raise ValueError(f"wave 应是一维的波形，收到的形状是 {wave.shape}。")
    _require_wave(wave)
    buffer = io.BytesIO()
    with wave_files.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((wave.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return buffer.getvalue()


def flac_bytes(wave: np.ndarray, sample_rate: int = SAMPLE_RATE) -> bytes:
    """波形 → FLAC 文件的内容：无损，约是 WAV 的一半大，各种浏览器都会放。

    异常：
        ValueError: 同 :func:`wav_bytes`。
    来源：第 8.2.1 节。
    """
    import soundfile  # 只有读写文件与播放器用它

    samples = np.frombuffer(wav_bytes(wave, sample_rate)[44:], dtype="<i2")
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def read_sound(source: str | Path | bytes, sample_rate: int = SAMPLE_RATE, min_seconds: float = 0.1) -> np.ndarray:
    """读一个声音文件（WAV、FLAC、OGG、MP3，任何位数）：变成单声道、规定采样率的波形。

    - 几个声道取平均；采样率不同就换算；8、16、24、32 位与浮点都读成 −1 到 1；
    - 有许多样本顶到满幅（录音时削顶了），给出警告，照样读。

    参数：
        source:      文件的路径，或文件的内容。
        sample_rate: 要的采样率，赫兹。
        min_seconds: 至少要多长，秒。
    返回：
        波形，float32，形状 (n,)。
    异常：
        ValueError: 文件不存在、不是声音、已损坏，太短，没有声音（最响处低于 −60 分贝），或有 NaN、无穷。
    来源：第 8.2.1 节。
    """
    import soundfile  # 只有读写文件与播放器用它

    name = "（内存里的声音）" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ValueError(f"没有声音文件 {name}。请检查路径。")
    try:
        samples, rate = soundfile.read(
            io.BytesIO(source) if isinstance(source, bytes) else str(source), dtype="float32", always_2d=True
        )
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} 读不出来，它可能不是声音文件，或已损坏：{error}") from error
    if len(samples) < min_seconds * rate:
        raise ValueError(f"{name} 太短：只有 {len(samples) / rate:.3f} 秒，至少要 {min_seconds:g} 秒。")
    _require_wave(samples, f"{name} ")
    clipped = (np.abs(samples) >= 0.999).mean()
    if clipped > 0.001:
        warnings.warn(f"{name} 有 {clipped:.1%} 的样本顶到了满幅，录音时多半削顶了，声音会发毛。", stacklevel=2)
    mono = samples.mean(axis=1)
    if np.abs(mono).max() < 0.001:
        reason = "两个声道正好相反，平均之后抵消了" if np.abs(samples).max() >= 0.001 else "最响处低于 −60 分贝"
        raise ValueError(f"{name} 没有声音：{reason}。")
    return mono if rate == sample_rate else resample(mono, rate, sample_rate)


# —— 看与听 ——

def spectrogram_image(picture: np.ndarray, scale: int = 1) -> Image.Image:
    """梅尔图 → 彩色的 PIL 图像：横轴是时间，低频在下，越亮越响。

    参数：
        picture: 形状 (n_mels, 帧)，取值 −1 到 1。
        scale:   整数放大倍数。
    异常：
        ValueError: 形状不合，或有 NaN、无穷。
    来源：第 8.1.3 节。
    """
    if picture.ndim != 2 or not np.isfinite(picture).all() or scale < 1:
        raise ValueError(f"picture 应是 (梅尔带, 帧) 的有限的数，scale 应是正整数，收到的是 {picture.shape} 和 {scale}。")
    colors = plt.get_cmap("magma")(picture[::-1].clip(-1, 1) / 2 + 0.5)[..., :3]
    image = Image.fromarray((colors * 255).round().astype(np.uint8))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


_STYLE = Path(__file__).with_name("audio.css").read_text(encoding="utf-8").strip()
_SCRIPT = Path(__file__).with_name("audio.js").read_text(encoding="utf-8").strip()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


class Player:
    """几段声音，每段一个播放器；有图的，播放时一条竖线指出放到哪里。

    声音存在网页里，不需要内核、不联网；点了播放才解码。没有脚本的地方（不信任的笔记本）照样能放，只是没有竖线。

    参数：
        sounds:      名字 → 波形，形状 (n,)。
        sample_rate: 采样率，赫兹。
        pictures:    True 时在每段上方画出它的梅尔图（采样率须是 16,000 Hz）；也可以给出 名字 → 梅尔图。
    异常：
        ValueError: sounds 是空的，波形不合，或 pictures 的名字对不上。
    来源：第 8.1.1 节。
    """

    def __init__(
        self, sounds: Mapping[str, np.ndarray], sample_rate: int = SAMPLE_RATE,
        pictures: bool | Mapping[str, np.ndarray] = True,
    ):
        if not sounds:
            raise ValueError("sounds 是空的，至少要有一段声音。")
        if pictures is True and sample_rate != SAMPLE_RATE:
            raise ValueError(f"采样率是 {SAMPLE_RATE} Hz 时才画得出梅尔图，收到的是 {sample_rate}。请写 pictures=False。")
        if isinstance(pictures, Mapping) and pictures.keys() != sounds.keys():
            raise ValueError(f"pictures 的名字应与 sounds 的相同：{'、'.join(sounds)}，收到的是 {'、'.join(pictures)}。")
        for name, wave in sounds.items():
            if wave.ndim != 1:
                raise ValueError(f"“{name}”应是一维的波形，收到的形状是 {wave.shape}。")
            _require_wave(wave, f"“{name}”")
        if pictures is True:
            pictures = {name: mel_picture(wave) for name, wave in sounds.items()}
        self.sounds, self.sample_rate, self.pictures = dict(sounds), sample_rate, pictures or {}

    def html(self) -> str:
        """没有内核时的样子，也是有内核时的样子：一段自足的 HTML。"""
        figures = []
        for name, wave in self.sounds.items():
            label, picture = html.escape(name), ""
            if name in self.pictures:
                image = _data("image/webp", _encode(spectrogram_image(self.pictures[name]), "webp"))
                picture = f'<div><img src="{image}" alt="“{label}”的梅尔图"><span hidden></span></div>'
            sound = _data("audio/flac", flac_bytes(wave, self.sample_rate))
            figures.append(
                f'<figure>{picture}<figcaption>{label}</figcaption>'
                f'<audio controls preload="none" aria-label="{label}" src="{sound}"></audio></figure>'
            )
        return (
            f'<div class="book-player" role="group" aria-label="声音"><style>{_STYLE}</style>{"".join(figures)}'
            f"<script>{_SCRIPT}</script></div>"
        )

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"text/plain": f"声音：{'、'.join(self.sounds)}", "text/html": self.html()}


class SoundSlider(Slider):
    """一个滑块同时控制一段声音和它的梅尔图；在有内核和没有内核的地方都能拖动。

    参数：
        draw:   ``draw(值)`` 返回（波形，梅尔图）。
        values: 滑块的名字 → 取值列表，只能有一个滑块。
        alt:    给读屏软件的文字说明，会自动加上当前取值。
    异常：
        ValueError: 同 :class:`book_utils.Slider`，或不止一个滑块。
    来源：第 8.2.3 节。
    """

    def __init__(self, draw, values, alt: str):
        super().__init__(draw, values, alt)
        if len(values) != 1:
            raise ValueError(f"会发声的滑块只能有一个，收到的是 {len(values)} 个：{list(values)}。")

    def html(self) -> str:
        (name, choices), = self.values.items()
        labels = [_label(choice) for choice in choices]
        frames, sounds = [], []
        for choice in choices:
            wave, picture = self.draw(choice)
            frames.append(_data("image/webp", _encode(spectrogram_image(picture), "webp")))
            sounds.append(_data("audio/flac", flac_bytes(wave)))
        middle = len(choices) // 2
        alts = [f"{self.alt}（{name} = {label}）" for label in labels]
        data = json.dumps({"frames": frames, "sounds": sounds, "alts": alts, "labels": labels}, ensure_ascii=False)
        data = data.replace("</", r"<\/")
        page = (
            f'<div class="book-player" role="group" aria-label="{html.escape(self.alt)}"><style>{_STYLE}</style>'
            f'<figure class="book-player-wide"><div><img src="{frames[middle]}" alt="{html.escape(alts[middle])}">'
            f"<span hidden></span></div>"
            f'<label>{html.escape(name)} <input disabled type="range" min="0" max="{len(labels) - 1}" step="1" '
            f'value="{middle}" aria-valuetext="{html.escape(labels[middle])}"> '
            f"<output>{html.escape(labels[middle])}</output></label>"
            f'<audio controls preload="none" aria-label="{html.escape(self.alt)}" src="{sounds[middle]}"></audio></figure>'
            f'<script type="application/json">{data}</script><script>{_SCRIPT}</script></div>'
        )
        if len(page.encode()) > MAX_BYTES:
            raise ValueError(
                f"滑块有 {len(frames)} 段声音，共 {len(page.encode()) / 1000:.0f} KB，超过上限 {MAX_BYTES / 1000:.0f} KB。"
                "请减少取值，或把声音缩短。"
            )
        return page

    def widget(self):
        import ipywidgets

        (name, choices), = self.values.items()
        control = _control(name, choices)
        picture = ipywidgets.Image(format="png", layout={"width": "22rem", "max_width": "100%"})
        player = ipywidgets.Audio(format="flac", autoplay=False, loop=False)

        def redraw(_change=None):
            wave, drawn = self.draw(control.value)
            picture.value = _encode(spectrogram_image(drawn, scale=4), "png")
            player.value = flac_bytes(wave)

        control.observe(redraw, names="value")
        redraw()
        return ipywidgets.VBox([picture, control, player])


def waves_apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """两批梅尔图（形状都是 (N, n_mels, 帧)）逐段相差多少分贝：差的绝对值的平均，形状 (N,)。

    两边都全黑的地方不算，否则静音多的声音占便宜。
    异常：
        ValueError: 形状不同。
    来源：第 8.2.3 节。
    """
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"两批梅尔图的形状应相同，都是 (N, 梅尔带, 帧)，收到的是 {a.shape} 和 {b.shape}。")
    heard = (a > -1) | (b > -1)
    difference = np.abs(a - b) * (-FLOOR_DB / 2)
    return (difference * heard).sum(axis=(1, 2)) / np.maximum(heard.sum(axis=(1, 2)), 1)
