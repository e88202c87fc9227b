// 实时代码：读者点按钮、看过说明、同意之后，才连接 Binder；连上之后代码格变成可以修改、运行的。
// 连不上时页面保持原样。设置由 _ext/live_code.py 放进页面。
window.bookLive = (() => {
  let settings;
  const SILENCE = 180_000;      // 这么久（毫秒）没有一点消息，就当作连不上
  const PHASES = {
    waiting: "正在排队", fetching: "正在取仓库的代码", built: "环境已经建好", building: "正在建立环境，第一次要几分钟",
    pushing: "正在保存环境", launching: "正在启动", unknown: "正在排队",
  };
  let bar;                      // 页脚的状态条
  let started = false;

  // 读者点了“启用实时代码”：说明会连接哪里，征求同意
  function ask() {
    if (started) return;
    settings = JSON.parse(document.getElementById("book-live").textContent);
    const host = new URL(settings.binder).host;
    const dialog = document.createElement("dialog");
    dialog.className = "book-live-consent";
    dialog.setAttribute("aria-labelledby", "book-live-title");
    dialog.innerHTML = `
      <h2 id="book-live-title">启用实时代码</h2>
      <p>点“连接”之后，本页会连接 <strong>${host}</strong>，请它按仓库 ${settings.repository}（${settings.branch} 分支）
        开一台临时的电脑，你的代码在那里执行。${host} 会看到你的 IP 地址和你运行的代码；它是别人提供的免费服务，与本书无关。</p>
      <p>启动通常要一两分钟，赶上重建环境要更久。内存约 2 GB，没有显卡；闲置一会儿就会被收回，改动不会保存。</p>
      <form method="dialog"><button value="connect">连接</button><button value="cancel">取消</button></form>`;
    dialog.addEventListener("close", () => {
      dialog.remove();
      if (dialog.returnValue === "connect") start();
    });
    document.body.append(dialog);
    dialog.showModal();
  }

  async function start() {
    started = true;
    let stop;
    const stopped = new Promise((_, reject) => stop = () => reject(new Error("已经取消")));
    report("正在连接 Binder……", [["取消", stop]]);
    try {
      const server = await Promise.race([launch(stopped), stopped]);
      report("正在启动内核……", [["取消", stop]]);
      const thebe = await Promise.race([openSession(server), stopped]);
      makeCellsLive(thebe);
    } catch (error) {
      console.warn("实时代码：", error);
      started = false;
      report(`没有连上 Binder（${error.message}）。本页没有改动，可以稍后再试；也可以下载笔记本，在自己的电脑上运行。`,
        [["关闭", () => bar.remove()]]);
    }
  }

  // 请 Binder 开一台电脑，返回它的地址和口令。BinderHub 用事件流报告进度
  function launch(stopped) {
    const source = new EventSource(`${settings.binder}/build/gh/${settings.repository}/${settings.branch}`);
    let timer;
    return new Promise((resolve, reject) => {
      const wait = () => {
        clearTimeout(timer);
        timer = setTimeout(() => reject(new Error("很久没有回音")), SILENCE);
      };
      wait();
      stopped.catch(reject);
      source.onerror = () => reject(new Error("网络不通，或者服务暂时关闭"));
      source.onmessage = event => {
        wait();
        const {phase, url, token} = JSON.parse(event.data);
        if (phase === "ready") resolve({url, token});
        else if (phase === "failed") reject(new Error("Binder 没有建成环境"));
        else if (PHASES[phase]) bar.querySelector("span").textContent = `Binder：${PHASES[phase]}……`;
      };
    }).finally(() => {
      clearTimeout(timer);
      source.close();
    });
  }

  // 加载 Thebe，在 Binder 给的电脑上启动内核
  async function openSession({url, token}) {
    await loadThebe();
    const core = window.thebeCore.api;
    const config = core.makeConfiguration({
      mathjaxUrl: "",           // 否则它会到 CDN 去取 MathJax
      savedSessionOptions: {enabled: false},
      kernelOptions: {kernelName: "python3", path: settings.notebook},      // 内核在笔记本所在的文件夹里启动
      serverSettings: {baseUrl: url, token, appendToken: true},
    }, window.thebe.events);
    const server = core.connectToJupyter(config);
    await server.ready;
    const rendermime = core.makeRenderMimeRegistry(config.mathjax);
    const session = await server.startNewSession(rendermime);
    // 只用 ipywidgets 自带的控件，Thebe 里都有；不让它为了找别的控件去 CDN 取 require.js
    const loader = session.manager._loader;
    loader.requested = true;
    loader.resolveFn({});
    await findBookUtils(session);
    return {core, config, rendermime, session};
  }

  // 网页上没有笔记本的第一格，由这一句让内核找得到 book_utils
  function findBookUtils(session) {
    return session.kernel.requestExecute({code: "import sys; sys.path.insert(0, '..')", silent: true}).done;
  }

  function loadThebe() {
    const style = document.createElement("link");
    Object.assign(style, {rel: "stylesheet", href: `${settings.thebe}thebe.css`});
    // 放在本书的样式之前，免得盖过它
    document.head.prepend(style);
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `${settings.thebe}index.js`;
      script.onload = resolve;
      script.onerror = () => reject(new Error("没有取到 Thebe 的脚本"));
      document.head.append(script);
    });
  }

  // 代码格换成编辑器；原来的输出留着，到这一格真的运行时才换掉
  function makeCellsLive({core, config, rendermime, session}) {
    const items = [...document.querySelectorAll("article div.cell")].flatMap((cell, i) => {
      const source = cell.querySelector(".cell_input pre");
      if (!source) return [];
      const output = document.createElement("div");
      output.className = "book-live-output";
      (cell.querySelector(".cell_output") ?? cell).before(output);
      if (!cell.querySelector(".cell_output")) cell.append(output);
      return [{id: `live-${i}`, cell, placeholders: {source: source.closest("div[class*=highlight-]"), output}}];
    });
    const blocks = items.map(({id, placeholders}) => ({id, source: placeholders.source.querySelector("pre").textContent.trimEnd()}));
    const notebook = core.setupNotebookFromBlocks(blocks, config, rendermime);
    const options = {
      mountRunButton: true, mountRunAllButton: false, mountRestartButton: false, mountRestartAllButton: false,
      codeMirrorConfig: {lineNumbers: false, viewportMargin: Infinity},
    };
    window.thebe.renderAllCells(options, notebook, items);
    notebook.attachSession(session);

    items.forEach(({id, cell}, i) => {
      const run = cell.querySelector(".thebe-run-button");
      Object.assign(run, {textContent: "运行", title: "运行这一格（Shift+Enter）"});
      const runUpTo = document.createElement("button");
      Object.assign(runUpTo, {className: "thebe-button", textContent: "从头运行到这里", title: "依次运行本页到这里的每一格"});
      runUpTo.addEventListener("click", async () => {
        for (const {id} of items.slice(0, i + 1)) {
          window.thebe.setButtonsBusy(id);
          const result = await notebook.getCellById(id).execute();
          window.thebe.clearButtonsBusy(id);
          if (!result || result.error) break;
        }
      });
      run.after(runUpTo);
    });
    window.thebe.on("status", (_, {subject, status, id}) => {
      const ran = subject === "cell" && status === "executing" && items.find(item => item.id === id);
      if (ran) ran.cell.classList.add("book-live-ran");
    });
    window.thebe.on("error", (_, {subject}) => {
      if (subject === "session" || subject === "server") report("与内核的连接断了。刷新本页，可以重新连接。");
    });
    report("实时代码已启用：从上往下运行各格，或在一格里点“从头运行到这里”。", [
      ["重启内核", () => session.restart().then(() => findBookUtils(session))],
      ["结束", () => session.shutdown().finally(() => location.reload())],
    ]);
  }

  // 在页脚的状态条上显示一句话和几个按钮
  function report(text, buttons = []) {
    bar?.remove();
    bar = document.createElement("div");
    bar.className = "book-live-bar";
    const message = document.createElement("span");
    message.setAttribute("role", "status");
    bar.append(message, ...buttons.map(([label, action]) => {
      const button = document.createElement("button");
      button.textContent = label;
      button.addEventListener("click", action);
      return button;
    }));
    document.body.append(bar);
    message.textContent = text;
  }

  return {ask};
})();
