// 全文搜索的界面。查询与排序在 _ext/search_rank.js，索引由 _ext/site_search.py 生成；两样都在读者打开搜索时才下载。
// 主题的搜索框（Ctrl+K、“/”或放大镜）里边输入边出结果；回车进入 search.html?q=…，列出全部。

(() => {
  const root = new URL("..", document.currentScript.src);     // 网站的根，部署在子路径下也对
  const PER_PAGE = 4;             // 搜索框里每页最多列几处
  const STORE = "book-search-words";
  const han = /\p{Script=Han}/u;
  const escapeHtml = text => text.replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})[c]);

  let engine;     // 第一次用到搜索时才下载

  function load() {
    engine ??= (async () => {
      // no-cache：用之前先问一声服务器，重新发布之后不会拿旧的索引去配新的页面
      const [{createSearch}, answer] = await Promise.all([
        import(new URL("_static/search/rank.js", root)),
        fetch(new URL("_static/search/index.json", root), {cache: "no-cache"}),
      ]);
      return createSearch(await answer.json());
    })().catch(error => {
      engine = undefined;
      throw error;
    });
    return engine;
  }

  // ---------- 显示 ----------

  // 在 text 里找出 marks，返回不重叠的 [起, 止]；长的优先
  function ranges(text, marks) {
    const found = [], lower = text.toLowerCase();
    for (const mark of [...marks].sort((a, b) => b.length - a.length)) {
      const wanted = mark.toLowerCase();
      // 单个字母、数字到处都是，不标
      if (wanted.length < 2 && !han.test(wanted)) continue;
      for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, at + wanted.length)) {
        if (!found.some(([from, to]) => at < to && at + wanted.length > from)) found.push([at, at + wanted.length]);
      }
    }
    return found.sort((a, b) => a[0] - b[0]);
  }

  function marked(text, marks) {
    let html = "", from = 0;
    for (const [start, end] of ranges(text, marks)) {
      html += `${escapeHtml(text.slice(from, start))}<mark>${escapeHtml(text.slice(start, end))}</mark>`;
      from = end;
    }
    return html + escapeHtml(text.slice(from));
  }

  // 摘一段：正文里所查的词最密的地方（长的更要紧），尽量从一句的开头起；正文里没有，再从代码里摘
  function excerpt({prose, code}, marks, length = 90) {
    const source = ranges(prose, marks).length || !ranges(code, marks).length ? prose : code;
    const found = ranges(source, marks);
    const weight = start => found.reduce((sum, [a, b]) => sum + (a >= start && b <= start + length ? (b - a) ** 2 : 0), 0);
    const starts = found.map(([at]) => {
      const before = source.slice(Math.max(0, at - 30), at);
      const sentence = Math.max(...[..."。；：？！"].map(mark => before.lastIndexOf(mark)));
      return sentence >= 0 ? at - before.length + sentence + 1 : Math.max(0, at - 20);
    });
    const start = starts.reduce((best, at) => weight(at) > weight(best) ? at : best, starts[0] ?? 0);
    const piece = source.slice(start, start + length).trim();
    return (start ? "…" : "") + marked(piece, marks) + (start + length < source.length ? "…" : "");
  }

  function grouped(results) {
    const pages = new Map();
    for (const {record} of results) {
      const path = record.url.split("#")[0];
      if (!pages.has(path)) pages.set(path, []);
      pages.get(path).push(record);
    }
    return [...pages.values()];
  }

  function sectionHtml(record, marks) {
    const above = record.kind === "section" ? record.above : [record.above, {term: "术语", citation: "文献"}[record.kind]].filter(Boolean).join(" › ");
    const trail = above ? `<span class="book-search-above">${escapeHtml(above)}</span>` : "";
    const title = record.title === record.page ? "本页开头" : record.title;
    return `<li><a href="${escapeHtml(new URL(record.url, root).href)}">${trail}`
      + `<span class="book-search-title">${marked(title, marks)}</span>`
      + `<span class="book-search-excerpt">${excerpt(record, marks)}</span></a></li>`;
  }

  function listHtml(results, marks, query, limit) {
    return grouped(results).map(records => {
      const rest = records.length - limit;
      const more = rest > 0
        ? `<li class="book-search-more"><a href="${new URL("search.html", root)}?q=${encodeURIComponent(query)}">本页还有 ${rest} 处</a></li>` : "";
      return `<li class="book-search-page"><p>${marked(records[0].page, marks)}</p><ul>`
        + records.slice(0, limit).map(record => sectionHtml(record, marks)).join("") + more + "</ul></li>";
    }).join("");
  }

  function statusHtml(text, {results, instead, partial}) {
    const asked = `<q>${escapeHtml(text)}</q>`;
    const count = `${grouped(results).length} 页、${results.length} 处`;
    if (!results.length) {
      return `没有找到 ${asked}。可以换一个说法，少写几个字，或者从 <a href="${new URL("glossary.html", root)}">术语表</a> 和左边的目录找起。`;
    }
    if (instead) {
      const link = `${new URL("search.html", root)}?q=${encodeURIComponent(instead)}`;
      return `没有找到 ${asked}，你是不是想找 <a class="book-search-instead" href="${link}">${escapeHtml(instead)}</a>？下面是它的结果：${count}。`;
    }
    if (partial) return `没有一处含有 ${asked} 里所有的词，下面是最接近的 ${count}。`;
    return `找到 ${count}。`;
  }

  // 把一个搜索框和它下面的结果连起来
  function connect(form, limit, onQuery = () => {}) {
    const input = form.querySelector("input[name=q]");
    const box = document.createElement("div");
    box.className = "book-search-results";
    box.innerHTML = '<p class="book-search-status" role="status"></p><ul class="book-search-list" aria-label="搜索结果"></ul>';
    form.after(box);
    const status = box.querySelector("p"), list = box.querySelector("ul");
    let latest = 0, timer;

    async function run() {
      const text = input.value.trim(), mine = ++latest;
      delete box.dataset.shown;
      onQuery(text);
      if (!text) {
        status.textContent = list.innerHTML = "";
        return;
      }
      const slow = setTimeout(() => status.textContent = "正在搜索……", 400);
      try {
        const answer = (await load())(text);
        if (mine !== latest) return;            // 读者又输入了别的
        list.innerHTML = listHtml(answer.results, answer.marks, answer.instead ?? text, limit);
        status.innerHTML = statusHtml(text, answer);
        list.marks = answer.marks;
        box.dataset.shown = text;               // 下面列出的是哪一次查询的结果
      } catch (error) {
        console.warn("搜索没有成功：", error);
        if (mine !== latest) return;
        list.innerHTML = "";
        status.textContent = location.protocol === "file:"
          ? "搜索要通过网址打开本书才能用：在仓库里运行 make serve。" : "搜索的索引没有下载成功，请检查网络后再试。";
      } finally {
        clearTimeout(slow);
      }
    }

    input.addEventListener("focus", () => load().catch(() => {}));
    input.addEventListener("input", event => {
      if (event.isComposing) return;            // 拼音还没有选定汉字
      clearTimeout(timer);
      delete box.dataset.shown;
      timer = setTimeout(run, 120);
    });
    input.addEventListener("compositionend", run);
    list.addEventListener("click", event => {
      const link = event.target.closest("a");
      if (link && !link.closest(".book-search-more")) arrive(link, list.marks);
    });

    // ↓、↑ 在搜索框与各条结果之间移动；焦点真的移过去，读屏软件因此会念出来
    function move(event) {
      if (event.isComposing || !["ArrowDown", "ArrowUp"].includes(event.key)) return;
      const stops = [input, ...list.querySelectorAll("a")];
      const next = stops[stops.indexOf(document.activeElement) + (event.key === "ArrowDown" ? 1 : -1)];
      if (!next) return;
      event.preventDefault();
      next.focus();
      next.scrollIntoView({block: "nearest"});
    }
    form.addEventListener("keydown", move);
    box.addEventListener("keydown", move);
    form.addEventListener("submit", event => {
      if (!input.value.trim()) event.preventDefault();
    });
    return {input, run};
  }

  // ---------- 到了那一页，标出所查的词 ----------

  function arrive(link, marks) {
    const target = new URL(link.href);
    sessionStorage.setItem(STORE, JSON.stringify({path: target.pathname, hash: target.hash, marks}));
    document.getElementById("pst-search-dialog")?.close();
    if (target.pathname === location.pathname) showMarks();
  }

  // 用浏览器的高亮接口，不改动页面；没有这个接口的浏览器就不标
  function showMarks() {
    const {path, hash, marks} = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");
    if (path !== location.pathname || !window.Highlight) return;
    sessionStorage.removeItem(STORE);
    const target = document.getElementById(decodeURIComponent(hash.slice(1)));
    const place = target?.closest("dl, section") ?? document.querySelector("article");
    const walker = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
    const highlight = new Highlight();
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      if (node.parentElement.closest("script, style, mjx-container")) continue;
      for (const [start, end] of ranges(node.data, marks)) {
        const range = new Range();
        range.setStart(node, start);
        range.setEnd(node, end);
        highlight.add(range);
      }
    }
    CSS.highlights.set("book-search", highlight);
  }

  // ---------- 接到页面上 ----------

  document.addEventListener("DOMContentLoaded", () => {
    const dialog = document.getElementById("pst-search-dialog");
    connect(dialog.querySelector("form"), PER_PAGE);
    dialog.setAttribute("aria-label", "搜索");
    // 手机上搜索框占满屏幕，没有 Esc 键，也点不到外面
    const close = document.createElement("button");
    close.type = "button";
    close.className = "book-search-close";
    close.textContent = "关闭";
    close.addEventListener("click", () => dialog.close());
    dialog.querySelector("form").append(close);
    dialog.insertAdjacentHTML("beforeend",
      '<p class="book-search-keys" aria-hidden="true"><kbd>↑</kbd> <kbd>↓</kbd> 选择　<kbd>Enter</kbd> 打开或列出全部　<kbd>Esc</kbd> 关闭</p>');

    const page = document.querySelector(".book-search-page form");
    if (page) {
      const {input, run} = connect(page, Infinity, text => {
        history.replaceState(null, "", text ? `?q=${encodeURIComponent(text)}` : location.pathname);
      });
      page.addEventListener("submit", event => event.preventDefault());
      input.value = new URLSearchParams(location.search).get("q") ?? "";
      input.focus();
      run();
    }

    document.addEventListener("keydown", event => {
      if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.target.closest("input, textarea, select, [contenteditable]")) return;
      event.preventDefault();
      document.querySelector(".search-button__button")?.click();
    });
    document.addEventListener("keydown", event => event.key === "Escape" && window.CSS?.highlights?.delete("book-search"));
    showMarks();
  });
})();
