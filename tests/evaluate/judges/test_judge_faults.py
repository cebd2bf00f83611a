"""Faulty replies: each is the failure of one answer, none is paid twice, and what is read is checked."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.assault.faulty_replies import FAULTS
from benchmarks.assault.replies import KINDS, drive, kind_of
from benchmarks.assault.reply_server import GOOD, ReplyServer, Wire, completion
from persona_probe.errors import InputError
from persona_probe.evaluate.completion import Completion, Malformed
from persona_probe.evaluate.endpoint import Budget, Key
from persona_probe.evaluate.judges.cache import JudgementCache
from persona_probe.evaluate.judges.http import Endpoint, HttpBackend
from persona_probe.evaluate.judges.judge import CachedJudge
from persona_probe.evaluate.judges.protocols import Criterion, critique, seems_out_of, summarise
from persona_probe.evaluate.judges.replies import Ask, Failure, Item, Judgement, Replies, Reply
from tests.evaluate.judges.fake_judge_server import FakeServer
from tests.evaluate.judges.judging_items import CRITERION, items, teach

Make = Callable[..., CachedJudge]
ASKED = Criterion("faults", "{question}|{answer}", labels=("CODE",))


WAITS = "slow"
"""Replies that take their time: seconds of waiting."""


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.long) if k == WAITS else k for k in KINDS])
def test_no_faulty_reply_ends_a_run_or_is_lost_or_paid_twice(tmp_path: Path, kind: str) -> None:
    driven = drive({name: fault for name, fault in FAULTS.items() if kind_of(fault) == kind}, tmp_path, kind)
    assert driven.unlike() == []
    assert driven.asked_twice() == []
    assert driven.lost() == []
    assert len(FAULTS) > 200


# --- One endpoint that answers as a test says


def judge_at(url: str, tmp_path: Path, criterion: Criterion = ASKED, budget: Budget | None = None, **settings: object):
    endpoint = Endpoint(**{"model": "m", "base_url": url, "key_variable": None, "max_retries": 1, **settings})
    return CachedJudge(criterion, HttpBackend(endpoint, budget), JudgementCache(tmp_path / "c.sqlite"))


def replying(change: Callable[[dict], None]) -> Callable[[Wire], None]:
    def send(wire: Wire) -> None:
        body = completion()
        change(body)
        wire.answer(json.dumps(body).encode())

    return send


def test_a_count_below_zero_does_not_widen_the_budget(tmp_path: Path) -> None:
    usage = {"prompt_tokens": -(10**9), "completion_tokens": -5}
    with ReplyServer({f"q{n}": replying(lambda body: body.update(usage=usage)) for n in range(30)}) as server:
        budget = Budget(tokens=100)
        judge = judge_at(server.url, tmp_path, budget=budget, concurrency=1)
        found = judge.judge([Item(f"q{n}", "a") for n in range(30)])
    assert 0 < budget.tokens <= 100 and 0 < sum(j.usable for j in found) < 30
    assert {j.label for j in found if not j.usable} == {"not asked"}


def test_a_reply_without_end_is_not_kept_in_memory(tmp_path: Path) -> None:
    with ReplyServer({name: FAULTS[name].send for name in ("wire: 64 MB of nothing", "wire: no end")}) as server:
        judge = judge_at(server.url, tmp_path)
        judge.judge([Item("well", "a")])
        tracemalloc.start()
        found = judge.judge([Item("wire: 64 MB of nothing", "a"), Item("wire: no end", "a"), Item("well", "a")])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert [j.label for j in found] == ["failed", "failed", "score"] and peak < 30e6


@pytest.mark.parametrize("key", ["k", "1", "8", "85", "none", "sk-long-enough-to-hide"])
def test_a_key_in_a_reply_is_hidden_where_it_is_a_secret_and_never_changes_a_score(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORT_KEY", key)
    other = [{"token": "85", "logprob": -0.1}, {"token": f"k {key}", "logprob": -4}]
    echo = replying(lambda body: body["choices"][0]["logprobs"]["content"][0].update(top_logprobs=other))
    with ReplyServer({"echo": echo, "error": FAULTS["status 404 for a while"].send}) as server:
        judge = judge_at(server.url, tmp_path, key_variable="SHORT_KEY")
        [found] = judge.judge([Item("echo", "a")])
        assert server.key == key
    assert found.score == pytest.approx(GOOD)
    assert ("***" in str(found.tokens)) == (len(key) > 8) and (key in str(found.tokens)) == (len(key) <= 8)
    assert Key("secret-of-eight").masked("a secret-of-eight b") == "a *** b" and Key("k").masked("ok k") == "ok k"


@pytest.mark.parametrize("key", ["sk two", "sk\nsecond-line", "sk-\u00e9"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODD_KEY", key)
    with pytest.raises(InputError, match="the key in ODD_KEY holds") as caught:
        Key.from_environment("ODD_KEY")
    assert "sk" not in str(caught.value)


def test_a_second_reply_on_one_connection_is_not_taken_for_the_next_answer(tmp_path: Path) -> None:
    name = "wire: a second reply that nobody asked for"
    with ReplyServer({name: FAULTS[name].send}) as server:
        judge = judge_at(server.url, tmp_path, concurrency=1)
        found = judge.judge([Item("well 0", "a"), Item(name, "a"), *(Item(f"well {n}", "a") for n in range(1, 5))])
    assert [j.score for j in found] == pytest.approx([GOOD] * 6)


# --- Models that refuse parameters, or think first


def refusing(*names: str) -> Callable[[Wire], None]:
    def send(wire: Wire) -> None:
        for name in names:
            if name in wire.request:
                instead = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                says = f"Unsupported parameter: '{name}' is not supported with this model.{instead}"
                error = {"message": says, "param": name, "code": "unsupported_parameter"}
                wire.answer(json.dumps({"error": error}).encode(), 400)
                return
        wire.whole()

    return send


def test_a_reasoning_judge_gets_what_it_takes_and_is_told_once(tmp_path: Path) -> None:
    names = [f"q{n}" for n in range(6)]
    send = refusing("max_tokens", "temperature", "seed")
    with ReplyServer(dict.fromkeys(names, send)) as server:
        judge = judge_at(server.url, tmp_path, samples=1, concurrency=1)
        found = judge.judge([Item(name, "a") for name in names])
    assert [j.score for j in found] == pytest.approx([GOOD] * 6)
    assert len(server.bodies) == 6 + 3
    last = server.bodies[-1]
    assert not {"max_tokens", "temperature", "seed"} & set(last) and last["max_completion_tokens"] == 8 + 2048


def test_several_requests_at_once_learn_the_same(tmp_path: Path) -> None:
    names = [f"q{n}" for n in range(12)]
    with ReplyServer(dict.fromkeys(names, refusing("max_tokens", "temperature"))) as server:
        judge = judge_at(server.url, tmp_path, samples=1, concurrency=6)
        assert [j.score for j in judge.judge([Item(name, "a") for name in names])] == [GOOD] * 12


def test_a_written_reply_has_room_for_a_thought_and_a_score_has_none(tmp_path: Path) -> None:
    rubric = critique("advice", "{question}|{answer}")
    with ReplyServer({"q": refusing("max_tokens")}) as server:
        judge_at(server.url, tmp_path, rubric).judge([Item("q", "a")])
        judge_at(server.url, tmp_path).judge([Item("q", "a")])
        judge_at(server.url, tmp_path, rubric, thought_tokens=500).judge([Item("well", "a")])
    sent = [body.get("max_completion_tokens", body.get("max_tokens")) for body in server.bodies]
    assert sent == [600, 600 + 2048, 1, 1, 1100]


def test_an_error_about_a_value_is_no_reason_to_leave_it_out(tmp_path: Path) -> None:
    def too_large(wire: Wire) -> None:
        wire.answer(b'{"error": {"message": "max_tokens is too large: 600", "param": "max_tokens"}}', 400)

    with ReplyServer({"q": too_large}) as server:
        [well, found] = judge_at(server.url, tmp_path).judge([Item("well", "a"), Item("q", "a")])
    assert well.usable and "too large" in found.error and server.asked["q"] == 1


# --- Any backend: what cannot be a reply is a failure, and what is under way is kept


class Backend:
    """Gives one outcome for every request, in order."""

    id, block = "backend", 8

    def __init__(self, *outcomes: Reply | Failure) -> None:
        self.outcomes, self.asked = list(outcomes), 0

    def cost(self, ask: Ask) -> tuple[int, int, int]:
        return 1, 1, 1

    def replies(self, asks: object) -> Replies:
        for place in range(len(list(asks))):  # pyright: ignore[reportArgumentType]
            self.asked += 1
            yield place, self.outcomes.pop(0)


@pytest.mark.parametrize("probability", [float("nan"), float("inf"), -0.5, 2.0, None, "1"])
def test_what_is_no_probability_is_one_failure_of_any_backend(probability: object, tmp_path: Path) -> None:
    bad = Reply({"5": probability})  # pyright: ignore[reportArgumentType]
    backend = Backend(Reply({"5": 1.0}), bad, Reply({"7": 1.0}))
    judge = CachedJudge(CRITERION, backend, JudgementCache(tmp_path / "c.sqlite"))
    found = judge.judge(items(3))
    assert [j.label for j in found] == ["score", "failed", "score"] and backend.asked == 3
    assert "between 0 and 1" in found[1].error
    assert judge.cache.count() == 2


def test_the_reasons_are_counted(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    failures = [Failure("one"), Failure("two"), Failure("two")]
    judge = CachedJudge(CRITERION, Backend(Reply({"5": 1.0}), *failures), JudgementCache(tmp_path / "c.sqlite"))
    summary = summarise(judge.judge(items(4)))
    assert "2 answers failed and are set aside; a further run asks for them again: two" in caplog.text
    assert summary.why.startswith("3 of 4 answers have no usable judgement (3 failed, most often: two;")


def test_an_interrupt_keeps_what_was_under_way(server: FakeServer, make_judge: Make) -> None:
    teach(server, 24)
    server.delay = 0.05
    judge = make_judge(concurrency=4)

    def interrupt(count: int) -> None:
        if count == 5:
            raise KeyboardInterrupt

    judge.on_reply = interrupt
    with pytest.raises(KeyboardInterrupt):
        judge.judge(items(24))
    assert judge.cache.count() == len(server.calls) < 24
    make_judge().judge(items(24))
    assert len(server.calls) == 24


def test_several_samples_survive_the_failure_of_some(tmp_path: Path) -> None:
    def third(wire: Wire) -> None:
        bad = wire.request["seed"] == 2 or "most" in wire.request["messages"][0]["content"]
        wire.answer(b"[]") if bad else wire.whole()

    with ReplyServer({"some": third, "most": third}) as server:
        judge = judge_at(server.url, tmp_path, samples=4)
        well, some, most = judge.judge([Item("well", "a"), Item("some", "a"), Item("most", "a")])
    assert (well.score, some.score, most.label) == (GOOD, GOOD, "failed")


def test_half_a_surrogate_pair_in_an_answer_can_be_asked_about(server: FakeServer, make_judge: Make) -> None:
    server.known["Q: q A: \ufffd."] = {"50": 1.0}
    assert make_judge().judge([Item("q", "\ud800.")])[0].score == pytest.approx(50)


# --- Scales


@pytest.mark.parametrize(
    ("text", "low", "high", "score"),
    [
        ("Final Score: 80%", 0, 100, 80),
        ("Final Score: 8/10", 0, 100, 80),
        ("Final Score: 0.85", 0, 100, None),
        ("Final Score: 0.85", 0, 1, 0.85),
        ("Final Score: 1. The answer is kind: 90", 0, 100, None),
        ("Final Score: 1. The answer is unkind.", 0, 100, 1),
        ("Final Score: 3.\n1. It is kind.", 1, 5, 3),
        ("Final Score: 4%", 1, 5, None),
        ("Final Score: -1", 0, 100, None),
        ("<think>Final Score: 5</think>Final Score: 20", 0, 100, 20),
    ],
)
def test_written_scores_on_another_scale(text: str, low: int, high: int, score: float | None) -> None:
    assert critique("r", "{answer}", low=low, high=high).read(Reply(text=text)).score == score


def test_a_pattern_that_finds_words_gives_no_score() -> None:
    rubric = critique("r", "{answer}", pattern=r"Score: (\w+)")
    assert [rubric.read(Reply(text=f"Score: {word}")).score for word in ("high", "nan", "inf", "4")] == [
        None,
        None,
        None,
        4,
    ]


@pytest.mark.parametrize(
    ("scores", "whole"),
    [
        ([0.9, 0.8, 0.1], 1),
        ([1, 1, 0, 1], 1),
        ([0, 0, 0, 0.4], 0),
        ([7, 8, 9, 3], 10),
        ([10, 5, 0, 10], 0),
        ([4, 3, 5, 1], 5),
        ([0, 2, 5, 0], 0),
        ([0, 0], 0),
        ([90, 1, 0.5], 0),
        ([], 0),
    ],
)
def test_the_scale_that_scores_seem_to_be_on(scores: list[float], whole: int) -> None:
    assert seems_out_of(scores) == whole


def test_a_judge_from_zero_to_one_or_one_to_five_is_found_out() -> None:
    def reply(number: int, id: int) -> Judgement:
        tokens = {str(number): 0.6, "10": 0.3}
        return Judgement(str(id), float(number), "score", 1.0, tokens, [], "j", "p", (0, 100), cached=False)

    for numbers, whole in (([1, 0, 1, 1], 1), ([3, 4, 5, 2], 5), ([7, 8, 9, 8], 10)):
        assert f"from 0 to {whole}" in summarise([reply(n, i) for i, n in enumerate(numbers * 5)]).why
    assert summarise([reply(n, i) for i, n in enumerate([0, 0, 1, 0] * 5)]).judged


# --- What a completion may be


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("85", "85"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "8"}, {"type": "text", "text": "5"}], "85"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "20"}]}, {"type": "text", "text": "85"}], "85"),
    ],
)
def test_the_text_of_a_message(content: object, text: str) -> None:
    assert Completion.of(json.dumps({"choices": [{"message": {"content": content}}]})).text == text


@pytest.mark.parametrize("body", ["[" * 100_000, '{"choices": [{"message": {}, "x": ' + "[" * 60 + "]" * 60 + "}]}"])
def test_depth_is_refused_without_a_crash(body: str) -> None:
    with pytest.raises(Malformed):
        Completion.of(body)


def test_an_endpoint_that_never_gives_a_reply_ends_the_run_in_one_line(tmp_path: Path) -> None:
    send = FAULTS["logprob NaN"].send
    names = [f"q{n}" for n in range(60)]
    with ReplyServer(dict.fromkeys(names, send)) as server:
        with pytest.raises(InputError, match=r"no reply to 20 requests.*logprob of nan"):
            judge_at(server.url, tmp_path, concurrency=2).judge([Item(name, "a") for name in names])
        assert max(server.asked.values()) == 1 and len(server.asked) <= 32
