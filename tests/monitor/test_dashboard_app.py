"""What the page is sent, by whom it may be asked, and what the command says to bad input."""

import http.client
import json
import os
import re
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from dash import no_update

from persona_probe.cli import runs as command
from persona_probe.cli.runs import make_server
from persona_probe.monitor.dashboard.app import TITLE, _look, make_app, status
from persona_probe.monitor.dashboard.feed import EventFollower, Feed
from persona_probe.monitor.events import End, Fault, from_line, to_line
from persona_probe.monitor.figure import monitor_figure
from persona_probe.monitor.history import History
from tests.factories import refusal, run_command
from tests.monitor.events import HOSTILE, TOXIC, alarm, reading, start, write


def texts(component: Any) -> str:
    """All text in components, in order."""
    if isinstance(component, list | tuple):
        return " ".join(texts(c) for c in component)
    children = getattr(component, "children", component)
    return "" if children is None else texts(children) if children is not component else str(component)


def test_only_changes_are_sent(tmp_path: Path) -> None:
    path, feed = tmp_path / "readings.jsonl", Feed(tmp_path)
    _, line, figure, *_, seen = _look(feed, "", None)
    assert texts(line).startswith("waiting") and "no reading yet" in str(figure)
    write(path, start(), reading(0), alarm(0), Fault(0, "behaviour", "boom"))
    options, line, figure, alarms, latest, faults, seen = _look(Feed(tmp_path), "", seen)
    assert [o["value"] for o in options] == ["", "readings.jsonl"]
    assert "step 0 · 1 reading ·" in texts(line) and texts(line).endswith("1 alarm")
    assert TOXIC in str(figure) and "1.5 over 1.25" in texts(alarms) and "behaviour is off: boom" in texts(faults)
    assert f"{TOXIC} 3 1 0.75 to 1.25 1 0 inside 0.5" in texts(latest)
    feed = Feed(tmp_path)
    seen = _look(feed, "", None)[-1]
    again = _look(feed, "", seen)
    assert [part is no_update for part in again] == [True, False, *[True] * 5]
    write(path, reading(5, 2.0), End(5, 2, 0.1))
    _, line, figure, *_ = _look(feed, "", seen)
    assert figure is not no_update and "step 5" in texts(line) and "run has ended" in texts(line)


def test_the_choice_picks_among_the_found_files_only(tmp_path: Path) -> None:
    write(tmp_path / "run" / "a" / "readings.jsonl", start(), reading(3))
    write(tmp_path / "run" / "b.events.jsonl", start(), reading(4))
    write(tmp_path / "secret.events.jsonl", start(), reading(5))
    feed = Feed(tmp_path / "run")
    assert sorted(feed.names()) == ["a/readings.jsonl", "b.events.jsonl"]
    chosen = {name: feed.read(name) for name in ("a/readings.jsonl", "b.events.jsonl", "../secret.events.jsonl")}
    found = {name: one.name for name, one in chosen.items() if one}
    assert found.pop("../secret.events.jsonl") in found
    assert all(name == shown for name, shown in found.items())


def test_the_status_says_what_a_reader_must_know(tmp_path: Path) -> None:
    path = tmp_path / "readings.jsonl"
    write(path, start(), reading(0), start(), reading(7))
    with path.open("ab") as handle:
        handle.write(b"nonsense\n")
    followed = Feed(tmp_path).read()
    assert followed is not None
    assert status(followed, followed.changed + 600) == [
        "readings.jsonl · step 7 · 2 readings · last event 10 min ago · started 2 times · 1 line left out: no events"
    ]


def test_the_server_answers_this_machine_only_and_sends_its_policy(tmp_path: Path) -> None:
    client = make_app(Feed(tmp_path)).server.test_client()
    answer = client.get("/", base_url="http://127.0.0.1:8050")
    page = answer.get_data(as_text=True)
    assert answer.status_code == 200 and f"<title>{TITLE}</title>" in page
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert not re.search(r"""(src|href)=["'](?!/_dash|data:)""", page)
    assert '"disable_version_check":true' in page and '"ui":false' in page and '"serve_locally":true' in page
    for host in ("evil.example", "evil.example:8050", "127.0.0.1.evil.example"):
        assert client.get("/", base_url=f"http://{host}").status_code == 403


