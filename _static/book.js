// 打印时一律用亮色，并展开所有折叠的答案和代码；印完恢复原样
let restore = () => {};
addEventListener("beforeprint", () => {
  const page = document.documentElement.dataset, theme = page.theme;
  const closed = [...document.querySelectorAll("details:not([open])")];
  page.theme = "light";
  closed.forEach(details => details.open = true);
  restore = () => {
    page.theme = theme;
    closed.forEach(details => details.open = false);
  };
});
addEventListener("afterprint", () => restore());
