"""nbval 的小补丁：不比较标准错误。

进度条、某些机器才有的警告都写在标准错误里，提交的笔记本也不保存它；不打这个补丁，nbval 会说“多出了 stderr”。
"""

from nbval.plugin import IPyNbFile

_original = IPyNbFile.__init__


def _init(self, *args, **kwargs):
    _original(self, *args, **kwargs)
    self.skip_compare = (*self.skip_compare, "stderr")


IPyNbFile.__init__ = _init
