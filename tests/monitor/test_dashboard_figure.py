"""The drawing is the history: curves, intervals, bands, alarms and behaviour are where the events say."""

import math
from typing import Any

from persona_probe.monitor.events import Event, Reading
from persona_probe.monitor.figure import MOST_PANELS, monitor_figure
from persona_probe.monitor.history import History
from tests.monitor.events import DIRECTION, HOSTILE, TOXIC, alarm, behaviour, reading, start


def drawn(*events: Event) -> dict[str, Any]:
    return monitor_figure(History().add(events)).to_plotly_json()


def traces(figure: dict[str, Any], panel: str) -> list[dict[str, Any]]:
    """The traces of the panel whose label begins so."""
    (label,) = (a for a in figure["layout"]["annotations"] if a["text"].startswith(f"<b>{panel}"))
    return [t for t in figure["data"] if t["xaxis"] == label["xref"].split()[0]]


def line(figure: dict[str, Any], panel: str) -> list[tuple[int, float | None]]:
    (one,) = (t for t in traces(figure, panel) if t["mode"] == "lines+markers")
    return list(zip(one["x"], one["y"], strict=True))


def test_each_feature_has_a_panel_with_its_curve_interval_band_and_base() -> None:
    figure = drawn(start(), reading(0, 1.0), reading(5, 2.0))
    assert line(figure, TOXIC) == [(0, 1.0), (5, 2.0)]
    assert line(figure, DIRECTION) == [(0, 1.0), (5, 1.0)]
    shaded = [(list(t["x"]), list(t["y"])) for t in traces(figure, TOXIC) if t.get("fill") == "toself"]
    assert shaded == [
        ([0, 5, 5, 0], [1.25, 1.25, 0.75, 0.75]),  # the base band
        ([0, 5, 5, 0], [1.25, 2.25, 1.75, 0.75]),  # the interval
    ]
    (base,) = (t for t in traces(figure, TOXIC) if t["mode"] == "lines" and t.get("fill") != "toself")
    assert list(base["y"]) == [1.0, 1.0]


def test_behaviour_and_fit_stand_beside() -> None:
    figure = drawn(start(), reading(0), behaviour(0, -0.5), reading(5), behaviour(5, -0.25))
    assert line(figure, "contrast index (nats/token)") == [(0, -0.5), (5, -0.25)]
    assert line(figure, "SAE fit") == [(0, 0.75), (5, 0.75)]
    left, right = (traces(figure, panel)[0]["xaxis"] for panel in (TOXIC, "contrast"))
    axes = figure["layout"]
    assert axes[f"xaxis{left[1:]}"]["domain"][1] < axes[f"xaxis{right[1:]}"]["domain"][0]


def test_without_sae_and_behaviour_there_is_no_empty_panel() -> None:
    figure = drawn(start(), reading(0, fit=math.nan))
    assert [a["text"] for a in figure["layout"]["annotations"]] == [f"<b>{TOXIC}, latent 3</b>", f"<b>{DIRECTION}</b>"]


def test_alarms_are_lines_in_their_features_panel_and_marks_on_its_curve() -> None:
    figure = drawn(start(), reading(0), reading(5, 2.0), reading(10, 3.0), alarm(5), alarm(7, "loss"))
    at = {(shape["xref"], shape["x0"]) for shape in figure["layout"]["shapes"]}
    toxic, other, fit = (traces(figure, panel)[0]["xaxis"] for panel in (TOXIC, DIRECTION, "SAE fit"))
    assert at == {(toxic, 5), (toxic, 7), (other, 7), (fit, 7)}
    (mark,) = (t for t in figure["data"] if t["mode"] == "markers")
    assert (mark["xaxis"], list(mark["x"]), list(mark["y"])) == (toxic, [5], [2.0])
    assert mark["text"] == ["outside band<br>1.5 over 1.25"] or mark["text"] == ("outside band<br>1.5 over 1.25",)


def test_many_features_share_a_panel_in_base_deviations() -> None:
    names = [f"trait/{n}" for n in range(MOST_PANELS + 1)]
    figure = drawn(start(names), reading(0, names=names), reading(5, 2.0, names=names), alarm(5, names[0]))
    lines = [t for t in traces(figure, f"{len(names)} features") if t["mode"] == "lines+markers"]
    assert [t["name"] for t in lines] == names
    assert [list(t["y"]) for t in lines] == [[0.0, 2.0]] + [[0.0, 0.0]] * MOST_PANELS
    band = next(t for t in figure["data"] if t.get("fill") == "toself")
    assert list(band["y"]) == [0.5, 0.5, -0.5, -0.5]
    assert len({(t["line"]["color"], t["marker"]["symbol"]) for t in lines}) == len(names)


def test_passive_readings_are_told_apart() -> None:
    figure = drawn(start(), reading(0), reading(5, 2.0), reading(5, 3.0, "passive"), reading(10, 4.0, "passive"))
    lines = {t["name"]: t for t in traces(figure, TOXIC) if t["mode"] == "lines+markers"}
    assert {name: list(t["y"]) for name, t in lines.items()} == {"probe": [1.0, 2.0], "passive": [3.0, 4.0]}
    assert lines["probe"]["line"]["dash"] != lines["passive"]["line"]["dash"]


def test_missing_numbers_leave_a_gap() -> None:
    gap = Reading(**{**vars(reading(5)), "features": reading(5, math.nan).features})
    assert line(drawn(start(), reading(0), gap, reading(9)), TOXIC) == [(0, 1.0), (5, None), (9, 1.0)]


def test_untrusted_names_are_shown_not_read() -> None:
    figure = monitor_figure(
        History().add([start([HOSTILE]), reading(0, names=[HOSTILE]), behaviour(0), alarm(0, HOSTILE)])
    )
    assert "<script>" not in (text := str(figure.to_plotly_json()))
    assert "&lt;script&gt;" in text


def test_nothing_to_draw_says_so() -> None:
    assert "no reading yet" in str(drawn(start()))
