"""What a reader meets: the height of the report in a laptop's and a phone's window, and what is on its first screen."""

import json
from pathlib import Path

import pytest

from persona_probe.report.html import report_from_tables, write_report
from persona_probe.report.images import find_browser
from persona_probe.report.opening import likelihood_words, times
from persona_probe.report.records import load_records
from persona_probe.stats import Estimate
from tests.report.pages import Outline, Seen, look
from tests.report.run_records import HOSTILE, write_run

BROWSER = find_browser()
DEMO = Path(__file__).parents[2] / "records" / "demo"
LAPTOP, PHONE = (1366, 768), (390, 844)
SCREENS = {LAPTOP: 10, PHONE: 22}
"""Most screens of the demo's report as it opens. On a phone everything stands in one column."""
SCRIPT = """({
  high: document.documentElement.scrollHeight, wide: document.documentElement.scrollWidth,
  answer: document.querySelector(".opening .answer p").getBoundingClientRect().top,
  across: new Set(Array.from(document.querySelectorAll(".question .answer"))
    .filter((one) => one.offsetParent).map((one) => one.offsetLeft)).size,
  open: Array.from(document.querySelectorAll(".question")).filter((one) => !one.closest("details:not([open])")).length,
  text: document.getElementById("content").innerText.replace(document.querySelector("footer").innerText, ""),
})"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The shipped demo's report, figures and cards from its tables alone, and the lines about what they lack."""
    before = {path: path.stat().st_mtime_ns for path in DEMO.rglob("*")}
    folder = tmp_path_factory.mktemp("drawn")
    lines = report_from_tables(DEMO, folder)
    assert {path: path.stat().st_mtime_ns for path in DEMO.rglob("*")} == before
    return folder, lines


@pytest.fixture(scope="module")
def seen(drawn: tuple[Path, list[str]]) -> dict[tuple[int, int], Seen]:
    """That report in both windows, and on paper."""
    if BROWSER is None:
        pytest.skip("no Chromium: install the Debian package chromium")
    windows = [LAPTOP, PHONE]
    return dict(zip(windows, look(BROWSER, drawn[0] / "report.html", windows, SCRIPT, printed=LAPTOP), strict=True))


@pytest.mark.browser
@pytest.mark.parametrize("window", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_the_report_is_short_and_begins_with_an_answer(
    window: tuple[int, int], seen: dict[tuple[int, int], Seen]
) -> None:
    said = seen[window].said
    assert said["high"] <= SCREENS[window] * window[1]
    assert said["wide"] <= window[0]
    assert 0 < said["answer"] < window[1] - 40  # a line of it at least is on the first screen
    assert said["open"] == 3


@pytest.mark.browser
def test_five_answers_stand_side_by_side(seen: dict[tuple[int, int], Seen]) -> None:
    assert seen[LAPTOP].said["across"] >= 5


@pytest.mark.browser
def test_readers_see_neither_html_nor_ids_of_arms(seen: dict[tuple[int, int], Seen]) -> None:
    text = seen[LAPTOP].said["text"]
    raw = ("<table", "<td", "&lt;", "realigned_in", "polite_harm", "everyday_advice")
    assert [words for words in raw if words in text] == []


@pytest.mark.browser
def test_paper_has_few_pages_and_none_half_empty(seen: dict[tuple[int, int], Seen]) -> None:
    pdfium = pytest.importorskip("pypdfium2")
    import numpy as np

    pictures = [page.render(scale=0.5).to_pil().convert("L") for page in pdfium.PdfDocument(seen[LAPTOP].paper)]
    assert len(pictures) <= 16
    filled = [np.flatnonzero((np.asarray(one) < 235).any(1)).max() / one.height for one in pictures[:-1]]
    assert min(filled) > 0.5, filled


# --- Without a browser


def test_the_first_answers_are_those_of_the_base_the_bad_the_good_and_a_corrected_model(tmp_path: Path) -> None:
    outline = Outline(write_report(write_run(tmp_path / "run")).read_text("utf-8"))
    begin = outline.text[: outline.text.index("Arms and contrast index")]
    places = [begin.index(f"Answer of {arm}, seed 0, to question 0") for arm in ("base", "correct", "realigned_in")]
    assert places == sorted(places) and HOSTILE in begin  # the incorrect model's answer, as text
    assert "img" not in outline.tags


@pytest.mark.parametrize(
    ("effect", "words"),
    [((0.6931472, 0.0, 1.3862944), "2.0 times [1.0, 4.0]"), ((-0.6931472, -1.3862944, 0.0), "0.50 times [0.25, 1.0]")],
)
def test_an_effect_of_the_index_is_a_factor(effect: tuple[float, float, float], words: str) -> None:
    assert times(Estimate(*effect, 60)) == words
    assert times(Estimate(effect[0], float("nan"), float("nan"), 60)) == words.partition(" [")[0]
    assert times(None) == ""


def test_the_demos_effect_is_said_in_plain_words() -> None:
    words = likelihood_words(load_records(DEMO))
    assert words.startswith("Next to the control, misaligned answers became 2.7 times as likely per token")
    assert "2.3 to 3.0" in words


def test_a_folder_of_tables_is_drawn_and_says_what_it_lacks(drawn: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, lines = drawn
    assert lines == []  # the shipped record has all
    page = (folder / "report.html").read_text("utf-8")
    assert '<a href="cards.html">' in page and "Latent 2144" in (folder / "cards.html").read_text("utf-8")
    assert '<a href="figures/arms.csv">' in page and (folder / "figures" / "arms.csv").is_file()

    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "manifest.json").write_text(json.dumps({"config": {"name": "bare"}}))
    lines = report_from_tables(tmp_path / "bare", tmp_path / "drawn")
    assert lines[0].startswith("No summary.json") and any("induce stage has not run" in line for line in lines)
