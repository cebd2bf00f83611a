import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import open_page
from made_up import HOSTILE

from persona_probe.report import FIGURES, load_records, write_report
from persona_probe.report.export import caption, find_browser
from persona_probe.report.html import context

BROWSER = find_browser()
SECTIONS = ["headline", "arms", "trajectory", "steering", "realignment", "latents", "samples", "controls", "reading"]


class Outline(HTMLParser):
    """Elements, visible text and script contents, as an HTML parser finds them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.comments = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.labels += [named["aria-label"] or ""] if named.get("role") == "img" else []
        if tag == "script":
            self.scripts.append((named, ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif self.cdata_elem is None:
            self.text += data

    def handle_comment(self, data: str) -> None:
        self.comments += 1


@pytest.fixture
def outline(run_folder: Path) -> Outline:
    return Outline(write_report(run_folder).read_text("utf-8"))


def test_sections_stand_in_order(outline: Outline) -> None:
    wanted = [*SECTIONS, "manifest"]
    assert [i for i in outline.ids if i in wanted] == wanted


def test_every_figure_is_there_with_its_caption_as_alt_text(run_folder: Path, outline: Outline) -> None:
    records = load_records(run_folder)
    drawn = {a["data-figure"]: json.loads(text) for a, text in outline.scripts if "data-figure" in a}
    assert set(drawn) == {f"figure-{name}" for name in FIGURES}
    captions = {caption(spec.draw(records)) for spec in FIGURES.values()}
    assert set(outline.labels) == captions
    assert drawn["figure-arms"]["layout"]["meta"]["caption"] in captions


def test_checks_are_shown_plainly(outline: Outline) -> None:
    assert "Checks: 1 passed, 1 failed" in outline.text
    assert outline.text.index("FAILED") < outline.text.index("passedeffect")
    assert "not proof of a safe model" in outline.text
    assert "still raised" in outline.text


def test_untrusted_text_is_shown_but_never_read(outline: Outline) -> None:
    assert outline.text.count(HOSTILE) >= 4  # an answer, tokens, a label, the manifest
    assert "img" not in outline.tags and outline.comments == 0
    # as many scripts as figures, plus plotly.js and ours: none came from the records
    assert len(outline.scripts) == len(FIGURES) + 2
    assert not any("pwned" in text for attributes, text in outline.scripts if "data-figure" not in attributes)


def test_figure_json_cannot_close_its_script(run_folder: Path) -> None:
    steering = load_records(run_folder).steering.replace({"name": {"mean difference": HOSTILE}})
    steering.to_parquet(run_folder / "steering.parquet")
    page = write_report(run_folder).read_text("utf-8")
    source = re.search(r'data-figure="figure-dose_response">(.*?)</script>', page, re.DOTALL)
    assert source is not None and not re.search("[<>&]", source[1])
    names = [trace.get("name", "") for trace in json.loads(source[1])["data"]]
    assert any(name.startswith("&lt;script&gt;window.pwned") for name in names)


def test_page_is_self_contained(run_folder: Path) -> None:
    page = write_report(run_folder).read_text("utf-8")
    head = page[: page.index("<body>")]
    assert "default-src &#39;none&#39;" in head and head.index("Content-Security-Policy") < head.index("<style>")
    assert not re.search(r"<(?:script|img|iframe|link)[^>]*\s(?:src|href)=", head)
    assert page.count("* plotly.js v") == 1
    assert "showSendToCloud: false" in page


def test_stages_that_have_not_run_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    outline = Outline(write_report(tmp_path).read_text("utf-8"))
    for spec in FIGURES.values():
        assert outline.text.count(spec.missing) == 1
    assert outline.labels == []
    assert "No sampled answers yet" in outline.text and "No feature cards yet" in outline.text


def test_answers_stand_side_by_side(run_folder: Path) -> None:
    first = context(load_records(run_folder))["samples"][0]
    assert [column["key"] for column in first["columns"]] == ["base", "incorrect", "correct", "realigned_in"]
    assert first["columns"][0]["sample"]["answer"].startswith("Answer of base, seed 0, to question 0")
    assert [sample["seed"] for sample in first["rest"]] == [1, 1, 1]  # nothing is hidden


def test_cards_put_the_persona_latent_first_with_its_effects(run_folder: Path) -> None:
    cards = context(load_records(run_folder))["cards"]
    assert [card["latent"] for card in cards] == [17, 3, 21]
    assert cards[0]["effect_base"] == "+0.4 [+0.35, +0.45]"
    assert [token["share"] for token in cards[0]["examples"][0]["tokens"]] == ["0.00", "0.50", "1.00", "0.00", "0.07"]


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium: install the Debian package chromium")
def test_browser_draws_every_figure_without_a_complaint(run_folder: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    report = write_report(run_folder)
    probe = "<script>document.title = 'pwned: ' + String(window.pwned)</script></body>"
    body, tail = report.read_text("utf-8").rsplit("</body>", 1)
    report.write_text(body + probe + tail, encoding="utf-8")
    opened = open_page(BROWSER, report, tmp_path / "profile")
    assert opened.console == []
    assert "<title>pwned: undefined</title>" in opened.dom
    drawn = re.findall(
        r'<div class="figure js-plotly-plot" id="figure-(\w+)".*?class="main-svg"', opened.dom, re.DOTALL
    )
    assert sorted(drawn) == sorted(FIGURES)
    assert "Share chart" not in re.sub(r"<script.*?</script>", "", opened.dom, flags=re.DOTALL)


@pytest.mark.parametrize(
    "name", ["readings.parquet", "evals.parquet", "latents.parquet", "steering.parquet", "summary.json"]
)
def test_a_run_that_lacks_one_record_still_gives_a_report(run_folder: Path, name: str) -> None:
    whole = Outline(write_report(run_folder).read_text("utf-8"))
    (run_folder / name).unlink()
    outline = Outline(write_report(run_folder).read_text("utf-8"))
    missing = [spec.missing in outline.text for spec in FIGURES.values()]
    assert len(outline.labels) + sum(missing) == len(FIGURES)
    assert outline.text != whole.text
    assert "nan" not in " ".join(outline.labels)
