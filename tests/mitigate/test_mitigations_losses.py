"""The extra losses: zero on the base, and in value and gradient what a row-by-row computation gives."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from persona_probe.config import Training
from persona_probe.data.chat import Conversation
from persona_probe.data.tokens import encode as encode_row
from persona_probe.mitigate.losses import KLToBase, latent_excess
from persona_probe.mitigate.methods import MITIGATIONS, make_mitigation
from persona_probe.mitigate.mitigation import MitigatedRun
from persona_probe.models.adapters import trainable_parameters
from persona_probe.models.layers import decoder_layer
from persona_probe.saes.read import encode
from tests.factories import LAYER, make_model, make_sae
from tests.mitigate.mitigation_inputs import (
    LATENTS,
    ROWS,
    Gradients,
    close,
    fresh,
    make_inputs,
    one_step,
    perturbed,
    train,
)

PENALTIES = ("kl", "latent_penalty")
TOKENIZER = make_inputs().tokenizer


@pytest.mark.parametrize(
    ("name", "architecture", "bf16"),
    [("kl", "llama", True), ("latent_penalty", "llama", True), ("latent_penalty", "gemma2", False)],
)
def test_it_is_exactly_zero_on_the_base(name: str, bf16: bool, architecture: str, tmp_path: Path) -> None:
    training = replace(one_step(), bf16=bf16, steps=2)
    fitted = train(tmp_path, make_mitigation(name, 3.0), training, fresh(training, architecture))
    assert fitted.penalties[0] == 0 and fitted.penalties[1] > 0


def token_ids(messages: Conversation) -> tuple[Tensor, int]:
    """A training row as TRL tokenises it, end of turn included, and where its answer begins."""
    head = TOKENIZER.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = TOKENIZER.apply_chat_template(messages, tokenize=False)
    ids = TOKENIZER(str(whole), add_special_tokens=False)["input_ids"]
    return torch.tensor([ids]), len(TOKENIZER(str(head), add_special_tokens=False)["input_ids"])  # pyright: ignore


def task_loss(model: nn.Module) -> Tensor:
    parts = []
    for messages in ROWS:
        ids, start = token_ids(messages)
        logprobs = model(ids).logits[0].log_softmax(dim=-1)
        parts.append(-logprobs[range(start - 1, ids.shape[1] - 1), ids[0, start:]])
    return torch.cat(parts).mean()


def kl_by_hand(tuned: nn.Module, base: nn.Module) -> Tensor:
    """Over the general rows of the first step, one by one, with torch's own KL."""
    run = MitigatedRun(tuned, make_inputs(), one_step(), 0)
    drawn, parts = KLToBase(strength=1.0).drawn(run, 0), []
    wanted = {tuple(encode_row(TOKENIZER, row).ids): encode_row(TOKENIZER, row).n_prompt for row in run.inputs.general}
    for ids, attention in zip(drawn.ids, drawn.attention, strict=True):
        row = ids[attention.bool()]
        start = wanted[tuple(row.tolist())]
        left, right = (m(row[None]).logits[0, start - 1 : -1].log_softmax(dim=-1) for m in (tuned, base))
        parts.append(nn.functional.kl_div(left, right.detach(), log_target=True, reduction="none").sum(dim=-1))
    return torch.cat(parts).mean()


def residual(model: nn.Module, ids: Tensor) -> Tensor:
    kept = []
    handle = decoder_layer(model, LAYER).register_forward_hook(lambda _m, _i, out: kept.append(out))
    model(ids)
    handle.remove()
    return (kept[0][0] if isinstance(kept[0], tuple) else kept[0])[0]


def excess_by_hand(tuned: nn.Module, base: nn.Module) -> Tensor:
    """Row by row, with the JumpReLU spelled out."""
    sae, parts = make_sae("jumprelu"), []
    for messages in ROWS:
        ids, start = token_ids(messages)
        values = []
        for model in (tuned, base):
            x = residual(model, ids)[start:]
            pre = (x - sae.b_dec.detach()) @ sae.W_enc.detach() + sae.b_enc.detach()
            values.append((pre.relu() * (pre > sae.threshold.detach()))[:, list(LATENTS)])
        parts.append((values[0] - values[1].detach()).clamp(min=0).square().sum(dim=-1))
    return torch.cat(parts).mean()


