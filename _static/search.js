// 全文搜索的界面与排序，建在 Pagefind 之上；索引由 _ext/site_search.py 生成。
// 主题的搜索框（Ctrl+K、“/”或放大镜）里边输入边出结果；回车进入 search.html?q=…，列出全部。
//
// 一次查询：整理（全角、繁体、大小写）→ 换成本书的用词 → 切成词 → 向 Pagefind 逐词查出候选的节
// → 在候选的标题和正文里按原样比对，排出先后。没有一节含有所有的词时，先看是不是打错了字。

(() => {
  const root = new URL("..", document.currentScript.src);     // 网站的根，部署在子路径下也对
  const CANDIDATES = 40;          // 每次取回多少节来比对
  const CITATIONS = 10;           // 以及多少条文献
  const PER_PAGE = 4;             // 搜索框里每页最多列几处
  const STORE = "book-search-words";
  const CODE_BELOW = "␞";         // 一份里正文与代码的分界，见 _ext/site_search.py
  // 问句里常见、不影响找什么的词
  const STOP = new Set(("的 了 吗 呢 是 什么 怎么 怎样 如何 为什么 为何 哪些 哪里 请问 一下 有 在 和 与 及 中 里 "
    + "a an the of in on to for and or is are how what why with do does i").split(" "));

  // ---------- 文字 ----------

  const han = /\p{Script=Han}/u;
  const squeeze = text => text.normalize("NFKC").toLowerCase().replace(/[^\p{L}\p{N}]/gu, "");
  const escapeHtml = text => text.replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})[c]);
  // “扩散模型-退化过程”“实战：反转”里，真正的题目是后一半
  const topic = title => title.replace(/^(第.{1,3}章|[\d.]+)\s*/, "").replace(/^(扩散模型-|实战：)/, "");
  // 标题里单独也能查的各部分：“调度器（Scheduler）”“UNet 模型”
  const topicParts = title => {
    const bare = topic(title).replace(/（.*?）/g, "");
    return [...topic(title).split(/[-—：（）、，\s]/), ...bare.split(/[-—：、，]/)].map(squeeze).filter(Boolean);
  };
  // 西文从一个词的开头比起，免得 unte 在 encounter 里也算找到；驼峰写法的每一段、汉字后面的西文也是词的开头
  const wordStarts = text => {
    const spaced = text.normalize("NFKC").replace(/(?<=\p{Script=Han})(?=[A-Za-z\d])/gu, " ");
    return ` ${spaced} ${spaced.replace(/(?<=[a-z\d])(?=[A-Z])/g, " ")}`.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, " ");
  };
  const contains = (place, term) => place.includes(han.test(term) ? term : ` ${term}`);
  // 这些节把全章提到的都复述一遍，不是讲它的地方
  const RECAP = /概述|小结|勘误|延伸阅读|练习/;

  // 全角、繁体换成半角、简体
  const tidy = (query, traditional) =>
    [...query.normalize("NFKC")].map(c => traditional[c] ?? c).join("").replace(/\s+/g, " ").trim();

  // “什么是退化过程？”→“退化过程”
  const withoutAsking = query => query
    .replace(/^(请问|什么是|什么叫|如何|怎么|怎样|为什么|what is|what are|how to|how do i) ?/i, "").replace(/^(a|an|the) /i, "")
    .replace(/(是什么|有什么用|怎么用|怎么办|吗|呢)?[?？!！。.]*$/, "") || query;

  // 把查询里别的说法换成本书的用词；长的先换
  function inBookWords(query, same) {
    const pairs = same.flatMap(([ours, ...others]) => others.map(other => [other, ours]))
      .sort((a, b) => b[0].length - a[0].length);
    let result = query;
    for (const [other, ours] of pairs) {
      const pattern = other.replace(/[.*+?^${}()|[\]\\]/g, "\\$&").replace(/[\s-]/g, "[\\s-]?");
      const bounded = han.test(other) ? pattern : `(?<![a-z0-9_])${pattern}(?![a-z0-9_])`;
      if (!han.test(other) || !result.includes(ours)) result = result.replace(new RegExp(bounded, "gi"), ` ${ours} `);
    }
    return result.replace(/\s+/g, " ").trim();
  }

  const segmenter = window.Intl?.Segmenter && new Intl.Segmenter("zh", {granularity: "word"});

  // 切成词。汉字用浏览器自带的词典；西文、数字、标识符在标点处断开
  function words(query) {
    const pieces = query.toLowerCase().match(/\p{Script=Han}+|[^\s\p{Script=Han}]+/gu) ?? [];
    const found = pieces.flatMap(piece => {
      if (!han.test(piece)) return piece.match(/[\p{L}\p{N}]+/gu) ?? [];
      return segmenter ? [...segmenter.segment(piece)].map(part => part.segment) : piece.match(/..?/gu);
    });
    const useful = found.filter(word => !STOP.has(word));
    return [...new Set(useful.length ? useful : found)];
  }

  // 相邻两字母颠倒只算一处错
  function distance(a, b) {
    const rows = [...Array(a.length + 1)].map((_, i) => [i]);
    for (let j = 0; j <= b.length; j++) rows[0][j] = j;
    for (let i = 1; i <= a.length; i++) for (let j = 1; j <= b.length; j++) {
      rows[i][j] = Math.min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (a[i - 1] !== b[j - 1]));
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) {
        rows[i][j] = Math.min(rows[i][j], rows[i - 2][j - 2] + 1);
      }
    }
    return rows[a.length][b.length];
  }

  // 词表里与它最像的词；差得太多就没有
  function nearest(text, vocabulary) {
    const wanted = squeeze(text);
    const allowed = wanted.length < 2 ? 0 : wanted.length < 6 ? 1 : 2;
    let best = null, least = allowed + 1;
    for (const word of vocabulary) {
      const candidate = squeeze(word);
      if (candidate === wanted || Math.abs(candidate.length - wanted.length) > allowed) continue;
      if (candidate.length < 3 && !han.test(candidate)) continue;
      const far = distance(wanted, candidate);
      if (far < least) [best, least] = [word, far];
    }
    return best;
  }

  // 整个查询，或其中一段，改成词表里的词
  function corrected(query, vocabulary) {
    const whole = nearest(query, vocabulary);
    if (whole) return whole;
    const known = new Set(vocabulary.map(squeeze));
    const pieces = query.match(/\p{Script=Han}+|[^\s\p{Script=Han}]+/gu) ?? [];
    const fixed = pieces.map(piece => (known.has(squeeze(piece)) ? null : nearest(piece, vocabulary)) ?? piece);
    return fixed.some((piece, i) => piece !== pieces[i]) ? fixed.join(" ") : null;
  }

  // ---------- 查询 ----------

  let engine;     // 第一次用到搜索时才下载

  function load() {
    engine ??= (async () => {
      const bundle = new URL("_static/pagefind/", root);
      const [pagefind, answer] = await Promise.all([
        import(new URL("pagefind.js", bundle)), fetch(new URL("words.json", bundle)),
      ]);
      await pagefind.init();
      return {pagefind, table: await answer.json()};
    })().catch(error => {
      engine = undefined;
      throw error;
    });
    return engine;
  }

  // 正文与文献各取各的候选，合起来；稀罕的词更要紧
  async function candidates(pagefind, terms) {
    const [texts, citations] = await Promise.all([
      inGroup(pagefind, terms, "text", CANDIDATES), inGroup(pagefind, terms, "citation", CITATIONS),
    ]);
    const rarity = terms.map((_, i) => 1 / Math.log2(2 + texts.counts[i] + citations.counts[i]));
    return {records: [...texts.records, ...citations.records], rarity};
  }

  // 在一组里逐词查：含的词越多越靠前，其次看 Pagefind 的分数
  async function inGroup(pagefind, terms, group, limit) {
    const answers = await Promise.all(terms.map(term => pagefind.search(term, {filters: {group}})));
    const merged = new Map();
    answers.forEach(({results}) => {
      const top = results[0]?.score || 1;
      for (const result of results) {
        const entry = merged.get(result.id) ?? {result, hits: 0, score: 0};
        entry.hits += 1;
        entry.score += result.score / top;
        merged.set(result.id, entry);
      }
    });
    const ordered = [...merged.values()].sort((a, b) => b.hits - a.hits || b.score - a.score).slice(0, limit);
    const records = await Promise.all(ordered.map(async entry => {
      const {meta, content} = await entry.result.data();
      const text = content.replaceAll("\u200b", "").trim();
      return {above: "", defines: "", ...meta, text: text.slice(meta.title.length).replace(/^[.\s]+/, "").replace(/([。；：？！])\s+/g, "$1"), found: entry.score};
    }));
    return {records, counts: answers.map(({results}) => results.length)};
  }

  // 一节有多合用：先看标题是不是所查的，再看正文；标题越合，正文越不要紧
  function rate(record, query, terms, rarity) {
    const asked = squeeze(query), title = squeeze(record.title), parts = topicParts(record.title);
    const share = (text, weights) => {
      const place = wordStarts(text);
      const got = terms.reduce((sum, term, i) => sum + (contains(place, term) ? weights[i] : 0), 0);
      return got / (weights.reduce((sum, weight) => sum + weight, 0) || 1);
    };
    const number = record.title.match(/^[\d.]+|^第.{1,3}章/)?.[0];
    const bare = topic(record.title).replace(/（.*?）/g, "");
    let heading = 40 * share(record.title, rarity) ** 2;
    if (query === number || [title, squeeze(topic(record.title)), squeeze(bare)].includes(asked)) heading = 118;
    else if (record.kind === "term" && parts.includes(asked)) heading = 112;
    else if (record.defines.split(" ").map(squeeze).includes(asked)) heading = 100;
    else if (parts.includes(asked)) heading = 85 + 8 * asked.length / squeeze(bare).length;
    else if (title.includes(asked)) heading = 70 + 15 * asked.length / title.length + (squeeze(bare).startsWith(asked) ? 5 : 0);

    // 单个字母到处都有，含不含它说明不了什么
    const even = terms.map(term => han.test(term) || term.length > 1 ? 1 : .2), own = `${record.title} ${record.text}`;
    // 标题已经合了，就不必再逐词核对：“U-Net”与“UNet”切出的词不同
    const covered = heading >= 70 ? 1 : share(own, even) && share(`${own} ${record.above} ${record.page}`, even);
    const times = squeeze(record.text).split(asked).length - 1;
    let body = 20 * covered ** 2 + 6 * record.found / terms.length + (times ? 12 + 3 * Math.log2(times) : 0);
    if (RECAP.test(record.title)) body *= .7;
    if (record.kind === "aside") body *= .5;

    const level = record.kind === "term" || /^\d+\.\d+\.\d/.test(number) ? 0 : record.title === record.page ? 10 : 6;
    let score = heading + body;
    if (heading >= 70) score = heading + level + body / 5;
    if (heading >= 112) score = heading + level - record.order / 1000;      // 几章都有的标题，在前的优先
    return {...record, covered, score: record.kind === "citation" ? score / 6 : score};     // 文献里的词只作补充
  }

  async function findOnce(pagefind, query) {
    const terms = words(query);
    if (!terms.length) return [];
    const {records, rarity} = await candidates(pagefind, terms);
    return records.map(record => rate(record, query, terms, rarity));
  }

  // 原样、去掉问话、换成本书的说法，各查一遍，同一节取高的
  async function find(pagefind, query, same) {
    const asked = withoutAsking(query);
    const variants = [...new Set([query, asked, inBookWords(asked, same)].map(text => text.toLowerCase()))];
    const best = new Map();
    for (const variant of variants) for (const record of await findOnce(pagefind, variant)) {
      if (!(best.get(record.url)?.score >= record.score)) best.set(record.url, record);
    }
    const all = [...best.values()].sort((a, b) => b.score - a.score);
    const complete = all.filter(record => record.covered > .999);
    return {
      results: complete.length ? complete : all.filter(record => record.covered >= .5),
      complete: complete.length > 0,
      marks: [...new Set(variants.flatMap(variant => [variant, ...words(variant)]))],
    };
  }

  // 返回结果，以及要对读者说的话：instead 是改正后的查询，partial 表示没有一节含有所有的词
  async function search(text) {
    const {pagefind, table} = await load();
    const query = tidy(text, table.traditional);
    const answer = await find(pagefind, query, table.same);
    // 只碰上文献里某个更长的人名，多半也是打错了字
    const chance = answer.results.every(record => record.kind === "citation" && !wordStarts(record.text).includes(` ${words(query).at(-1)} `));
    if (!answer.complete || chance) {
      const instead = corrected(query, table.words);
      if (instead) {
        const better = await find(pagefind, instead, table.same);
        if (better.complete) return {...better, instead};
      }
    }
    return {...answer, partial: !answer.complete};
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

  // 摘一段：正文里所查的词最密的地方，尽量从一句的开头起；正文里没有，再从代码里摘
  function excerpt(text, marks, length = 90) {
    const [prose, code = ""] = text.split(CODE_BELOW);
    const source = ranges(prose, marks).length || !ranges(code, marks).length ? prose.trim() : code.trim();
    const found = ranges(source, marks);
    const weight = start => found.reduce((sum, [a, b]) => sum + (a >= start && b <= start + length ? b - a : 0), 0);
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
    for (const record of results) {
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
      + `<span class="book-search-excerpt">${excerpt(record.text, marks)}</span></a></li>`;
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
      onQuery(text);
      if (!text) {
        status.textContent = list.innerHTML = "";
        return;
      }
      const slow = setTimeout(() => status.textContent = "正在搜索……", 400);
      try {
        const answer = await search(text);
        if (mine !== latest) return;            // 读者又输入了别的
        list.innerHTML = listHtml(answer.results, answer.marks, answer.instead ?? text, limit);
        status.innerHTML = statusHtml(text, answer);
        list.marks = answer.marks;
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
