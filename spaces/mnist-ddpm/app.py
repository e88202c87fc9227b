"""一个小小的 Space：选种子与步数，用 DDIM 从噪声画出八个手写数字。"""

import os
from pathlib import Path

# 不上报使用情况；要在导入 gradio 之前设好
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# 启动时 gradio 要访问自己的网页，代理到不了这里：本机的地址不走代理
exempt = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [exempt, "localhost", "127.0.0.1"]))

import gradio as gr
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from PIL import Image, ImageOps


def embedded_model() -> str:
    """随书的小模型：在本书的仓库里运行时用它。"""
    return str(Path(__file__).resolve().parents[2] / "models" / "mnist-ddpm")


# 程序启动时装入一次，以后每次请求都用它。在 Space 的设置里用变量 MODEL_ID 指定模型仓库
pipeline = DDIMPipeline.from_pretrained(os.environ.get("MODEL_ID") or embedded_model())
pipeline.scheduler = DDIMScheduler.from_config(
    pipeline.scheduler.config, timestep_spacing="trailing"
)
pipeline.set_progress_bar_config(disable=True)


def draw(seed: int, steps: int) -> Image.Image:
    """由种子和步数画出两行八个数字。同样的输入总是得到同样的图。"""
    generator = torch.Generator().manual_seed(int(seed))
    digits = pipeline(batch_size=8, generator=generator, num_inference_steps=int(steps)).images
    sheet = Image.new("L", (4 * 28, 2 * 28))
    for i, digit in enumerate(digits):
        sheet.paste(digit, (i % 4 * 28, i // 4 * 28))
    # 反色成白纸黑字，放大四倍
    return ImageOps.invert(sheet).resize((4 * 112, 2 * 112), Image.Resampling.NEAREST)


demo = gr.Interface(
    fn=draw,
    inputs=[
        gr.Slider(0, 99, value=0, step=1, label="种子"),
        gr.Slider(2, 30, value=10, step=1, label="步数"),
    ],
    outputs=gr.Image(show_label=False, format="png", buttons=["download"]),
    title="MNIST 扩散模型",
    submit_btn="生成",
    clear_btn="清空",
    api_name="draw",
    flagging_mode="never",
)

if __name__ == "__main__":
    # 在自己的电脑上只听回环地址，别的机器连不进来；Space 的容器会用环境变量改成它要的地址
    demo.launch(server_name=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
