"use strict";
// Draws every figure from the JSON beside it, in the colours of the reader's scheme.
(function () {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: window.innerWidth > 700 ? "hover" : false,
    modeBarButtons: [["toImage", "resetScale2d"]],
    showSendToCloud: false, // plotly.js 4 offers by default to upload the figure
    plotlyServerURL: "",
  };

  function colours() {
    const style = getComputedStyle(document.documentElement);
    return { ink: style.getPropertyValue("--ink").trim(), page: style.getPropertyValue("--page").trim() };
  }

  function layoutOf(figure) {
    const { ink, page } = colours();
    const font = Object.assign({}, figure.layout.font, { color: ink });
    const hoverlabel = { bgcolor: page, font: { color: ink } };
    return Object.assign({}, figure.layout, { font, hoverlabel, paper_bgcolor: "rgba(0,0,0,0)", autosize: true });
  }

  // the blue of light pages is too dim on dark ones: it takes the place of the sky blue, which turns paler
  const DARK = [
    ["#56B4E9", "#C7E7F9"],
    ["rgba(86,180,233,", "rgba(199,231,249,"],
    ["#0072B2", "#56B4E9"],
    ["rgba(0,114,178,", "rgba(86,180,233,"],
  ];
  function readable(json) {
    return dark.matches ? DARK.reduce((text, [light, shown]) => text.replaceAll(light, shown), json) : json;
  }

  const figures = Array.from(document.querySelectorAll("script[data-figure]"), function (source) {
    return { place: document.getElementById(source.dataset.figure), json: source.textContent };
  });

  function draw() {
    for (const { place, json } of figures) {
      const content = JSON.parse(readable(json));
      Plotly.react(place, content.data, layoutOf(content), config);
    }
  }

  draw();
  dark.addEventListener("change", draw);
})();
