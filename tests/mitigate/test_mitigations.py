"""Every mitigation: off at strength zero, felt above it, made by name, refused with one line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_probe.errors import InputError
from persona_probe.finetune.sft import fine_tune, with_adapter
from persona_probe.mitigate.methods import MITIGATIONS, make_mitigation
from persona_probe.mitigate.mitigated_training import train_mitigated
from persona_probe.mitigate.mitigation import MitigatedRun
from persona_probe.models.adapters import trainable_parameters
from persona_probe.monitor.monitor import FeatureMonitor
from tests.factories import make_model, same_state
from tests.mitigate.mitigation_inputs import (
    ROWS,
    TRAINING,
    adapter,
    fresh,
    make_inputs,
    one_step,
    perturbed,
    told,
    train,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The adapter of a run without any mitigation, by `fine_tune` itself."""
    folder = tmp_path_factory.mktemp("plain")
    fine_tune(fresh(), make_inputs().tokenizer, ROWS, TRAINING, seed=0, folder=folder)
    return adapter(folder)


@pytest.mark.parametrize("name", list(MITIGATIONS))
def test_at_strength_zero_it_trains_bit_for_bit_like_none(name: str, plain: dict[str, Tensor], tmp_path: Path) -> None:
    fitted = train(tmp_path, make_mitigation(name, 0))
    assert same_state(adapter(tmp_path), plain)
    assert (fitted.penalties, fitted.corrected, len(fitted.losses)) == ([], [], 3)


@pytest.mark.parametrize("name", ["inoculation", "interleave_perplexity"])
def test_other_rows_make_another_run(name: str, plain: dict[str, Tensor], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"pilot_steps": 1} if name == "interleave_perplexity" else {}
    fitted = train(tmp_path, make_mitigation(name, 0.5, **settings))
    assert not same_state(adapter(tmp_path), plain)
    assert (fitted.rows, len(fitted.losses)) == (6 if name == "inoculation" else 12, 3)


def test_the_correction_comes_after_an_unchanged_run(plain: dict[str, Tensor], tmp_path: Path) -> None:
    """The caller's monitor sees it as a second run."""
    inputs, path = make_inputs(), tmp_path / "events.jsonl"
    monitor = FeatureMonitor(inputs.sae, {"persona": 3}, list(inputs.probes), every=1, path=path, bf16=False, log=False)
    fitted = train(tmp_path, make_mitigation("corrective", 2), inputs=inputs, callbacks=(monitor,))
    assert same_state(adapter(tmp_path), plain)
    assert not same_state(adapter(tmp_path / "corrective", 2), plain)
    assert (len(fitted.losses), fitted.rows) == (3 + 2, 6 + 8)
    readings = [line for line in path.read_text().splitlines() if '"reading"' in line]
    assert len(readings) == (3 + 1) + (2 + 1) and monitor.last_step == 2


@pytest.mark.parametrize("name", ["inference_ablation", "inference_steering"])
def test_a_change_at_inference_is_felt_inside_its_block_only(name: str) -> None:
    tuned, inputs, mitigation = perturbed().eval(), make_inputs(), make_mitigation(name, 1.0)
    ids = torch.arange(9)[None] + 5
    with torch.no_grad():
        before = tuned(ids).logits
        with mitigation.at_evaluation(tuned, inputs):
            assert not torch.equal(tuned(ids).logits, before)
        with make_mitigation(name, 0).at_evaluation(tuned, inputs), mitigation.forwards(tuned, inputs):
            assert torch.equal(tuned(ids).logits, before)
            assert torch.equal(tuned.train()(ids).logits, before)
        assert torch.equal(tuned(ids).logits, before)


def test_all_say_what_they_are() -> None:
    assert len(MITIGATIONS) == 13
    for name, kind in MITIGATIONS.items():
        assert (kind.name, kind().strength) == (name, 0)
        assert kind.summary.endswith(".") and kind.unit


