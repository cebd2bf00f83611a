"use strict";
// Sorting by column and filtering by text; without it, tables stand in the order of the file.
(function () {
  const LONG = 8; // rows from which a filter is worth its space
  const sorter = new Intl.Collator("en", { numeric: true });

  // the number that a cell begins with, so that "+0.31 [+0.22, +0.40]" sorts by its estimate
  function value(row, column) {
    const text = row.cells[column].textContent.trim();
    const found = /^[+-]?[\d,]*\.?\d+(e[+-]?\d+)?/i.exec(text.replace("−", "-"));
    return { text, number: found ? Number(found[0].replaceAll(",", "")) : NaN };
  }

  function compare(a, b, direction) {
    if (Number.isNaN(a.number) !== Number.isNaN(b.number)) return Number.isNaN(a.number) ? 1 : -1; // no number: last
    const order = Number.isNaN(a.number) ? sorter.compare(a.text, b.text) : a.number - b.number;
    return order * direction;
  }

  function sort(table, column, heading) {
    const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const rows = Array.from(table.tBodies[0].rows, (row) => [value(row, column), row]);
    rows.sort(([a], [b]) => compare(a, b, direction));
    table.tBodies[0].append(...rows.map(([, row]) => row));
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  }

  function sortable(table) {
    Array.from(table.tHead.rows[0].cells).forEach(function (heading, column) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      button.addEventListener("click", () => sort(table, column, heading));
      heading.append(button);
    });
  }

  function filterable(table) {
    const rows = Array.from(table.tBodies[0].rows);
    if (rows.length < LONG) return;
    const box = document.createElement("p"), field = document.createElement("input"), count = document.createElement("span");
    box.className = "finder";
    field.type = "search";
    field.placeholder = "filter rows";
    field.setAttribute("aria-label", "Filter rows of: " + (table.caption ? table.caption.textContent : "this table"));
    count.className = "muted";
    count.setAttribute("role", "status");
    field.addEventListener("input", function () {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
      const shown = rows.filter((row) => !row.hidden).length;
      count.textContent = shown + " of " + rows.length + " rows";
    });
    box.append(field, count);
    table.closest(".scroll").before(box);
  }

  for (const table of document.querySelectorAll("table.data")) {
    filterable(table);
    sortable(table);
  }
})();
