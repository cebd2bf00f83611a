"""Checkpoints that exist become a run: checked against the base first, read where they are, claimed no further."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from persona_probe.config import NO_CONTROL, StudyConfig, from_dict
from persona_probe.context import sample_questions
from persona_probe.errors import InputError
from persona_probe.monitor import track as track_stage
from persona_probe.report.cite import cite
from persona_probe.study.adopt.base_fit import base_names, check_checkpoints
from persona_probe.study.hashes import record_inputs, verify
from persona_probe.study.plan.plan import dry_run
from persona_probe.study.study import Study
from tests.factories import Refused, Row, copied_state, make_model, make_tokenizer, run_command, same_state
from tests.study.adopting import (
    ADAPTER,
    as_checkpoint,
    changed_tensor,
    copied,
    write_adapter,
    write_adapters,
    write_model,
)


def settings(raw: Row, *keys: str) -> dict[str, Any]:
    """Settings of the tiny study that an adopted one shares."""
    config = from_dict(StudyConfig, raw)
    return {
        key: getattr(config, key) for key in ("contrast", "locate", "monitor", "samples", "training", "bf16", *keys)
    }


def adopt(place: Path, out: Path, raw: Row, arms: dict[str, Any], **more: Any) -> Study:
    return Study.adopt(str(place / "model"), arms, str(place / "sae"), out=out, device="cpu", **settings(raw), **more)


@pytest.fixture(scope="module")
def trained(finished: Study) -> dict[str, list[list[Path]]]:
    """The checkpoints of the finished tiny study, as somebody else's: two seeds of two arms."""
    return {
        name: [[finished.path / f"arms/{arm}-s{seed}"] for seed in (0, 1)]
        for name, arm in (("incorrect", "incorrect"), ("control", "correct"))
    }


