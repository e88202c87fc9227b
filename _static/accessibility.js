// 比屏幕宽的公式在自己的框里横向滚动；让它能用 Tab 键选中，再用方向键滚动（代码和表格由主题照管）
addEventListener("DOMContentLoaded", () => window.MathJax?.startup?.promise.then(() => {
  const displayed = document.querySelectorAll("div.math mjx-container");
  const inline = [...document.querySelectorAll("article span.math mjx-container")]
    .filter(formula => !formula.closest("table"));              // 宽的表整个横向滚动
  const narrow = matchMedia("(max-width: 576px)");              // 再宽的屏幕，行内的公式都放得下
  const block = "p, li, dd, dt, figcaption, h1, h2, h3, h4, h5";
  const scrollable = (formula, wide) => wide ? formula.tabIndex = 0 : formula.removeAttribute("tabindex");

  function update() {
    displayed.forEach(formula => scrollable(formula, formula.scrollWidth > formula.clientWidth));
    // 先量完再改，免得每改一个都重新排版；一个字的余地留给跟在公式后面的标点
    const wide = inline.map(formula => narrow.matches
      && formula.firstElementChild.getBoundingClientRect().width > (formula.closest(block)?.clientWidth ?? Infinity) - 20);
    inline.forEach((formula, i) => {
      if (formula.classList.contains("book-wide") === wide[i]) return;
      formula.classList.toggle("book-wide", wide[i]);
      scrollable(formula, wide[i]);
    });
  }

  const resized = new ResizeObserver(update);
  displayed.forEach(formula => resized.observe(formula));
  resized.observe(document.querySelector("article"));
  document.fonts.addEventListener("loadingdone", update);       // 字体到了之后，公式的宽度会变
}));
