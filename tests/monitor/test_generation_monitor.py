"""Rules on answers, their thresholds, what actions do, and how a trace is shown."""

import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import persona_probe as pp
from persona_probe.errors import InputError
from persona_probe.monitor.features import FeatureGroups
from persona_probe.monitor.generation.actions import (
    Annotate,
    AnswerUnderWay,
    CallWith,
    LogAnswer,
    Regenerate,
    SteerDown,
    StopAnswer,
)
from persona_probe.monitor.generation.calibration import AnswerCalibration, calibrate_answers
from persona_probe.monitor.generation.following import alarm, end_of_answer
from persona_probe.monitor.generation.incidents import Incident, IncidentLog, read_incidents
from persona_probe.monitor.generation.monitor import GenerationMonitor
from persona_probe.monitor.generation.rules import AnswerRule, RuleState
from persona_probe.monitor.generation.trace import AnswerAlarm, Trace, make_trace, token_texts
from tests.factories import D_MODEL, LAYER, hook_count, make_model, make_sae, make_tokenizer

QUESTIONS = [f"What of {word}?" for word in ("soup", "rice", "bread", "fish", "beans", "eggs", "pears", "leeks")]
TOKENIZER = make_tokenizer()
ALWAYS, NEVER = -1e6, 1e6


def monitor_of(rules: Any = (), actions: Any = None, model: Any = None, **settings: Any) -> GenerationMonitor:
    features = {"a": 3, "up": torch.linspace(-1, 1, D_MODEL)}
    model = make_model() if model is None else model
    return GenerationMonitor(model, make_sae("jumprelu"), features, rules, actions, tokenizer=TOKENIZER, **settings)


def rule(threshold: float | None = None, **settings: Any) -> AnswerRule:
    return AnswerRule("up", threshold=threshold, **{"window": 2, **settings})


def trace_of(text: str, values: list[float]) -> Trace:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    rows = [np.array([v], dtype=np.float32) for v in values]
    return make_trace(TOKENIZER, ["up"], ids, rows, np.zeros(1, np.float32))


# --- Rules


@pytest.mark.parametrize("side", ["above", "below", "both"])
@pytest.mark.parametrize("over", ["mean", "min"])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_rule_alarms_while_an_answer_is_written_if_and_only_if_its_score_exceeds(
    side: str, over: str, window: int
) -> None:
    draw = np.random.default_rng(0)
    for number in range(60):
        values = draw.normal(size=draw.integers(1, 14))
        values[draw.random(len(values)) < 0.2] = math.nan
        limit = float(draw.normal())
        one = AnswerRule("up", window, over, side, threshold=limit)
        under_way = AnswerUnderWay(0, [RuleState(one, 0)])
        for token, value in enumerate(values):
            alarm(under_way, token, np.array([value]), ())
        end_of_answer(under_way, len(values) - 1, ())
        assert len(under_way.alarms) == int(one.exceeds(one.score(values))), (number, values, limit)


def test_a_rule_without_a_threshold_is_silent_and_bad_ones_are_refused() -> None:
    assert not AnswerRule("up").exceeds(1e9)
    bad: tuple[tuple[dict[str, Any], str], ...] = (
        ({"window": 0}, "at least 1"),
        ({"side": "over"}, "side"),
        ({"over": "median"}, "over"),
        ({"threshold": math.nan}, "finite"),
    )
    for settings, words in bad:
        with pytest.raises(InputError, match=words):
            AnswerRule("up", **settings)
    with pytest.raises(InputError, match="'upp'"):
        monitor_of(AnswerRule("upp"))
    with pytest.raises(InputError, match="two rules"):
        monitor_of([rule(), rule()])
    with pytest.raises(InputError, match="only_for of StopAnswer"):
        monitor_of(rule(), [StopAnswer(only_for=["else"])])
    with pytest.raises(InputError, match="layer="):
        GenerationMonitor(make_model(), None, {"up": torch.ones(D_MODEL)}, tokenizer=TOKENIZER)
    with pytest.raises(InputError, match="width"):
        GenerationMonitor(make_model(), None, {"up": torch.ones(5)}, tokenizer=TOKENIZER, layer=LAYER)


# --- Thresholds


