"""The cache: by content, shared by processes, whole after a kill."""

import json
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from persona_probe.errors import InputError
from persona_probe.evaluate.judges.cache import (
    LEASE,
    Claims,
    JudgementCache,
    StoredJudgement,
    default_path,
    judgement_key,
)
from persona_probe.evaluate.judges.http import Endpoint, HttpBackend
from persona_probe.evaluate.judges.judge import CachedJudge
from persona_probe.evaluate.judges.replies import Reply
from tests.evaluate.judges.fake_judge_server import FakeServer
from tests.evaluate.judges.judging_items import CRITERION, KEY, items, teach
from tests.processes import Process

Make = Callable[..., CachedJudge]
LIMIT_S = 60


def judge_all(channel: Connection, url: str, path: Path, count: int, lease: float) -> None:
    """In a process of its own: judge `count` answers when told to, and say what came."""
    from persona_probe.evaluate.judges import cache, judge

    cache.LEASE, judge.POLL = lease, 0.02
    endpoint = Endpoint("judge", base_url=url, key_variable="JUDGE_KEY", concurrency=2)
    own = CachedJudge(CRITERION, HttpBackend(endpoint), JudgementCache(path))
    channel.send("ready")
    channel.recv()
    found = own.judge(items(count))
    channel.send({"scores": [j.score for j in found], "asked": own.progress.asked})


def row(key: str = "k", score: float = 1.0) -> StoredJudgement:
    return StoredJudgement(key, "judge", "protocol", '[{"role": "user"}]', Reply({"1": 1.0}), score, "score", 1.0)


def worker(server: FakeServer, path: Path, count: int, lease: float = 60.0) -> tuple[Process, Connection]:
    """A process of its own that judges `count` answers, and the channel to it."""
    here, there = Pipe()
    return Process(judge_all, there, server.url, path, count, lease, environment={"JUDGE_KEY": KEY}), here


def go(*channels: Connection) -> None:
    """Let workers begin together, when all are ready."""
    for channel in channels:
        assert channel.poll(LIMIT_S) and channel.recv() == "ready"
    for channel in channels:
        channel.send("go")


def test_two_processes_make_no_call_twice(server: FakeServer, tmp_path: Path) -> None:
    teach(server, 60)
    server.delay = 0.02
    workers = [worker(server, tmp_path / "shared.sqlite", 60) for _ in range(2)]
    channels = [channel for _, channel in workers]
    go(*channels)
    assert all(channel.poll(LIMIT_S) for channel in channels)
    found = [channel.recv() for channel in channels]
    assert max(Counter(server.prompts()).values()) == 1
    assert len(server.calls) == 60
    for one in found:
        assert one["scores"] == pytest.approx(list(range(60)))
        assert one["asked"] > 0
    assert sum(one["asked"] for one in found) == 60


def test_after_a_kill_only_the_missing_calls_are_made(server: FakeServer, tmp_path: Path, make_judge: Make) -> None:
    teach(server, 40)
    server.held_from = 20
    path = tmp_path / "judgements.sqlite"  # the same file as make_judge's
    killed, channel = worker(server, path, 40)
    go(channel)
    cache = JudgementCache(path)
    deadline = time.monotonic() + LIMIT_S
    while cache.count() < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.kill()
    assert killed.wait(LIMIT_S) == -signal.SIGKILL
    kept, made = cache.count(), len(server.calls)
    server.held_from = None
    assert kept == 20
    began = time.monotonic()
    found = make_judge().judge(items(40))
    assert time.monotonic() - began < LEASE / 2, "the claims of a killed process are free at once"
    assert not list(path.parent.glob(".locks/*"))
    assert [j.score for j in found] == pytest.approx(list(range(40)))
    assert sum(j.cached for j in found) == kept
    assert len(server.calls) - made == 40 - kept


def test_a_claim_keeps_others_out_until_its_lease_ends(cache: JudgementCache) -> None:
    assert cache.claim(["a", "b", "c"], "one", 60, most=2) == ["a", "b"]
    assert cache.claim(["a", "b", "c"], "two", 60, most=9) == ["c"]
    cache.renew("one", -1)
    assert cache.claim(["a"], "two", 60, most=9) == ["a"]
    cache.store(row("b"), "one")
    cache.renew("two", -1)
    assert cache.claim(["a", "b"], "one", 60, most=9) == ["a"]
    cache.release("one", ["a"])
    assert cache.claim(["a", "c"], "three", 60, most=9) == ["a", "c"]


