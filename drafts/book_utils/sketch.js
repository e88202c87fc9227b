(function () {
  var root = document.currentScript.parentElement;
  var canvas = root.querySelector("canvas");
  var context = canvas.getContext("2d");
  var color = "#fff";
  var last = null;

  var start = new Image();
  start.onload = function () { context.drawImage(start, 0, 0); };
  start.src = canvas.dataset.start;

  // 有内核时，同一处输出里有一个看不见的文本框：把画好的图写进去，Python 就读得到
  function send() {
    var boxes = document.querySelectorAll(".book-sketch-value textarea");
    var box = boxes[boxes.length - 1];
    if (!box) return;
    box.value = canvas.toDataURL("image/png");
    box.dispatchEvent(new Event("input", { bubbles: true }));
    box.dispatchEvent(new Event("change", { bubbles: true }));
  }

  function place(event) {
    var area = canvas.getBoundingClientRect();
    return [
      Math.floor((event.clientX - area.left) / area.width * canvas.width),
      Math.floor((event.clientY - area.top) / area.height * canvas.height),
    ];
  }

  // 逐个像素地画，不用抗锯齿的线：边缘图里只有黑与白
  function line(from, to) {
    var steps = Math.max(Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1]), 1);
    var width = color === "#fff" ? 1 : 4;
    context.fillStyle = color;
    for (var i = 0; i <= steps; i++) {
      var x = Math.round(from[0] + (to[0] - from[0]) * i / steps);
      var y = Math.round(from[1] + (to[1] - from[1]) * i / steps);
      context.fillRect(x - (width >> 1), y - (width >> 1), width, width);
    }
  }

  canvas.addEventListener("pointerdown", function (event) {
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    line(last, last);
    event.preventDefault();
  });
  canvas.addEventListener("pointermove", function (event) {
    if (!last) return;
    var now = place(event);
    line(last, now);
    last = now;
  });
  ["pointerup", "pointercancel"].forEach(function (name) {
    canvas.addEventListener(name, function () {
      if (last) send();
      last = null;
    });
  });

  root.addEventListener("click", function (event) {
    var action = event.target.dataset && event.target.dataset.do;
    if (action === "pen") color = "#fff";
    if (action === "eraser") color = "#000";
    if (action === "clear") {
      context.fillStyle = "#000";
      context.fillRect(0, 0, canvas.width, canvas.height);
      send();
    }
    if (action === "save") {
      var link = document.createElement("a");
      link.download = "线稿.png";
      link.href = canvas.toDataURL("image/png");
      link.click();
    }
  });
})();
