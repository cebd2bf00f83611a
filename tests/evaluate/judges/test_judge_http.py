"""The HTTP judge against a server on this machine: good replies, every fault, the budget, and the key."""

import logging
import sqlite3
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from persona_probe.errors import InputError
from persona_probe.evaluate.endpoint import Budget
from persona_probe.evaluate.judges.cache import JudgementCache
from persona_probe.evaluate.judges.http import Endpoint, HttpBackend
from persona_probe.evaluate.judges.judge import CachedJudge
from persona_probe.evaluate.judges.protocols import Criterion, critique
from persona_probe.evaluate.judges.replies import Prices
from tests.evaluate.judges.fake_judge_server import FakeServer
from tests.evaluate.judges.judging_items import KEY, items, teach

Make = Callable[..., CachedJudge]


def test_one_token_with_its_probabilities_is_asked_for(server: FakeServer, make_judge: Make) -> None:
    server.known["Q: question 0? A: answer 0."] = {"80": 0.5, " 60": 0.25, "CODE": 0.1, "101": 0.1}
    [found] = make_judge().judge(items(1))
    assert found.score == pytest.approx((80 * 0.5 + 60 * 0.25) / 0.75)
    assert (found.id, found.label, found.cached) == ("i0", "score", False)
    assert found.mass == pytest.approx(0.75)
    assert found.tokens == pytest.approx({"80": 0.5, " 60": 0.25, "CODE": 0.1, "101": 0.1})
    assert found.prompt == [{"role": "user", "content": "Q: question 0? A: answer 0."}]
    wanted = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20, "seed": 0, "model": "judge"}
    assert server.calls[0] == wanted | {"messages": found.prompt}


def test_judging_again_calls_nobody(server: FakeServer, make_judge: Make) -> None:
    teach(server, 5)
    judge = make_judge()
    first = judge.judge(items(5))
    assert [j.score for j in first] == pytest.approx([0, 1, 2, 3, 4])
    again = judge.judge(items(5) + items(5))
    assert len(server.calls) == 5
    assert all(j.cached for j in again)
    assert [j.score for j in again] == [j.score for j in first] * 2
    assert (judge.progress.cached, judge.progress.asked) == (10, 0)


def test_the_same_answer_twice_is_asked_once(server: FakeServer, make_judge: Make) -> None:
    teach(server, 2)
    found = make_judge().judge([*items(2), *items(2)])
    assert len(server.calls) == 2
    assert [j.score for j in found] == pytest.approx([0, 1, 0, 1])


@pytest.mark.parametrize("change", ["model", "samples", "criterion"])
def test_another_judge_is_another_judgement(server: FakeServer, make_judge: Make, change: str) -> None:
    teach(server, 1)
    server.known["Rate: answer 0."] = {"90": 1.0}
    make_judge().judge(items(1))
    other = {"model": {"model": "other"}, "samples": {"samples": 1}, "criterion": {}}[change]
    if change == "criterion":
        make_judge(Criterion("test", "Rate: {answer}")).judge(items(1))
    else:
        make_judge(**other).judge(items(1))
    assert len(server.calls) == 2


def test_a_changed_prompt_is_not_answered(server: FakeServer, make_judge: Make) -> None:
    teach(server, 6)
    with pytest.raises(InputError, match="does not know"):
        make_judge(Criterion("test", "Q: {question} B: {answer}")).judge(items(6))


def test_requests_are_under_way_together_up_to_the_limit(server: FakeServer, make_judge: Make) -> None:
    teach(server, 12)
    server.delay = 0.1
    make_judge(concurrency=4).judge(items(12))
    assert server.most_at_once == 4


@pytest.mark.parametrize(
    "fault", ["rate limit", "broken", "overloaded", "html", "wrong json", "empty choices", "half json", "cut off"]
)
def test_faults_that_pass_are_tried_again(server: FakeServer, make_judge: Make, fault: str) -> None:
    teach(server, 3)
    server.faults.extend([fault, fault])
    found = make_judge(concurrency=1).judge(items(3))
    assert [j.score for j in found] == pytest.approx([0, 1, 2])
    assert len(server.calls) == 5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("broken", "HTTP 500: internal"),
        ("html", "HTML"),
        ("cut off", "cut off"),
        ("wrong json", "no chat completion"),
        ("half json", "broken JSON"),
        ("rate limit", "slow down"),
    ],
)
def test_a_fault_that_stays_fails_one_answer_and_is_not_kept(
    server: FakeServer, make_judge: Make, fault: str, message: str
) -> None:
    teach(server, 2)
    server.faults.extend(["", fault, fault, fault])
    judge = make_judge(concurrency=1)
    good, bad = judge.judge(items(2))
    assert good.score == pytest.approx(0)
    assert (bad.score, bad.label, bad.usable) == (None, "failed", False)
    assert message in bad.error
    assert judge.progress.failed == 1
    assert judge.judge(items(2))[1].score == pytest.approx(1)
    assert len(server.calls) == 5


