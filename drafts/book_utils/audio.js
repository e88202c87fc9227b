(() => {
  const root = document.currentScript.parentElement;
  root.querySelectorAll('figure').forEach(figure => {
    const audio = figure.querySelector('audio'), line = figure.querySelector('span');
    const follow = () => {
      if (line && audio.duration) line.style.left = `${100 * audio.currentTime / audio.duration}%`;
      if (!audio.paused) requestAnimationFrame(follow);
    };
    audio.addEventListener('play', () => {
      document.querySelectorAll('.book-player audio').forEach(other => { if (other !== audio) other.pause(); });
      if (line) line.hidden = false;
      follow();
    });
    audio.addEventListener('seeked', follow);
  });
  const input = root.querySelector('input');
  if (!input) return;
  const {frames, sounds, alts, labels} = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const audio = root.querySelector('audio'), image = root.querySelector('img'), output = root.querySelector('output');
  let shown = Number(input.value);
  const show = () => {
    const index = Number(input.value);
    input.setAttribute('aria-valuetext', labels[index]);
    output.textContent = labels[index];
    image.src = frames[index];
    image.alt = alts[index];
    if (index === shown) return;
    shown = index;
    const playing = !audio.paused, time = audio.currentTime;
    audio.src = sounds[index];
    if (playing) {
      audio.addEventListener('loadedmetadata', () => { audio.currentTime = time; }, {once: true});
      audio.play();
    }
  };
  input.disabled = false;
  input.addEventListener('input', show);
  show();
  // 返回本页时，浏览器晚些时候才恢复滑块的位置
  addEventListener('pageshow', show, {once: true});
})();
