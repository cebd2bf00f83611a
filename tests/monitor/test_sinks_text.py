"""The terminal's lines and Prometheus' text: right numbers, names that cannot break out."""

import io
import re
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from persona_probe.errors import InputError
from persona_probe.monitor.band import band_state
from persona_probe.monitor.events import End, Fault
from persona_probe.monitor.sinks.prometheus import PrometheusSink
from persona_probe.monitor.sinks.terminal import TerminalSink
from tests.monitor.events import DIRECTION, HOSTILE, TOXIC, alarm, behaviour, reading, start

NASTY = 'quote " back\\slash\nline \x1b[31mred'


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(stream: io.StringIO, *events: object) -> list[str]:
    sink = TerminalSink(stream)
    for event in events:
        sink.emit(event)  # pyright: ignore[reportArgumentType]
    sink.close()
    return stream.getvalue().splitlines()


def test_one_line_per_reading_with_state_and_fit() -> None:
    lines = written(io.StringIO(), start(), reading(0), reading(5, 2.0), reading(10, 0.5, "passive"))
    assert lines == [
        f"watching {TOXIC}, {DIRECTION} at layer 20, 8 probes",
        f"step 0  {TOXIC} 1 (+0.00 sd, inside)  {DIRECTION} 1 (+0.00 sd, inside)  EV 0.750  loss 2.5  0.12 s",
        f"step 5  {TOXIC} 2 (+2.00 sd, above)  {DIRECTION} 1 (+0.00 sd, inside)  EV 0.750  loss 2.5  0.12 s",
        f"step 10 (passive)  {TOXIC} 0.5 (-1.00 sd, below)  {DIRECTION} 1 (+0.00 sd, inside)"
        "  EV 0.750  loss 2.5  0.12 s",
    ]


def test_other_events_have_a_line_too() -> None:
    lines = written(io.StringIO(), alarm(5), Fault(6, "probe", "boom"), behaviour(7), End(9, 3, 1.5))
    assert lines == [
        "step 5  ALARM outside band: 1.5 over 1.25",
        "step 6  probe is off: boom",
        "step 7  contrast index (nats/token) -0.5 [-0.6, -0.4]",
        "step 9  done: 3 readings in 1.5 s",
    ]


def test_colour_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b" not in written(io.StringIO(), alarm(5))[0]
    assert "\x1b[1;31m" in written(FakeTerminal(), alarm(5))[0]


def test_names_cannot_move_the_cursor_or_speak_markup() -> None:
    (line,) = written(FakeTerminal(), reading(0, names=[f"{NASTY}[bold]{HOSTILE}"]))
    assert f'quote " back\\slash line ?[31mred[bold]{HOSTILE}' in re.sub("\x1b\\[[0-9;]*m", "", line)


def test_places_relative_to_the_band() -> None:
    feature = reading(0, 1.25).features[0]
    assert band_state(feature, {TOXIC: (0.75, 1.25)}) == "inside"
    assert band_state(feature, {TOXIC: (1.3, 2.0)}) == "below"
    assert band_state(feature, {TOXIC: (0.0, 1.2)}) == "above"
    assert band_state(feature, {}) == "no band"
    assert band_state(feature, {TOXIC: (float("nan"), float("nan"))}) == "no band"  # one probe has no deviation
    assert band_state(reading(0, float("nan")).features[0], {TOXIC: (0.75, 1.25)}) == "not finite"


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def labels(**pairs: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"run": "demo", **pairs}.items()))


def test_prometheus_text_has_the_latest_values(tmp_path: Path) -> None:
    path = tmp_path / "made" / "persona.prom"
    sink = PrometheusSink(path, run="demo")
    events = [start(), reading(0), alarm(3), alarm(5), reading(5, 2.0, names=[TOXIC, NASTY]), behaviour(5)]
    for event in [*events, Fault(6, "probe", "boom")]:
        sink.emit(event)
    sink.close()
    found = samples(path.read_text())
    assert found["persona_feature_mean", labels(feature=TOXIC, mode="probe")] == 2.0
    assert found["persona_feature_shift", labels(feature=TOXIC, mode="probe")] == 2.0
    assert found["persona_feature_mean", labels(feature=NASTY, mode="probe")] == 1.0
    assert found["persona_reading_step", labels(mode="probe")] == 5
    assert found["persona_reading_explained_variance", labels(mode="probe")] == 0.75
    assert found["persona_alarms_total", labels(rule="outside band", feature=TOXIC)] == 2
    assert found["persona_behaviour", labels(name="contrast index (nats/token)")] == -0.5
    assert found["persona_faults_total", labels(part="probe")] == 1
    assert [p.name for p in path.parent.iterdir()] == ["persona.prom"]


def test_prometheus_port_is_local_and_freed() -> None:
    sink = PrometheusSink(port=0)
    sink.emit(reading(7, 2.0))
    port = sink.port
    assert port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert 'persona_reading_step{mode="probe",run=""} 7.0' in answer.read().decode()
    assert sink._server[0].server_address[0] == "127.0.0.1"
    with pytest.raises(InputError, match=f"port {port} cannot be used"):
        PrometheusSink(port=port)
    sink.close()
    PrometheusSink(port=port).close()
    sink.emit(reading(9))  # a second training run with the same sink
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert 'persona_reading_step{mode="probe",run=""} 9.0' in answer.read().decode()
    sink.close()


def test_prometheus_wants_one_place(tmp_path: Path) -> None:
    for places in ({}, {"path": tmp_path / "a.prom", "port": 0}):
        with pytest.raises(InputError, match=r"either path=.* or port="):
            PrometheusSink(**places)  # pyright: ignore[reportArgumentType]