def test_the_threshold_is_the_kth_highest_score_with_its_binomial_interval() -> None:
    scores = list(range(1, 100))
    found = calibrate_answers([rule()], {"up": scores}, list(range(99)), 20, 0.05, {})
    one = found.rules[0]
    assert (one.k, one.threshold, one.alarms.count, one.promised) == (5, 95.0, 4, 0.05)
    assert one.alarms.low == pytest.approx(0.0111, abs=1e-4) and one.alarms.high == pytest.approx(0.1002, abs=1e-4)
    assert one.supported and "4 of" not in one.statement and "[0.011, 0.100]" in one.statement
    few = calibrate_answers([rule()], {"up": scores[:10]}, list(range(10)), 20, 0.05, {}).rules[0]
    assert not few.supported and few.threshold == 10.0 and few.needed == 19 and "needs 19" in few.statement
    twice = calibrate_answers([rule()], {"up": scores}, [n // 3 for n in range(99)], 20, 0.05, {}).rules[0]
    assert twice.alarms.high > one.alarms.high


def test_calibrated_rules_keep_their_false_alarm_rate_on_new_answers() -> None:
    draw, rates = np.random.default_rng(1), []
    rules = [rule(), rule(name="other")]
    for _ in range(300):
        scores = {"up": draw.normal(size=79).tolist(), "other": draw.normal(size=79).tolist()}
        found = calibrate_answers(rules, scores, list(range(79)), 9, 0.1, {})
        new = draw.normal(size=(200, 2))
        rates.append((new > [one.threshold for one in found.rules]).any(axis=1).mean())
    assert 0.08 < np.mean(rates) <= 0.102


def test_a_monitor_calibrates_on_its_answers_or_on_given_ones_and_finds_its_file_again(tmp_path: Path) -> None:
    monitor = monitor_of([rule(), AnswerRule("a")])
    file = tmp_path / "thresholds.json"
    found = monitor.calibrate(QUESTIONS, 0.5, path=file, max_new_tokens=6)
    assert found.n == 8 and found.questions == 8 and found.any_alarm.rate <= 0.5
    again = monitor.generate(QUESTIONS, max_new_tokens=6)
    assert sum(bool(answer.alarms) for answer in again) == found.any_alarm.count
    other = monitor_of([rule(), AnswerRule("a")])
    assert other.use(file) == found and other.rules == monitor.rules
    with pytest.raises(InputError, match=r"another rules .*calibrate again"):
        monitor_of(rule(window=5)).use(file)
    file.write_text('{"rules": [{}]}', encoding="utf-8")
    with pytest.raises(InputError, match="calibrate again"):
        AnswerCalibration.load(file)
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": "well, no"}] for q in QUESTIONS]
    given = monitor.calibrate(talks, 0.5)
    assert given.longest == len(TOKENIZER.encode("well, no"))
    for clean, words in ((talks[:3] + QUESTIONS[:3], "one kind"), (talks[:1], "at least two")):
        with pytest.raises(InputError, match=words):
            monitor.calibrate(clean)
    with pytest.raises(InputError, match="no rules"):
        monitor_of().calibrate(QUESTIONS)
    long = monitor.generate(QUESTIONS[0], max_new_tokens=12)[0]
    assert len(long.trace.ids) <= given.longest or "longer than the clean answers" in long.notes[-1]


def test_given_answers_are_read_as_activations_reads_them() -> None:
    monitor = monitor_of(rule(ALWAYS, window=1))
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because of the söup."}]
    found = monitor.read([talk])[0]
    wanted = pp.activations(monitor.model, make_sae("jumprelu"), [talk], latents=[3], tokenizer=TOKENIZER)
    answer = [part == "answer" for part in wanted.parts[0]]
    np.testing.assert_allclose(found.trace.of("a"), wanted.values[0][answer, 0].numpy(), rtol=1e-5, atol=1e-6)
    assert "".join(found.trace.tokens) == "Because of the söup." and found.alarms[0].token == 0


# --- Actions


def test_without_actions_that_act_the_answers_are_those_of_generate_and_no_hook_stays() -> None:
    monitor, plain = monitor_of(rule(ALWAYS), [LogAnswer(), Annotate()]), make_model()
    hooks = hook_count(monitor.model)
    answers = monitor.generate(QUESTIONS, max_new_tokens=7, seed=2, batch_size=3)
    assert [a.text for a in answers] == pp.generate(plain, QUESTIONS, tokenizer=TOKENIZER, max_new_tokens=7, seed=2)
    assert hook_count(monitor.model) == hooks
    assert all(a.alarms and a.notes and a.alarms[0].did == ("logged", "annotated") for a in answers if a.trace.ids)


def test_a_stopped_answer_ends_at_its_alarm_and_the_others_go_on() -> None:
    plain = monitor_of().generate(QUESTIONS, max_new_tokens=9)
    levels = [rule().score(a.trace.watched[:, 1]) for a in plain]
    middle = float(np.median(levels))
    answers = monitor_of(rule(middle), [StopAnswer("[gone]")]).generate(QUESTIONS, max_new_tokens=9)
    assert {a.finish == "alarm" for a in answers} == {True, False}
    for before, answer, level in zip(plain, answers, levels, strict=True):
        if level <= middle:
            assert answer.text == before.text and answer.finish == before.finish
            continue
        assert answer.finish == "alarm" and answer.text == "[gone]"
        ends = answer.alarms[0].token + 1
        assert answer.trace.ids == before.trace.ids[:ends] and len(answer.trace.ids) <= len(before.trace.ids)


@pytest.mark.parametrize(("window", "over", "side"), [(1, "mean", "above"), (3, "mean", "above"), (2, "min", "both")])
def test_latents_that_compete_are_read_many_tokens_at_once_and_no_alarm_comes_late(
    window: int, over: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sae, names = make_model(), make_sae("topk"), {"a": 3, "b": 40}
    plain = GenerationMonitor(model, sae, names, tokenizer=TOKENIZER).generate(QUESTIONS, max_new_tokens=20)
    encoded: list[int] = []
    columns = FeatureGroups.columns
    monkeypatch.setattr(FeatureGroups, "columns", lambda *a, **k: (encoded.append(1), columns(*a, **k))[1])
    loose = AnswerRule("a", window, over, side)
    fired = 0
    for limit in np.quantile([loose.score(a.trace.watched[:, 0]) for a in plain], [0.2, 0.6, 1.0]):
        tight = replace(loose, threshold=float(limit))
        monitor = GenerationMonitor(model, sae, names, tight, [StopAnswer()], tokenizer=TOKENIZER)
        for before, answer in zip(plain, monitor.generate(QUESTIONS, max_new_tokens=20), strict=True):
            under_way = AnswerUnderWay(0, [RuleState(tight, 0)])
            for token, row in enumerate(before.trace.watched):
                alarm(under_way, token, row, ())
            end_of_answer(under_way, len(before.trace.ids) - 1, ())
            assert [x.token for x in answer.alarms] == [x.token for x in under_way.alarms]
            assert len(answer.trace.ids) == (answer.alarms[0].token + 1 if answer.alarms else len(before.trace.ids))
            np.testing.assert_allclose(
                answer.trace.values, before.trace.values[: len(answer.trace.ids)], rtol=1e-3, atol=1e-3
            )
            fired += len(answer.alarms)
    encoded.clear()
    GenerationMonitor(model, sae, names, tokenizer=TOKENIZER).generate(QUESTIONS, max_new_tokens=20)
    assert 2 <= len(encoded) <= 2 + len(QUESTIONS)  # of at least 20 passes: every 16th, and where an answer ends
    assert fired


def test_a_rejected_answer_is_drawn_again_with_other_numbers() -> None:
    plain = monitor_of().generate(QUESTIONS, max_new_tokens=5)
    levels = sorted(rule(window=1).score(a.trace.watched[:, 1]) for a in plain)
    answers = monitor_of(rule(levels[4], window=1), [Regenerate(3)]).generate(QUESTIONS, max_new_tokens=5)
    drawn = [a for a in answers if a.rejected]
    assert drawn and all(len(a.rejected) <= 3 for a in answers)
    assert all(a.finish == "alarm" for a in answers if a.alarms)
    assert any(a.trace.ids != a.rejected[0].ids for a in drawn)
    never = monitor_of(rule(ALWAYS, window=1), [Regenerate(2, instead="no")]).generate(QUESTIONS[:2], max_new_tokens=5)
    assert [(a.text, len(a.rejected), a.finish) for a in never] == [("no", 2, "alarm")] * 2
    with pytest.raises(InputError, match="temperature"):
        monitor_of(rule(), [Regenerate()]).generate(QUESTIONS, temperature=0)
    with pytest.raises(InputError, match="at least 1"):
        Regenerate(0)


def test_steering_down_takes_out_what_the_feature_wrote_from_the_next_token_on() -> None:
    """Two tokens before and after the alarm, against a forward pass that is pushed there and nowhere else."""
    from persona_probe.models.layers import evaluating, forward_to_layer
    from persona_probe.models.taps import EditTap, ReadTap

    model, above = make_model(), LAYER + 1
    monitor = GenerationMonitor(
        model,
        None,
        {"up": torch.linspace(-1, 1, D_MODEL)},
        AnswerRule("up", window=1, threshold=ALWAYS),
        [SteerDown(2.0)],
        tokenizer=TOKENIZER,
        layer=LAYER,
    )
    from persona_probe.data.tokens import answer_prompt

    with ReadTap(model, above) as tap:
        seen: list[torch.Tensor] = []
        handle = model.register_forward_hook(lambda *_: seen.append(tap.value[0, -1].clone()))  # pyright: ignore
        answer = monitor.generate("Why?", max_new_tokens=6, temperature=0)[0]
        handle.remove()
    assert answer.steered_from == 1 and answer.alarms[0].did[0].startswith("steered down by")
    prompt = answer_prompt(TOKENIZER, [{"role": "user", "content": "Why?"}])
    unit = torch.linspace(-1, 1, D_MODEL) / torch.linspace(-1, 1, D_MODEL).norm()
    ids = torch.tensor([[*prompt, *answer.trace.ids]])

    def push(resid: torch.Tensor) -> torch.Tensor:
        pushed = resid.clone()
        pushed[:, len(prompt) + 1 :] -= 2.0 * answer.alarms[0].value * unit
        return pushed

    with evaluating(model), EditTap(model, LAYER, push), ReadTap(model, above) as whole:
        forward_to_layer(model, above, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    wanted = whole.value[0, len(prompt) - 1 :]
    assert len(answer.trace.ids) >= 3
    for place in range(len(seen)):
        torch.testing.assert_close(seen[place], wanted[place], rtol=1e-3, atol=1e-3)


def test_a_function_gets_the_alarm_and_may_stop_the_answer() -> None:
    heard: list[AnswerAlarm] = []

    def hear(found: AnswerAlarm, answer: AnswerUnderWay) -> None:
        heard.append(found)
        answer.stopped = True

    answers = monitor_of(rule(ALWAYS, window=1), [CallWith(hear)]).generate(QUESTIONS[:3], max_new_tokens=4)
    assert len(heard) == sum(bool(a.trace.ids) for a in answers) and {a.finish for a in answers} <= {"alarm", "stop"}


# --- transformers' own generate


def test_in_generate_a_stopped_row_ends_and_the_others_are_unchanged() -> None:
    ids = torch.tensor([TOKENIZER.encode(q)[:9] for q in QUESTIONS[:4]])
    model = make_model()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "attention_mask": torch.ones_like(ids)}
    monitor = monitor_of(rule(window=1), model=model)
    with monitor.watching() as watch:
        plain = model.generate(ids, **settings, logits_processor=[watch])  # pyright: ignore
    before = watch.answers(plain)
    levels = sorted(rule(window=1).score(a.trace.watched[:, 1]) for a in before)
    acting = monitor_of(rule(levels[1], window=1), [StopAnswer()], model=model)
    with acting.watching() as watch:
        out = model.generate(ids, **settings, logits_processor=[watch])  # pyright: ignore
    after = watch.answers(out)
    assert sorted(a.finish == "alarm" for a in after) == [False, False, True, True]
    for old, new in zip(before, after, strict=True):
        ends = new.alarms[0].token + 1 if new.alarms else len(old.trace.ids)
        assert new.trace.ids == old.trace.ids[:ends]


def test_generation_that_mixes_rows_is_refused() -> None:
    model, ids = make_model(), torch.tensor([TOKENIZER.encode("hello there")] * 2)
    monitor = monitor_of(model=model)
    settings = {"max_new_tokens": 6, "pad_token_id": 1, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(InputError, match="without beams"), monitor.watching() as watch:
        model.generate(ids, **settings, num_beams=3, logits_processor=[watch])  # pyright: ignore
    with pytest.raises(InputError, match=r"monitor\.generate"), monitor_of(rule(), [Regenerate()]).watching():
        pass
    assert hook_count(model) == 0


# --- A trace shown


HOSTILE = 'a<script>x</script>\x1b[31m\u202eb & "c"\n'


def test_text_of_the_model_becomes_no_markup_and_steers_no_terminal() -> None:
    trace = trace_of(HOSTILE, [1.0] * len(TOKENIZER.encode(HOSTILE, add_special_tokens=False)))
    assert "".join(trace.tokens) == HOSTILE
    page = replace(trace, names=("<b>up",))._repr_html_()
    assert "<script" not in page and "<b>" not in page and "&lt;" in page and "\x1b" not in page
    assert "\u202e" not in page and "\\u202e" in page
    shown = trace.text()
    assert re.sub(r"\x1b\[(38;2;0;0;0;48;2;\d+;\d+;\d+m|0m|4m)", "", shown).count("\x1b") == 0
    assert "\x1b" not in trace.text(colour=False) and "\u202e" not in shown


def test_colours_follow_the_values_and_marks_the_alarms() -> None:
    trace = trace_of("abc", [0.0, 1.0, 2.0])
    trace = replace(trace, alarms=(AnswerAlarm("up", "up", 2, 2.0, 1.5),), thresholds={"up": 1.5})
    strengths = [float(s) for s in re.findall(r"rgba\(\d+,\d+,\d+,([\d.]+)\)", trace.html())]
    assert strengths == sorted(strengths) and strengths[0] == 0 and strengths[2] == 0.85
    assert trace.html().count("outline") == 1 and "threshold 1.5" in trace.html()
    assert trace.text(colour=False) == "abc[!]" == str(trace)
    drawn: Any = trace.figure()
    curve, marks = drawn.data
    assert list(curve.y) == [0.0, 1.0, 2.0] and list(marks.x) == [2] and list(marks.y) == [2.0]
    hostile: Any = trace_of("<b>", [1.0, 1.0, 1.0]).figure()
    assert "<" not in "".join(hostile.data[0].text)
    assert trace.frame().columns.tolist() == ["token", "id", "special", "up"]
    with pytest.raises(InputError, match="'upp'"):
        trace.of("upp")
    assert math.isnan(trace_of("abc", [0.0, 1.0]).of("up")[2])
    assert trace_of("abc", [0.0, 1.0]).record()["values"][2] == [None]


def test_tokens_spell_the_text_whatever_bytes_they_cut() -> None:
    for text in ("söup, 汤 and 🍲!", "", "plain", "é"):
        ids = TOKENIZER.encode(text, add_special_tokens=False)
        texts = token_texts(TOKENIZER, ids)
        assert "".join(texts) == text and len(texts) == len(ids)
        assert "\ufffd" not in "".join(texts)


# --- Incidents


def test_incidents_are_appended_whole_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "incidents.jsonl"
    found = AnswerAlarm("up", "up", 3, 2.5, 1.5, ("stopped",))
    log = IncidentLog(path)
    log.write(Incident.of(found, request="r1", model="m", adapter="base"))
    log.close()
    with path.open("ab") as file:
        file.write(b'{"kind": "alarm", "torn')
    log = IncidentLog(path)
    log.write(Incident("rollback", model="m", message="back to base"))
    log.close()
    rows = read_incidents(path)
    assert [row["kind"] for row in rows] == ["alarm", "rollback"]
    assert rows[0]["value"] == 2.5 and rows[0]["actions"] == ["stopped"] and "answer" not in rows[0]
    assert path.stat().st_mode & 0o077 == 0
    with path.open("ab") as file:
        file.write(b'{"kind": "other"}\n')
    with pytest.raises(InputError, match="no incident"):
        read_incidents(path)
    with pytest.raises(InputError, match="folder"):
        IncidentLog(tmp_path)


def test_a_log_line_holds_no_text_of_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        answers = monitor_of(rule(ALWAYS, window=1)).generate(QUESTIONS[:1], max_new_tokens=4)
    assert len(caplog.messages) == 1 and "threshold" in caplog.messages[0]
    assert answers[0].text not in caplog.messages[0] or not answers[0].text