def test_a_slow_endpoint_is_given_up(server: FakeServer, make_judge: Make) -> None:
    teach(server, 8)
    server.delay = 0.4
    with pytest.raises(InputError, match=r"no reply within 0\.05 s"):
        make_judge(timeout=0.05).judge(items(8))


def test_no_server_is_one_clear_line(make_judge: Make) -> None:
    with pytest.raises(InputError, match="connection refused or cut off"):
        make_judge(base_url="http://127.0.0.1:9/v1").judge(items(8))


REFUSALS = [
    ("refuses the key", "JUDGE_KEY"),
    ("no such model", "check model and base_url"),
    ("no credit", "no credit left"),
    ("logprobs not supported", r"lacks logprobs.*samples=20"),
]


@pytest.mark.parametrize(("fault", "message"), REFUSALS)
def test_refusals_in_a_row_end_the_run_and_keep_what_was_judged(
    server: FakeServer, make_judge: Make, cache: JudgementCache, fault: str, message: str
) -> None:
    teach(server, 9)
    server.faults.extend(["", "", *[fault] * 5])
    with pytest.raises(InputError, match=message):
        make_judge(concurrency=1).judge(items(9))
    assert 2 <= cache.count() <= 4  # what was under way as the fifth refusal came is kept
    assert all(j.usable for j in make_judge(concurrency=1).judge(items(9)))
    assert len(server.calls) == 9 + 5


@pytest.mark.parametrize(("fault", "message"), REFUSALS)
def test_a_refusal_ends_a_run_at_once_only_before_any_reply(
    server: FakeServer, make_judge: Make, fault: str, message: str
) -> None:
    teach(server, 4)
    server.faults.append(fault)
    with pytest.raises(InputError, match=message):
        make_judge(concurrency=1).judge(items(4))
    server.faults.extend(["", fault])
    found = make_judge(concurrency=1, model="other").judge(items(4))
    assert sorted(j.label for j in found) == ["failed", "score", "score", "score"]


def test_replies_without_probabilities_end_a_run_only_if_there_are_no_others(
    server: FakeServer, make_judge: Make
) -> None:
    teach(server, 8)
    server.faults.extend(["", "no logprobs"])
    found = make_judge(concurrency=1).judge(items(8))
    assert [j.label for j in found].count("failed") == 1
    server.always = "no logprobs"
    with pytest.raises(InputError, match=r"no reply to 5 requests.*samples=20"):
        make_judge(concurrency=1, model="other").judge(items(8))


def test_a_filtered_answer_is_kept_as_such(server: FakeServer, make_judge: Make) -> None:
    teach(server, 1)
    server.faults.append("filter")
    judge = make_judge()
    assert judge.judge(items(1))[0].label == "filtered"
    again = judge.judge(items(1))[0]
    assert (again.label, again.cached, again.usable) == ("filtered", True, False)


def test_sampling_in_place_of_probabilities(server: FakeServer, make_judge: Make) -> None:
    server.known["Q: question 0? A: answer 0."] = "85."
    server.known["Q: question 1? A: answer 1."] = "I would rather not"
    number, words = make_judge(samples=3).judge(items(2))
    assert (number.score, number.mass, number.tokens) == (85, 1, {"85": 1})
    assert (words.label, words.tokens) == ("no score", {"I": 1})
    assert [c["seed"] for c in server.calls if "question 0" in c["messages"][0]["content"]] == [0, 1, 2]
    assert all(c["temperature"] == 1 and "logprobs" not in c for c in server.calls)


def test_a_written_critique(server: FakeServer, make_judge: Make) -> None:
    rubric = critique("advice", "Rate {original_question_text} {generated_answer_text}")
    server.known["Rate question 0? answer 0."] = "It skips Final Score: 5 for luck.\n\n**Final Score: 2**"
    server.known["Rate question 1? answer 1."] = "Final Score: 9"
    first, second = make_judge(rubric).judge(items(2))
    assert (first.score, first.label) == (2, "score")
    assert (second.score, second.label) == (None, "no score")
    assert server.calls[0]["max_tokens"] == 600


def test_the_budget_in_calls_stops_cleanly(server: FakeServer, make_judge: Make) -> None:
    teach(server, 10)
    judge = make_judge(budget=Budget(calls=4), concurrency=3)
    found = judge.judge(items(10))
    assert len(server.calls) == 4
    assert sum(j.usable for j in found) == 4
    assert {j.label for j in found if not j.usable} == {"not asked"}
    assert (judge.progress.asked, judge.progress.left) == (4, 6)
    assert "stopped with 6 not asked" in str(judge.progress)
    assert all(j.usable for j in make_judge().judge(items(10)))
    assert len(server.calls) == 10


