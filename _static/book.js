// 打印时一律用亮色，展开所有折叠的答案和代码，滑块回到中间一帧；印完恢复原样
let restore = () => {};
addEventListener("beforeprint", () => {
  const page = document.documentElement.dataset, theme = page.theme;
  const closed = [...document.querySelectorAll("details:not([open])")];
  const sliders = [...document.querySelectorAll(".book-slider input")];
  const values = sliders.map(input => input.value);
  const move = (input, value) => {
    input.value = value;
    input.dispatchEvent(new Event("input"));
  };
  page.theme = "light";
  closed.forEach(details => details.open = true);
  sliders.forEach(input => move(input, Math.ceil(input.max / 2)));
  restore = () => {
    page.theme = theme;
    closed.forEach(details => details.open = false);
    sliders.forEach((input, i) => move(input, values[i]));
  };
});
addEventListener("afterprint", () => restore());
