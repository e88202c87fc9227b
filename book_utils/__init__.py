"""《从零开始学扩散模型》的小工具包：与扩散模型有关的函数都先在书里讲过，再在这里取用。

有哪些名字、各在哪个模块，列在旁边的 ``__init__.pyi`` 里，编辑器也读它；用到时才导入那个模块，
所以只用滑块或自检时不必等 PyTorch 与 diffusers。
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
