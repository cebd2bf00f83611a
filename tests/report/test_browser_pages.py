"""The report and the comparison in a browser: drawn, sorted, filtered, dark, on paper, closed to what is foreign."""

from pathlib import Path

import pytest

from persona_probe.report.compare import write_comparison
from persona_probe.report.figures import figures_of
from persona_probe.report.html import write_report
from persona_probe.report.images import find_browser
from persona_probe.report.records import load_records
from tests.report.pages import run_script
from tests.report.run_records import write_run

BROWSER = find_browser()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: install the Debian package chromium"),
]

REPORT = """
  const all = (what) => Array.from(document.querySelectorAll(what)), one = (what) => document.querySelector(what);
  const put = (field, value) => { field.value = value; field.dispatchEvent(new Event("input", { bubbles: true })); };
  const seen = (what) => all(what).filter((e) => e.getClientRects().length).length;
  say.pwned = String(window.pwned);
  say.loaded = performance.getEntriesByType("resource").length;
  const folds = all("details:not([open])"), shown = (f) => f.querySelector(".main-svg");
  say.waiting = all(".figure").filter((f) => !shown(f)).every((f) => f.closest("details:not([open])"));
  for (const fold of folds) fold.open = true;
  await new Promise((done) => setTimeout(done, 500));
  say.drawn = all(".figure").filter((f) => f.querySelector(".main-svg")).map((f) => f.id.slice(7));
  say.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  say.nameless = all("main :is(input, select), button").filter((e) => !e.getAttribute("aria-label")
    && !(e.labels || []).length && !e.textContent.trim()).length;
  say.lost = all("a[href^='#']").filter((a) => !document.getElementById(a.hash.slice(1))).map((a) => a.hash);

  for (const fold of folds) fold.open = false;
  const table = one("#tested"), heads = Array.from(table.tHead.rows[0].cells);
  const effect = heads.findIndex((h) => h.textContent.includes("base up"));
  const order = () => Array.from(table.tBodies[0].rows, (row) => row.cells[0].textContent);
  table.closest("details").open = true;
  const button = heads[effect].querySelector("button");
  button.click(); say.ascending = order().slice(0, 3); say.sorted = heads[effect].getAttribute("aria-sort");
  button.click(); say.descending = order().slice(0, 2);
  const filter = table.closest("details").querySelector("input");
  put(filter, "candidate 2"); say.rows = Array.from(table.tBodies[0].rows).filter((r) => !r.hidden).length;
  say.counted = filter.nextElementSibling.textContent; put(filter, "");

  const form = one("#answer-filter"), count = one("#answer-count");
  say.answers = count.textContent;
  const box = form.querySelector("[value=incorrect]"); box.click(); say.without = count.textContent;
  say.hostile = all(".answer[data-arm=incorrect]:not([hidden])").length; box.click();
  put(form.elements.category, "money"); say.money = all(".question:not([hidden])").length;
  put(form.elements.words, "nothing like this"); say.none = count.textContent; form.reset();
  await new Promise((done) => setTimeout(done, 20)); say.reset = count.textContent;

  const figure = one("#figure-arms"), paint = () => getComputedStyle(document.body).backgroundColor;
  say.light = [paint(), figure._fullLayout.font.color]; one("#theme").click();
  await new Promise((done) => setTimeout(done, 200));
  say.dark = [paint(), figure._fullLayout.font.color, one("#theme").getAttribute("aria-pressed")];

  const term = one("main a.term"); term.focus();
  const meaning = document.getElementById(term.getAttribute("aria-describedby")).textContent;
  say.tip = [one("#tip").hidden, one("#tip").textContent === meaning];
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" })); say.escaped = one("#tip").hidden;

  const shut = all("details:not([open])").length; dispatchEvent(new Event("beforeprint"));
  say.paper = [shut > 0, all("details:not([open])").length === shut, figure._fullLayout.width];
  say.paper.push(figure._fullLayout.font.color);
  dispatchEvent(new Event("afterprint"));
  say.after = [all("details:not([open])").length === shut, figure._fullLayout.font.color];
"""

COMPARISON = """
  const all = (what) => Array.from(document.querySelectorAll(what));
  say.drawn = all(".figure").filter((f) => f.querySelector(".main-svg")).map((f) => f.id);
  const ranges = (id) => document.getElementById(id)._fullLayout.yaxis.range.map((v) => Math.round(v * 1e6));
  say.ranges = [ranges("figure-A-trajectory"), ranges("figure-B-trajectory")];
  say.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
"""


def test_the_report_works_and_lets_nothing_foreign_run(run_folder: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    records = load_records(run_folder)
    said, console = run_script(BROWSER, write_report(run_folder), tmp_path / "profile", REPORT)
    assert console == [] and "error" not in said
    assert said["pwned"] == "undefined" and said["loaded"] == 0
    assert sorted(said["drawn"]) == sorted(n for n, s in figures_of(records).items() if not s.data(records).empty)
    assert said["waiting"]  # a figure that is not drawn yet is in a closed fold
    assert said["wide"] <= 0 and said["nameless"] == 0 and said["lost"] == []
    assert said["ascending"] == ["100", "101", "102"] and said["sorted"] == "ascending"  # random latents, from -0.1
    assert said["descending"] == ["17", "21"]
    assert said["rows"] < 15 and said["counted"] == f"{said['rows']} of 15 rows"
    assert said["answers"] == said["reset"] == "14 of 14 answers" and said["without"] == "10 of 14 answers"
    assert said["hostile"] == 0 and said["money"] == 1 and said["none"] == "no answer matches"
    assert said["light"] == ["rgb(255, 255, 255)", "#1b1f24"] and said["dark"] == ["rgb(20, 23, 27)", "#e4e8ec", "true"]
    assert said["tip"] == [False, True] and said["escaped"]
    assert said["paper"] == [True, True, 680, "#1b1f24"] and said["after"] == [True, "#e4e8ec"]


def test_the_comparison_draws_both_runs_on_the_same_axes(run_folder: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    other = write_run(tmp_path / "other")
    evals = load_records(other).evals
    evals.assign(value=evals["value"] * 3).to_parquet(other / "evals.parquet")
    for name in ("steering.parquet", "latents.parquet", "cards.json"):  # fewer figures, quicker
        (run_folder / name).unlink()
        (other / name).unlink()
    page = write_comparison(run_folder, other, tmp_path / "compare.html")
    said, console = run_script(BROWSER, page, tmp_path / "profile", COMPARISON)
    assert console == [] and "error" not in said and said["wide"] <= 0
    assert {"figure-A-arms", "figure-B-arms"} <= set(said["drawn"]) and len(said["drawn"]) % 2 == 0
    assert said["ranges"][0] == said["ranges"][1]
