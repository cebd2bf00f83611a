"use strict";
// Shows answers by arm, category and words; without it, all of them stand there.
(function () {
  const form = document.getElementById("answer-filter");
  if (!form) return;
  const questions = Array.from(document.querySelectorAll(".question"));
  const count = document.getElementById("answer-count");
  const total = document.querySelectorAll(".question .answer").length;

  function filter() {
    const arms = new Set(Array.from(form.querySelectorAll("[name=arm]:checked"), (box) => box.value));
    const category = form.elements.category.value;
    const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const question of questions) {
      const fits = category === "" || question.dataset.category === category;
      const asked = question.querySelector("h3").textContent;
      let here = 0;
      for (const answer of question.querySelectorAll(".answer")) {
        const text = (asked + " " + answer.textContent).toLowerCase();
        answer.hidden = !(fits && arms.has(answer.dataset.arm) && words.every((word) => text.includes(word)));
        here += answer.hidden ? 0 : 1;
      }
      question.hidden = here === 0;
      for (const more of question.querySelectorAll("details")) {
        more.hidden = !more.querySelector(".answer:not([hidden])");
        if (words.length > 0 && !more.hidden) more.open = true;
      }
      shown += here;
    }
    const further = document.querySelector(".further"); // the questions after the first few
    if (further) {
      further.hidden = !further.querySelector(".question:not([hidden])");
      if (words.length > 0 && !further.hidden) further.open = true;
    }
    count.textContent = shown === 0 ? "no answer matches" : shown + " of " + total + " answers";
  }

  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  filter();
})();
