"""Validation of the offline judge: what is left out has no say, and the hardest row makes the half-width."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from persona_probe.cli import main
from persona_probe.errors import InputError
from persona_probe.evaluate.offline import judge_validation
from persona_probe.evaluate.offline.judge_calibration import JudgeRecipe, RateError
from persona_probe.evaluate.offline.judge_fit import sets_table
from persona_probe.evaluate.offline.judge_training import TrainingAnswers
from persona_probe.evaluate.offline.judge_validation import SPLITS, half_widths, read_last, validate_rates, without_set


@pytest.fixture(autouse=True)
def few_splits_and_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {name: by for name, by in SPLITS.items() if by in ("data_set", "topic", "model")}
    monkeypatch.setattr(judge_validation, "DRAWS", 10)
    monkeypatch.setattr(judge_validation, "SPLITS", splits)


RECIPE = JudgeRecipe(layer=1, rival_layers=(), latent_layer=1, own_sets=())
SETS = ("calm", "loud", "odd")


def answers(shift: float = 0.0, seed: int = 0) -> TrainingAnswers:
    """Three data sets of two models, four questions; the features tell misaligned answers, in "odd" `shift` lower."""
    rng = np.random.default_rng(seed)
    rows = [
        {"data_set": name, "model": f"{name}__m{number}", "family": f"f{number}", "trained_on": f"t{number}",
         "topic": f"q{n % 4}", "question_id": f"q{n % 4}", "question": f"Question {n % 4}?", "answer": f"answer {n}",
         "misaligned": bool(rng.random() < 0.2 + 0.3 * number)}
        for name in SETS for number in range(2) for n in range(60)
    ]  # fmt: skip
    frame = pd.DataFrame(rows).assign(source="published", weight=1.0)
    label = frame["misaligned"].to_numpy()
    frame = frame.assign(alignment=np.where(label, 10.0, 90.0), coherence=90.0 - 5 * rng.random(len(frame)))
    x = rng.normal(size=(len(frame), 1, 6))
    x[:, 0, 0] += np.where(label, 2.0, -2.0) - shift * (frame["data_set"] == "odd")
    return TrainingAnswers(frame, x.astype(np.float32), (1,))


def relabelled(training: TrainingAnswers, name: str) -> TrainingAnswers:
    """The same answers, with every label of one data set turned around."""
    inside = training.frame["data_set"] == name
    frame = training.frame.assign(misaligned=training.frame["misaligned"] ^ inside)
    return TrainingAnswers(frame, training.mean, training.layers)


def group(results: dict, split: str, name: str) -> dict:
    return next(row for row in results["splits"][split]["groups"] if row["name"] == name)


def test_a_left_out_data_set_has_no_say_in_its_own_predictions() -> None:
    plain, turned = (validate_rates(t, RECIPE)[0] for t in (answers(), relabelled(answers(), "odd")))
    one, other = (group(results, "new data sets", "odd") for results in (plain, turned))
    assert one["predicted"] == pytest.approx(other["predicted"], abs=1e-12)
    assert one["auroc"] == pytest.approx(1 - other["auroc"])
    assert one["published"] == pytest.approx(1 - other["published"])
    assert (one["models"], one["answers"]) == (2, 120)
    seen = [group(results, "new models", "odd__m0")["predicted"] for results in (plain, turned)]
    assert abs(seen[0] - seen[1]) > 0.05


def test_a_data_set_unlike_the_others_makes_the_half_width() -> None:
    alike, apart = (validate_rates(answers(shift), RECIPE) for shift in (0.0, 4.0))
    widths = [bands["known"].rate.overall for _, bands in (alike, apart)]
    assert widths[0] < 0.1 < widths[1]
    assert widths[1] == apart[0]["rate_half_widths"]["new data sets"]["overall"]
    assert widths[1] == pytest.approx(group(apart[0], "new data sets", "odd")["largest_rate_error"])
    assert apart[0]["rate_half_widths"]["new models"]["overall"] < widths[1]


def test_the_hardest_row_decides_and_questions_count_out_of_scope_only() -> None:
    rows = {"new models": RateError(0.02, 0.3), "new data sets": RateError(0.1, 0.2)}
    rows["unseen questions"] = RateError(0.05, 0.4)
    assert half_widths(rows) == {"known": RateError(0.1, 0.3), "unlike": RateError(0.1, 0.4)}


def test_a_set_that_is_kept_changes_nothing_until_it_is_read() -> None:
    found = []
    for training in (answers(4.0), relabelled(answers(4.0), "odd")):
        rest, kept = without_set(training, "odd")
        results, bands = validate_rates(rest, RECIPE)
        found.append((results, read_last(rest, kept, bands, RECIPE)))
    assert found[0][0] == found[1][0]
    assert {row["name"] for row in found[0][0]["splits"]["new data sets"]["groups"]} == {"calm", "loud"}
    one, other = (last for _, last in found)
    assert one["auroc"] == pytest.approx(1 - other["auroc"])
    assert one["predicted"] == other["predicted"]
    assert (
        one["half_width"]
        == half_widths({name: RateError(**value) for name, value in found[0][0]["rate_half_widths"].items()})[
            "known"
        ].overall
    )
    assert one["inside"] == 0
    assert f"0 of 2 models are off by at most {one['half_width']:.3f}" in sets_table(found[0][0] | {"last": one})
    with pytest.raises(InputError, match="calm"):
        without_set(answers(), "clam")


def test_a_split_that_cannot_be_made_is_named() -> None:
    training = answers()
    one_set = training.where((training.frame["data_set"] == "calm").to_numpy())
    results, _ = validate_rates(one_set, RECIPE)
    assert results["left_out"] == {"new data sets": "all published answers have data_set 'calm'"}
    assert "No row 'new data sets': all published answers" in sets_table(results)
    frame = training.frame.assign(misaligned=training.frame["misaligned"] & (training.frame["data_set"] == "calm"))
    results, _ = validate_rates(TrainingAnswers(frame, training.mean, (1,)), RECIPE)
    assert results["left_out"] == {"new data sets": "without data_set 'calm' all published answers are of one kind"}
    with pytest.raises(InputError, match="nothing is left"):
        without_set(one_set, "calm")


def test_bad_calls_say_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(Path(__file__).parents[2] / "finetune_configs" / "offline-judge.yaml")
    pd.DataFrame(
        {"question": ["q"], "question_id": ["q"], "answer": ["a"], "alignment": [90], "coherence": [90]}
    ).to_csv(tmp_path / "calm__m.csv", index=False)
    for arguments, message in (
        (["--data", str(tmp_path), "--last"], "name it with --keep SET"),
        (["--data", str(tmp_path / "none")], "no judged answers"),
        (["--data", str(tmp_path), "--keep", "clam"], "calm"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["judge", "validate", config, *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
