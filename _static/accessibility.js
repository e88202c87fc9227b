// 比屏幕宽的公式在自己的框里横向滚动；让它能用 Tab 键选中，再用方向键滚动（代码和表格由主题照管）
addEventListener("DOMContentLoaded", () => {
  const update = new ResizeObserver(entries => entries.forEach(({target}) => {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }));
  window.MathJax?.startup?.promise.then(() =>
    document.querySelectorAll("div.math mjx-container").forEach(formula => update.observe(formula)));
});
