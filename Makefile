# 《从零开始学扩散模型》：所有日常操作的入口，运行 make help 查看。需要 GNU make。

# 只在当前 shell 找不到合适的 Python 时才需要改：make book PYTHON_BOOTSTRAP=python3.12
PYTHON_BOOTSTRAP ?= python3
PORT ?= 8000
export PYTHON_BOOTSTRAP
export FULL

PYTHON := .venv/bin/python
READY  := .venv/.ready
BUILT  := _build/html/.complete
NPM    := node_modules/.package-lock.json

# 默认情形下，glibc 会把每个用完的大张量立即还给系统，下一步训练再重新申请、逐页清零。
# 让它留着这些内存并使用大页：实测训练快 20 %–35 %。对 glibc 以外的系统没有影响。
export GLIBC_TUNABLES         := glibc.malloc.hugetlb=1
export MALLOC_MMAP_THRESHOLD_ := 8589934592
export MALLOC_TRIM_THRESHOLD_ := 17179869184
export MALLOC_TOP_PAD_        := 268435456

# 网站由这些文件决定；其中一个比上次建成的网站新，才重建
CODE    := $(shell find book_utils recipes -type f ! -path "*/__pycache__/*") $(shell find models data -name '.*' -prune -o -type f ! -name '*-ubyte' ! -name '*.md' -print 2>/dev/null)
SOURCES := $(filter-out README.md,$(wildcard *.md *.bib *.yml chapters/*.md chapters/*.ipynb spaces/*/*))
ASSETS  := $(shell find _static _extra _ext -type f ! -path '*/__pycache__/*' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup book test check lint serve space notebooks colab newest reproduce bench evaluate clean
.DELETE_ON_ERROR:

help: ## 列出所有目标
	@echo "用法：make 目标"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r target text; do printf '%-18s %s\n' "$$target" "$$text"; done

setup: $(READY) $(NPM) ## 建立 .venv 并安装所需的包（其他目标会自动先做这一步）
	@echo "环境在 .venv，用 .venv/bin/python 运行书里的代码。"

$(READY): requirements.txt constraints.txt $(wildcard spaces/packages.txt)
	@sh tools/setup.sh

# 网站用的浏览器脚本；npm 装完才写下这个文件
$(NPM): package.json package-lock.json | $(READY)
	@$(PYTHON) tools/npm_packages.py
	@touch $@

book: $(BUILT) ## 执行各章并把网站建到 _build/html
	@echo "网站在 _build/html，运行 make serve 后在浏览器里阅读。"

# 各章只执行一遍，网站、笔记本与测试都取这一份结果；一章过没过时看内容（tools/execution.py），不看时间
_build/.executed: $(SOURCES) $(CODE) $(READY)
	$(PYTHON) tools/executed.py
	@touch $@

# 扩展、样式或脚本变了，Sphinx 看不出哪些页面要重做，也不会重新复制样式，就都重做（代码不必重新执行）
_build/.pages: $(ASSETS)
	@rm -rf _build/.doctrees _build/html
	@mkdir -p _build
	@touch $@

$(BUILT): $(SOURCES) $(NPM) _build/.executed _build/.pages
	@rm -f $@
	@# 有警告时 Sphinx 只报一次，所以出错后丢掉它的记录，免得再运行一遍就“通过”
	.venv/bin/jupyter-book build -W --keep-going . || { rm -rf _build/.doctrees; exit 1; }
	@touch $@

# 每个核一个进程；T= 后面是传给 pytest 的选项，例如 make test T="tests/text -x"
test: book ## 运行全部测试（先建网站）；没有变过的页不重查，要全部重查：make test FULL=1
	$(PYTHON) -m pytest --rootdir=. -n auto --dist loadgroup --durations=15 $(or $(T),tests)

check: $(NPM) ## 只查一章，几分钟：make check CHAPTER=03
	@$(PYTHON) tools/check.py $(CHAPTER)

lint: $(READY) ## 检查代码的写法（ruff，规则在 pyproject.toml）
	$(PYTHON) -m ruff check .

serve: book ## 在本机打开网站：http://127.0.0.1:8000（换端口：make serve PORT=8080）
	@echo "在浏览器里打开 http://127.0.0.1:$(PORT) ，按 Ctrl+C 结束。"
	@$(PYTHON) -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

space: $(READY) ## 在本机运行 2.1 节的演示程序：http://127.0.0.1:7860（5.7 节的：make space S=butterfly-color）
	@PYTHONPATH=.venv/space-packages $(PYTHON) spaces/$(or $(S),mnist-ddpm)/app.py

notebooks: $(READY) ## 重新生成并执行与各章配对的 .ipynb（全部强制执行：make notebooks FORCE=1）
	$(PYTHON) tools/notebooks.py write $(if $(FORCE),--force)

colab: ## 在 .venv-colab 里用 Colab 的较旧版本执行每一章（首次约装 5 GB）
	@$(PYTHON_BOOTSTRAP) tools/other_versions.py colab

newest: ## 在 .venv-newest 里用各个包的最新版本执行每一章
	@$(PYTHON_BOOTSTRAP) tools/other_versions.py newest

reproduce: $(READY) ## 完整训练第三章的两个模型，与原文的损失对照
	$(PYTHON) tools/reproduce.py

bench: $(READY) ## 比较本书与原文训练循环的速度
	$(PYTHON) tools/bench.py

evaluate: $(READY) ## 测量随书小模型的质量
	$(PYTHON) recipes/evaluate.py

clean: ## 删去网站与执行缓存（保留 .venv；连它也不要时：rm -rf .venv）
	rm -rf _build
