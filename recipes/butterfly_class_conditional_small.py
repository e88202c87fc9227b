"""配方：butterfly-class-conditional-small，差一些的同类，用来作自引导（第 5.9 节）。

面对的数据与条件都与 butterfly-class-conditional 相同，只是通道少、走的步数少：自引导要的就是这样一个同类。

用法：python recipes/butterfly_class_conditional_small.py
"""

import butterfly_class_conditional as better
from diffusers import UNet2DModel

from book_utils import set_seed

NAME = "butterfly-class-conditional-small"
PURPOSE = "butterfly-class-conditional 的同类，小一些、训练得少一些，用来作自引导（第 5.9 节）"
DATA = better.DATA


def build_model() -> UNet2DModel:
    """454,947 个参数。"""
    return better.build_model((16, 32, 48))


def main(arguments: list[str] | None = None):
    set_seed(0)
    better.train(build_model(), NAME, n_epochs=2, ema_decay=0.99, arguments=arguments)


def measure(name: str = NAME) -> dict:
    """只量不引导的。"""
    return better.measure_settings(name, {"plain": {1.0: {}}})


card_lines = better.card_lines


if __name__ == "__main__":
    main()
