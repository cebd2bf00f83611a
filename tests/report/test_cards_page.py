"""The page of feature cards: nothing untrusted is read as markup, search and sorting work, silence is said in words."""

import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from persona_probe.report.cards import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    card_html,
    cards_page,
    content_policy,
    histogram,
    steering,
    styles_of,
)
from persona_probe.report.images import find_browser
from persona_probe.report.theme import BLUE, VERMILLION
from tests.report.made_up_cards import ACTIVITY, CARDS, PUSHES
from tests.report.pages import Outline, open_page
from tests.report.run_records import HOSTILE

BROWSER = find_browser()
MISSING = replace(CARDS[0].findings, scores=(), effects=(), steering=(), strength=None)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "cards.html"
    path.write_text(cards_page(CARDS, "made-up", "made-up model"), encoding="utf-8")
    return path


@pytest.fixture
def outline(page: Path) -> Outline:
    return Outline(page.read_text("utf-8"))


def card_of(page: str, latent: int) -> str:
    found = re.search(rf'<article[^>]*id="latent-{latent}".*?</article>', page, re.DOTALL)
    assert found is not None
    return found[0]


def test_untrusted_text_is_shown_but_never_read(outline: Outline) -> None:
    assert outline.text.count(HOSTILE) >= 8  # tokens, passages, a name, the text's name
    assert "img" not in outline.tags and outline.comments == 0
    assert len(outline.scripts) == 2 and not any("pwned" in text for _, text in outline.scripts)


def test_the_policy_allows_this_script_and_nothing_else(page: Path, outline: Outline) -> None:
    text = page.read_text("utf-8")
    stated = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert stated is not None
    policy = stated[1].replace("&#39;", "'")
    assert policy == content_policy(*(text for _, text in outline.scripts))
    assert "script-src 'sha256-" in policy and "default-src 'none'" in policy and "script-src 'unsafe" not in policy
    assert not re.search(r"<(?:script|img|iframe|link)[^>]*\s(?:src|href)=", text)


def test_every_number_of_a_card_is_shown(page: Path) -> None:
    card = Outline(card_of(page.read_text("utf-8"), 3)).text
    for shown in ("scorn for cooks", "+0.5 [+0, +2]", "steered up in the base model: +0.3 [+0.05, +1.5]", "rank of 64"):
        assert shown in card
    assert "steered in the organism" not in card  # not tested
    assert "base: active on 11.00% of 1,000 tokens; incorrect: active on 20.00% of 1,000 tokens" in card
    assert "21 (0.9), 50 (0.1)" in card and "q-value of its rise over all latents: 0.01" in card


def test_the_maximum_is_marked_and_tokens_are_coloured(page: Path) -> None:
    card = card_of(page.read_text("utf-8"), 3)
    assert re.findall(r"<mark[^>]*>(.*?)</mark>", card) == [" soup"]
    assert re.findall(r"--share:([\d.]+)", card) == ["0.00", "1.00", "0.00", "0.40"]
    assert "… <span" in card and "⏎" in card


def test_silence_is_said_in_words_without_an_empty_figure(page: Path) -> None:
    card = card_of(page.read_text("utf-8"), 8)
    assert "It never fires on this text in the base model: there is no passage to show." in card
    assert "It never fires on this text in the base model." in card and card.count("<svg") == 1
    untested = card_html(replace(CARDS[2], findings=MISSING))
    assert "Not tested for cause in this study." in untested and "<svg" not in untested


def test_links_lead_to_cards_of_the_page_and_to_neuronpedia(page: Path) -> None:
    assert re.findall(r'href="([^"]*)"', page.read_text("utf-8")) == ["#latent-21"] * 3
    linked = card_html(replace(CARDS[0], neuronpedia="https://neuronpedia.org/a/b/3"))
    assert re.findall(r'href="([^"]*)"', linked) == ["https://neuronpedia.org/a/b/3"]


def test_a_notebook_shows_one_card_without_scripts() -> None:
    shown = CARDS[1]._repr_html_()
    outline = Outline(shown)
    assert shown == card_html(CARDS[1])
    assert outline.tags.count("article") == 1 and "script" not in outline.tags and "img" not in outline.tags
    style = re.findall(r"<style>(.*?)</style>", shown, re.DOTALL)
    # a rule outside the card would restyle the notebook
    rules = re.findall(r"^ *([^\s{}@][^{}]*)\{", style[0], re.MULTILINE)
    assert rules and all(re.match(r"(:root\S* )?\.feature-card", rule) for rule in rules)


def test_bars_hold_the_counts_on_a_log_scale() -> None:
    plot = histogram(ACTIVITY)
    assert plot is not None
    base, organism = plot.series
    assert [len(s.marks) for s in plot.series] == [3, 5]
    assert organism.marks[0].y == TOP and organism.marks[0].height == BOTTOM - TOP  # the largest count
    assert base.marks[-1].height == pytest.approx((BOTTOM - TOP) * 0.301 / 2.179, abs=0.2)  # log 2 over log 151
    assert [m.x for m in base.marks[:2]] == [LEFT, pytest.approx(LEFT + (RIGHT - LEFT) / 6, abs=0.1)]
    assert [t.text for t in plot.y_ticks] == ["0", "1", "10", "100"]
    assert histogram([replace(ACTIVITY[0], counts=())]) is None


