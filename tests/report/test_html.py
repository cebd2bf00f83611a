import json
import re
from pathlib import Path

import pytest

from persona_probe.report.export import caption
from persona_probe.report.figures import FIGURES, figures_of
from persona_probe.report.html import cards, links, sampled_answers, tiles, write_report
from persona_probe.report.page import GLOSSARY, SCRIPTS, content_policy, explained, script_hash
from persona_probe.report.records import Records, load_records
from tests.report.pages import Outline
from tests.report.run_records import HOSTILE, write_run

SECTIONS = ["headline", "arms", "trajectory", "steering", "realignment", "latents", "samples", "controls", "reading"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of the made-up run; read only."""
    return write_report(write_run(tmp_path_factory.mktemp("report") / "run")).read_text("utf-8")


@pytest.fixture(scope="module")
def outline(page: str) -> Outline:
    return Outline(page)


def test_sections_stand_in_order(outline: Outline) -> None:
    wanted = [*SECTIONS, "manifest"]
    assert [i for i in outline.ids if i in wanted] == wanted


def test_every_figure_is_there_with_its_caption_as_alt_text(records: Records, outline: Outline) -> None:
    drawn = {a["data-figure"]: json.loads(text) for a, text in outline.scripts if "data-figure" in a}
    assert set(drawn) == {f"figure-{name}" for name in figures_of(records)}
    captions = {figure["layout"]["meta"]["caption"] for figure in drawn.values()}
    assert set(outline.labels) == captions and caption(FIGURES["arms"].draw(records)) in captions


def test_checks_are_shown_plainly(outline: Outline) -> None:
    assert "Checks: 1 passed, 1 failed" in outline.text
    assert outline.text.index("FAILED") < outline.text.index("passedeffect")
    assert "not proof of a safe model" in outline.text
    assert "still raised" in outline.text


def test_untrusted_text_is_shown_but_never_read(outline: Outline) -> None:
    assert outline.text.count(HOSTILE) >= 4  # an answer, tokens, a label, the manifest
    assert "img" not in outline.tags and outline.comments == 0
    # plotly.js and ours: none came from the records
    running = [text for attributes, text in outline.scripts if attributes.get("type") != "application/json"]
    assert len(running) == len(SCRIPTS) + 1
    assert all(script_hash(text) in content_policy() for text in running)
    assert not any("pwned" in text for attributes, text in outline.scripts if "data-figure" not in attributes)


def test_figure_json_cannot_close_its_script(run_folder: Path) -> None:
    steering = load_records(run_folder).steering.replace({"name": {"mean difference": HOSTILE}})
    steering.to_parquet(run_folder / "steering.parquet")
    page = write_report(run_folder).read_text("utf-8")
    source = re.search(r'data-figure="figure-dose_response">(.*?)</script>', page, re.DOTALL)
    assert source is not None and not re.search("[<>&]", source[1])
    names = [trace.get("name", "") for trace in json.loads(source[1])["data"]]
    assert any(name.startswith("&lt;script&gt;window.pwned") for name in names)


def test_page_is_self_contained(page: str) -> None:
    head = page[: page.index("<body>")]
    assert "default-src &#39;none&#39;" in head and head.index("Content-Security-Policy") < head.index("<style>")
    assert not re.search(r"<(?:script|img|iframe|link)[^>]*\s(?:src|href)=", head)
    assert page.count("* plotly.js v") == 1
    assert "showSendToCloud: false" in page and len(page.encode()) < 8_000_000
    policy = content_policy()
    assert "unsafe" not in policy.split("script-src")[1].split(";")[0]


def test_stages_that_have_not_run_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    outline = Outline(write_report(tmp_path).read_text("utf-8"))
    for spec in FIGURES.values():
        assert outline.text.count(spec.missing) == 1
    assert outline.labels == []
    assert "No sampled answers yet" in outline.text and "No feature cards yet" in outline.text


def test_answers_stand_side_by_side(records: Records) -> None:
    first = sampled_answers(records)[0]
    assert [column["key"] for column in first["columns"]] == ["base", "incorrect", "correct", "realigned_in"]
    assert first["columns"][0]["sample"]["answer"].startswith("Answer of base, seed 0, to question 0")
    assert [sample["seed"] for sample in first["rest"]] == [1, 1, 1]  # nothing is hidden


def test_cards_put_the_persona_latent_first_with_its_effects(records: Records) -> None:
    shown = cards(records)
    assert [card["latent"] for card in shown] == [17, 3, 21] and shown[0]["strength"] == "2 x_delta"
    assert shown[0]["effect_base"] == "+0.4 [+0.35, +0.45]"
    assert [token["share"] for token in shown[0]["examples"][0]["tokens"]] == ["0.00", "0.50", "1.00", "0.00", "0.07"]


@pytest.mark.parametrize(
    "name", ["readings.parquet", "evals.parquet", "latents.parquet", "steering.parquet", "summary.json"]
)
def test_a_run_that_lacks_one_record_still_gives_a_report(run_folder: Path, outline: Outline, name: str) -> None:
    (run_folder / name).unlink()
    lacking = Outline(write_report(run_folder).read_text("utf-8"))
    shown = figures_of(load_records(run_folder))
    missing = [spec.missing in lacking.text for spec in shown.values()]
    assert len(lacking.labels) + sum(missing) == len(shown)
    assert lacking.text != outline.text
    assert "nan" not in " ".join(lacking.labels)


def test_terms_lead_to_their_meaning_and_text_stays_escaped() -> None:
    said = explained("<b>Latents</b> of an arm; latents")
    assert said.startswith("&lt;b&gt;<a") and said.endswith("; latents")
    assert '<a class="term" href="#term-latent" aria-describedby="meaning-latent">Latents</a>' in said
    assert said.count("<a ") == 2 and explained("charm") == "charm"


def test_every_term_that_is_used_is_in_the_glossary(outline: Outline) -> None:
    assert {f"meaning-{term.key}" for term in GLOSSARY} <= set(outline.ids)
    assert len(outline.ids) == len(set(outline.ids))


def test_the_verdict_comes_first_and_answers_what_was_measured(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    names = {"behaviour": True, "induce": True, "repair": False, "rise": True, "control": True}
    summary["checks"] = [{"name": n, "passed": p, "statement": n} for n, p in names.items()]
    summary["verdicts"]["realigned_in"]["behaviour"] = "restored"
    (run_folder / "summary.json").write_text(json.dumps(summary))
    found = tiles(load_records(run_folder))
    assert [tile["state"] for tile in found] == ["yes", "no", "yes", "no"]
    assert (
        "latent 17; a push makes misaligned answers 1.5 times as likely (index +0.4" in found[1]["shows"]
        and "from step 20" in found[2]["shows"]
    )
    assert "1 of 2 corrective arms" in found[3]["shows"] and found[3]["says"] == "Partly undone"
    summary["checks"] = []
    (run_folder / "summary.json").write_text(json.dumps(summary))
    assert [tile["state"] for tile in tiles(load_records(run_folder))] == ["open"] * 3 + ["no"]


def test_links_lead_to_files_that_are_there(run_folder: Path, page: str) -> None:
    assert links(run_folder) == {} and "cards.html" not in page
    (run_folder / "cards.html").write_text("cards")
    (run_folder / "figures").mkdir()
    (run_folder / "figures" / "arms.csv").write_text("arm")
    assert links(run_folder) == {"cards": "cards.html", "arms": "figures/arms.csv"}
    linked = write_report(run_folder).read_text("utf-8")
    assert '<a href="cards.html">' in linked and '<a href="figures/arms.csv">' in linked
    assert "figures/latents.csv" not in linked


def test_long_answers_beyond_the_pages_size_are_counted_not_dropped_silently(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_probe.report.html.MAX_CHARACTERS", 100)
    questions = sampled_answers(records)
    assert sum(len(q["rest"]) + q["left_out"] for q in questions) == 6 and questions[1]["left_out"] == 3
