"use strict";
// Draws every figure from the JSON beside it, in the colours of the reader's theme; on paper, light and as wide as paper.
(function () {
  const PAPER = 670; // pixels between the margins of an A4 page
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: window.innerWidth > 700 ? "hover" : false,
    modeBarButtons: [["toImage", "resetScale2d"]],
    showSendToCloud: false, // plotly.js 4 offers by default to upload the figure
    plotlyServerURL: "",
  };
  let printing = false;
  const dark = () => !printing && (window.isDark ? window.isDark() : system.matches);

  function layoutOf(figure) {
    const style = getComputedStyle(document.documentElement);
    const ink = printing ? "#1b1f24" : style.getPropertyValue("--ink").trim();
    const page = printing ? "#ffffff" : style.getPropertyValue("--page").trim();
    const font = Object.assign({}, figure.layout.font, { color: ink });
    const hoverlabel = { bgcolor: page, font: { color: ink } };
    const size = printing ? { autosize: false, width: PAPER } : { autosize: true, width: undefined };
    return Object.assign({}, figure.layout, { font, hoverlabel, paper_bgcolor: "rgba(0,0,0,0)" }, size);
  }

  // the blue of light pages is too dim on dark ones: it takes the place of the sky blue, which turns paler
  const DARK = [
    ["#56B4E9", "#C7E7F9"],
    ["rgba(86,180,233,", "rgba(199,231,249,"],
    ["#0072B2", "#56B4E9"],
    ["rgba(0,114,178,", "rgba(86,180,233,"],
    ["#000000", "#e4e8ec"],
  ];
  const readable = (json) => (dark() ? DARK.reduce((text, [light, shown]) => text.replaceAll(light, shown), json) : json);

  const figures = Array.from(document.querySelectorAll("script[data-figure]"), function (source) {
    return { place: document.getElementById(source.dataset.figure), json: source.textContent };
  });

  function draw() {
    for (const { place, json } of figures) {
      const content = JSON.parse(readable(json));
      place.style.height = content.layout.height + "px"; // plotly.js leaves it to the page, and captions would overlap
      Plotly.react(place, content.data, layoutOf(content), config);
    }
    pairs().forEach(shareAxes);
  }

  // Two runs side by side deceive when their axes differ.
  function pairs() {
    const groups = new Map();
    for (const { place } of figures) {
      if (place.dataset.pair) groups.set(place.dataset.pair, [...(groups.get(place.dataset.pair) || []), place]);
    }
    return [...groups.values()].filter((group) => group.length === 2);
  }

  function shareAxes([left, right]) {
    const a = left._fullLayout, b = right._fullLayout, update = {};
    for (const key of Object.keys(a).filter((name) => /^[xy]axis\d*$/.test(name))) {
      const one = a[key], other = b[key];
      if (!other || one.type !== other.type || !["linear", "log"].includes(one.type)) continue;
      if (one.range[0] > one.range[1] || other.range[0] > other.range[1]) continue;
      update[key + ".range"] = [Math.min(one.range[0], other.range[0]), Math.max(one.range[1], other.range[1])];
    }
    for (const place of [left, right]) Plotly.relayout(place, structuredClone(update));
  }

  function print(begins) {
    printing = begins;
    for (const box of document.querySelectorAll(begins ? "details:not([open])" : "details[data-shut]")) {
      box.open = begins;
      box.toggleAttribute("data-shut", begins);
    }
    draw();
  }

  draw();
  document.addEventListener("themechange", draw);
  if (!window.isDark) system.addEventListener("change", draw);
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
})();
