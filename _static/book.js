// Whatever scrolls sideways must be reachable by keyboard, and nothing else should be a tab stop.
(() => {
  const SCROLLING = ".bd-article div.math, .cell_output .output, .pst-scrollable-table-container";
  const mark = () => {
    for (const box of document.querySelectorAll(SCROLLING)) {
      if (box.scrollWidth > box.clientWidth) box.setAttribute("tabindex", "0");
      else box.removeAttribute("tabindex");
    }
  };
  window.addEventListener("load", () => {
    if (!("ResizeObserver" in window)) return mark();
    const watch = new ResizeObserver(mark);
    document.querySelectorAll(".bd-article div.math, .bd-article").forEach((box) => watch.observe(box));
  });
})();

// Mathematics waits until the page is read: compiling MathJax would hold up the first key press on a slider.
for (const { href } of document.querySelectorAll('link[rel="preload"][href$="mathjax.js"]')) {
  document.head.append(Object.assign(document.createElement("script"), { src: href }));
}
