"""一个 Space：选一种颜色和引导的强度，画出四只带着那种颜色的蝴蝶。"""

import os
import re
from pathlib import Path

# 不上报使用情况；要在导入 gradio 之前设好
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# 启动时 gradio 要访问自己的网页，代理到不了这里：本机的地址不走代理
exempt = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [exempt, "localhost", "127.0.0.1"]))

import gradio as gr
import torch
from PIL import Image
from pipeline import ColorGuidedPipeline


def embedded_model() -> str:
    """随书的小模型：在本书的仓库里运行时用它。"""
    return str(Path(__file__).resolve().parents[2] / "models" / "butterflies-ddpm-32")


# 程序启动时装入一次。在 Space 的设置里用变量 MODEL_ID 指定模型仓库
guided = ColorGuidedPipeline.from_pretrained(os.environ.get("MODEL_ID") or embedded_model())
guided.set_progress_bar_config(disable=True)


def parse_color(text: str | None) -> tuple[float, ...]:
    """取色器给的颜色 → 三个 0 到 1 的数；它有时写成 #19e680，有时写成 rgba(25, 230, 128, 1)。"""
    text = (text or "").strip()
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        values = [int(text[i : i + 2], 16) for i in (1, 3, 5)]
    elif match := re.fullmatch(r"rgba?\((\d+(?:\.\d+)?),\s*(\d+(?:\.\d+)?),\s*(\d+(?:\.\d+)?)(?:,\s*[\d.]+)?\)", text):
        values = [float(value) for value in match.groups()]
    else:
        raise gr.Error(f"颜色应写成 #RRGGBB，例如 #19e680，收到的是“{text}”。")
    if max(values) > 255:
        raise gr.Error(f"颜色的三个数应在 0 到 255 之间，收到的是“{text}”。")
    return tuple(value / 255 for value in values)


def check(name: str, value: float | None, low: float, high: float) -> float:
    """值在范围里就原样返回，否则用中文说明。"""
    if value is None or not low <= value <= high:
        raise gr.Error(f"{name}应在 {low:g} 到 {high:g} 之间，收到的是 {'空的' if value is None else f'{value:g}'}。")
    return value


def draw(color: str, scale: float, seed: float) -> Image.Image:
    """画两行四只蝴蝶。同样的输入总是得到同样的图。"""
    target = parse_color(color)
    scale = check("强度", scale, 0, 200)
    seed = int(check("种子", seed, 0, 9999))
    generator = torch.Generator().manual_seed(seed)
    butterflies = guided(target, guidance_scale=scale, batch_size=4, num_inference_steps=15, generator=generator).images
    size = butterflies[0].width
    sheet = Image.new("RGB", (2 * size, 2 * size))
    for i, butterfly in enumerate(butterflies):
        sheet.paste(butterfly, (i % 2 * size, i // 2 * size))
    return sheet.resize((2 * 192, 2 * 192), Image.Resampling.NEAREST)


demo = gr.Interface(
    fn=draw,
    inputs=[
        gr.ColorPicker(value="#19e680", label="颜色"),
        # 不用带范围的滑块：超出范围时它用英文报错，这里由 check 用中文说
        gr.Number(value=40, label="强度", info="0 到 200，0 是不引导"),
        gr.Number(value=0, precision=0, label="种子", info="0 到 9999"),
    ],
    outputs=gr.Image(show_label=False, format="png", buttons=["download"]),
    title="要什么颜色的蝴蝶",
    submit_btn="生成",
    clear_btn="清空",
    api_name="draw",
    flagging_mode="never",
)

if __name__ == "__main__":
    # 在自己的电脑上只听回环地址；Space 的容器会用环境变量改成它要的地址
    demo.launch(server_name=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
