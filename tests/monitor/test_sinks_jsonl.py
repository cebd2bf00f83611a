"""The file of events: nothing whole is lost, a torn line is, damage is told, and a follower survives what happens."""

import os
from pathlib import Path

import pytest

from persona_probe.errors import InputError
from persona_probe.monitor.dashboard.feed import EventFollower, event_files
from persona_probe.monitor.events import End, Event, Fault, to_line
from persona_probe.monitor.history import History
from persona_probe.monitor.sinks.files import JsonlSink, read_events, readings_frame
from persona_probe.monitor.sinks.sink import Sink
from tests.monitor.events import TOXIC, alarm, behaviour, reading, start, write

EVENTS: list[Event] = [start(), reading(0), alarm(5), behaviour(5), Fault(6, "probe", "boom"), End(9, 2, 0.5)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "readings.jsonl"


def test_events_come_back_as_they_went(path: Path) -> None:
    write(path, *EVENTS)
    assert read_events(path) == EVENTS


def test_every_line_is_in_the_file_at_once(path: Path) -> None:
    sink: Sink = JsonlSink(path, fsync=True)
    for n, event in enumerate(EVENTS, 1):
        sink.emit(event)
        assert len(read_events(path)) == n
    sink.close()
    sink.emit(EVENTS[0])  # as a second training run with the same monitor does
    sink.close()
    assert read_events(path) == [*EVENTS, EVENTS[0]]


@pytest.mark.parametrize("cut", range(1, len(to_line(EVENTS[1]).encode()), 37))
def test_a_line_torn_anywhere_is_cut_and_nothing_else(path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    write(path, EVENTS[0])
    whole = path.read_bytes()
    path.write_bytes(whole + to_line(EVENTS[1]).encode()[:cut])
    assert read_events(path) == EVENTS[:1]
    write(path, *EVENTS[1:])
    assert read_events(path) == EVENTS
    assert f"torn line of {cut} bytes" in caplog.text
    assert path.read_bytes().startswith(whole)


def test_a_whole_line_without_its_break_is_kept(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(path, *EVENTS[:2])
    path.write_bytes(path.read_bytes()[:-1])
    assert read_events(path) == EVENTS[:2]
    write(path, *EVENTS[2:])
    assert read_events(path) == EVENTS
    assert caplog.text == ""


def test_a_torn_only_line_longer_than_a_block_is_cut(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b'{"event": "' + b"x" * 200_000)
    write(path, EVENTS[0])
    assert read_events(path) == EVENTS[:1]


def test_damage_in_the_middle_is_told_with_its_line(path: Path) -> None:
    write(path, *EVENTS[:2])
    path.write_bytes(path.read_bytes() + b'{"event": "reading"}\n' + to_line(EVENTS[2]).encode())
    with pytest.raises(InputError, match="line 3 is damaged"):
        read_events(path)


def test_a_missing_file_and_a_folder_are_told(path: Path) -> None:
    with pytest.raises(InputError, match="no events at"):
        read_events(path)
    with pytest.raises(InputError, match="is a folder"):
        JsonlSink(path.parent.parent)


def test_readings_as_a_table(path: Path) -> None:
    frame = readings_frame([start(), reading(0, 1.0), alarm(5), reading(5, 2.0)])
    toxic = frame[frame["feature"] == TOXIC]
    assert toxic["step"].tolist() == [0, 5] and toxic["mean"].tolist() == [1.0, 2.0]
    assert toxic["shift"].tolist() == [0.0, 2.0]  # base mean 1, base sd 0.5
    assert len(frame) == 4
    assert readings_frame([start()]).empty


def test_a_follower_takes_whole_lines_only(path: Path) -> None:
    follower = EventFollower(path)
    assert follower.poll().events == []
    path.parent.mkdir()
    lines = b"".join(to_line(event).encode() for event in EVENTS)
    seen: list[Event] = []
    for n in range(0, len(lines) + 50, 50):
        path.write_bytes(lines[:n])
        news = follower.poll()
        assert not news.restarted
        seen += news.events
        assert len(seen) == lines[:n].count(b"\n")
    assert seen == EVENTS
    assert follower.poll().events == []


@pytest.mark.parametrize("how", ["shorter", "longer", "new file", "deleted"])
def test_a_follower_survives_a_replaced_file(path: Path, how: str) -> None:
    write(path, *EVENTS)
    follower = EventFollower(path)
    assert follower.poll().events == EVENTS
    fresh = [start(), *(reading(n, 3.0) for n in range(1 if how == "shorter" else 20))]
    if how == "new file":
        write(path.with_name("other"), *fresh)
        path.with_name("other").replace(path)
    else:
        path.unlink()
        if how == "deleted":
            gone = follower.poll()
            assert gone.restarted and gone.events == []
        write(path, *fresh)
    news = follower.poll()
    assert news.restarted == (how != "deleted")
    assert news.events == fresh
    assert follower.poll().events == [] and not follower.poll().restarted


def test_a_follower_counts_damage_and_goes_on(path: Path) -> None:
    write(path, EVENTS[0])
    path.write_bytes(path.read_bytes() + b"\n\xff\xfe\nnull\n{}\n" + to_line(EVENTS[1]).encode())
    follower = EventFollower(path)
    assert follower.poll().events == EVENTS[:2]
    assert follower.damaged == 3


def test_the_files_of_a_run(tmp_path: Path) -> None:
    assert event_files(tmp_path) == []
    old, new, other = tmp_path / "readings.jsonl", tmp_path / "arms" / "a.events.jsonl", tmp_path / "samples.jsonl"
    for n, path in enumerate((old, new, other)):
        write(path, start())
        os.utime(path, (n, n))
    assert event_files(tmp_path) == [new, old]
    assert event_files(old) == [old]
    assert event_files(tmp_path / "soon.jsonl") == [tmp_path / "soon.jsonl"]
    with pytest.raises(InputError, match="no run at"):
        event_files(tmp_path / "nothing")


def steps(history: History, mode: str = "probe") -> list[int]:
    return [r.step for r in history.readings[mode]]


def test_a_resumed_run_replaces_what_it_does_again() -> None:
    history = History().add([start(), *(reading(n) for n in range(0, 50, 10)), alarm(20), alarm(30), behaviour(30)])
    assert steps(history) == [0, 10, 20, 30, 40]
    history.add([start()])
    assert steps(history) == [0, 10, 20, 30, 40]  # until it has something new to say
    history.add([reading(30, 7.0)])
    assert steps(history) == [0, 10, 20, 30] and history.readings["probe"][-1].features[0].mean == 7
    assert [a.step for a in history.alarms] == [20] and not history.behaviours
    history.add([start(), reading(0)])
    assert steps(history) == [0] and history.alarms == [] and history.starts == 3


def test_a_long_run_keeps_its_ends_and_a_bounded_number() -> None:
    history = History(limit=10).add([start(), *(reading(n) for n in range(1000))])
    assert len(steps(history)) <= 10
    assert steps(history)[0] == 0 and steps(history)[-1] == 999
    assert steps(history) == sorted(set(steps(history)))
    assert history.taken == 1000
    assert history.latest is not None and history.latest.step == 999
