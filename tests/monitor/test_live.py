"""The live view draws what the shared drawing draws, in place, and in a real kernel while the cell is running."""

import logging
import sys
from typing import Any

import pytest

from persona_probe.monitor.events import End, Event
from persona_probe.monitor.figure import monitor_figure
from persona_probe.monitor.history import History
from persona_probe.monitor.sinks import live as module
from persona_probe.monitor.sinks.live import LiveView
from tests.monitor.events import alarm, behaviour, reading, start

EVENTS: list[Event] = [start(), reading(0), reading(5, 2.0), behaviour(5), alarm(5), reading(10, 3.0), End(10, 3, 0.1)]
CELL = """
import time
from tests.monitor.events import alarm, reading, start
from persona_probe.monitor.sinks import LiveView
view = LiveView(seconds=0)
for event in (start(), reading(0), reading(5, 2.0), reading(10, 3.0), alarm(10)):
    view.emit(event)
print("cell ends")
"""


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a notebook would display."""
    shown: list[Any] = []
    monkeypatch.setattr(module, "_in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", shown.append)
    return shown


def data(figure: Any) -> list[dict[str, Any]]:
    """Traces without the ids that widgets give them."""
    return [{k: v for k, v in trace.items() if k != "uid"} for trace in figure.to_plotly_json()["data"]]


def test_after_every_event_it_shows_what_a_fresh_drawing_shows(notebook: list[Any]) -> None:
    view, history = LiveView(seconds=0), History()
    for event in EVENTS:
        view.emit(event)
        view.close()  # draws what the pace held back
        fresh: Any = monitor_figure(history.add([event]))
        (shown,) = notebook  # one figure, displayed once
        assert data(shown) == data(fresh)
        assert shown.layout.shapes == fresh.layout.shapes
        assert shown.layout.annotations == fresh.layout.annotations
    assert view.figure is notebook[0]


def test_new_points_travel_in_one_message(notebook: list[Any]) -> None:
    view, sent = LiveView(seconds=0), []
    for event in (start(), reading(0), alarm(0)):
        view.emit(event)
    names = [f"_py2js_{kind}" for kind in ("update", "restyle", "relayout", "addTraces", "deleteTraces")]
    view.figure.observe(lambda change: sent.append((change["name"], change["new"])), names)
    view.emit(reading(5, 2.0))
    view.close()
    ((kind, message), (_, cleared)) = sent
    assert kind == "_py2js_update" and cleared is None
    assert [0, 5] in [list(x) for x in message["style_data"]["x"] if x is not None]


def test_the_pace_is_kept(notebook: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    real = LiveView._draw
    monkeypatch.setattr(LiveView, "_draw", lambda self: (drawn.append(1), real(self)))
    view = LiveView(seconds=3600)
    for event in (start(), reading(0), reading(5), reading(10)):
        view.emit(event)
    assert len(drawn) == 1  # the first shows it
    view.emit(alarm(10))
    assert len(drawn) == 2  # an alarm does not wait
    view.emit(reading(15))
    view.close()
    assert len(drawn) == 3 and view.history.taken == 4


def test_without_widgets_it_says_once_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "anywidget", None)
    view = LiveView()
    for event in EVENTS:
        view.emit(event)
    view.close()
    assert view.figure is None
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "pip install 'persona-probe[notebooks]'" in caplog.text


def test_outside_a_notebook_it_says_so_and_draws_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(LiveView, "_draw", lambda self: drawn.append(1))
    view = LiveView(seconds=0)
    for event in EVENTS:
        view.emit(event)
    view.close()
    assert drawn == [] and caplog.text.count("no notebook here") == 1


def test_a_running_cell_sends_its_points() -> None:
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd="tests/monitor")
    try:
        heard: list[dict[str, Any]] = []
        client.execute_interactive(CELL, timeout=60, output_hook=heard.append)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    kinds = [message["msg_type"] for message in heard]
    assert "error" not in kinds, heard
    ended = next(i for i, m in enumerate(heard) if m["msg_type"] == "stream" and "cell ends" in m["content"]["text"])
    shown = kinds.index("display_data")
    assert "application/vnd.jupyter.widget-view+json" in heard[shown]["content"]["data"]
    sent = [m["content"]["data"]["state"] for m in heard[shown:ended] if m["msg_type"] == "comm_msg"]
    (added,) = (state["_py2js_addTraces"] for state in sent if state.get("_py2js_addTraces"))
    assert [0, 5, 10] in [trace["x"] for trace in added["trace_data"] if trace["mode"] == "lines+markers"]
