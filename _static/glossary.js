// 术语的释义：鼠标停留、键盘聚焦或手指轻触时，在词的旁边显示；没有脚本时只是普通链接。
// 释义由 _ext/reading.py 在构建时放进页面，这里不发任何请求。
addEventListener("DOMContentLoaded", () => {
  const data = document.getElementById("book-terms");
  if (!data) return;
  const terms = JSON.parse(data.textContent);

  const tip = document.createElement("div");
  Object.assign(tip, {id: "book-tip", hidden: true});
  tip.setAttribute("role", "tooltip");
  document.body.append(tip);
  let owner = null;             // 正在解释的那个词
  let timer;

  function show(link) {
    clearTimeout(timer);
    if (owner === link) return;
    hide();
    const [name, definition] = terms[link.hash.slice(1)];
    tip.innerHTML = `<strong></strong>${definition}<a tabindex="-1">到术语表</a>`;
    tip.firstChild.textContent = name;
    tip.lastChild.href = link.href;
    tip.hidden = false;
    owner = link;
    link.setAttribute("aria-describedby", tip.id);
    place();
    // 释义里有公式时排好再放一次，大小会变
    window.MathJax?.typesetPromise?.([tip]).then(place);
  }

  function hide() {
    clearTimeout(timer);
    owner?.removeAttribute("aria-describedby");
    owner = null;
    tip.hidden = true;
  }

  function place() {
    if (!owner) return;
    const word = owner.getClientRects()[0];       // 词断成两行时，取前一行的位置
    const margin = 8, width = document.documentElement.clientWidth;
    const left = Math.max(margin, Math.min(word.left, width - tip.offsetWidth - margin));
    const below = word.bottom + 6 + tip.offsetHeight < innerHeight;
    const top = below ? word.bottom + 6 : word.top - tip.offsetHeight - 6;
    Object.assign(tip.style, {left: `${left + scrollX}px`, top: `${top + scrollY}px`});
  }

  function later(action, ms) {
    clearTimeout(timer);
    timer = setTimeout(action, ms);
  }

  for (const link of document.querySelectorAll("article a:has(> .std-term)")) {
    if (!(link.hash.slice(1) in terms)) continue;
    let byTouch = false;        // 这一次按下的是手指，而且释义还没有显示
    link.addEventListener("pointerenter", event => event.pointerType === "mouse" && later(() => show(link), 120));
    link.addEventListener("pointerleave", event => event.pointerType === "mouse" && later(hide, 250));
    link.addEventListener("pointerdown", event => byTouch = event.pointerType === "touch" && owner !== link);
    link.addEventListener("focus", () => show(link));
    link.addEventListener("blur", event => tip.contains(event.relatedTarget) || later(hide, 100));
    // 手指第一次轻触只看释义，再触一次，或点释义里的链接，才去术语表
    link.addEventListener("click", event => {
      if (!byTouch) return;
      byTouch = false;
      event.preventDefault();
      show(link);
    });
  }
  // 鼠标可以移到释义上选字、点链接
  tip.addEventListener("pointerenter", () => clearTimeout(timer));
  tip.addEventListener("pointerleave", event => event.pointerType === "mouse" && later(hide, 250));
  document.addEventListener("keydown", event => event.key === "Escape" && hide());
  document.addEventListener("pointerdown", event => owner && !owner.contains(event.target) && !tip.contains(event.target) && hide());
  addEventListener("resize", hide);
});
