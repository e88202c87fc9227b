"""断网：Python 启动时自动载入，除本机回环地址外，任何连接都立即报错。

把这个文件夹放到 PYTHONPATH 的最前面即生效，子进程（包括 Jupyter 内核）也一样。
比 unshare 之类的办法粗，但不需要权限，在任何机器上都能用。
"""

import os
import socket

# git、curl 以及用 Rust、C 写的下载库不经过下面的函数；它们都认代理，把代理指到一个没有人听的端口
for _name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ[_name] = os.environ[_name.upper()] = "http://127.0.0.1:9"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "localhost,127.0.0.1,::1"


def _check(host: object) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name is None or name == "" or name == "localhost" or name == "::1" or str(name).startswith("127."):
        return
    raise OSError(f"测试在断网状态下运行，却有代码要连接 {name}。")


def _guard(function, host_of):
    def guarded(*args, **kwargs):
        _check(host_of(*args, **kwargs))
        return function(*args, **kwargs)

    return guarded


def _address_host(sock, *args, **kwargs):
    """connect(address)、sendto(data, [flags,] address) 的地址都在最后；非 IP 套接字不管。"""
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or not isinstance(args[-1], tuple):
        return None
    return args[-1][0]


for _name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, _name, _guard(getattr(socket.socket, _name), _address_host))
socket.getaddrinfo = _guard(socket.getaddrinfo, lambda host, *args, **kwargs: host)
socket.gethostbyname = _guard(socket.gethostbyname, lambda host: host)
