"use strict";
// A term's meaning beside it while it has the pointer or the focus, and the section that is read, in the contents.
// Without it, a term is a link to the glossary.
(function () {
  const tip = document.getElementById("tip");
  let leaving = 0;

  function show(term) {
    clearTimeout(leaving);
    tip.textContent = document.getElementById(term.getAttribute("aria-describedby")).textContent;
    tip.hidden = false;
    const at = term.getBoundingClientRect(), room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const below = at.bottom + 6;
    const fits = below + tip.offsetHeight < window.innerHeight;
    tip.style.left = Math.max(8, Math.min(at.left, room)) + "px";
    tip.style.top = (fits ? below : Math.max(8, at.top - tip.offsetHeight - 6)) + "px";
  }
  const hide = () => { tip.hidden = true; };
  const leave = () => { leaving = setTimeout(hide, 200); };

  for (const term of document.querySelectorAll("a.term")) {
    term.addEventListener("pointerenter", () => show(term));
    term.addEventListener("focus", () => show(term));
    term.addEventListener("pointerleave", leave);
    term.addEventListener("blur", hide);
  }
  tip.addEventListener("pointerenter", () => clearTimeout(leaving));
  tip.addEventListener("pointerleave", leave);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.addEventListener("scroll", hide, { passive: true });

  // the section that is read: the last whose heading has passed the upper third
  const links = Array.from(document.querySelectorAll("nav a[href^='#']"));
  const headings = links.map((link) => document.getElementById(link.hash.slice(1)));
  function follow() {
    const passed = headings.filter((one) => one.getBoundingClientRect().top < window.innerHeight / 3).length;
    links.forEach(function (link, place) {
      if (place === Math.max(0, passed - 1)) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    });
  }
  document.addEventListener("scroll", follow, { passive: true });
  follow();
})();