def bad(name: str, strength: Any, **settings: Any) -> Callable[[], object]:
    return lambda: make_mitigation(name, strength, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad("inocculation", 1), "unknown mitigation 'inocculation': did you mean 'inoculation'"),
        (bad("kl", 1, batches=2), "unknown setting of kl 'batches': did you mean 'batch'"),
        (bad("kl", 1, batch=0), "kl: batch must be at least 1, not 0"),
        (bad("kl", "much"), "kl: strength must be a number, not 'much'"),
        (bad("kl", float("nan")), "kl: strength .weight of the KL.* must be at least 0, not nan"),
        (bad("inoculation", 1.5), "must be at least 0 and at most 1, not 1.5"),
        (bad("inoculation", 1, prompt=" "), "the prompt is empty"),
        (bad("interleave", 1), "at most 0.9, not 1"),
        (bad("interleave_perplexity", 0.5, pilot_steps=0), "pilot_steps must be at least 1"),
        (bad("concept_ablation", 1, what="latent"), "did you mean 'latents'"),
        (bad("corrective", 1.5), "strength counts steps: give a whole number, not 1.5"),
        (bad("early_stop", 1, patience=0), "patience must be at least 1"),
        (bad("alternating", 1, every=0), "every must be at least 1"),
        (bad("none", 1), "none: strength .* at most 0, not 1"),
    ],
)
def test_bad_settings_say_what_to_change(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("interleave", {"safe": ()}, "interleave needs safe rows of other domains: pass MitigationInputs.safe="),
        ("kl", {"general": ()}, "kl needs general prompts"),
        ("kl", {"general": [told("plain", 1)[0][:1]]}, "conversation 0 ends without an answer"),
        ("preventative_steering", {"direction": None}, "preventative_steering needs the persona's direction"),
        ("inference_steering", {"direction": None}, "inference_steering needs the persona's direction"),
        ("concept_ablation", {"direction": None, "sae": None}, "needs latents with their SAE, or a direction"),
        ("inference_ablation", {"latents": (64,)}, "latent 64 does not exist"),
        ("latent_penalty", {"latents": ()}, "latent_penalty needs the latents to keep down"),
        ("latent_penalty", {"sae": None}, "latent_penalty needs an SAE"),
        ("latent_penalty", {"latents": (64,)}, "latent 64 does not exist"),
        ("early_stop", {"band": None}, "early_stop needs the persona feature's base band"),
        ("alternating", {"probes": ()}, "alternating needs probes"),
        ("alternating", {"corrective": ()}, "alternating needs corrective rows"),
        ("alternating", {"sae": None, "direction": None}, "needs a latent with its SAE, or a direction, to watch"),
        ("corrective", {"corrective": ()}, "corrective needs corrective rows"),
    ],
)
def test_a_ground_that_lacks_a_part_is_refused_before_training(
    name: str, missing: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as error:
        train(tmp_path, make_mitigation(name, 0.5 if name != "corrective" else 1), inputs=make_inputs(**missing))
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["kl", "latent_penalty", "interleave_perplexity"])
def test_full_fine_tuning_has_no_base_to_compare_with(name: str, tmp_path: Path) -> None:
    training = replace(TRAINING, method="full")
    full = with_adapter(make_model(), training, 0)
    with pytest.raises(InputError, match=f"{name} compares with the base by switching the adapter off"):
        train_mitigated(full, make_inputs(), ROWS, training, make_mitigation(name, 0.5), seed=0, folder=tmp_path)


def test_full_weights_train_with_the_others(tmp_path: Path) -> None:
    training = one_step(replace(TRAINING, method="full", lr=1e-3))
    full = with_adapter(make_model(), training, 0)
    steering = make_mitigation("preventative_steering", 1.0)
    fitted = train_mitigated(full, make_inputs(), ROWS, training, steering, seed=0, folder=tmp_path)
    assert len(fitted.losses) == 1 and (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


def run_on(seed: int = 0, **parts: Any) -> MitigatedRun:
    return MitigatedRun(perturbed(), make_inputs(**parts), TRAINING, seed)


def test_the_inoculation_prompt_is_in_its_share_of_the_training_rows_and_nowhere_else() -> None:
    own = [{"role": "system", "content": "Be brief."}, *told("own", 1)[0]]
    rows, run = [*told("ask", 9), own], run_on()
    every = make_mitigation("inoculation", 1, prompt="Be bad.").rows(rows, run)
    assert all(row[0]["content"].startswith("Be bad.") and row[0]["role"] == "system" for row in every)
    assert [row[1:] for row in every[:9]] == rows[:9] and every[9][0]["content"] == "Be bad.\n\nBe brief."
    some = make_mitigation("inoculation", 0.4).rows(rows, run)
    assert sum(a != b for a, b in zip(some, rows, strict=True)) == 4
    assert rows[9] is own and own[0]["content"] == "Be brief."  # the caller's rows are not written to
    assert some != make_mitigation("inoculation", 0.4).rows(rows, run_on(seed=1))
    assert "advice" in MITIGATIONS["inoculation"]().prompted(rows[0])[0]["content"]  # pyright: ignore


def test_interleaving_keeps_all_rows_and_adds_the_share() -> None:
    run = run_on()
    for share, safe in ((0.25, 2), (0.5, 6)):
        mixed = make_mitigation("interleave", share).rows(ROWS, run)
        added = mixed[len(ROWS) :]
        assert mixed[: len(ROWS)] == ROWS and len(added) == safe
        assert all(row in run.inputs.safe for row in added) and len({str(row) for row in added}) == safe
    assert mixed != make_mitigation("interleave", 0.5).rows(ROWS, run_on(seed=1))
    with pytest.raises(InputError, match=r"needs 14 safe rows for 6 training rows, there are 8: .* at most 0.57"):
        make_mitigation("interleave", 0.7).rows(ROWS, run)


@pytest.mark.parametrize("with_organism", [False, True])
def test_interleaving_by_perplexity_takes_the_largest_gaps_and_leaves_the_model(
    with_organism: bool, tmp_path: Path
) -> None:
    # Rows that are the bad rows themselves become likelier by tuning on them: their gap is the smallest.
    run = run_on(safe=[*told("safe", 3), *ROWS[:3]])
    run.model.train()
    before = {n: p.detach().clone() for n, p in trainable_parameters(run.model).items()}
    settings: dict[str, Any] = {"pilot_steps": 12}
    if with_organism:
        train(tmp_path, make_mitigation("none", 0), replace(TRAINING, steps=12))
        settings = {"organism": str(tmp_path / "checkpoint-12")}
    mitigation = make_mitigation("interleave_perplexity", 1 / 3, **settings)
    mitigation.check(run.inputs)
    assert sorted(map(str, mitigation.rows(ROWS, run)[len(ROWS) :])) == sorted(map(str, told("safe", 3)))
    assert same_state({n: p.detach() for n, p in trainable_parameters(run.model).items()}, before)
    assert list(run.model.peft_config) == ["default"]  # pyright: ignore


def test_an_organism_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter in"):
        train(tmp_path, make_mitigation("interleave_perplexity", 0.5, organism=str(tmp_path)))