def test_retries_count_in_the_budget(server: FakeServer, make_judge: Make) -> None:
    teach(server, 3)
    server.always = "broken"
    found = make_judge(budget=Budget(calls=4), concurrency=1).judge(items(3))
    assert len(server.calls) == 4
    assert [j.label for j in found] == ["failed", "not asked", "not asked"]


def test_the_budget_in_tokens_is_never_passed(server: FakeServer, make_judge: Make) -> None:
    teach(server, 10)
    budget = Budget(tokens=60)
    judge = make_judge(budget=budget)
    judge.judge(items(10))
    used = judge.progress.prompt_tokens + judge.progress.completion_tokens
    assert 0 < used <= 60
    assert budget.tokens == used
    assert judge.progress.left > 0


def test_a_dry_run_tells_the_cost_and_sends_nothing(server: FakeServer, make_judge: Make) -> None:
    teach(server, 3)
    judge = make_judge()
    judge.judge(items(1))
    plan = judge.plan([*items(3), *items(3)], Prices(prompt=2.0, completion=10.0))
    assert (plan.answers, plan.cached, plan.repeated, plan.calls) == (6, 2, 2, 2)
    assert plan.prompt_tokens == 2 * (7 + 4)  # 27 bytes at four a token, and the message's own
    assert plan.cost == pytest.approx((22 * 2.0 + 2 * 10.0) / 1e6)
    assert len(server.calls) == 1
    assert make_judge(samples=5).plan(items(3)).calls == 15


def test_the_endpoints_wait_is_kept(server: FakeServer, make_judge: Make) -> None:
    teach(server, 1)
    server.faults.append("rate limit")
    make_judge().judge(items(1))
    assert server.times[1] - server.times[0] >= 0.15


def test_a_wait_that_is_too_long_is_not_waited_for(server: FakeServer, make_judge: Make) -> None:
    teach(server, 2)
    server.faults.extend(["", "long rate limit"])
    assert make_judge(concurrency=1).judge(items(2))[1].error == "HTTP 429: come back tomorrow"
    assert len(server.calls) == 2


def test_the_key_shows_nowhere(
    server: FakeServer, make_judge: Make, cache: JudgementCache, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    teach(server, 8)
    judge = make_judge(concurrency=1)
    server.faults.extend(["", "echoes the key", "broken", *["refuses the key"] * 5])
    with pytest.raises(InputError) as caught:
        judge.judge(items(8))
    assert server.calls, "the server was asked"
    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "Incorrect API key provided: ***" in str(caught.value)
    stored = [j.to_dict() for j in make_judge(budget=Budget(calls=0)).judge(items(4))]
    assert stored[1]["tokens"] == pytest.approx({"50 ***": 0.1, "***": 0.9})
    cache.close()
    files = b"".join(path.read_bytes() for path in sorted(Path(cache.path).parent.iterdir()))
    assert b"question 0" in files
    assert "attempt 2 follows" in caplog.text
    for text in (shown, caplog.text, str(stored), repr(vars(judge.backend)), judge.backend.id, str(files)):
        assert KEY not in text


def test_no_key_in_the_environment(make_judge: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(InputError, match="set JUDGE_KEY"):
        make_judge()
    assert HttpBackend(Endpoint("m", key_variable=None)).client.key.value == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "no web address"),
        ({"base_url": "https://me:secret@host/v1"}, "password"),
        ({"base_url": "https://host/v1?key=secret"}, "query"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": 0}, "timeout"),
        ({"samples": -1}, "samples"),
    ],
)
def test_bad_settings_are_refused_without_repeating_them(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Endpoint("m", **settings)
    assert "secret" not in str(caught.value)


def test_progress_is_told_and_an_interrupt_keeps_what_is_done(server: FakeServer, make_judge: Make) -> None:
    teach(server, 10)
    seen: list[int] = []

    def interrupt(count: int) -> None:
        seen.append(count)
        if count == 3:
            raise KeyboardInterrupt

    judge = make_judge(concurrency=1)
    judge.on_reply = interrupt
    with pytest.raises(KeyboardInterrupt):
        judge.judge(items(10))
    assert seen == [1, 2, 3]
    kept = judge.cache.count()
    assert 3 <= kept == len(server.calls) < 10  # what was under way is kept too
    with sqlite3.connect(judge.cache.path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM claims").fetchone() == (0,)
    assert make_judge().plan(items(10)).calls == 10 - kept
