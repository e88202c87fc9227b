// 比屏幕宽的公式在自己的框里横向滚动；让它能用 Tab 键选中，再用方向键滚动（代码和表格由主题照管）
addEventListener("DOMContentLoaded", () => window.MathJax?.startup?.promise.then(() => {
  const formulas = document.querySelectorAll("div.math mjx-container");
  const update = () => formulas.forEach(formula => {
    if (formula.scrollWidth > formula.clientWidth) formula.tabIndex = 0;
    else formula.removeAttribute("tabindex");
  });
  const resized = new ResizeObserver(update);
  formulas.forEach(formula => resized.observe(formula));
  document.fonts.addEventListener("loadingdone", update);       // 字体到了之后，公式的宽度会变
}));
