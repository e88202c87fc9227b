#!/bin/sh
# 建立 .venv 并装好 requirements.txt 里的包；由 make 调用，也可以直接运行：sh tools/setup.sh
#
# 全部装好之后才写下标记 .venv/.ready：中断或出错时没有标记，再运行一次就从断处继续。
# 可用的环境变量：
#   PYTHON_BOOTSTRAP   用哪个 Python 建立环境，默认 python3
#   BOOK_MIN_DISK_GB   至少要有多少 GB 空闲磁盘，默认见下
#   PIP_INDEX_URL 等    由 pip 读取
set -eu

ROOT=$(cd "$(dirname "$0")/.." && pwd)
VENV=$ROOT/.venv
PYTHON=${PYTHON_BOOTSTRAP:-python3}
# 实测（Linux，Python 3.11）：环境本身 6.0 GB，装完之前安装包还要占 1.6 GB，pip 的缓存再占 1.6 GB
NEED_GB=${BOOK_MIN_DISK_GB:-10}
PIP_VERSION=26.3

fail() {
    printf '\n安装没有完成：%s\n' "$1" >&2
    exit 1
}
trap 'printf "\n安装被中断。再运行一次同样的命令，就从断处继续。\n" >&2; exit 130' INT TERM HUP

# —— 1. Python 够新，且能建立虚拟环境 ——
command -v "$PYTHON" >/dev/null 2>&1 || fail "找不到 $PYTHON。
本书需要 Python 3.11 或更新的版本；装好之后，也可以这样指定它：make book PYTHON_BOOTSTRAP=/路径/python3.12"
version=$("$PYTHON" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])') || fail "$PYTHON 不能运行。"
major=${version%%.*}
rest=${version#*.}
minor=${rest%%.*}
if [ "$major" -lt 3 ] || { [ "$major" -eq 3 ] && [ "$minor" -lt 11 ]; }; then
    fail "$PYTHON 的版本是 $version，太旧了。
本书需要 Python 3.11 或更新的版本；若另装有新版本，可以这样指定它：make book PYTHON_BOOTSTRAP=python3.12"
fi
"$PYTHON" -c 'import venv, ensurepip' >/dev/null 2>&1 || fail "$PYTHON（$version）缺少 venv 或 ensurepip，不能建立虚拟环境。
在 Debian 和 Ubuntu 上请先运行：sudo apt-get install python3-venv"

# —— 2. 磁盘够大：已经装进 .venv 的部分不必再占 ——
used_kb=0
[ -d "$VENV" ] && used_kb=$(du -sk "$VENV" | cut -f1)
free_kb=$(df -Pk "$ROOT" | awk 'NR == 2 { print $4 }')
need_kb=$((NEED_GB * 1024 * 1024 - used_kb))
if [ "$free_kb" -lt "$need_kb" ]; then
    fail "磁盘空间不够：$ROOT 所在的磁盘还有 $((free_kb / 1024 / 1024)) GB，安装还需要 $(((need_kb + 1048575) / 1024 / 1024)) GB。
请腾出空间，或把本书放到更大的磁盘上。"
fi

# —— 3. 虚拟环境：没有，或上次只建了一半，就重建 ——
rm -f "$VENV/.ready"
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "[1/3] 用 Python $version 建立虚拟环境 .venv"
    "$PYTHON" -m venv --clear "$VENV" || fail "建立虚拟环境失败，原因见上。"
else
    echo "[1/3] 虚拟环境 .venv 已在，检查上次有没有装到一半的包"
    "$VENV/bin/python" "$ROOT/tools/repair_venv.py"
fi

# —— 4. 安装包 ——
# 临时文件放在 .venv 里：许多机器的 /tmp 是内存盘，放不下几个 GB 的安装包
rm -rf "$VENV/.tmp"
mkdir "$VENV/.tmp"
export TMPDIR="$VENV/.tmp"
exec 4>&1
install() {
    # 报错照常显示，同时留一份，好分清是哪一种；进度条（标准输出）不经过管道
    status=$({ { "$VENV/bin/python" -m pip install --disable-pip-version-check "$@" 2>&1 >&4 && echo 0 >&3 || echo 1 >&3; } |
        tee "$TMPDIR/pip.log" >&2; } 3>&1)
    [ "$status" = 0 ] && return
    if grep -q -E 'ResolutionImpossible|different Python' "$TMPDIR/pip.log"; then
        fail "写死的版本彼此不容，或者不容这个 Python（$version），原因见上。这不是网络的问题，换镜像没有用。
· 换一个 Python 试试，例如：make book PYTHON_BOOTSTRAP=python3.12
· 改过 requirements.txt 或 constraints.txt 的，请让两处一致。"
    fi
    fail "pip 没有装好全部的包，原因见上。
· 若是网络中断，再运行一次同样的命令即可，已经装好的不会重来；
· 若连不上或很慢，可以换一个镜像，例如：
    make book PIP_INDEX_URL=https://pypi.tuna.tsinghua.edu.cn/simple
· 若提示 No space left on device，请腾出磁盘空间。"
}
echo "[2/3] 安装 pip $PIP_VERSION"
install --quiet "pip==$PIP_VERSION"
echo "[3/3] 安装 requirements.txt 里的包（首次约需下载 1.6 GB）"
install -r "$ROOT/requirements.txt" -c "$ROOT/constraints.txt"

# 演示程序（2.1 节）的包与本书的不相容，装在旁边的文件夹里；清单没有变就不重装
if [ -f "$ROOT/spaces/packages.txt" ] && ! cmp -s "$ROOT/spaces/packages.txt" "$VENV/space-packages/packages.txt"; then
    echo "      再装 2.1 节演示程序的包（约下载 41 MB）"
    rm -rf "$VENV/space-packages"
    install --quiet --no-deps --target "$VENV/space-packages" -r "$ROOT/spaces/packages.txt"
    cp "$ROOT/spaces/packages.txt" "$VENV/space-packages/packages.txt"
fi
rm -rf "$VENV/.tmp"

# —— 5. 让 import book_utils 在任何文件夹里都能用，包括在 JupyterLab 里打开的笔记本 ——
# .pth 里的相对路径从 site-packages 算起，往上四层是仓库根目录；仓库搬家也不失效
site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "../../../.." > "$site/book-root.pth"

touch "$VENV/.ready"
echo "环境已备好。"