def test_the_steering_curve_marks_what_leaves_the_bound() -> None:
    plot = steering(PUSHES)
    assert plot is not None and steering(()) is None
    assert [s.name for s in plot.series] == ["base", "incorrect"]
    assert [m.hollow for m in plot.series[0].marks] == [True, False, False, True]
    points = plot.series[0].marks
    assert points[0].x < points[-1].x and points[0].y > points[-1].y
    unsteered = plot.series[0].level
    assert unsteered == pytest.approx((points[0].y + points[-1].y) / 2, abs=0.1)
    assert all(m.low is not None and m.high is not None and m.high < m.y < m.low for m in points)
    assert "the 4 at which" in plot.caption and [t.text for t in plot.x_ticks] == ["-2", "-1", "0", "+1", "+2"]


def driven(page: Path, script: str) -> Path:
    """A copy of the page that a script of the test may drive."""
    text = page.read_text("utf-8")
    text = re.sub(r"script-src .*?; style-src", "script-src &#39;unsafe-inline&#39;; style-src", text)
    body, tail = text.rsplit("</body>", 1)
    path = page.with_name("driven.html")
    path.write_text(f"{body}<script>{script}</script></body>{tail}", encoding="utf-8")
    return path


def cards_shown(dom: str) -> list[int]:
    articles = re.findall(r"<article[^>]*>", dom)
    return [int(re.findall(r'id="latent-(\d+)"', a)[0]) for a in articles if " hidden" not in a]


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium: install the Debian package chromium")
def test_browser_shows_all_cards_without_a_complaint(page: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    opened = open_page(BROWSER, page, tmp_path / "profile")
    assert opened.console == []
    assert cards_shown(opened.dom) == [3, 21, 8]
    assert ">3 of 3 cards<" in opened.dom


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium: install the Debian package chromium")
def test_search_hides_and_the_menu_sorts(page: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    script = """
      const say = {}, field = document.getElementById("search"), menu = document.getElementById("order");
      const cards = () => Array.from(document.getElementById("cards").children);
      const latents = () => cards().filter((c) => c.getClientRects().length).map((c) => c.id);
      for (const words of ["GOLD", "latent 8", "cooks  soup", "unhush", "scorn gold", ""]) {
        field.value = words; field.dispatchEvent(new Event("input")); say[words] = latents();
        if (words === "scorn gold") say.none = document.getElementById("count").textContent;
      }
      for (const key of ["rank rise", "rank cosine", "effect base", "latent", "listed"]) {
        menu.value = key; menu.dispatchEvent(new Event("change")); say[key] = latents();
      }
      document.dispatchEvent(new Event("DOMContentLoaded"));  // this script runs before the page is whole
      const ground = () => getComputedStyle(document.querySelector(".feature-card")).backgroundColor;
      say.themes = [ground()];
      document.getElementById("theme").click(); say.themes.push(ground());
      document.getElementById("theme").click(); say.themes.push(ground());
      say.pwned = String(window.pwned);
      document.body.textContent = JSON.stringify(say);
    """
    opened = open_page(BROWSER, driven(page, script), tmp_path / "profile")
    assert opened.console == []
    body = re.search(r"<body[^>]*>(.*)</body>", opened.dom, re.DOTALL)
    assert body is not None
    said = json.loads(body[1])
    light, dark, again = said.pop("themes")
    assert light == again != dark
    found = {key: [int(i.split("-")[1]) for i in ids] for key, ids in said.items() if isinstance(ids, list)}
    assert found == {
        **{"GOLD": [21], "latent 8": [8], "cooks  soup": [3], "unhush": [8], "scorn gold": [], "": [3, 21, 8]},
        **{"rank rise": [8, 3, 21], "rank cosine": [21, 8, 3], "effect base": [21, 8, 3]},
        **{"latent": [3, 8, 21], "listed": [3, 21, 8]},
    }
    assert said["none"] == "no card matches" and said["pwned"] == "undefined"


def test_a_model_has_the_colour_that_it_has_in_the_figures() -> None:
    """Grey for the base, vermillion for the organism, blue for its control, in whatever order they come."""
    sheet = (files("persona_probe.report") / "web" / "cards.css").read_text(encoding="utf-8")
    (light,) = re.findall(r"\.feature-card \{(.*?)\n\}", sheet, re.DOTALL)[:1]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", light))
    assert colours["tuned"].upper() == VERMILLION and colours["control"].upper() == BLUE
    grey = colours["base"]
    assert grey[1:3] == grey[3:5] == grey[5:7]
    assert styles_of(["correct", "base", "incorrect"]) == {"correct": "control", "base": "base", "incorrect": "tuned"}
    assert styles_of(["base", "warm", "other"]) == {"base": "base", "warm": "third", "other": "fourth"}
    for style in ("base", "tuned", "control"):
        assert f".feature-card svg .{style} {{ --series: var(--{style}); }}" in sheet
