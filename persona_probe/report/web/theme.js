"use strict";
// Light or dark: as the system has it until the reader says otherwise. It runs before the page is drawn, so nothing flashes.
(function () {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const KEY = "persona-probe-theme";

  function remembered() {
    try { return localStorage.getItem(KEY); } catch (error) { return null; } // storage may be closed to local files
  }
  function remember(theme) {
    try { localStorage.setItem(KEY, theme); } catch (error) { root.dataset.themeKept = "no"; }
  }

  if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();
  window.isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const tell = () => document.dispatchEvent(new Event("themechange"));
  system.addEventListener("change", tell);

  document.addEventListener("DOMContentLoaded", function () {
    const button = document.getElementById("theme");
    if (!button) return;
    const show = () => button.setAttribute("aria-pressed", String(window.isDark()));
    button.hidden = false;
    show();
    document.addEventListener("themechange", show);
    button.addEventListener("click", function () {
      root.dataset.theme = window.isDark() ? "light" : "dark";
      remember(root.dataset.theme);
      tell();
    });
  });
})();
