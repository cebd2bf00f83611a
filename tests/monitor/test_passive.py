"""Passive reading sees training forwards, each once, and nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from persona_probe.config import Training
from persona_probe.errors import InputError
from persona_probe.finetune.sft import fine_tune, with_adapter
from persona_probe.finetune.trainer import AnswerTrainer, split_rows
from persona_probe.models.layers import base_transformer, decoder_layer, transformer_config
from persona_probe.monitor.events import Reading, Start
from persona_probe.monitor.features import FeatureGroups
from persona_probe.monitor.passive import PassiveReader
from persona_probe.monitor.settings import PassiveReading
from tests.factories import LAYER, hook_count, make_model, make_tokenizer, same_state, talks
from tests.monitor.monitored_runs import (
    DIRECTION,
    KeepEvents,
    adapted,
    directions,
    hidden_state,
    loop,
    loop_batch,
    monitor,
)

UNIT = DIRECTION / DIRECTION.norm()


def hand_mean(model: nn.Module, step: int) -> float:
    """Mean over sequences of the mean projection of trained tokens, of the batch of a step."""
    ids, labels = loop_batch(step)
    with hidden_state(model) as seen, torch.no_grad():
        model(input_ids=ids)
    trained = labels != -100
    means = [(row[mask] @ UNIT).mean() for row, mask in zip(seen[0], trained, strict=True)]
    return float(torch.stack(means).mean())


def passive(**kwargs: Any) -> Any:
    return directions(mode="passive", **kwargs)


def test_it_reads_the_batch_of_the_due_step() -> None:
    model, watching = make_model(), passive(every=2)
    wanted = hand_mean(model, 1)
    with watching.watch(model) as live:
        loop(model, 4, live)
    rows = watching.readings
    assert rows["step"].tolist() == [1, 2, 4] and (rows["mode"] == "passive").all()
    assert rows["mean"].iloc[0] == pytest.approx(wanted, abs=1e-5)
    assert rows["n_probes"].tolist() == [3, 3, 3]
    assert rows["tokens_seen"].tolist() == [36, 72, 144]
    assert rows["shift"].iloc[0] == 0 and rows["shift"].iloc[2] != 0
    assert rows["base_mean"].nunique() == 1


def test_a_reading_is_of_the_weights_before_the_update() -> None:
    model, twin, watching = make_model(), make_model(), passive(every=2)
    with watching.watch(model) as live:
        loop(model, 2, live)
    loop(twin, 1)
    assert watching.readings["mean"].iloc[-1] == pytest.approx(hand_mean(twin, 2), abs=1e-5)


@pytest.mark.parametrize("mode", ["passive", "both", "probe"])
def test_training_is_the_same_bit_for_bit(mode: str) -> None:
    def run(watched: bool) -> dict[str, torch.Tensor]:
        model, watching = adapted(dropout=0.3), monitor(mode=mode, every=1, architecture="jumprelu")
        if not watched:
            return loop(model, 3)
        with watching.watch(model, make_tokenizer()) as live:
            weights = loop(model, 3, live)
        assert watching.faults == [] and set(watching.readings["step"]) >= {1, 2, 3}
        assert hook_count(model) == 0
        return weights

    assert same_state(run(True), run(False))


def test_evaluation_generation_and_probes_do_not_count() -> None:
    model, watching = make_model(), directions(mode="both", every=1)
    ids, labels = loop_batch(1)
    with watching.watch(model, make_tokenizer()) as live:
        model.eval()
        model(input_ids=ids, labels=labels)
        model.train()
        with torch.no_grad():
            model(input_ids=ids, labels=labels)
            model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=1)  # pyright: ignore[reportCallIssue]
        model(input_ids=ids, labels=labels).loss.backward()
        model(input_ids=ids[:1], labels=labels[:1]).loss.backward()
        live.step(1)
        model(input_ids=ids[:2], labels=labels[:2])
        live.step(2)
    rows = watching.readings.query("mode == 'passive'")
    assert rows["n_probes"].tolist() == [4, 2]
    assert rows["tokens_seen"].tolist() == [48, 72]
    probes = watching.readings.query("mode == 'probe'")
    assert probes["step"].tolist() == [0, 1, 2] and (probes["n_probes"] == 4).all()
    assert rows["base_mean"].iloc[0] == probes["base_mean"].iloc[0]


class Recomputing:
    """A decoder layer whose hooks run inside the checkpoint, as transformers had it, so that they run again."""

    kind: bool

    @classmethod
    def put_on(cls, layer: nn.Module, reentrant: bool, calls: list[bool]) -> None:
        old = type(layer)

        def call(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            def inner(y: torch.Tensor) -> Any:
                calls.append(torch.is_grad_enabled())
                return old.__call__(self, y, *args, **kwargs)

            return checkpoint(inner, x, use_reentrant=reentrant)

        layer.__class__ = type("Recomputing", (old,), {"__call__": call})


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_does_not_count_again(reentrant: bool) -> None:
    model, watching, calls = make_model().train(), passive(every=1), list[bool]()
    Recomputing.put_on(decoder_layer(model, LAYER), reentrant, calls)
    ids, labels = loop_batch(1)
    with watching.watch(model) as live, hidden_state(model) as seen, set_checkpoint_early_stop(False):
        model(input_ids=ids, labels=labels).loss.backward()
        live.step(1)
    # The layer and its hooks ran twice, the second time in the backward pass with gradients on.
    assert calls == [not reentrant, True] and len(seen) == 2
    rows = watching.readings
    assert rows["n_probes"].tolist() == [3] and rows["tokens_seen"].tolist() == [36]


def test_a_transformer_that_is_called_without_its_head_is_read() -> None:
    model, watching = make_model().train(), passive(every=1)
    with watching.watch(model) as live:
        transformer: Any = base_transformer(model)
        transformer(input_ids=loop_batch(1)[0])
        live.step(1)
    assert watching.readings["tokens_seen"].tolist() == [36]


def test_labels_are_missed_aloud(caplog: pytest.LogCaptureFixture) -> None:
    model, watching = make_model().train(), passive(every=1)
    with watching.watch(model) as live:
        for step in (1, 2):
            model(input_ids=loop_batch(step)[0])
            live.step(step)
    assert caplog.text.count("given no labels") == 1
    assert len(watching.readings) == 2


@pytest.mark.parametrize(("architecture", "fit_every"), [("topk", 1), ("jumprelu", 2)])
def test_latents_and_fit_are_read_from_the_batch(architecture: str, fit_every: int) -> None:
    model, watching = make_model(), monitor(mode="passive", every=1, architecture=architecture, fit_every=fit_every)
    ids, labels = loop_batch(1)
    with hidden_state(model) as seen, torch.no_grad():
        model(input_ids=ids)
    sae: Any = watching.settings.sae
    acts = sae.encode(seen[0]).detach()[:, :, 3]
    wanted = torch.stack([a[m].mean() for a, m in zip(acts, labels != -100, strict=True)]).mean()
    with watching.watch(model) as live:
        loop(model, 3, live)
    rows = watching.readings.query("feature == 'persona'")
    assert rows["mean"].iloc[0] == pytest.approx(float(wanted), abs=1e-4)
    fitted = rows["explained_variance"].notna().tolist()
    assert fitted == ([True] * 3 if fit_every == 1 else [True, False, True])
    assert (rows["residual_norm"] > 1).all()


def test_tokens_are_bounded_per_step() -> None:
    model, watching = make_model(), passive(every=1, passive=PassiveReading("all", max_tokens=3))
    with watching.watch(model) as live:
        loop(model, 1, live)
    # Three of 36 tokens, evenly spaced: one of each row.
    assert watching.readings["n_probes"].tolist() == [3]


def test_micro_batches_share_the_bound() -> None:
    model, faults = make_model().train(), list[Exception]()
    features = FeatureGroups.of(None, {"mean difference": DIRECTION}, LAYER)
    reader = PassiveReader(features, PassiveReading("all", max_tokens=6), faults.append)
    reader.attach(model, micro_batches=3)
    reader.arm(with_fit=True)
    for step in (1, 2, 3):
        model(input_ids=loop_batch(step)[0])
    snapshot = reader.take()
    # Two tokens of each batch, of its first and second row.
    assert snapshot is not None and len(snapshot.values) == 6 and snapshot.fit.n == 6 and faults == []
    reader.detach()


def test_the_first_step_is_the_base_of_a_passive_monitor() -> None:
    model, kept = make_model(), KeepEvents()
    with passive(every=3, sinks=[kept]).watch(model) as live:
        loop(model, 4, live)
    kinds = [type(event).__name__ for event in kept.events]
    assert kinds == ["Start", "Reading", "Reading", "End"]
    (start,), (reading, _) = kept.of(Start), kept.of(Reading)
    first = reading.features[0]
    assert start.n_probes == 0 and start.metadata["base"]["mean"] == {"mean difference": first.mean}
    low, high = start.bands["mean difference"]
    assert (low + high) / 2 == pytest.approx(first.mean) and high - low == pytest.approx(first.base_sd)


def test_hooks_go_when_the_loop_raises_and_training_goes_on_when_a_hook_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, watching = make_model(), passive(every=1)
    with pytest.raises(ZeroDivisionError), watching.watch(model) as live:
        loop(model, 1, live)
        raise ZeroDivisionError
    assert hook_count(model) == 0
    broken = passive(every=1)
    with broken.watch(model) as live:
        monkeypatch.setattr(live._run.passive, "_read", lambda *a: 1 / 0)  # pyright: ignore
        weights = loop(model, 2, live)
        assert hook_count(model) == 0
    assert [(f.step, f.part) for f in broken.faults] == [(1, "passive reading")]
    assert all(np.isfinite(v).all() for v in weights.values())


def test_a_forgotten_monitor_leaves_no_hook() -> None:
    model, watching = make_model(), passive()
    watching.start(model)
    assert hook_count(model) > 0
    del watching
    import gc

    gc.collect()
    assert hook_count(model) == 0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'response'"):
        PassiveReading("respons")
    with pytest.raises(InputError, match="at least 1"):
        PassiveReading(max_tokens=0)
    with pytest.raises(InputError, match="mode 'probes'"):
        directions(mode="probes")
    with pytest.raises(InputError, match="has no probes to read"):
        passive().read(make_model(), 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_own_training_tells_which_tokens_it_trains(
    checkpointing: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows behind a beginning that they share run without labels; with checkpointing whole rows do.
    wanted, tokens, compute = list[float](), list[int](), AnswerTrainer.compute_loss

    def watched(self: AnswerTrainer, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        trained = inputs["labels"] != -100
        with hidden_state(model) as seen, torch.no_grad():
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        wanted.append(float(torch.stack([(x[m] @ UNIT).mean() for x, m in zip(seen[0], trained, strict=True)]).mean()))
        tokens.append(int(inputs["attention_mask"].sum()))
        assert checkpointing or split_rows(inputs, transformer_config(model)).shared > 0
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AnswerTrainer, "compute_loss", watched)
    training = Training(steps=1, batch_size=6, bf16=False, checkpoints=(), gradient_checkpointing=checkpointing)
    watching = passive(every=1)
    tuned = with_adapter(make_model(), training, 0)
    fine_tune(tuned, make_tokenizer(), talks(6), training, seed=0, folder=tmp_path, callbacks=[watching])
    (read,) = watching.readings.to_dict("records")
    assert read["mean"] == pytest.approx(wanted[0], abs=1e-4) and read["n_probes"] == 6
    assert read["tokens_seen"] == tokens[0]
    assert "given no labels" not in caplog.text
