"use strict";
// Search and sorting of the cards; without it the page shows all of them in the order of the file.
(function () {
  const list = document.getElementById("cards");
  const cards = Array.from(list.children);
  const search = document.getElementById("search");
  const order = document.getElementById("order");
  const count = document.getElementById("count");

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      card.hidden = !words.every((word) => card.dataset.search.includes(word));
      shown += card.hidden ? 0 : 1;
    }
    count.textContent = shown === 0 ? "no card matches" : shown + " of " + cards.length + " cards";
  }

  function sort() {
    const key = order.value;
    const place = new Map(cards.map((card) => [card, JSON.parse(card.dataset.order)]));
    const value = (card) => (key in place.get(card) ? place.get(card)[key] : Infinity);
    const listed = (card) => place.get(card).listed;
    const before = (a, b) => (value(a) === value(b) ? listed(a) - listed(b) : value(a) < value(b) ? -1 : 1);
    list.append(...cards.slice().sort(before));
  }

  search.addEventListener("input", filter);
  order.addEventListener("change", sort);
  filter();
})();