def test_a_hostile_run_name_is_text(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    app = make_app(Feed(folder))
    client = app.server.test_client()
    assert "pwned" not in client.get("/", base_url="http://127.0.0.1").get_data(as_text=True)
    layout = client.get("/_dash-layout", base_url="http://127.0.0.1").get_json()
    heading = layout["props"]["children"][0]["props"]["children"][0]
    assert (heading["type"], heading["props"]["children"]) == ("H1", folder.name)


def test_it_listens_on_loopback_and_tells_a_taken_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = make_server(str(tmp_path), 0)
    assert server.server_address[0] == "127.0.0.1"
    refused = refusal(capsys)
    error = refused("watch", tmp_path, "--port", server.port, "--no-browser")
    assert re.search(rf"port {server.port} cannot be used .*another --port", error)
    server.server_close()
    make_server(str(tmp_path), server.port).server_close()
    assert "port 99999 cannot be used" in refused("watch", tmp_path, "--port", 99_999, "--no-browser")


def test_a_missing_run_and_missing_dash_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = refusal(capsys)
    assert re.search(r"no run at .*nowhere", refused("watch", tmp_path / "nowhere", "--no-browser"))
    monkeypatch.setitem(sys.modules, "dash", None)
    assert "pip install 'persona-probe[dashboard]'" in refused("watch", tmp_path, "--no-browser")


def test_the_command_says_where_and_opens_the_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from werkzeug.serving import BaseWSGIServer

    visited: list[str] = []

    def interrupted(self: BaseWSGIServer, poll_interval: float = 0.5) -> None:
        assert isinstance(self.socket, socket.socket)
        raise KeyboardInterrupt

    monkeypatch.setattr(BaseWSGIServer, "serve_forever", interrupted)
    monkeypatch.setattr(webbrowser, "open", visited.append)
    run_command("watch", tmp_path, "--port", 0)
    run_command("watch", tmp_path, "--port", 0, "--no-browser")
    said = capsys.readouterr().out
    assert len(visited) == 1 and f"at {visited[0]} (Ctrl-C ends)" in said
    assert visited[0].startswith(f"http://{command.HOST}:") and said.count("the run continues") == 2


LINES = {
    "no-event": {"step": 3},
    "unknown-event": {"event": "other", "step": 3},
    "step-text": {"event": "end", "step": "seven", "readings": 1, "seconds": 0.1},
    "step-bool": {"event": "end", "step": True, "readings": 1, "seconds": 0.1},
    "step-null": {"event": "end", "step": None, "readings": 1, "seconds": 0.1},
    "step-huge": {"event": "end", "step": 10**30, "readings": 1, "seconds": 0.1},
    "seconds-list": {"event": "end", "step": 1, "readings": 1, "seconds": [0.1]},
    "message-number": {"event": "fault", "step": 1, "part": "x", "message": 7},
    "message-half": '{"event": "fault", "step": 1, "part": "x", "message": "\\ud800"}',
    "alarm-dict": {"event": "alarm", "step": 1, "rule": {}, "feature": [], "message": {}, "value": 1, "threshold": 2},
    "alarm-huge": {"event": "alarm", "step": 1, "rule": "r", "feature": "f", "message": "m", "value": 10**400}
    | {"threshold": 0},
    "behaviour": {"event": "behaviour", "step": 1, "name": "index", "value": "high"},
    "behaviour-low": {"event": "behaviour", "step": 1, "name": "index", "value": 1.0, "ci_low": "low"},
    "start-features": {"event": "start", "features": ["a"], "layer": 1, "n_probes": 1, "bands": {}},
    "start-bands": {"event": "start", "features": {}, "layer": 1, "n_probes": 1, "bands": {"a": [1, 2, 3]}},
    "start-bands-text": {"event": "start", "features": {}, "layer": 1, "n_probes": 1, "bands": {"a": ["x", "y"]}},
    "start-bands-huge": {"event": "start", "features": {}, "layer": 1, "n_probes": 1, "bands": {"a": [0, 10**400]}},
    "start-metadata": {"event": "start", "features": {}, "layer": 1, "n_probes": 1, "bands": {}, "metadata": [1]},
    "reading-features": {"event": "reading", "step": 1, "mode": "probe", "features": 7},
    "reading-nothing": {"event": "reading"},
    "deep": "[" * 50_000,
    "digits": '{"event": "end", "step": ' + "9" * 5000 + "}",
    "bytes": "\x00\x01",
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_with_wrong_types_is_left_out_and_the_page_goes_on(name: str, tmp_path: Path) -> None:
    path = tmp_path / "readings.jsonl"
    write(path, start(), reading(0))
    line = LINES[name] if isinstance(LINES[name], str) else json.dumps(LINES[name])
    with path.open("a") as handle:
        handle.write(f"{line}\n")
    write(path, reading(5))
    feed = Feed(tmp_path)
    _, line, figure, *_ = _look(feed, "", None)
    assert "step 5" in texts(line) and "1 line left out" in texts(line) and TOXIC in str(figure)


WRONG: tuple[Any, ...] = (None, "x", [], {}, True, 10**30, [1], {"a": 1})


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_no_field_of_another_type_reaches_a_history(wrong: Any) -> None:
    taken = []
    for event in (start(), reading(0), alarm(0), Fault(0, "a", "b"), End(0, 1, 0.1)):
        record = json.loads(to_line(event))
        for key in record:
            with suppress(ValueError):
                taken.append(from_line(json.dumps({**record, key: wrong})))
    drawn = monitor_figure(History().add([start(), *taken, reading(9)]))
    assert TOXIC in drawn.to_json()  # pyright: ignore


def test_a_page_that_cannot_be_drawn_says_so_and_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "readings.jsonl", start(), reading(0))
    client = make_app(Feed(tmp_path)).server.test_client()
    outputs = [("file", "options"), ("status", "children"), ("figure", "figure"), ("alarms", "children")]
    outputs += [("latest", "children"), ("faults", "children"), ("seen", "data")]
    name = "..{}..".format("...".join(f"{one}.{what}" for one, what in outputs))
    body = {
        "output": name,
        "outputs": [{"id": one, "property": what} for one, what in outputs],
        "inputs": [{"id": "tick", "property": "n_intervals", "value": 1}, {"id": "file", "property": "value"}],
        "changedPropIds": ["tick.n_intervals"],
        "state": [{"id": "seen", "property": "data", "value": {"not": "a list"}}],
    }
    url, local = "/_dash-update-component", "http://127.0.0.1:8050"
    answer = client.post(url, json=body, base_url=local)
    assert answer.status_code == 200 and "cannot be shown (KeyError)" in answer.get_data(as_text=True)
    body["state"] = [{"id": "seen", "property": "data", "value": None}]
    assert "step 0" in client.post(url, json=body, base_url=local).get_data(as_text=True)
    for nonsense in ({}, [], "x", {"output": "nothing.here"}):
        assert client.post(url, json=nonsense, base_url=local).status_code in (400, 415)
    large = client.post(url, data=b"0" * 2**21, content_type="application/json", base_url=local)
    assert large.status_code == 413


def test_a_body_without_a_stated_length_is_cut_off(tmp_path: Path) -> None:
    server = make_server(str(tmp_path), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 2**28:
            sent += 2**16
            yield b"0" * 2**16

    asking = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with suppress(OSError):  # the server has answered and hung up
        asking.request("POST", "/_dash-update-component", endless(), encode_chunked=True)
    asking.close()
    again = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    again.request("GET", "/")
    assert again.getresponse().status == 200 and sent < 2**28
    server.shutdown()
    server.server_close()


def test_pipes_and_devices_are_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "readings.jsonl")
    (tmp_path / "zero.events.jsonl").symlink_to("/dev/zero")
    (tmp_path / "sub.events.jsonl").mkdir()
    assert Feed(tmp_path).names() == []
    assert "no run at" in refusal(capsys)("watch", tmp_path / "readings.jsonl", "--no-browser")
    follower = EventFollower(tmp_path / "readings.jsonl")  # it became a pipe after it was found
    assert follower.poll().events == []


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_probe.monitor.dashboard.feed.LONGEST_LINE", 2000)
    path = tmp_path / "readings.jsonl"
    path.write_bytes(b"x" * 9000)
    follower = EventFollower(path)
    assert follower.poll().events == [] and follower.damaged == 0
    with path.open("ab") as handle:
        handle.write(b"x" * 500 + b"\n")
    write(path, End(1, 1, 0.1))
    assert follower.poll().events == [End(1, 1, 0.1)] and follower.damaged == 1