def trained_gradients(
    name: str, strength: float, training: Training, architecture: str, folder: Path
) -> tuple[dict[str, Tensor], float]:
    kept = Gradients()
    tuned = perturbed(training, architecture)
    fitted = train(folder, make_mitigation(name, strength), training, tuned, callbacks=(kept,))
    return kept.first, fitted.penalties[0]


BY_HAND: dict[str, Callable[[nn.Module, nn.Module], Tensor]] = {"kl": kl_by_hand, "latent_penalty": excess_by_hand}


@pytest.mark.parametrize(
    ("name", "architecture", "checkpointing"),
    [
        ("kl", "llama", True),
        ("kl", "gemma2", False),  # its logits are capped, so that it takes TRL's own trainer
        ("latent_penalty", "llama", False),
        ("latent_penalty", "llama", True),
        ("latent_penalty", "gemma2", True),
    ],
)
def test_value_and_gradient_are_those_of_a_computation_by_hand(
    name: str, architecture: str, checkpointing: bool, tmp_path: Path
) -> None:
    training, strength = replace(one_step(), gradient_checkpointing=checkpointing), 0.7
    found, penalty = trained_gradients(name, strength, training, architecture, tmp_path)
    tuned, base = perturbed(training, architecture), make_model(architecture)
    extra = strength * BY_HAND[name](tuned, base)
    assert penalty == pytest.approx(float(extra.detach()), rel=1e-3) and penalty > 1e-3
    (task_loss(tuned) + extra).backward()
    nn.utils.clip_grad_norm_(trainable_parameters(tuned).values(), 1.0)  # as the trainer does
    assert close(found, {n: p.grad for n, p in trainable_parameters(tuned).items() if p.grad is not None})


@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_the_excess_of_other_saes_is_that_of_their_own_encoding(kind: str) -> None:
    """Where latents compete too; the SAE is left as it was."""
    sae, latents = make_sae(kind), [1, 5, 40]
    asked = {name: p.requires_grad for name, p in sae.named_parameters()}
    tuned, base = (3 * torch.randn(7, 32, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    found = latent_excess(sae, tuned.requires_grad_(True), base, latents)
    above = (encode(sae, tuned.detach()) - encode(sae, base))[:, latents].clamp(min=0)
    assert float(found.detach()) == pytest.approx(float(above.square().sum()) / 7, rel=1e-5) and float(above.max()) > 0
    found.backward()
    assert tuned.grad is not None and float(tuned.grad.abs().max()) > 0
    assert {name: p.requires_grad for name, p in sae.named_parameters()} == asked
    assert all(p.grad is None for p in sae.parameters())


def test_a_strong_penalty_keeps_the_latents_down(tmp_path: Path) -> None:
    training, ends = replace(one_step(), steps=8), {}
    for weight in (0.0, 50.0):
        tuned = fresh(training)
        train(tmp_path / str(weight), make_mitigation("latent_penalty", weight), training, tuned)
        with torch.no_grad():
            ends[weight] = float(excess_by_hand(tuned, make_model()))
    assert ends[50.0] < 0.5 * ends[0.0]


def test_general_rows_change_from_step_to_step_and_not_from_run_to_run() -> None:
    run = MitigatedRun(fresh(), make_inputs(), one_step(), 0)
    draw = KLToBase(strength=1.0, batch=2).drawn
    assert torch.equal(draw(run, 4).ids, draw(run, 4).ids)
    assert len({tuple(draw(run, step).ids.flatten().tolist()) for step in range(6)}) > 1
    assert len(KLToBase(strength=1.0, batch=99).drawn(run, 0).ids) == 5  # all there are
    assert set(PENALTIES) <= {name for name, kind in MITIGATIONS.items() if kind.needs_base}
