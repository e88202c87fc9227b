"""本机上的小 Hub：只用标准库（另加 PyYAML 检查模型卡），按 huggingface_hub 2.4.0 的请求逐条应答，让上传与下载不联网也能测。

仓库全在内存里。它只实现模型仓库，端点如下：

    GET  /api/whoami-v2                              我是谁
    POST /api/repos/create                           建仓库
    POST /api/validate-yaml                          检查模型卡的元数据
    POST /api/models/仓库/preupload/版本             每个文件是普通文件还是大文件
    POST /仓库.git/info/lfs/objects/batch            大文件传到哪里
    PUT  /lfs/SHA-256                                传大文件
    POST /api/models/仓库/commit/版本                提交（ndjson）
    POST /api/models/仓库/tag/版本                   打标签
    GET  /api/models/仓库[/revision/版本]            仓库信息
    GET  /api/models/仓库/tree/版本                  文件列表
    HEAD、GET /仓库/resolve/版本/路径                下载一个文件
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN = "hf_write", "hf_read"
USER = "xiaoming"


class HubError(Exception):
    """要回给客户端的错误：状态码、说明，以及 huggingface_hub 用来分辨错误的代号。"""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Repo:
    """一个仓库：一串提交，每次提交是当时全部文件的一份快照。"""

    def __init__(self):
        self.commits = []           # [(提交编号, 说明, {路径: 内容}), …]
        self.tags = {}              # {标签: 提交编号}
        self.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, title: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {title} {sorted(files)}".encode()).hexdigest()
        self.commits.append((oid, title, files))
        return oid

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """revision 可以是 main、标签或提交编号。"""
        wanted = self.commits[-1][0] if revision == "main" else self.tags.get(revision, revision)
        for oid, _, files in self.commits:
            if oid == wanted:
                return oid, files
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Hub(ThreadingHTTPServer):
    """用法：``with Hub() as hub: …``，地址是 ``hub.url``。"""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
        self.repos = {}
        self.lfs = {}               # {SHA-256: 内容}，提交之前也在这里
        self.use_lfs = True         # 假：所有文件都随提交一起传，不走大文件的协议
        self.requests = []          # 收到的请求，如 "PUT /lfs/…"
        self.before = lambda request: None      # 应答前调用，测试用它造成中断

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def is_lfs(self, path: str) -> bool:
        return self.use_lfs and path.endswith(".safetensors")

    def oid(self, path: str, content: bytes) -> str:
        """大文件的编号是 SHA-256，普通文件的是 git 的 SHA-1。"""
        if self.is_lfs(path):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def handle_request(self):
        self.body = self.read_body()        # 先读完请求，再决定怎样答，免得客户端还在写就断开
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        try:
            self.server.before(request)
            for pattern, function in ROUTES:
                match = re.fullmatch(pattern, request)
                if match:
                    return function(self, *match.groups())
            raise HubError(404, f"no such endpoint: {request}")
        except HubError as error:
            self.reply({"error": error.message}, error.status, {
                "X-Error-Code": error.code, "X-Error-Message": error.message,
            })

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *arguments):
        pass

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, content, status: int = 200, headers: dict | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # —— 权限 ——

    def role(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.server.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.server.tokens[token]

    def require_write(self, owner: str):
        if self.role() != "write" or owner != USER:
            raise HubError(403, f"You don't have the rights to write under the namespace {owner!r}")

    def repo(self, name: str) -> Repo:
        if name not in self.server.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.server.repos[name]

    def writable(self, name: str, revision: str = "main") -> Repo:
        self.require_write(name.split("/")[0])
        if revision != "main":
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.repo(name)

    # —— 各个端点 ——

    def whoami(self):
        self.reply({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": self.role()}}})

    def create(self):
        request = json.loads(self.body)
        owner = request.get("organization") or USER
        self.require_write(owner)
        name = f"{owner}/{request['name']}"
        exists = name in self.server.repos
        self.server.repos.setdefault(name, Repo())
        self.reply({"url": f"{self.server.url}/{name}"}, 409 if exists else 200)

    def validate_yaml(self):
        try:
            card = json.loads(self.body)["content"]
            metadata = yaml.safe_load(re.match(r"\s*---\n(.*?)\n---", card, re.DOTALL)[1])
            problem = None if isinstance(metadata["license"], str) else "license must be a string"
        except (TypeError, KeyError, yaml.YAMLError) as error:
            problem = f"invalid metadata: {error}"
        answer = {"errors": [{"message": problem}] if problem else [], "warnings": []}
        self.reply(answer, 400 if problem else 200)

    def preupload(self, name, revision):
        files = self.writable(name, revision).files
        self.reply({"files": [{
            "path": (path := file["path"]),
            "uploadMode": "lfs" if self.server.is_lfs(path) else "regular",
            "shouldIgnore": False,
            "oid": self.server.oid(path, files[path]) if path in files else None,
        } for file in json.loads(self.body)["files"]]})

    def lfs_batch(self, name):
        self.writable(name)
        self.reply({"transfer": "basic", "objects": [
            item if item["oid"] in self.server.lfs      # 已经有了，不必再传
            else item | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}
            for item in json.loads(self.body)["objects"]
        ]})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "SHA-256 mismatch")
        self.server.lfs[oid] = self.body
        self.reply(b"")

    def commit(self, name, revision):
        repo = self.writable(name, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repo.files)                        # 先在副本上改，全部成功才成为新的提交
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.server.lfs:
                files[value["path"]] = self.server.lfs[value["oid"]]
            else:
                raise HubError(400, f"cannot commit {line['key']} {value['path']}")
        oid = repo.commit(lines[0]["value"]["summary"], files)
        self.reply({"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def tag(self, name, revision):
        self.require_write(name.split("/")[0])
        repo = self.repo(name)
        label = json.loads(self.body)["tag"]
        if label in repo.tags:
            raise HubError(409, "Tag already exists")
        repo.tags[label] = repo.at(revision)[0]
        self.reply({})

    def info(self, name, revision=None):
        oid, files = self.repo(name).at(revision or "main")
        self.reply({"id": name, "sha": oid, "private": False, "siblings": [{"rfilename": path} for path in files]})

    def tree(self, name, revision):
        entries = []
        for path, content in self.repo(name).at(revision)[1].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": self.server.oid(path, content)}
            if self.server.is_lfs(path):
                entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self.reply(entries)

    def resolve(self, name, revision, path):
        oid, files = self.repo(name).at(revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        self.reply(files[path], headers={"ETag": f'"{self.server.oid(path, files[path])}"', "X-Repo-Commit": oid})

    def home(self):
        self.reply(b"")


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"(?:GET|HEAD) /", Handler.home),
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"POST /api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(\w+)", Handler.lfs_put),
    (rf"POST /api/models/{NAME}/commit/(.+)", Handler.commit),
    (rf"POST /api/models/{NAME}/tag/(.+)", Handler.tag),
    (rf"GET /api/models/{NAME}", Handler.info),
    (rf"GET /api/models/{NAME}/revision/(.+)", Handler.info),
    (rf"GET /api/models/{NAME}/tree/(.+)", Handler.tree),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
