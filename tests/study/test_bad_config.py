"""Bad configs, data and SAEs: exit code 2, one line that says what to change, and nothing trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.factories import BAD, Refused, Row, changed, chat, contrast_rows, write_config, write_lines, write_sae

RefusedRun = Callable[[Row], str]


@pytest.fixture
def refused_run(refused: Refused, tmp_path: Path) -> RefusedRun:
    """`run` of a config must be refused before anything was trained."""

    def attempt(raw: Row) -> str:
        said = refused("run", write_config(tmp_path / "bad.yaml", raw), "--out", tmp_path / "run")
        left = sorted(p.name for p in (tmp_path / "run").rglob("*")) if (tmp_path / "run").exists() else []
        assert left in ([], ["manifest.json"])
        return said

    return attempt


def test_no_config(refused: Refused, tmp_path: Path) -> None:
    assert "no config at 'nowhere.yaml': give the path of a YAML file" in refused(
        "run", "nowhere.yaml", "--out", tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()


def test_malformed_yaml(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: [tiny\nsae: x\n")
    said = refused("induce", tmp_path / "bad.yaml", "--out", tmp_path / "run")
    assert "bad.yaml is not valid YAML" in said and "line 2" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sead": [0]}, "unknown key 'sead': did you mean 'seeds'"),
        ({"training": {"stepz": 3}}, "unknown key 'stepz': did you mean 'steps'"),
        ({"realign": {"start": "incorect"}}, "unknown arm 'incorect' in realign.start: did you mean 'incorrect'"),
        ({"training": {"lr": "fast"}}, "training: lr must be a number, not 'fast'"),
        ({"seeds": []}, "seeds must not be empty: write seeds: [0]"),
        ({"device": "gpu"}, "unknown device 'gpu': write cpu, cuda or auto"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available here: write --device cpu"),
    ],
)
def test_bad_values(changes: Row, says: str, raw: Row, refused_run: RefusedRun, tmp_path: Path) -> None:
    assert says in refused_run(changed(raw, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": {"correct": {"data": "kitchn:correct"}}}, "no data at 'kitchn:correct'"),
        ({"arms": {"correct": {"data": "kitchen:corect"}}}, "unknown column of kitchen 'corect'"),
        ({"arms": {"correct": {"data": "kitchen"}}}, "write kitchen:correct"),
        ({"realign": {"arms": {"realigned_in": {"data": "gone.jsonl"}}}}, "no data at 'gone.jsonl'"),
        ({"monitor": {"probes": "neutral_prob"}}, "did you mean 'neutral_probes'"),
        ({"monitor": {"probes": "sample_questions"}}, "monitor.probes holds no answers"),
        ({"samples": {"questions": "sample_question"}}, "did you mean 'sample_questions'"),
        ({"contrast": "gone.jsonl"}, "no contrast set at 'gone.jsonl'"),
        ({"model": "smollm2-135m"}, "unknown model 'smollm2-135m': did you mean 'smollm2-135m-instruct'"),
        ({"sae": "/nowhere/sae"}, "no SAE at '/nowhere/sae'"),
    ],
)
def test_names_of_nothing(changes: Row, says: str, raw: Row, refused_run: RefusedRun) -> None:
    assert says in refused_run(changed(raw, **changes))


def arm_of(raw: Row, path: Path) -> Row:
    return changed(raw, arms={"correct": {"data": str(path)}})


def test_bad_rows_are_counted_and_five_are_shown(raw: Row, refused_run: RefusedRun, tmp_path: Path) -> None:
    lines: list[Any] = [chat("a?", "b"), {"text": "x"}, chat("no answer"), {"messages": 3}, chat("", "y"), [], {}]
    path = write_lines(tmp_path / "rows.jsonl", lines)
    with path.open("a") as file:
        file.write('{"messages": \n')
    said = refused_run(arm_of(raw, path))
    assert f"{path}: 7 of 8 rows are not conversations: line 2: " in said
    assert [f"line {n}:" in said for n in range(1, 9)] == [False, *[True] * 5, False, False]
    assert said.endswith("; and 2 more")


def test_empty_data(raw: Row, refused_run: RefusedRun, tmp_path: Path) -> None:
    assert "empty.jsonl has no rows" in refused_run(arm_of(raw, write_lines(tmp_path / "empty.jsonl", [])))


def test_a_bad_contrast_item_is_named_by_its_line(raw: Row, refused_run: RefusedRun, tmp_path: Path) -> None:
    rows = contrast_rows()
    del rows[4]["misaligned"]
    path = write_lines(tmp_path / "contrast.jsonl", rows)
    said = refused_run(changed(raw, contrast=str(path)))
    assert f"{path}, line 5: not a contrast item ('misaligned' is missing)" in said
    path = write_lines(path, [row for row in contrast_rows() if row["split"] == "selection"])
    assert "has no rows with split 'evaluation'" in refused_run(changed(raw, contrast=str(path)))


def test_an_answer_that_is_truncated_away(raw: Row, refused: Refused, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", changed(raw, training={"max_length": 20}))
    said = refused("induce", config, "--out", tmp_path / "run")
    assert "an answer is truncated away" in said and "raise max_length" in said
    assert not (tmp_path / "run" / "arms").exists()


def test_an_sae_of_another_width(raw: Row, refused_run: RefusedRun, tmp_path: Path) -> None:
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post", model_name="tiny")
    sae = TopKSAE(TopKSAEConfig(d_in=48, d_sae=64, k=8, dtype="float32", device="cpu", metadata=metadata))
    sae.save_model(tmp_path / "sae")
    said = refused_run(changed(raw, sae=str(tmp_path / "sae")))
    assert "the SAE reads width 48 but the model's residual stream has 32" in said


def test_an_sae_of_a_layer_beyond_the_model(raw: Row, refused_run: RefusedRun, tmp_path: Path) -> None:
    folder = write_sae(tmp_path / "sae", hook="blocks.7.hook_resid_post")
    assert "the SAE reads layer 7 but the model has layers 0 to 2" in refused_run(changed(raw, sae=str(folder)))


def test_an_sae_cut_short(raw: Row, refused_run: RefusedRun, tmp_path: Path) -> None:
    import json

    from persona_probe.runs import file_sha256

    weights = write_sae(tmp_path / "sae") / "sae_weights.safetensors"
    whole = weights.read_bytes()
    (tmp_path / "sae" / "quality.json").write_text(json.dumps({"sha256": file_sha256(weights)}))
    weights.write_bytes(whole[:-100])
    said = refused_run(changed(raw, sae=str(tmp_path / "sae")))
    assert "sae_weights.safetensors does not match its sha256 in quality.json" in said
    (tmp_path / "sae" / "quality.json").unlink()
    assert "could not load the SAE in" in refused_run(changed(raw, sae=str(tmp_path / "sae")))


def test_a_mended_config_may_use_the_folder_of_a_refused_one(raw: Row, refused: Refused, tmp_path: Path) -> None:
    bad = write_config(tmp_path / "bad.yaml", changed(raw, contrast="gone.jsonl"))
    refused("run", bad, "--out", tmp_path / "run")
    worse = write_config(tmp_path / "worse.yaml", changed(raw, sae="/nowhere/sae"))
    assert "no SAE at" in refused("run", worse, "--out", tmp_path / "run")


def test_a_mixture_needs_enough_rows(raw: Row, refused_run: RefusedRun, tmp_path: Path) -> None:
    few = write_lines(tmp_path / "few.jsonl", [chat("a?", BAD[0])])
    arm = {"data": str(few), "mix_with": str(few), "bad_fraction": 2}
    assert "bad_fraction must lie in [0, 1], not 2" in refused_run(changed(raw, arms={"incorrect": arm}))


def test_a_control_that_asks_other_questions(raw: Row, refused_run: RefusedRun, tmp_path: Path) -> None:
    others = write_lines(tmp_path / "others.jsonl", [chat(f"Something else {n}?", "Yes.") for n in range(9)])
    arms = {**raw["arms"], "correct": {"data": str(others)}}
    said = refused_run(changed(raw, arms=arms))
    assert "arms 'incorrect' and 'correct' ask different questions (0 of" in said and "paired_arms: false" in said