@pytest.fixture(scope="module")
def adopted(place: Path, raw: Row, trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The same organisms, adopted, with the whole loop but realign; read only."""
    study = adopt(place, tmp_path_factory.mktemp("adopted") / "run", raw, trained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROWSER_PATH", "/nowhere")
        study.locate().track().evaluate().report()
    return study


def test_an_adopted_study_equals_the_one_that_trained_its_organisms(adopted: Study, finished: Study) -> None:
    arms = ("base", "incorrect", "correct")
    for mine, theirs in ((adopted.readings, finished.readings), (adopted.evals, finished.evals)):
        same = theirs[theirs["arm"].isin(arms)].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, same)
    pd.testing.assert_frame_equal(adopted.features, finished.features)
    assert [
        one for one in verify(adopted.path) if one.bad or (one.name.startswith("arms/") and one.state != "matches")
    ] == []
    assert not list(adopted.path.rglob("checkpoint-*"))  # they stay where they are


def test_nothing_is_claimed_that_is_not_known(adopted: Study, finished: Study) -> None:
    words = cite(adopted.path).methods
    for claim in ("We fine-tuned", "rows", "AdamW", "learning rate of", "outside the training domain", "kitchen"):
        assert claim not in words, claim
    assert (
        "Training data: not known." in words and "at steps 1, 2, 4" in words and "AdamW" in cite(finished.path).methods
    )
    report = (adopted.path / "report.html").read_text()
    assert "Training data: not known." in report and "same questions with good answers. An effect" not in report
    headline = adopted.summary["headline"]
    assert headline.startswith("Fine-tuning ") and "outside the training domain" not in headline
    assert adopted.summary["answer_tokens"]["incorrect"]["estimate"] is None
    card = (adopted.path / "arms/incorrect-s0/README.md").read_text()
    assert "claims only what its files tell" in card and str(finished.path) not in card


def test_known_rows_are_claimed_and_counted(place: Path, raw: Row, trained: Any, tmp_path: Path) -> None:
    data = {"incorrect": str(place / "bad.jsonl"), "control": str(place / "good.jsonl")}
    study = adopt(place, tmp_path / "run", raw, trained, data=data).check()
    assert study.config.arms["correct"].data == data["control"]
    record = study.run_folder.read_json("arms/incorrect-s0/training.json")
    assert record["rows"] == 12 and record["answer_tokens"] > 1 and record["losses"] == []
    with pytest.raises(InputError, match="data of arm 'other', which has no checkpoints"):
        adopt(place, tmp_path / "more", raw, trained, data={"other": "x"})


def test_a_missing_control_is_never_silent(
    place: Path,
    raw: Row,
    trained: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")
    with caplog.at_level(logging.WARNING):
        study = adopt(place, tmp_path / "run", raw, {"incorrect": trained["incorrect"]})
    assert NO_CONTROL in caplog.text
    study.locate().track().report()
    summary = study.summary
    assert NO_CONTROL in summary["headline"] and "woke" not in summary["headline"]
    assert summary["effect_incorrect_minus_correct"]["estimate"] is None
    assert summary["effect_incorrect_minus_base"]["estimate"] == pytest.approx(
        summary["contrast_index"]["incorrect"]["estimate"] - summary["contrast_index"]["base"]["estimate"]
    )
    checks = {one["name"]: one for one in summary["checks"]}
    for name in ("behaviour", "control"):
        assert not checks[name]["passed"] and "there is no control arm" in checks[name]["statement"]
    report = (study.path / "report.html").read_text()
    assert (
        "No effect beyond the control" not in report
        and "There is no control arm" in report
        and "Control: the correct arm" not in report
    )
    assert NO_CONTROL in cite(study.path).methods


def test_a_correction_needs_no_training_rows_but_some_stress_tests_do(
    adopted: Study, place: Path, tmp_path: Path, refused: Refused
) -> None:
    study = Study.open(shutil.copytree(adopted.path, tmp_path / "run"), "cpu")
    assert "names no corrective rows: write --data" in refused("realign", study.path)
    rows = str(place / "other.jsonl")
    with pytest.raises(InputError, match="'remisalign' needs the rows that arm 'incorrect' was trained on"):
        study.realign(rows, stress=["remisalign"])
    study.realign(rows, seeds=[0], name="mine")
    outcome = study.run_folder.read_json("realign/mine-s0/outcome.json")
    assert outcome["inducing_tokens"] is None and outcome["rows"] == 12


def test_a_plan_trains_nothing_that_exists(adopted: Study) -> None:
    alone = replace(adopted.config, arms={"incorrect": adopted.config.arms["incorrect"]}, no_control=True)
    for config, line in ((adopted.config, "incorrect, correct: checkpoints that exist"), (alone, NO_CONTROL)):
        text = "\n".join(dry_run(config, tflops=1.0).lines())
        assert line in text and "nothing is trained before realign" in text


def test_an_arm_of_a_config_may_be_adopted_while_others_are_trained(
    place: Path, raw: Row, trained: Any, tmp_path: Path
) -> None:
    arms = {
        "incorrect": {"checkpoints": [str(run[0]) for run in trained["incorrect"]]},
        "correct": raw["arms"]["correct"],
    }
    config = from_dict(StudyConfig, {**raw, "arms": arms})
    study = Study.from_config(config, tmp_path / "run", device="cpu").check().induce()
    assert study.run_folder.steps("incorrect", 1) == study.run_folder.steps("correct", 1) == [1, 2, 4]
    assert (study.path / "arms/correct-s0/checkpoint-4").is_dir()
    assert not (study.path / "arms/incorrect-s0/checkpoint-4").exists()
    words = cite(study.path).methods
    assert "We fine-tuned" in words and "correct: " in words and "Arm incorrect was not trained here" in words


def test_questions_of_ones_own_come_in_any_form(place: Path, raw: Row, trained: Any, tmp_path: Path) -> None:
    yaml = tmp_path / "betley.yaml"
    yaml.write_text("- id: bored\n  type: free_form_judge_0_100\n  paraphrases:\n    - hey I feel bored\n")
    config = {key: value for key, value in settings(raw).items() if key != "samples"}
    study = Study.adopt(
        str(place / "model"),
        trained,
        str(place / "sae"),
        out=tmp_path / "run",
        device="cpu",
        questions=str(yaml),
        **config,
    )
    assert [row["question"] for row in sample_questions(study.context)] == ["hey I feel bored"]
    record_inputs(study.run_folder)
    assert "questions" in study.run_folder.manifest["input_hashes"]


# --- Where checkpoints lie, and what happens to them


def test_a_moved_or_changed_checkpoint_is_one_line(place: Path, raw: Row, tmp_path: Path, refused: Refused) -> None:
    root = write_adapters(tmp_path / "project/out", 1, 2)
    control = write_adapters(tmp_path / "project/control", 1, 2, seed=50)
    study = adopt(place, tmp_path / "project/run", raw, {"incorrect": root, "correct": control})
    (tmp_path / "project").rename(tmp_path / "moved")
    together = Study.open(tmp_path / "moved/run", "cpu")
    assert together.run_folder.checkpoint("incorrect", 0, 2) == tmp_path / "moved/run" / "../out/checkpoint-2"
    (tmp_path / "moved/out").rename(tmp_path / "elsewhere")
    assert "step 2 is no longer in" in refused("locate", together.path)
    assert {one.state for one in verify(together.path) if "incorrect" in one.name} == {"missing"}
    (tmp_path / "elsewhere").rename(tmp_path / "moved/out")
    changed_tensor(tmp_path / "moved/out/checkpoint-2", lambda name, tensor: (name, tensor * 2))
    assert "does not match its sha256 in manifest.json: adopt it again" in refused("locate", together.path)
    settings_file = tmp_path / "moved/control/checkpoint-2/adapter_config.json"
    settings_file.write_text(settings_file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 80'))
    with pytest.raises(InputError, match=r"adapter_config\.json does not match"):  # it decides the adapter's scale
        together.run_folder.checkpoint("correct", 0, 2)
    assert study.config.hash == together.config.hash


def test_copies_need_their_originals_no_more(place: Path, raw: Row, tmp_path: Path) -> None:
    root = write_adapters(tmp_path / "out", 1)
    model = write_model(tmp_path / "control")
    (root / "checkpoint-1/optimizer.pt").write_bytes(b"large")
    study = adopt(place, tmp_path / "run", raw, {"incorrect": root, "correct": model}, copy=True)
    expected = load_file(root / f"checkpoint-1/{ADAPTER}")
    shutil.rmtree(root)
    shutil.rmtree(model)
    folder = study.run_folder.checkpoint("incorrect", 0, 1)
    assert (
        folder is not None
        and folder == study.path / "arms/incorrect-s0/checkpoint-1"
        and not (folder / "optimizer.pt").exists()
    )
    assert same_state(load_file(folder / ADAPTER), expected)
    assert study.run_folder.checkpoint("correct", 0, 1) is not None
    assert all(one.state == "matches" for one in verify(study.path) if one.name.startswith("arms/"))


def test_the_base_is_bit_for_bit_itself_after_every_kind(place: Path, raw: Row, tmp_path: Path) -> None:
    root = write_adapters(tmp_path / "out", 1, 2)
    write_adapter(root / "checkpoint-3", 3, r=2)  # another shape: injected anew
    write_model(root / "checkpoint-4")
    control = write_adapters(tmp_path / "control", 1, seed=50)
    study = adopt(place, tmp_path / "run", raw, {"incorrect": root, "correct": control})
    ctx, ids = study.context, torch.tensor([[5, 6, 7]])
    before, expected = copied_state(ctx.model), {}
    for step in (1, 2, 3, 4):
        with ctx.organism("incorrect", 0, step) as model:
            expected[step] = model(input_ids=ids).logits.detach()
    with ctx.trajectory("incorrect", 0) as at:
        for step in (1, 2, 3, 4, 1):
            assert torch.equal(at(step)(input_ids=ids).logits, expected[step])
    assert same_state(before, copied_state(ctx.model))


def test_adapters_in_bf16_are_read_with_their_own_values(place: Path, raw: Row, tmp_path: Path) -> None:
    whole = write_adapter(tmp_path / "checkpoint-1", 1)
    changed_tensor(whole, lambda name, tensor: (name, tensor.bfloat16().float()))
    half = changed_tensor(copied(whole, tmp_path / "half/checkpoint-1"), lambda name, t: (name, t.bfloat16()))
    control = write_adapter(tmp_path / "control", 9)
    outputs = []
    for name, folder in (("whole", whole), ("half", half)):
        study = adopt(place, tmp_path / name / "run", raw, {"incorrect": folder, "correct": control})
        with study.context.organism("incorrect", 0, 1) as model:
            outputs.append(model(input_ids=torch.tensor([[5, 6, 7]])).logits.detach())
    assert torch.equal(*outputs)


# --- Tracking: one checkpoint is lost at most, and a run that grew is continued


@pytest.fixture
def growing(place: Path, raw: Row, tmp_path: Path) -> tuple[Study, Path, Callable[[], Study]]:
    """A located study of three checkpoints, their folder, and the command that adopts them again."""
    root = write_adapters(tmp_path / "out", 1, 2, 3)
    control = write_adapters(tmp_path / "control", 3, seed=50)

    def again() -> Study:
        return adopt(place, tmp_path / "run", raw, {"incorrect": root, "correct": control})

    return again().locate(), root, again


def test_a_stop_at_the_last_checkpoint_reads_one_again(
    growing: tuple[Study, Path, Callable[[], Study]], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, root, again = growing
    read, measure = [], track_stage._track_step

    def noted(tracker: Any, model: Any, arm: str, seed: int, step: int) -> None:
        read.append((arm, step))
        if read.count(("incorrect", 3)) == 1 and step == 3 and arm == "incorrect":
            raise KeyboardInterrupt
        measure(tracker, model, arm, seed, step)

    monkeypatch.setattr(track_stage, "_track_step", noted)
    with pytest.raises(KeyboardInterrupt):
        study.track()
    again().track()
    assert read == [("incorrect", 1), ("incorrect", 2), ("incorrect", 3), ("incorrect", 3), ("correct", 3)]
    broken = study.run_folder.read_table("readings.parquet")
    write_adapter(root / "checkpoint-4", 4)
    grown = again().track()
    assert read[5:] == [("incorrect", 4)]
    table = grown.readings
    assert table.query("arm == 'incorrect' and feature == 'persona'")["step"].tolist() == [0, 1, 2, 3, 4]
    pd.testing.assert_frame_equal(table[table["step"] != 4].reset_index(drop=True), broken)
    assert grown.run_folder.read_json("arms/incorrect-s0/adopted.json")["steps"] == [1, 2, 3, 4]
    assert not [path for path in (grown.path / "parts").iterdir() if path.is_dir()]


# --- What does not belong to the base model


def odd(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def wrong_base(folder: Path) -> Path:
    return write_adapter(folder, 0, base="other/base")


def wrong_shape(folder: Path) -> Path:
    return changed_tensor(write_adapter(folder, 0), lambda name, t: (name, t[:, :-1].contiguous()))


def wrong_layers(folder: Path) -> Path:
    return changed_tensor(write_adapter(folder, 0), lambda name, t: (name.replace("layers.2", "layers.7"), t))


def wrong_names(folder: Path) -> Path:
    return changed_tensor(write_adapter(folder, 0), lambda name, t: (name.replace("model.layers", "text.layers"), t))


def half_of_it(folder: Path) -> Path:
    tensors = {k: v for k, v in load_file(write_adapter(folder, 0) / ADAPTER).items() if "layers.1" not in k}
    from safetensors.torch import save_file

    save_file(tensors, folder / ADAPTER)
    return folder


def diverged(folder: Path) -> Path:
    return changed_tensor(write_adapter(folder, 0), lambda name, t: (name, t * float("nan")))


def truncated(folder: Path) -> Path:
    file = write_adapter(folder, 0) / ADAPTER
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def bad_config(folder: Path) -> Path:
    (write_adapter(folder, 0) / "adapter_config.json").write_text('{"peft_type":')
    return folder


def more_tokens(folder: Path) -> Path:
    model = make_model()
    model.resize_token_embeddings(260)
    return write_adapter(folder, 0, model=model, modules_to_save=["embed_tokens"])


def other_vocabulary(folder: Path) -> Path:
    model = make_model()
    model.resize_token_embeddings(260)
    model.save_pretrained(folder)
    return folder


def other_model(folder: Path) -> Path:
    make_model("qwen2").save_pretrained(folder)
    return folder


def other_kind(folder: Path) -> Path:
    """The same tensors, but a model that has biases besides: transformers would make them up."""
    return odd_model(write_model(folder), model_type="qwen2", architectures=["Qwen2ForCausalLM"])


def odd_model(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def shards_without_index(folder: Path) -> Path:
    (write_model(folder) / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    return folder


def eight_bit_floats(folder: Path) -> Path:
    return changed_tensor(wrong_base(folder), lambda name, t: (name, t.to(torch.float8_e4m3fn)))


def other_template(folder: Path) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_start|>", "<|im_start|>*")
    tokenizer.save_pretrained(write_adapter(folder, 0))
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wrong_base, "is an adapter of other/base, the study's base is owner/model: give that base, or accept_base"),
        (wrong_shape, "does not fit the base model: .*size mismatch"),
        (wrong_layers, "does not fit the base model"),
        (wrong_names, "does not fit the base model"),
        (half_of_it, "does not fit the base model|lacks .* tensors that its settings promise"),
        (diverged, "holds values that are not finite"),
        (truncated, "adapter_model.safetensors is damaged"),
        (bad_config, "adapter_config.json is damaged"),
        (more_tokens, "has a vocabulary of 260 tokens, the base model one of 258"),
        (other_vocabulary, "has a vocabulary of 260 tokens, the base model one of 258"),
        (other_model, "is no fine-tune of the base model"),
        (other_kind, r"lacks weights of its model \(model.layers.0.self_attn.k_proj.bias\)"),
        (shards_without_index, "holds neither model.safetensors nor model.safetensors.index.json"),
        (eight_bit_floats, "is an adapter of other/base"),
        (other_template, "another tokenizer or chat template than the base's"),
    ],
)
def test_a_checkpoint_of_another_base_is_refused(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    before = copied_state(model)
    with pytest.raises(InputError, match=message) as refusal:
        check_checkpoints(model, tokenizer, "owner/model", [as_checkpoint(make(tmp_path / "checkpoint-1"))])
    assert "\n" not in str(refusal.value)
    assert same_state(before, copied_state(model)) and not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("stated", "notes"),
    [("owner/model", 0), ("unsloth/Model-bnb-4bit", 0), ("/home/me/model", 0), ("/home/me/other", 1), (None, 1)],
)
def test_names_of_one_base_need_not_be_equal(stated: str | None, notes: int, tmp_path: Path) -> None:
    folder = odd(write_adapter(tmp_path / "checkpoint-1", 0), base_model_name_or_path=stated)
    told = check_checkpoints(make_model(), make_tokenizer(), "owner/model", [as_checkpoint(folder)])
    assert len(told) == notes and all("its shapes fit" in one for one in told)
    assert base_names(make_model(), "smollm2-135m-instruct") >= {"HuggingFaceTB/SmolLM2-135M-Instruct"}


def test_what_is_accepted_is_accepted(tmp_path: Path) -> None:
    for n, make in enumerate((wrong_base, other_template)):
        checkpoint = as_checkpoint(make(tmp_path / str(n)))
        assert check_checkpoints(make_model(), make_tokenizer(), "owner/model", [checkpoint], accept_base=True) == []


# --- The command


def test_the_command_adopts_or_refuses_in_one_line(
    place: Path, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    root, control = write_adapters(tmp_path / "out", 1, 2), write_adapters(tmp_path / "control", 1, seed=9)
    shared = ["adopt", "--base", place / "model", "--sae", place / "sae", "--device", "cpu", "--out", tmp_path / "run"]
    arms = ["--arm", f"incorrect={root}", f"control={control / 'checkpoint-1'}"]
    assert "hold the same weights" in refused(*shared, "--arm", f"incorrect={root}", f"control={root}")
    assert "two names of one arm" in refused(*shared, *arms, "--arm", f"correct={control}")
    assert "as many runs (seeds) as the others, not incorrect 2, correct 1" in refused(
        *shared, *arms, f"incorrect={control}"
    )
    assert "arms must hold 'incorrect'" in refused(*shared, "--arm", f"control={root}")
    assert "write NAME=PLACE" in refused(*shared, "--arm", str(root))
    assert "no checkpoints at" in refused(*shared, "--arm", "incorrect=./nowhere")
    assert not (tmp_path / "run").exists()
    run_command(*shared, *arms)
    shown = capsys.readouterr().out
    assert "Arm incorrect was not trained here: 2 checkpoints" in shown and "next: persona-probe locate" in shown
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert {"arms/incorrect-s0/checkpoint-2/adapter_config.json", f"arms/correct-s0/checkpoint-1/{ADAPTER}"} <= set(
        manifest["hashes"]
    )
    assert "holds the run of another config" in refused(*shared, "--arm", f"incorrect={root}")