def test_claims_are_renewed_while_their_owner_lives_and_end_with_it(cache: JudgementCache) -> None:
    def lease() -> float:
        with sqlite3.connect(cache.path) as connection:
            return connection.execute("SELECT MIN(lease) FROM claims").fetchone()[0]

    with pytest.raises(ZeroDivisionError), Claims(cache, lease=0.3) as claims:
        assert claims.take(["a", "b"], 9) == ["a", "b"]
        first = lease()
        while lease() == first:
            time.sleep(0.01)
        raise ZeroDivisionError
    assert cache.claim(["a", "b"], "other", 60, 9) == ["a", "b"]


def test_claims_do_not_go_by_the_time_of_day(cache: JudgementCache, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    with Claims(cache) as one, Claims(cache) as two:
        assert one.take(["a"], 9) == ["a"]
        for moved in (-86400, 86400):
            monkeypatch.setattr(time, "time", lambda moved=moved: now + moved)
            assert two.take(["a"], 9) == []
        one.drop(["a"])
        assert two.take(["a"], 9) == ["a"]


def test_claims_whose_owner_is_gone_are_free_whatever_their_lease(cache: JudgementCache) -> None:
    cache.claim(["a", "b"], "another-host:1:0123456789abcdef", 1e9, 9)
    with Claims(cache) as claims:
        assert claims.take(["a", "b", "c"], 2) == ["c", "a"]
        assert claims.take(["b"], 9) == ["b"]


def test_damaged_rows_are_asked_for_again(server: FakeServer, make_judge: Make, cache: JudgementCache) -> None:
    teach(server, 5)
    make_judge().judge(items(5))
    bad = ('{"tokens": {"5": NaN}}', '{"tokens": {"5": 3.0}}', "[]", '{"tokens"', '{"strange": 1}')
    with sqlite3.connect(cache.path) as connection:
        for (key,), reply in zip(connection.execute("SELECT key FROM judgements").fetchall(), bad, strict=True):
            connection.execute("UPDATE judgements SET reply = ? WHERE key = ?", (reply, key))
    found = make_judge().judge(items(5))
    assert [j.score for j in found] == pytest.approx(list(range(5))) and len(server.calls) == 10
    assert all(j.cached for j in make_judge().judge(items(5)))


def test_a_cache_that_cannot_be_written_is_one_line(cache: JudgementCache) -> None:
    cache.close()
    with pytest.raises(InputError, match=r"the judgement cache .* does not work"):
        cache.count()


def test_the_first_judgement_stays(cache: JudgementCache) -> None:
    cache.store(row(score=1.0), "one")
    cache.store(StoredJudgement(**{**vars(row(score=2.0)), "reply": Reply({"2": 1.0})}), "two")
    assert cache.replies(["k", "other"]) == {"k": Reply({"1": 1.0})}
    assert cache.count() == 1


def test_the_prompt_is_kept_beside_the_score(server: FakeServer, make_judge: Make, cache: JudgementCache) -> None:
    teach(server, 8)
    make_judge().judge(items(8)[7:])
    [(prompt, score, label, judge, protocol)] = sqlite3.connect(cache.path).execute(
        "SELECT prompt, score, label, judge, protocol FROM judgements"
    )
    assert json.loads(prompt) == [{"role": "user", "content": "Q: question 7? A: answer 7."}]
    assert (score, label) == (pytest.approx(7), "score")
    assert json.loads(judge)["model"] == "judge"
    assert protocol.startswith("test-")


def test_the_key_is_the_content() -> None:
    messages = [{"role": "user", "content": "q"}]
    same = judgement_key("judge", "p", messages)
    assert same == judgement_key("judge", "p", [{"content": "q", "role": "user"}])
    others = [
        judgement_key("judge 2", "p", messages),
        judgement_key("judge", "p2", messages),
        judgement_key("judge", "p", [{"role": "user", "content": "q "}]),
        judgement_key("judge", "p", messages, written=5),
    ]
    assert len({same, *others}) == 5


def test_reopening_finds_what_was_kept(tmp_path: Path) -> None:
    first = JudgementCache(tmp_path / "new" / "folder" / "c.sqlite")
    first.store(row(), "me")
    first.close()
    assert JudgementCache(first.path).count() == 1
    with sqlite3.connect(first.path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_default_place_is_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_PROBE_CACHE", str(tmp_path / "mine"))
    assert default_path() == tmp_path / "mine" / "judgements.sqlite"
    JudgementCache().close()
    assert default_path().is_file()


def test_files_that_are_no_cache_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("These are my notes, and no database at all." * 50)
    with pytest.raises(InputError, match="no judgement cache"):
        JudgementCache(text)
    assert text.read_text().startswith("These are my notes")
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE recipes (name)")
    with pytest.raises(InputError, match="another program's database"):
        JudgementCache(foreign)
    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(InputError, match="version 99"):
        JudgementCache(newer)
