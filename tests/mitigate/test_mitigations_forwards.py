"""Changed training forwards: exact in training, absent from evaluation and from the monitor's readings."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from persona_probe.config import Training
from persona_probe.errors import InputError, TrainingDiverged
from persona_probe.mitigate.methods import make_mitigation
from persona_probe.mitigate.pushes import taken_out
from persona_probe.models.adapters import organism
from persona_probe.models.layers import evaluating
from persona_probe.models.taps import orthonormal, read
from persona_probe.monitor.monitor import FeatureMonitor
from tests.factories import LAYER, hook_count, make_model, make_tokenizer
from tests.mitigate.mitigation_inputs import (
    LATENTS,
    ROWS,
    Gradients,
    close,
    direction,
    fresh,
    make_inputs,
    one_step,
    perturbed,
    train,
)

IDS = torch.arange(12)[None] + 5
NAMES = ("concept_ablation", "preventative_steering")


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_inside_the_block_is_untouched(name: str) -> None:
    tuned = perturbed().eval()
    hooks = hook_count(tuned)
    with torch.no_grad():
        before = tuned(IDS).logits
        with make_mitigation(name, 1.0).forwards(tuned, make_inputs()):
            assert torch.equal(tuned(IDS).logits, before)
            tuned.train()
            assert not torch.equal(tuned(IDS).logits, before)
            with evaluating(tuned):
                assert torch.equal(tuned(IDS).logits, before)
    assert hook_count(tuned) == hooks


def residual(model: nn.Module) -> Tensor:
    with read(model, LAYER) as tap, torch.no_grad():
        model(IDS)
    return tap.value[0]


@pytest.mark.parametrize("what", ["latents", "direction", None])
def test_an_ablated_training_forward_has_no_component_along_the_directions(what: str | None) -> None:
    inputs, tuned = make_inputs(), perturbed().train()
    wanted = direction()[None] if what == "direction" else inputs.sae.W_dec.detach()[list(LATENTS)]  # pyright: ignore
    basis = orthonormal(wanted)
    plain = residual(tuned)
    with make_mitigation("concept_ablation", 1.0, what=what).forwards(tuned, inputs):
        ablated = residual(tuned)
    assert float((plain @ basis.T).abs().max()) > 0.1
    assert float((ablated @ basis.T).abs().max()) < 1e-4
    with make_mitigation("concept_ablation", 0.25, what=what).forwards(tuned, inputs):
        assert torch.allclose(residual(tuned) @ basis.T, 0.75 * plain @ basis.T, atol=1e-4)


def test_steering_adds_the_direction_at_every_position() -> None:
    inputs, tuned = make_inputs(), perturbed().train()
    plain = residual(tuned)
    with make_mitigation("preventative_steering", 0.5).forwards(tuned, inputs):
        assert torch.allclose(residual(tuned) - plain, 0.5 * direction().expand_as(plain), atol=1e-5)
    with make_mitigation("inference_steering", 0.5).at_evaluation(tuned.eval(), inputs):
        assert torch.allclose(residual(tuned) - plain, -0.5 * direction().expand_as(plain), atol=1e-5)


def by_hand(name: str, tuned: nn.Module) -> Tensor:
    """The task's loss row by row, under a hook that is no tap."""
    tokenizer, parts = make_tokenizer(), []
    unit = orthonormal(make_inputs().sae.W_dec.detach()[list(LATENTS)])  # pyright: ignore

    def hook(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        return out - out @ unit.T @ unit if name == "concept_ablation" else out + direction()

    handle = tuned.get_submodule(f"base_model.model.model.layers.{LAYER}").register_forward_hook(hook)
    for messages in ROWS:
        head = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(str(tokenizer.apply_chat_template(messages, tokenize=False)))["input_ids"]
        start = len(tokenizer(str(head))["input_ids"])  # pyright: ignore
        logprobs = tuned(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        parts.append(-logprobs[range(start - 1, len(ids) - 1), ids[start:]])  # pyright: ignore
    handle.remove()
    return torch.cat(parts).mean()


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("concept_ablation", False), ("concept_ablation", True), ("preventative_steering", True)],
)
def test_loss_and_gradient_are_those_of_the_changed_forward(name: str, checkpointing: bool, tmp_path: Path) -> None:
    """Also where checkpointing computes the forward a second time, inside the backward pass."""
    training, kept = replace(one_step(), gradient_checkpointing=checkpointing), Gradients()
    fitted = train(tmp_path, make_mitigation(name, 1.0), training, perturbed(), callbacks=(kept,))
    tuned = perturbed()
    loss = by_hand(name, tuned)
    loss.backward()
    parameters = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    assert fitted.losses[0] == pytest.approx(float(loss.detach()), rel=1e-3)
    assert close(kept.first, {n: p.grad for n, p in parameters.items() if p.grad is not None})


@pytest.mark.parametrize(("name", "bf16"), [("concept_ablation", False), ("preventative_steering", True)])
def test_the_monitor_reads_the_plain_model_while_it_trains(name: str, bf16: bool, tmp_path: Path) -> None:
    inputs, kept = make_inputs(latents=()), {}
    monitor = FeatureMonitor(
        None,
        {"direction": direction()},
        list(inputs.probes),
        layer=LAYER,
        steps=(2,),
        tokenizer=inputs.tokenizer,
        bf16=bf16,
        on_reading=lambda step, snapshot, _model: kept.update({step: float(snapshot.values.mean())}),
        log=False,
    )
    training = replace(one_step(), steps=3, checkpoints=(2,), bf16=bf16)
    train(tmp_path, make_mitigation(name, 1.0), training, inputs=inputs, callbacks=(monitor,))
    live = kept[2]
    with organism(make_model(), tmp_path / "checkpoint-2") as tuned:
        plain = float(monitor.read(tuned, 2).values.mean())
    changed = 0.0 if name == "concept_ablation" else plain + float(direction().norm())
    assert abs(live - plain) < 0.02 * abs(changed - plain) and abs(changed - plain) > 0.1


def test_half_taken_out_of_a_plane_is_half() -> None:
    basis, x = torch.eye(3)[:2], torch.tensor([[2.0, 4.0, 8.0]])
    assert taken_out(x, basis, 0.5).tolist() == [[1.0, 2.0, 8.0]]
    assert taken_out(x, basis, 1.0).tolist() == [[0.0, 0.0, 8.0]]


def test_no_hook_stays_after_a_run_that_failed(tmp_path: Path) -> None:
    tuned = fresh()
    hooks, training = hook_count(tuned), Training(lr=1e30, steps=4, bf16=False, rank=2, batch_size=4, checkpoints=())
    with pytest.raises(TrainingDiverged):
        train(tmp_path, make_mitigation("concept_ablation", 1.0), training, tuned)
    assert hook_count(tuned) == hooks
    with pytest.raises(InputError, match="training data is empty"):
        train(tmp_path, make_mitigation("preventative_steering", 1.0), training, tuned, rows=[])
    assert hook_count(tuned) == hooks
