(() => {
  const root = document.currentScript.parentElement;
  const {frames, alts, labels} = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const inputs = [...root.querySelectorAll('input')], image = root.querySelector('img');
  const show = () => {
    let index = 0;
    inputs.forEach((input, i) => {
      index = index * labels[i].length + Number(input.value);
      const text = labels[i][input.value];
      input.setAttribute('aria-valuetext', text);
      input.parentElement.querySelector('output').textContent = text;
    });
    image.src = frames[index];
    image.alt = alts[index];
  };
  inputs.forEach(input => {
    input.disabled = false;
    input.addEventListener('input', show);
  });
  root.querySelector('.book-slider-still').remove();
  show();
  // 返回本页时，浏览器晚些时候才恢复滑块的位置
  addEventListener('pageshow', show, {once: true});
})();
