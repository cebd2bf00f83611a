"use strict";
// Draws every figure from the JSON beside it, in the colours of the reader's theme; on paper, light and as wide as paper.
// Closed folds stay closed on paper.
(function () {
  const PAPER = 680; // pixels between the margins of an A4 page
  const TALL = 300; // pixels beyond which a figure shrinks on paper, so that pages fill
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: window.innerWidth > 700 ? "hover" : false,
    modeBarButtons: [["toImage", "resetScale2d"]],
    showSendToCloud: false, // plotly.js 4 offers by default to upload the figure
    plotlyServerURL: "",
  };
  const HALF = 0.86; // a figure that shares a row with another is less high too
  const WIDE = 700; // pixels of a figure that has a row for itself
  const NARROW = 480; // pixels of a figure on a phone, whose text is smaller
  let printing = false;
  const dark = () => !printing && (window.isDark ? window.isDark() : system.matches);

  function layoutOf(figure, place) {
    const style = getComputedStyle(document.documentElement);
    const ink = printing ? "#1b1f24" : style.getPropertyValue("--ink").trim();
    const page = printing ? "#ffffff" : style.getPropertyValue("--page").trim();
    const font = Object.assign({}, figure.layout.font, { color: ink });
    if (printing || (place && place.clientWidth < NARROW)) font.size = printing ? 10 : 11;
    const small = printing || (place && place.clientWidth < WIDE); // plotly.js writes the titles of panels large
    const sized = (note) => Object.assign({}, note, { font: Object.assign({}, note.font, { size: font.size || 12 }) });
    const notes = figure.layout.annotations && small ? { annotations: figure.layout.annotations.map(sized) } : {};
    const hoverlabel = { bgcolor: page, font: { color: ink } };
    const half = place && place.closest(".columns > *:not(.wide)") ? HALF : 1;
    const height = printing ? Math.min(figure.layout.height, TALL + (figure.layout.height - TALL) * 0.35) : Math.round(figure.layout.height * half);
    const size = printing ? { autosize: false, width: PAPER, height } : { autosize: true, width: undefined, height };
    const look = { font, hoverlabel, paper_bgcolor: "rgba(0,0,0,0)" };
    return Object.assign({}, figure.layout, look, notes, size);
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

  // a figure in a closed fold is drawn when the fold opens: there it has no width yet
  const folded = (place) => place.closest("details:not([open])");

  function drawOne({ place, json }) {
    const content = JSON.parse(readable(json)), layout = layoutOf(content, place);
    const height = layout.height;
    place.style.height = height + "px"; // plotly.js leaves it to the page, and captions would overlap
    Plotly.react(place, content.data, layout, config);
    giveLegendRoom(place, height);
  }

  // A legend of several lines would take its room from the plot: the figure grows by what is beyond two lines.
  function giveLegendRoom(place, height) {
    const full = place._fullLayout, legend = full.showlegend && full.legend;
    if (!legend || legend.orientation !== "h") return;
    // plotly.js gives it the width of the plot alone: left of it there is room as well
    Plotly.relayout(place, { "legend.x": (4 - full._size.l) / full._size.w });
    const extra = Math.max(0, Math.round(place._fullLayout.legend._height) - 44);
    if (extra === 0) return;
    place.style.height = height + extra + "px";
    Plotly.relayout(place, { height: height + extra });
  }

  function draw() {
    figures.filter(({ place }) => !folded(place)).forEach(drawOne);
    pairs().forEach(shareAxes);
  }

  function opened(event) {
    if (!event.target.open) return;
    figures.filter(({ place }) => event.target.contains(place) && !folded(place)).forEach(drawOne);
  }

  // Two runs side by side deceive when their axes differ.
  function pairs() {
    const groups = new Map();
    for (const { place } of figures) {
      if (place.dataset.pair) groups.set(place.dataset.pair, [...(groups.get(place.dataset.pair) || []), place]);
    }
    return [...groups.values()].filter((group) => group.length === 2 && group.every((place) => place._fullLayout));
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

  // paper shows what the reader has open: everything would be some forty pages
  function print(begins) {
    printing = begins;
    draw();
  }

  draw();
  document.addEventListener("toggle", opened, true);
  document.addEventListener("themechange", draw);
  if (!window.isDark) system.addEventListener("change", draw);
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
})();
