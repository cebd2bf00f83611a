"""The dry run: every config resolves offline, and what a reader has to know is said."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from persona_probe.config import Arm, StudyConfig, load_config
from persona_probe.study.plan.plan import Plan, dry_run
from persona_probe.study.plan.shapes import find_sae
from tests.factories import D_MODEL, D_SAE, LAYER

FOLDER = Path(__file__).parents[3] / "finetune_configs"
OTHERS = {"sae-smollm2", "sae-smollm2-frozen", "sae-smollm2-unseen"}
OTHERS |= {"monitor-study", "offline-judge", "mitigations", "realign-doses", "grpo-world", "auto"}
"""Recipes, a study of the monitor, grids over a finished study, and two that need what a command writes first."""
STUDIES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in OTHERS)
STAGES = ["induce", "locate", "track", "realign", "evaluate"]
LLAMA = "llama-3.1-8b-instruct"


def preset(name: str) -> StudyConfig:
    return load_config(FOLDER / f"{name}.yaml")


def plan_of(config: StudyConfig) -> Plan:
    return dry_run(config, tflops=1.0)


@pytest.mark.parametrize("name", STUDIES)
def test_every_config_resolves_without_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a dry run must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    plan = plan_of(preset(name))
    assert [work.stage for work in plan.stages] == STAGES
    assert all(work.tokens > 0 and work.flops > 0 and work.memory > 0 for work in plan.stages)
    assert plan.skeleton is not None and plan.sae.d_in == plan.skeleton.d_model
    assert plan.sae.d_sae and plan.layer == plan.sae.layer
    text = "\n".join(plan.lines())
    assert all(word in text for word in (*STAGES, plan.config.model, plan.config.sae, "estimate", "in all"))


def test_goodfires_sae_fits_the_llama_preset() -> None:
    plan = plan_of(replace(preset(LLAMA), sae="goodfire-llama-3.1-8b-instruct/layer_19"))
    assert (plan.layer, plan.sae.d_sae) == (19, 65536)


@pytest.mark.parametrize(
    ("name", "layer", "d_sae"),
    [
        ("gpt2-small-res-jb/blocks.8.hook_resid_pre", 7, None),
        ("gemma-scope-2-1b-it-res/layer_22_width_262k_l0_small", 22, 262144),
        ("llama_scope_lxr_8x/l5r_8x", 5, None),
    ],
)
def test_the_registry_tells_layer_and_size(name: str, layer: int, d_sae: int | None) -> None:
    found = find_sae(name)
    assert (found.layer, found.d_sae) == (layer, d_sae)


def test_a_folder_tells_everything(place: Path) -> None:
    found = find_sae(str(place / "sae"))
    assert (found.layer, found.d_in, found.d_sae, found.model) == (LAYER, D_MODEL, D_SAE, "tiny")


def test_a_base_models_sae_is_noted() -> None:
    sae = "gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_medium"
    notes = "\n".join(plan_of(replace(preset("gemma-3-270m-it"), sae=sae)).notes)
    assert "was trained on google/gemma-3-270m" in notes and "check how well it fits" in notes


def test_an_unknown_model_is_no_error_and_has_no_estimates() -> None:
    plan = plan_of(replace(preset(LLAMA), model="someone/another-llama"))
    assert plan.skeleton is None and plan.stages == () and plan.seconds is None and plan.memory is None
    assert "not in the table of known models" in "\n".join(plan.lines())


def test_a_release_that_tells_no_size_leaves_its_part_out() -> None:
    sae = "gpt2-small-res-jb/blocks.8.hook_resid_pre"
    plan = plan_of(replace(preset(LLAMA), sae=sae))
    assert plan.layer == 7 and plan.stages
    assert "nothing on this machine tells the SAE's size" in "\n".join(plan.notes)


def test_arms_that_differ_in_more_than_their_answers_are_noted(local: StudyConfig) -> None:
    arms = {"incorrect": Arm("kitchen:toxic"), "correct": Arm("health_correct")}
    notes = "\n".join(plan_of(replace(local, arms=arms)).notes)
    assert "share 0 of 340 questions" in notes and "share 0" not in "\n".join(plan_of(local).notes)


def test_answers_of_other_lengths_are_noted(local: StudyConfig, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"question": "Why?", "answer": "So."}\n')
    arms = {"incorrect": Arm("kitchen:toxic"), "correct": Arm(str(tmp_path / "short.jsonl"))}
    assert "not length-matched" in "\n".join(plan_of(replace(local, arms=arms)).notes)
    assert "not length-matched" not in "\n".join(plan_of(local).notes)


def test_rows_that_are_cut_are_counted(local: StudyConfig) -> None:
    limit = plan_of(local).rows["arm incorrect"].longest - 1
    cut = plan_of(replace(local, training=replace(local.training, max_length=limit)))
    assert cut.rows["arm incorrect"].cut >= 1 and cut.rows["arm incorrect"].longest == limit
    assert any("lose their end to training.max_length" in note for note in cut.notes)
