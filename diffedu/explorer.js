// Turns the static frame of one StepExplorer into a slider over all of its frames.
(function (id) {
  const root = document.getElementById(id);
  const data = JSON.parse(root.querySelector("script[type]").textContent);
  const { shape, start, labels, captions, frames } = data;
  const inputs = [...root.querySelectorAll("input, select")];
  const values = inputs.map((input) => input.closest(".de-control").querySelector(".de-value"));
  const caption = root.querySelector("output");
  const button = root.querySelector("button");
  const shown = ["light", "dark"].map((theme) => root.querySelector(".only-" + theme));
  const images = shown.map((image) => ({ [start]: image })); // by theme, then by frame
  const position = () => inputs.map((input) => Number(input.value));
  const index = (where) => where.reduce((sum, k, axis) => sum * shape[axis] + k, 0);

  function image(theme, frame) {
    if (!images[theme][frame]) {
      const { className } = shown[theme];
      const made = Object.assign(new Image(), { className, alt: captions[frame], decoding: "sync" });
      made.setAttribute("width", shown[theme].getAttribute("width"));
      made.setAttribute("height", shown[theme].getAttribute("height"));
      made.src = "data:image/webp;base64," + frames[frame][theme];
      images[theme][frame] = made;
    }
    return images[theme][frame];
  }

  function put(theme, frame) {
    const next = image(theme, frame);
    if (next !== shown[theme]) shown[theme].replaceWith(next);
    shown[theme] = next;
  }

  // A picture is put as soon as it is loaded: to wait for its decoding would take one frame more.
  function show(theme, frame) {
    const next = image(theme, frame);
    const here = () => index(position()) === frame && put(theme, frame);
    if (next.complete) here();
    else next.addEventListener("load", here, { once: true });
  }

  let later = 0;
  function update() {
    const where = position();
    const frame = index(where);
    inputs.forEach((input, axis) => {
      const label = labels[axis][where[axis]];
      if (!values[axis]) return;
      input.setAttribute("aria-valuetext", label);
      input.style.setProperty("--de-fill", (100 * where[axis]) / (shape[axis] - 1) + "%");
      values[axis].textContent = label;
    });
    const visible = getComputedStyle(shown[1]).display === "none" ? 0 : 1;
    show(visible, frame);
    if (caption.textContent !== captions[frame]) caption.textContent = captions[frame];
    clearTimeout(later);
    later = setTimeout(() => { // after this picture is painted
      show(1 - visible, frame);
      if (document.readyState === "complete") prepare(where, visible);
    });
  }

  // The pictures one step away are decoded before the key is pressed.
  function prepare(where, theme) {
    shape.forEach((size, axis) => {
      for (const k of [where[axis] + 1, where[axis] - 1, 0, size - 1]) {
        if (k < 0 || k >= size) continue;
        const near = index(where.map((v, a) => (a === axis ? k : v)));
        image(theme, near).decode().catch(() => {});
      }
    });
  }

  let timer = 0;
  function running(on) {
    button.textContent = on ? "Pause" : "Play";
    button.classList.toggle("de-running", on);
    caption.setAttribute("aria-live", on ? "off" : "polite"); // a running film is not read aloud
    if (!on) timer = clearInterval(timer);
  }
  function play() {
    const input = inputs.find((each) => each.id === button.getAttribute("aria-controls"));
    const go = (k) => {
      input.value = k;
      update();
      if (input.value === input.max) running(false);
    };
    if (timer) return running(false);
    running(true);
    if (input.value === input.max) go(0);
    timer = setInterval(() => go(Number(input.value) + 1), Math.min(400, Math.max(120, 4000 / input.max)));
  }

  inputs.forEach((input) => input.addEventListener("input", () => (timer && running(false), update())));
  if (button) button.addEventListener("click", play);
  root.querySelector(".de-controls").hidden = false;
  update();
  // While the page loads, only what is looked at is made; then the rest: loading is cheap, decoding is not.
  const rest = () => (update(), frames.forEach((_, frame) => [0, 1].forEach((theme) => image(theme, frame))));
  if (document.readyState === "complete") rest();
  else addEventListener("load", () => setTimeout(rest, 200));
})
