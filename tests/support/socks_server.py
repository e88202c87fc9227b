"""本机上的小 SOCKS5 代理：不解析域名，所有连接都接到指定的本机端口上，并记下要连的是谁。"""

import socket
import socketserver
import threading


class SocksProxy(socketserver.ThreadingTCPServer):
    """用法：``with SocksProxy(port) as proxy: …``，地址是 ``proxy.url``；``proxy.hosts`` 是来客要连的主机。"""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target_port: int):
        super().__init__(("127.0.0.1", 0), Handler)
        self.target_port = target_port
        self.hosts: list[str] = []
        self.url = f"socks5h://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *details):
        self.shutdown()
        super().__exit__(*details)


class Handler(socketserver.StreamRequestHandler):
    def read(self, count: int) -> bytes:
        content = self.rfile.read(count)
        if len(content) < count:
            raise ConnectionError("对方先断开了")
        return content

    def handle(self):
        _version, n_methods = self.read(2)
        self.read(n_methods)
        self.request.sendall(b"\x05\x00")                       # 不要密码
        _version, _command, _zero, kind = self.read(4)
        if kind == 3:                                           # 域名
            host = self.read(self.read(1)[0]).decode()
        else:                                                   # IPv4（1）或 IPv6（4）
            family, size = (socket.AF_INET, 4) if kind == 1 else (socket.AF_INET6, 16)
            host = socket.inet_ntop(family, self.read(size))
        self.read(2)                                            # 端口
        self.server.hosts.append(host)
        with socket.create_connection(("127.0.0.1", self.server.target_port)) as upstream:
            self.request.sendall(b"\x05\x00\x00\x01" + b"\0" * 6)
            back = threading.Thread(target=self.copy, args=(upstream, self.request), daemon=True)
            back.start()
            self.copy(self.request, upstream)
            back.join(10)

    @staticmethod
    def copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while content := source.recv(65536):
                sink.sendall(content)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass                                                # 一头已经关了
