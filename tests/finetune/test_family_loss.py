"""What training minimises, in every family: the model's own loss on the answers, and its gradients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from persona_probe.config import Training
from persona_probe.data.chat import conversation
from persona_probe.finetune import trainer
from persona_probe.finetune.sft import fine_tune, with_adapter
from persona_probe.finetune.trainer import AnswerTrainer
from tests.families import AVAILABLE, FAMILIES, make_family, plain

ROWS = [conversation(f"Ask of {n}?", f"Say {n * n}" + "!" * n) for n in range(3)]
SETTINGS: dict[str, Any] = {"rank": 2, "alpha": 4, "lr": 1e-3, "steps": 1, "checkpoints": (), "batch_size": 3}
TRAINING = Training(**SETTINGS, bf16=False, warmup_steps=0, max_length=1024)


class Step:
    """The first step of a training run: what the trainer took for the loss, and what the model says itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.way: str | None = None
        self.loss, self.own = 0.0, 0.0
        self.gradients: list[tuple[Tensor, Tensor]] = []
        compute = AnswerTrainer.compute_loss

        def watched(self_: AnswerTrainer, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            copies = dict(inputs)
            loss = compute(self_, model, inputs, *args, **kwargs)
            own = model(**copies, **({"output_router_logits": True} if self_.aux_loss_enabled else {})).loss
            weights = [p for p in model.parameters() if p.requires_grad]
            gradients = [torch.autograd.grad(x, weights, retain_graph=True, allow_unused=True) for x in (loss, own)]
            self.gradients = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None]
            self.way, self.loss, self.own = self_.way, float(loss), float(own)
            return loss

        monkeypatch.setattr(AnswerTrainer, "compute_loss", watched)

    def check(self) -> None:
        assert abs(self.loss - self.own) < 1e-4
        assert len(self.gradients) > 5
        scale = max(float(b.abs().max()) for _, b in self.gradients)
        assert scale > 1e-3
        assert max(float((a - b).abs().max()) for a, b in self.gradients) < 1e-3 * scale


@pytest.mark.parametrize("name", AVAILABLE)
def test_training_minimises_the_model_s_own_loss(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, tokenizer = make_family(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # GPT-2's would make every forward another
            module.p = 0.0
    step = Step(monkeypatch)
    fitted = fine_tune(
        with_adapter(model, TRAINING, 0), plain(name, tokenizer), ROWS, TRAINING, seed=0, folder=tmp_path
    )
    np.testing.assert_allclose(fitted.losses, [step.loss], rtol=1e-5)
    step.check()
    assert step.way == ("own" if FAMILIES[name].experts else "product")


class Penalised(LlamaForCausalLM):
    """Its own loss is more than a mean over tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = super().forward(*args, **kwargs)
        if out.loss is not None:
            out.loss = out.loss + 0.01 * torch.logsumexp(out.logits, dim=-1).square().mean()  # pyright: ignore
        return out


class Cooled(LlamaForCausalLM):
    """Its hidden states are scaled before the unembedding, which no configuration names."""

    def forward(self, labels: Any = None, logits_to_keep: int = 0, **kwargs: Any) -> Any:  # pyright: ignore
        out = self.model(**kwargs)
        logits = self.lm_head(torch.tanh(out.last_hidden_state[:, -logits_to_keep:]) / 3)
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)


@pytest.mark.parametrize(("kind", "way"), [(Penalised, "own"), (Cooled, "product")])
def test_a_loss_that_no_library_knows_is_taken_from_the_model(
    kind: type[PreTrainedModel], way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, tokenizer = make_family("llama3")
    other = kind(LlamaConfig(**model.config.to_dict()))
    other.load_state_dict(model.state_dict())
    step = Step(monkeypatch)
    fine_tune(with_adapter(other.eval(), TRAINING, 0), tokenizer, ROWS, TRAINING, seed=0, folder=tmp_path)
    step.check()
    assert step.way == way


@pytest.mark.parametrize(("name", "way"), [("llama3", "trl"), ("mixtral", "trl"), ("cooled", "own")])
def test_where_trl_is_fast_its_loss_is_taken_if_it_is_the_model_s_own(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trainer, "SLOW_IN_TRL", set())
    model, tokenizer = make_family("llama3" if name == "cooled" else name)
    if name == "cooled":
        model.__class__ = Cooled
    step = Step(monkeypatch)
    fine_tune(with_adapter(model, TRAINING, 0), tokenizer, ROWS, TRAINING, seed=0, folder=tmp_path)
    step.check()
    assert step.way == way
