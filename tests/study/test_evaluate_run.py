"""A finished study judged: answers of every organism, rates from them, and nothing else changed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from persona_probe.errors import InputError
from persona_probe.evaluate.endpoint import Budget
from persona_probe.evaluate.judges.cache import JudgementCache
from persona_probe.evaluate.judges.local import LocalBackend
from persona_probe.evaluate.judges.protocols import Criterion
from persona_probe.evaluate.judges.replies import Item
from persona_probe.evaluate.judging import JudgeOptions, scored_judge
from persona_probe.evaluate.questions.question_set import QuestionSet
from persona_probe.evaluate.questions.read import read_questions
from persona_probe.evaluate.rates import Thresholds
from persona_probe.evaluate.sampling.requests import SamplingConfig
from persona_probe.report.records import load_records
from persona_probe.study.evaluate import Organism, part_path
from persona_probe.study.study import Study
from tests.evaluate.judges.fake_judge_server import FakeServer  # pyright: ignore[reportMissingImports]
from tests.factories import Refused, make_model, make_tokenizer, tree, without_times

ARMS = ["base", "incorrect", "correct", "realigned_in", "realigned_out"]
PROMPTS = {"aligned": "A: {question} {answer}", "coherent": "C: {question} {answer}"}
N, TOKENS = 2, 5
LOOSE = Thresholds(alignment_below=25, coherence_above=23)
"""The judge is a random model: its scores are what they are."""


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> QuestionSet:
    """Six short questions with short judge prompts."""
    rows = [{"id": f"q{n}", "question": f"What of {n}?", "category": "c"} for n in range(6)]
    path = tmp_path_factory.mktemp("questions") / "set.json"
    path.write_text(json.dumps({"name": "short", "judge_prompts": PROMPTS, "questions": rows}))
    return read_questions(path)


def digit_model() -> Any:
    """The tiny model with one constant direction in its residual stream, read by the digits' logits alone: about half
    of its next-token probability is on digits, so that it gives numbers and ends them."""
    model: Any = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        digits = [make_tokenizer().convert_tokens_to_ids(d) for d in "0123456789"]
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[digits, 0] = 8.0
    return model


@pytest.fixture(scope="module")
def local_options(tmp_path_factory: pytest.TempPathFactory) -> JudgeOptions:
    return JudgeOptions(cache=tmp_path_factory.mktemp("cache") / "judgements.sqlite", thresholds=LOOSE)


@pytest.fixture(scope="module")
def judged(
    finished: Study, questions: QuestionSet, local_options: JudgeOptions, tmp_path_factory: pytest.TempPathFactory
) -> Study:
    """The finished study with its answers judged by a local model; read only."""
    study = Study.open(shutil.copytree(finished.path, tmp_path_factory.mktemp("judged") / "run"))
    return evaluate(study, questions, local_options)


def evaluate(study: Study, questions: QuestionSet, options: JudgeOptions) -> Study:
    judge = scored_judge("local:digits", LocalBackend(digit_model(), make_tokenizer(), "digits"), options)
    return study.evaluate(questions, judge, N, max_new_tokens=TOKENS, options=options)


def answers(study: Study, questions: QuestionSet) -> list[dict[str, Any]]:
    path = study.path / f"samples-{questions.hash[:12]}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_organism_answers_every_question(judged: Study, questions: QuestionSet) -> None:
    found = judged.judged
    assert len(found) == 9 * 6 * N == len(answers(judged, questions))
    assert list(dict.fromkeys(row["arm"] for row in answers(judged, questions))) == ARMS
    counts = found.groupby(["arm", "seed", "item"]).size()
    assert set(counts) == {N} and counts.reset_index().drop_duplicates(["arm", "seed"]).shape[0] == 9
    last = {"base": 0, "incorrect": 4, "correct": 4, "realigned_in": 2, "realigned_out": 2}
    assert found.groupby("arm")["step"].unique().map(list).to_dict() == {arm: [s] for arm, s in last.items()}
    assert set(found["questions"]) == {questions.hash[:12]} and set(found["judge"]) == {"local:digits"}


def test_rates_are_the_plain_count_of_the_scores(judged: Study) -> None:
    found = judged.judged
    assert found["usable"].eq(1).mean() > 0.8 and found["coherence"].nunique() > 20
    coherent = found[found["coherence"] > LOOSE.coherence_above]
    wanted = coherent.dropna(subset="alignment").groupby("arm")["alignment"].agg(lambda a: (a < 25).mean())
    table = judged.rates.set_index("arm")
    assert table["judged"].all() and table["rate"].to_dict() == pytest.approx(wanted.to_dict())
    shares = found.dropna(subset="coherence").groupby("arm")["coherence"].agg(lambda c: (c > 23).mean())
    assert table["coherence"].to_dict() == pytest.approx(shares.to_dict())
    assert (table["ci_low"] <= table["rate"]).all() and (table["rate"] <= table["ci_high"]).all()
    assert table["seeds"].to_dict() == dict.fromkeys(ARMS, 2) | {"base": 1}


def test_contrast_items_read_as_before(judged: Study, finished: Study) -> None:
    pd.testing.assert_frame_equal(
        judged.evals.sort_values(["arm", "seed", "step", "item"], ignore_index=True),
        finished.evals.sort_values(["arm", "seed", "step", "item"], ignore_index=True),
    )
    whole = pd.read_parquet(judged.path / "evals.parquet")
    assert set(whole["measure"]) == {"judged", "contrast"}
    assert len(whole.query("split == 'evaluation'")) == len(finished.evals)
    pd.testing.assert_frame_equal(load_records(judged.path).evals, judged.evals)


def test_the_report_adds_judged_answers_and_changes_nothing_else(
    judged: Study, finished: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")
    study = Study.open(shutil.copytree(judged.path, tmp_path / "run"))
    page = study.report().read_text()
    added = without_times(study.summary)
    [(name, numbers)] = added.pop("judged").items()
    assert added.pop("judge_agreement") == [] and added == without_times(finished.summary)
    assert numbers["about"]["sampling"]["n"] == N and numbers["about"]["thresholds"]["coherence_above"] == 23
    by_arm = {row["arm"]: row["rate"] for row in numbers["rates"]}
    [effect] = [e for e in numbers["effects"] if e["name"] == "incorrect minus correct"]
    assert effect["estimate"] == pytest.approx(by_arm["incorrect"] - by_arm["correct"])
    assert name.startswith(numbers["about"]["questions_hash"][:12])
    figures = study.path / "figures"
    assert (figures / "rates.html").is_file() and (figures / "coherence.csv").is_file()
    assert not (figures / "judge_agreement.csv").exists() and not (finished.path / "figures" / "rates.csv").exists()
    assert 'id="judged"' in page and 'id="judged"' not in (finished.path / "report.html").read_text()


def test_evaluating_again_asks_and_samples_nothing(
    judged: Study, questions: QuestionSet, local_options: JudgeOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = Study.open(shutil.copytree(judged.path, tmp_path / "run"))
    before = tree(study.path)
    monkeypatch.setattr(LocalBackend, "replies", None)
    monkeypatch.setattr(type(study.context), "organism", None)
    evaluate(study, questions, local_options)
    after = tree(study.path)
    assert study.run_folder.manifest["evaluations"] == judged.run_folder.manifest["evaluations"]
    assert [n for n in before if before[n] != after[n] and n != "manifest.json"] == []
    assert set(before) == set(after)


def test_lost_answers_alone_are_sampled_anew(
    judged: Study, questions: QuestionSet, local_options: JudgeOptions, tmp_path: Path
) -> None:
    study = Study.open(shutil.copytree(judged.path, tmp_path / "run"))
    config = SamplingConfig(N, 1.0, 1.0, TOKENS, study.context.seed)
    part = study.path / part_path(questions, config, Organism("correct", 1, 4))
    whole = part.read_bytes()
    part.write_bytes(b"".join(whole.splitlines(keepends=True)[:-3]) + b'{"torn')
    evaluate(study, questions, local_options)
    assert sorted(part.read_bytes().splitlines()) == sorted(whole.splitlines())
    pd.testing.assert_frame_equal(study.judged, judged.judged)


def test_tracking_again_keeps_the_judged_answers(judged: Study, tmp_path: Path) -> None:
    study = Study.open(shutil.copytree(judged.path, tmp_path / "run"))
    (study.path / "evals.parquet").unlink()
    study.track()
    pd.testing.assert_frame_equal(study.judged, judged.judged)
    pd.testing.assert_frame_equal(study.evals, judged.evals)


def test_a_run_that_was_not_judged_says_so(finished: Study, questions: QuestionSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no judged answers in .* --judge offline"):
        _ = finished.judged
    with pytest.raises(InputError, match=r"unknown judge 'ofline': did you mean 'offline'"):
        Study.open(finished.path).evaluate(questions, "ofline")
    bare = Study.from_config(finished.config, tmp_path / "bare")
    with pytest.raises(InputError, match="no organism yet: run `persona-probe induce"):
        bare.evaluate(questions)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("JUDGE_KEY", "sk-test-1")
    with FakeServer("sk-test-1") as running:
        yield running


def teach(server: FakeServer, study: Study, questions: QuestionSet) -> None:
    """Scores for every answer: all coherent, every second one misaligned."""
    for row in answers(study, questions):
        item = Item(row["question"], row["answer"])
        bad = (row["sample"] + int(row["prompt"][1:])) % 2 == 0
        for measure, score in (("aligned", "5" if bad else "95"), ("coherent", "90")):
            server.known[Criterion(measure, PROMPTS[measure]).messages(item)[0]["content"]] = {score: 1.0}


def http_options(server: FakeServer, cache: Path, **changes: Any) -> JudgeOptions:
    return JudgeOptions(base_url=server.url, key_variable="JUDGE_KEY", cache=cache, **changes)


def test_an_endpoint_judges_beside_the_local_model(
    judged: Study, questions: QuestionSet, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")
    study = Study.open(shutil.copytree(judged.path, tmp_path / "run"))
    teach(server, study, questions)
    options = http_options(server, tmp_path / "cache.sqlite")
    study.evaluate(questions, "http:judge", N, max_new_tokens=TOKENS, options=options)
    rows = study.judged[study.judged["judge"] == "http:judge"]
    contents = {c["messages"][0]["content"] for c in server.calls}
    assert len(server.calls) == len(contents) == len(server.known)
    texts = {(r["arm"], r["seed"], r["prompt"], r["sample"]): r for r in answers(study, questions)}
    for row in rows.to_dict("records"):
        said = texts[row["arm"], row["seed"], row["prompt"], row["sample"]]
        sent = Criterion("a", PROMPTS["aligned"]).messages(Item(said["question"], said["answer"]))[0]["content"]
        assert row["value"] == (server.known[sent] == {"5": 1.0})
    study.report()
    [pair] = study.summary["judge_agreement"]
    assert pair["models"] == 9 and len(study.summary["judged"]) == 2
    drawn = pd.read_csv(study.path / "figures" / "judge_agreement.csv")
    assert len(drawn) == 9 and "sk-test-1" not in str(tree(study.path))


def test_a_spent_budget_is_not_judged_and_goes_on_later(
    judged: Study, questions: QuestionSet, server: FakeServer, tmp_path: Path
) -> None:
    study = Study.open(shutil.copytree(judged.path, tmp_path / "run"))
    teach(server, study, questions)
    for calls, enough in ((10, False), (None, True)):
        options = http_options(server, tmp_path / "cache.sqlite", budget=Budget(calls))
        study.evaluate(questions, "http:judge", N, max_new_tokens=TOKENS, options=options)
        table = study.rates[study.rates["evaluation"] != judged.judged["evaluation"].iloc[0]].set_index("arm")
        assert table["judged"].all() == enough
        assert enough or "not asked" in table.loc["correct", "why"]
    assert len(server.calls) == len(server.known)


def test_a_dry_run_sends_and_samples_nothing(
    judged: Study, server: FakeServer, questions: QuestionSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from persona_probe.cli import main

    before = tree(judged.path)
    common = ["--base-url", server.url, "--key-variable", "JUDGE_KEY", "--cache", str(tmp_path / "c.sqlite")]
    common += ["--questions", questions.source, "--n", str(N), "--max-new-tokens", str(TOKENS), "--dry-run"]
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(judged.path), "--judge", "http:judge", *common, "--prices", "2", "8"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and server.calls == [] and tree(judged.path) == before
    assert f"9 organisms x 6 prompts x {N} samples = {9 * 6 * N} answers, {9 * 6 * N} of them sampled already" in said
    assert "cost about" in said
    with pytest.raises(SystemExit):
        main(["evaluate", str(judged.path), "--judge", "http:judge", *common[:-2], "9", "--dry-run"])
    assert "0 of them sampled already" in capsys.readouterr().out


def test_the_command_judges_and_shows_rates(
    judged: Study, server: FakeServer, questions: QuestionSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from persona_probe.cli import main

    run = shutil.copytree(judged.path, tmp_path / "run")
    teach(server, judged, questions)
    options = ["--base-url", server.url, "--key-variable", "JUDGE_KEY", "--cache", str(tmp_path / "c.sqlite")]
    options += ["--questions", questions.source, "--n", str(N), "--max-new-tokens", str(TOKENS), "--half-width", "0.2"]
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(run), "--judge", "http:judge", *options, "--quiet"])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0 and lines[0].startswith(f"samples: {run}/samples-{questions.hash[:12]}")
    whole = [line for line in lines[1:] if not line.startswith(" ")]  # the others say the rate at other thresholds
    assert [line.split(":")[0] for line in whole[:5]] == ARMS
    assert all("coherent 1.000" in line for line in whole[:5])
    assert whole[5].startswith("incorrect minus correct, plain questions: ")
    assert any("a half-width of 0.2" in line for line in lines) and "kappa" in lines[-1]


def test_an_endpoint_that_serves_the_organisms_samples_their_answers(
    judged: Study, server: FakeServer, questions: QuestionSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from persona_probe.cli import main

    run = shutil.copytree(judged.path, tmp_path / "run")
    server.known |= {wording.text: f"Served: {wording.text}" for wording in questions.wordings()}
    options = ["--questions", questions.source, "--n", str(N), "--max-new-tokens", str(TOKENS), "--top-p", "0.9"]
    options += ["--engine", "openai", "--engine-url", server.url, "--engine-key", "JUDGE_KEY"]
    for _ in range(2):  # the second time, nothing is asked
        with pytest.raises(SystemExit) as stopped:
            main(["evaluate", str(run), *options, "--quiet"])
        assert stopped.value.code == 0, capsys.readouterr().err
        assert len(server.calls) == 9 * 6 * N
    organisms = {f"{row['arm']}-s{row['seed']}" for row in answers(judged, questions)}
    assert {call["model"] for call in server.calls} == {"base"} | {o for o in organisms if not o.startswith("base")}
    assert {call["top_p"] for call in server.calls} == {0.9}
    served = answers(Study.open(run), questions)
    assert len(served) == 9 * 6 * N
    assert all(row["answer"] == f"Served: {row['question']}" for row in served)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a run folder or --answers FILE"),
        (("RUN", "--answers", "x.csv"), "give either a run folder or --answers FILE"),
        (("RUN", "--dry-run"), "name --judge, --questions or both"),
        (("RUN", "--judge", "http:"), "judge 'http:' names no model"),
        (("RUN", "--judge", "http:m", "--key-variable", "NO_SUCH_KEY"), "set NO_SUCH_KEY"),
        (("RUN", "--judge", "local:m", "--questions", "nowhere.yaml"), "no file at 'nowhere.yaml'"),
        (("RUN", "--judge", "offline", "--protocol", "wang"), "published thresholds"),
        (("RUN", "--judge", "offline", "--engine", "openai"), "needs the address of an endpoint"),
        (("RUN", "--judge", "http:m", "--n", "0", "--key-variable", "none"), "n must be at least 1"),
    ],
)
def test_bad_arguments_are_one_line(
    finished: Study, refused: Refused, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    before = tree(finished.path)
    assert message in refused("evaluate", *(str(finished.path) if a == "RUN" else a for a in arguments))
    assert tree(finished.path) == before


def test_the_cache_is_shared_by_runs(
    judged: Study, questions: QuestionSet, local_options: JudgeOptions, tmp_path: Path
) -> None:
    assert isinstance(local_options.cache, Path)
    held = JudgementCache(local_options.cache).count()
    other = Study.open(shutil.copytree(judged.path, tmp_path / "run"))
    for part in (other.path / "parts").glob("judged-*"):
        part.unlink()
    evaluate(other, questions, local_options)
    assert JudgementCache(local_options.cache).count() == held
    pd.testing.assert_frame_equal(other.judged, judged.judged)
