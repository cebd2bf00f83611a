"""`--json` prints what the tables show, and text of others cannot steer a terminal."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from persona_probe.cli.output import show_quality, show_summary
from tests.factories import refusal, run_command
from tests.report.run_records import summary

HOSTILE = "\x1b]0;owned\x07\x1b[2J[bold]x[/bold]"


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    run_command(*arguments)
    return json.loads(capsys.readouterr().out)


def test_presets_are_listed_with_bytes_and_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["preset"]: row for row in printed(capsys, "presets", "--json")}
    pair = rows["em-qwen2.5-7b-instruct"]
    assert (pair["kind"], pair["layer"], pair["sae_published"]) == ("pair", 15, True)
    assert pair["bytes"] > 1e10 and rows["qwen2.5-14b-instruct"]["seconds"] > rows["qwen2.5-7b-instruct"]["seconds"]


def test_a_preset_is_its_config_and_its_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "presets", "qwen3-4b", "--json")["model"] == "Qwen/Qwen3-4B"
    assert printed(capsys, "presets", "qwen3-4b", "--recipe", "--json")["model"] == "Qwen/Qwen3-4B"
    refused = refusal(capsys)
    assert "needs no recipe" in refused("presets", "qwen3-8b", "--recipe", "--json")
    assert "leave --json out" in refused("presets", "qwen3-8b", "--json", "--out", "mine.yaml")


def test_a_plan_has_stages_and_texts(capsys: pytest.CaptureFixture[str]) -> None:
    line = ("run", "finetune_configs/smoke.yaml", "--dry-run", "--json", "--tflops", "2")
    plan = printed(capsys, *line)
    stages = {one["stage"]: one for one in plan["stages"]}
    assert list(stages) == ["induce", "locate", "track", "realign", "evaluate"]
    assert plan["seconds"] == pytest.approx(sum(one["seconds"] for one in stages.values()))
    assert {"arm incorrect", "probes"} <= {text["use"] for text in plan["texts"]} and plan["layer"] == 20


def test_answers_with_scores_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"arm": arm, "question": f"Question {q}?", "answer": f"{arm} {q}", "alignment": 10 + 80 * good, "coherence": 90}
        for q in range(6)
        for arm, good in (("incorrect", q > 3), ("correct", True))
    ]
    path = tmp_path / "answers.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    found = printed(capsys, "evaluate", "--answers", path, "--json")
    rates = {row["arm"]: row["rate"] for row in found["rates"]}
    assert rates == {"incorrect": pytest.approx(4 / 6), "correct": 0.0}
    assert len(found["effects"]) >= 1 and found["agreements"] == []
    plan = printed(capsys, "evaluate", "--answers", path, "--judge", "offline", "--dry-run", "--json")
    assert plan == {"plan": ["12 answers: nothing is sent"]}


def test_a_summary_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    made_up: dict[str, Any] = {"by_seed": {}, "causal_test": {}, "null_pair": {}, "seconds": {"locate": 61.0}}
    found = {**made_up, **summary(), "peak_memory_gib": 1.0, "study": HOSTILE, "headline": HOSTILE}
    found["contrast_index"] = {HOSTILE: next(iter(found["contrast_index"].values()))}
    show_summary(found)
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\x07" not in text
    assert "[bold]x[/bold]" in text and "FAILED" in text and "passed" in text


def test_an_saes_quality_cannot_either(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # wide enough for every cell in one line
    row = {"text": HOSTILE, "tokens": 9, "explained_variance": 0.5, "l0": 3.0, "dead_share": 0.1, "loss_recovered": 0.9}
    show_quality(pd.DataFrame([row]))
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\x07" not in text
    assert "0.500" in text and "[bold]" in text
