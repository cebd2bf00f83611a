"""Hostile strings on every surface: pages, a terminal, spreadsheets; none may run, and no request may leave."""

import asyncio
import csv
import io
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.assault.counts import Count, Settings
from benchmarks.assault.hostile_strings import hostile_strings, marker
from persona_probe.report.images import find_browser
from tests.report.pages import run_script

LOOK = """
  const text = document.documentElement.textContent, all = (what) => Array.from(document.querySelectorAll(what));
  for (const one of all("details")) one.open = true;
  for (const one of all("a[href^='javascript:' i], summary")) one.click();
  await new Promise((done) => setTimeout(done, 300));
  say.pwned = window.pwned || [];
  say.loaded = performance.getEntriesByType("resource").map((one) => one.name);
  say.shown = %s.filter((one) => text.includes(one));
  say.active = all("iframe, object, embed, base, a[href^='javascript:' i]").map((one) => one.outerHTML.slice(0, 80));
  say.active.push(...all("*").filter((one) => one.getAttributeNames().some((name) => name.startsWith("on")))
    .map((one) => one.outerHTML.slice(0, 80)));
"""
"""What a page says of itself when everything in it was opened, and its scripted links were pressed."""
LIMIT_S = 600
"""For one page, on a busy machine."""
TRIES = 3
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What a terminal would act upon."""


@contextmanager
def listener() -> Iterator[tuple[str, list[str]]]:
    """An address on this machine, and the paths that were asked there."""
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


# --- The pages


def hostile_run(folder: Path, strings: Sequence[str]) -> Path:
    """A made-up run whose answers, questions, labels, tokens, names and headline are hostile."""
    from tests.report.run_records import cards, manifest, samples, summary, write_run

    write_run(folder)
    answers = samples()
    rows = [{**answers[n % len(answers)], "question": text, "question_id": f"h{n}"} for n, text in enumerate(strings)]
    rows = [{**row, "answer": strings[n], "arm": arm} for n, row in enumerate(rows) for arm in ("base", "incorrect")]
    _lines(folder / "samples.jsonl", rows)
    cards_ = cards()
    for n, text in enumerate(strings):
        card = cards_[n % len(cards_)]
        example = {"source": text, "tokens": [text, " you"], "values": [2.0, 1.0], "maximum": 2.0}
        card["label"] = f"{card['label']} {text}"
        card["examples"] = [*card["examples"], example]  # pyright: ignore[reportGeneralTypeIssues]
        card["top_tokens"] = [*card["top_tokens"], {"token": text, "logit": 1.0}]  # pyright: ignore[reportGeneralTypeIssues]
    (folder / "cards.json").write_text(json.dumps(cards_), "utf-8")
    said = summary()
    everything = " ".join(strings)
    said["headline"], said["study"], said["base_model"] = everything, everything, everything
    said["persona_feature"] = {"latent": 17, "label": everything}
    said["checks"] = [{"name": text, "passed": n % 2 == 0, "statement": text} for n, text in enumerate(strings)]
    (folder / "summary.json").write_text(json.dumps(said), "utf-8")
    config = manifest()
    config["config"] = {**config["config"], "label": everything}  # pyright: ignore[reportGeneralTypeIssues]
    (folder / "manifest.json").write_text(json.dumps({**config, "command": everything}), "utf-8")
    latents = pd.read_parquet(folder / "latents.parquet")
    latents["label"] = [everything if n == 1 else strings[n % len(strings)] for n in range(len(latents))]
    latents.to_parquet(folder / "latents.parquet")
    return folder


def _lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def report_page(place: Path, strings: Sequence[str]) -> Path:
    """`report.html`."""
    from persona_probe.report.html import write_report

    return write_report(hostile_run(place / "run", strings))


def comparison_page(place: Path, strings: Sequence[str]) -> Path:
    """What `compare` writes."""
    from persona_probe.report.compare import write_comparison

    return write_comparison(place / "run", hostile_run(place / "other", strings[::-1]), place / "compare.html")


def cards_page(place: Path, strings: Sequence[str]) -> Path:
    """`cards.html`, made of cards with hostile names, tokens and sources."""
    from persona_probe.report import cards
    from tests.report.made_up_cards import made_card

    made = [made_card(100 + n, text, n + 1, n + 1, text) for n, text in enumerate(strings)]
    return _page(place / "cards.html", cards.cards_page(made, strings[0], strings[1]))


def notebook_page(place: Path, strings: Sequence[str]) -> Path:
    """Everything that shows itself in a notebook, on a page without a policy, as a notebook is."""
    from persona_probe.report.tables import FeatureTable, StudyVerdict, Table
    from tests.report.made_up_cards import made_card

    latents = pd.read_parquet(place / "run" / "latents.parquet")
    verdict = StudyVerdict(
        strings[0], tuple((text, False, text) for text in strings), dict(zip(strings, strings, strict=True))
    )
    shown: list[Any] = [FeatureTable.of(latents, 40), verdict]
    shown += [made_card(200 + n, text, n + 1, n + 1, text) for n, text in enumerate(strings)]
    parts = [Table(strings[:3], [strings], strings[3]).html(), *(one._repr_html_() for one in shown)]
    body = "\n".join(map(str, parts))
    return _page(place / "notebook.html", f"<!DOCTYPE html><html><head></head><body>{body}</body></html>")


def screening_page(place: Path, strings: Sequence[str]) -> Path:
    """`screen.html` of rows that are hostile; its CSV and its printed lines are looked at elsewhere."""
    from persona_probe.screening.page import write_screening

    return write_screening(_screening(strings), place / "screen", strings[0], strings[1], worst=len(strings)).resolve()


def _screening(strings: Sequence[str]) -> Any:
    from persona_probe.data.chat import conversation
    from persona_probe.screening.feature import latent_feature
    from persona_probe.screening.reading import ScreenSettings
    from persona_probe.screening.screening import screening
    from tests.factories import LAYER, make_model, make_sae, make_tokenizer

    rows = [conversation(f"Ask {text}", text) for text in strings]
    feature = latent_feature(make_sae("standard"), 5, LAYER, (5, 7, 9))
    settings = ScreenSettings(own_tokens=2, bf16=False)
    return screening(rows, make_model(), feature, tokenizer=make_tokenizer(), settings=settings)


def careless_page(place: Path, strings: Sequence[str]) -> Path:
    """The strings as markup: the browser runs many of them, which shows that this part would see it."""
    # Some strings open what would swallow all that follows them: each is closed again.
    body = "\n".join(f"<div>{text}--></style></script></textarea></div>" for text in strings)
    return _page(place / "careless.html", f"<!DOCTYPE html><html><head></head><body>{body}</body></html>")


def _page(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


PAGES: dict[str, Callable[[Path, Sequence[str]], Path]] = {
    "report": report_page,
    "comparison": comparison_page,
    "cards": cards_page,
    "notebook": notebook_page,
    "screening": screening_page,
}
"""In an order in which what one writes is there for the next."""
SHORT = ("report", "notebook")


def look(browser: str, page: Path, profile: Path, strings: Sequence[str], asked: list[str]) -> list[str]:
    """Open a page and all that is folded in it; what went wrong."""
    asked.clear()
    marks = [marker(number).strip() for number in range(len(strings))]
    said = _ask(browser, page, profile, LOOK % json.dumps(marks))
    if "error" in said:
        return [f"the page could not be asked: {said['error']}"]
    wrong = [f"string {number} was run" for number in said["pwned"]]
    wrong += [f"asked for {one}" for one in asked] + [f"loaded {one}" for one in said["loaded"]]
    wrong += [f"holds {one}" for one in said["active"]]
    return wrong + [f"does not show {mark}: nothing was tried" for mark in marks if mark not in said["shown"]]


def _ask(browser: str, page: Path, profile: Path, script: str) -> dict[str, Any]:
    """What a script says in a page; on a busy machine the browser may close it before it has spoken."""
    for attempt in range(TRIES):
        with suppress(AssertionError):
            return run_script(browser, page, profile.with_name(f"{profile.name}-{attempt}"), script, LIMIT_S)[0]
    return {"error": "its script did not run"}


# --- The page that follows a run


async def watch(browser: str, url: str, marks: Sequence[str]) -> list[str]:
    """Open the dashboard until it shows every string; what went wrong."""
    from tests.monitor.watch_page import opened

    async with opened(browser, url) as page:
        shown = f"{json.dumps(list(marks))}.every((one) => document.body.textContent.includes(one))"
        await page.until(f"document.querySelector('.js-plotly-plot') && {shown}", LIMIT_S)
        wrong = [f"string {number} was run" for number in await page.ask("window.pwned || []")]
        away = [one for one in page.requests if not one.startswith((url, "data:", "blob:"))]
        return wrong + [f"asked for {one}" for one in away] + page.console


def dashboard(browser: str, place: Path, strings: Sequence[str], asked: list[str]) -> list[str]:
    """A run whose features, alarms and faults have hostile names."""
    from persona_probe.cli.runs import make_server
    from persona_probe.monitor.events import Alarm, Fault
    from tests.monitor.events import reading, start, write

    asked.clear()
    events = [start(strings), reading(0, names=strings), *(Alarm(1, text, text, text, 1.0, 0.5) for text in strings)]
    write(place / "watched" / "readings.jsonl", *events, *(Fault(1, text, text) for text in strings))
    server = make_server(str(place / "watched"), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        marks = [marker(number).strip() for number in range(len(strings))]
        wrong = asyncio.run(watch(browser, f"http://127.0.0.1:{server.port}/", marks))
    finally:
        server.shutdown()
        server.server_close()
    return wrong + [f"asked for {one}" for one in asked]


# --- Terminals and spreadsheets


def terminal(place: Path, strings: Sequence[str]) -> list[str]:
    """What commands print of rows, names and errors."""
    from persona_probe.cli import main
    from persona_probe.cli.options import echo
    from persona_probe.monitor.events import Alarm, Fault
    from persona_probe.monitor.sinks.terminal import TerminalSink
    from persona_probe.report.tables import Table
    from persona_probe.screening.page import result_lines

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        echo("\n".join(result_lines(_screening(strings[-8:]))))
        sink = TerminalSink(err)
        for text in strings:
            echo(text)
            echo(Table((text,), [(text,)], text).text())
            sink.emit(Alarm(1, text, text, text, 1.0, 0.5))
            sink.emit(Fault(1, text, text))
            for arguments in (["figures", str(place / "run"), "--only", text], [text], ["data", "check", text]):
                with suppress(SystemExit):
                    main(arguments)
        logging.getLogger().handlers.clear()
    printed = out.getvalue() + err.getvalue()
    wrong = [f"{len(OBEYED.findall(printed))} characters that a terminal obeys"] if OBEYED.search(printed) else []
    missing = [n for n in range(len(strings)) if marker(n).strip() not in printed]
    return wrong + [f"does not show string {n}: nothing was tried" for n in missing]


def spreadsheet(place: Path, strings: Sequence[str]) -> list[str]:
    """Every CSV that was written for the pages, and one of the strings alone."""
    from persona_probe.untrusted import csv_text

    frame = pd.DataFrame({"text": strings, "number": [-float(n) for n in range(len(strings))]})
    (place / "strings.csv").write_text(csv_text(frame), encoding="utf-8", newline="")
    wrong = []
    for path in place.rglob("*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file)):
                wrong += [f"{path.name}, line {number + 1}: {cell[:40]!r}" for cell in row if _formula(cell)]
    kept = pd.read_csv(place / "strings.csv")["number"].tolist() == frame["number"].tolist()
    return wrong + ([] if kept else ["numbers were changed"])


def _formula(cell: str) -> bool:
    text = cell.lstrip(" \t\r\n\ufeff\u200b")
    with suppress(ValueError):
        float(text)
        return False
    return text[:1] in {*"=+-@"} or cell[:1] in {*"\t\r\n"}


def assault(settings: Settings) -> list[Count]:
    """Every string on every surface; where there is no browser, the pages are left out."""
    counts, browser, place = [], find_browser(), settings.place
    with listener() as (url, asked):
        strings = hostile_strings(url)

        def add(surface: str, wrong: list[str]) -> None:
            counts.append(Count(f"hostile strings in {surface}: none run, none asks", len(strings), wrong))

        if browser is not None:
            for name, write_page in PAGES.items():
                if not settings.short or name in SHORT:
                    page = write_page(place, strings)
                    add(f"the {name} page", look(browser, page, place / f"profile-{name}", strings, asked))
            careless = look(browser, careless_page(place, strings), place / "profile-careless", strings, asked)
            ran = sum("was run" in line or "asked for" in line for line in careless)
            counts.append(Count("the same on a careless page: seen to run", 1, [] if ran > 9 else [f"only {ran} seen"]))
            if not settings.short:
                add("the dashboard", dashboard(browser, place, strings, asked))
        add("a terminal", terminal(place, strings))
        add("spreadsheets", spreadsheet(place, strings))
    return counts
