"""The monitor reads when due, reads the truth, and leaves training as it was, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from persona_probe.config import Training
from persona_probe.data.chat import conversation
from persona_probe.data.tokens import batches, encode
from persona_probe.errors import InputError
from persona_probe.finetune.sft import fine_tune, with_adapter
from persona_probe.models.adapters import trainable_parameters
from persona_probe.models.taps import read, steer
from persona_probe.monitor.band import Band, base_band
from persona_probe.monitor.events import End, Reading, Start
from persona_probe.monitor.figure import monitor_figure
from persona_probe.monitor.history import History
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.reading import FeatureReader
from persona_probe.monitor.sinks.files import read_events, readings_frame
from tests.factories import D_MODEL, LAYER, hook_count, make_model, make_sae, make_tokenizer, same_state, talks

TRAINING = Training(rank=2, alpha=4, batch_size=4, steps=5, checkpoints=(), lr=1e-2, bf16=False, warmup_steps=0)
DIRECTION = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(7))
FEATURES: dict[str, Any] = {"persona": 3, "other": 40, "mean difference": DIRECTION}


def monitor(**kwargs: Any) -> FeatureMonitor:
    return FeatureMonitor(make_sae("topk"), FEATURES, talks(4), **{"bf16": False, "every": 2, **kwargs})


def train(folder: Path, *callbacks: TrainerCallback, method: str = "lora") -> nn.Module:
    training = TRAINING if method == "lora" else Training(**{**TRAINING.__dict__, "method": "full"})
    model = with_adapter(make_model(), training, 0)
    fine_tune(model, make_tokenizer(), talks(), training, seed=0, folder=folder, callbacks=callbacks)
    return model


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_is_the_same_with_and_without_it(tmp_path: Path, method: str) -> None:
    plain = train(tmp_path / "plain", method=method)
    watched = train(tmp_path / "watched", monitor(every=1), method=method)
    assert same_state(dict(trainable_parameters(watched)), dict(trainable_parameters(plain)))
    assert hook_count(watched) == hook_count(plain)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [({"every": 2}, [0, 2, 4, 5]), ({"every": 5}, [0, 5]), ({"every": None, "steps": (1, 5)}, [1, 5])],
)
def test_readings_come_at_the_right_steps(tmp_path: Path, schedule: dict[str, Any], steps: list[int]) -> None:
    watching = monitor(**schedule)
    train(tmp_path, watching)
    rows = watching.readings
    for name in FEATURES:
        assert rows.loc[rows["feature"] == name, "step"].tolist() == steps


def test_the_base_against_itself_is_exactly_zero(tmp_path: Path) -> None:
    watching = monitor()
    train(tmp_path, watching)
    rows = watching.readings
    start = rows[rows["step"] == 0]
    assert (start["mean"] == start["base_mean"]).all()
    end = rows[(rows["step"] == 5) & (rows["feature"] == "mean difference")]
    assert float((end["mean"] - end["base_mean"]).abs().iloc[0]) > 0.01
    assert rows.groupby("feature")["base_mean"].nunique().eq(1).all()


def test_an_adapted_model_is_anchored_to_its_base() -> None:
    tuned = with_adapter(make_model(), TRAINING, 0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    trainable, watching, plain = list(trainable_parameters(tuned)), monitor(), monitor()
    watching.start(tuned, make_tokenizer())
    plain.start(make_model(), make_tokenizer())
    assert watching.base is not None and plain.base is not None
    assert np.array_equal(watching.base.values, plain.base.values)
    assert not np.allclose(watching.read(tuned, 0).values[:, 2], plain.base.values[:, 2], atol=0.01)
    assert list(trainable_parameters(tuned)) == trainable


def test_it_works_with_transformers_own_trainer(tmp_path: Path) -> None:
    def trained(*callbacks: TrainerCallback) -> nn.Module:
        model, tokenizer = make_model(), make_tokenizer()
        rows = [encode(tokenizer, c).ids[:24] for c in talks()]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        data: Any = [{"input_ids": r, "labels": r} for r in rows]
        Trainer(
            model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=list(callbacks)
        ).train()
        return model

    watching = monitor(every=1)
    assert same_state(trained(watching).state_dict(), trained().state_dict())
    assert watching.readings["step"].unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_a_reading_is_the_mean_over_answer_tokens(architecture: str) -> None:
    model, tokenizer, sae = make_model(), make_tokenizer(), make_sae(architecture)
    snapshot = FeatureReader(sae, FEATURES, list(batches(tokenizer, talks(4), 3)), LAYER, "response", False).read(model)
    for n, messages in enumerate(talks(4)):
        (batch,) = batches(tokenizer, [messages])
        with torch.no_grad(), read(model, LAYER) as tap:
            model(batch.ids)
        x = tap.value[batch.select("response")]
        acts = sae.encode(x)
        wanted = [acts[:, 3].mean(), acts[:, 40].mean(), (x @ (DIRECTION / DIRECTION.norm())).mean()]
        assert np.allclose(snapshot.values[n], [float(w) for w in wanted], atol=1e-4)
    assert snapshot.latents == (3, 40, -1)


@pytest.mark.parametrize("positions", ["all", "prompt", "last_prompt", "response"])
def test_every_kind_of_position_is_read(positions: str) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    features = {"mean difference": DIRECTION}
    reader = FeatureReader(None, features, list(batches(tokenizer, talks(4))), LAYER, positions, False)
    snapshot = reader.read(model)
    for n, messages in enumerate(talks(4)):
        (batch,) = batches(tokenizer, [messages])
        with torch.no_grad(), read(model, LAYER) as tap:
            model(batch.ids)
        wanted = (tap.value[batch.select(positions)] @ (DIRECTION / DIRECTION.norm())).mean()
        assert snapshot.values[n, 0] == pytest.approx(float(wanted), abs=1e-4)


def test_a_push_along_a_direction_is_read_as_its_size() -> None:
    model = make_model()
    reader = FeatureReader(
        make_sae("topk"), FEATURES, list(batches(make_tokenizer(), talks(4))), LAYER, "response", False
    )
    before = reader.read(model)
    with steer(model, LAYER, DIRECTION, 2.5, "x_delta", reference_norm=4.0):
        after = reader.read(model)
    assert np.allclose(after.values[:, 2] - before.values[:, 2], 10.0, atol=1e-4)
    rows = {row["feature"]: row for row in after.rows()}
    assert rows["mean difference"]["mean"] == pytest.approx(float(after.values[:, 2].mean()))


def test_a_plain_loop_is_watched(tmp_path: Path) -> None:
    model, watching = make_model(), monitor(path=tmp_path / "readings.jsonl")
    with watching.watch(model, make_tokenizer()) as live:
        for step in range(1, 6):
            with torch.no_grad():
                next(model.parameters()).mul_(1.1)
            live.step(step)
    assert watching.readings["step"].unique().tolist() == [0, 2, 4, 5]
    events = read_events(tmp_path / "readings.jsonl")
    assert [type(event) for event in events] == [Start, *[Reading] * 4, End]
    assert readings_frame(events).equals(watching.readings)


def test_on_reading_sees_every_reading(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    train(tmp_path, monitor(on_reading=lambda step, snapshot, model: seen.append((step, len(snapshot.values)))))
    assert seen == [(0, 4), (2, 4), (4, 4), (5, 4)]


class FailError(Exception):
    """Raised in the middle of training."""


class Failing(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise FailError


def test_modes_and_hooks_come_back_when_training_raises(tmp_path: Path) -> None:
    watching = monitor(every=1)
    model = with_adapter(make_model(), TRAINING, 0)
    with pytest.raises(FailError):
        fine_tune(model, make_tokenizer(), talks(), TRAINING, seed=0, folder=tmp_path, callbacks=[watching, Failing()])
    assert hook_count(model) == 0
    assert not any(m.training for m in model.modules())
    assert watching.last_step == 3
    with pytest.raises(FailError), watching.watch(make_model(), make_tokenizer()) as live:
        live.step(1)
        raise FailError
    assert watching.last_step == 1


def test_a_reading_leaves_modes_gradients_and_random_state() -> None:
    model, watching = make_model().train(), monitor()
    watching.start(model, make_tokenizer())
    model(torch.arange(8)[None]).logits.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state = torch.get_rng_state()
    watching.read(model, 1)
    assert all(m.training for m in model.modules()) and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(after) == len(gradients) > 0
    assert all(torch.equal(a, b) for a, b in zip(after, gradients, strict=True))


def test_bad_input_says_what_to_change() -> None:
    sae, tokenizer = make_sae("topk"), make_tokenizer()
    with pytest.raises(InputError, match="latents 0 to 63"):
        FeatureMonitor(sae, {"x": 64}, talks(2)).start(make_model(), tokenizer)
    with pytest.raises(InputError, match="width 32"):
        FeatureMonitor(sae, {"x": torch.ones(7)}, talks(2)).start(make_model(), tokenizer)
    with pytest.raises(InputError, match="no features"):
        FeatureMonitor(sae, {}, talks(2)).start(make_model(), tokenizer)
    with pytest.raises(InputError, match="needs a tokenizer"):
        monitor().start(make_model())
    with pytest.raises(InputError, match="layers 0 to 2"):
        monitor(layer=5).start(make_model(), tokenizer)
    with pytest.raises(InputError, match="every must be at least 1"):
        monitor(every=0)
    with pytest.raises(InputError, match="did you mean 'neutral_probes'"):
        FeatureMonitor(sae, FEATURES, "neutral_probe")
    with pytest.raises(InputError, match="no token at positions 'response'"):
        FeatureMonitor(sae, FEATURES, [conversation("a?")], positions="response").start(make_model(), tokenizer)


def test_prompts_are_read_over_the_prompt() -> None:
    assert FeatureMonitor(make_sae("topk"), FEATURES, ["a?", "b?"]).positions == "prompt"
    assert monitor().positions == "response"


def test_the_base_band_is_mean_and_deviation() -> None:
    band = base_band(np.array([1.0, 3.0]), 0.5)
    assert (band.low, band.high) == pytest.approx((2 - 0.5 * 2**0.5, 2 + 0.5 * 2**0.5))
    assert Band(1, 2).holds(1) and Band(1, 2).holds(2) and not Band(1, 2).holds(2.01)


def test_the_figure_is_that_of_the_event_file(tmp_path: Path) -> None:
    watching = monitor(path=tmp_path / "readings.jsonl")
    train(tmp_path / "run", watching)
    events = read_events(tmp_path / "readings.jsonl")
    drawn, wanted = watching.figure("What was read."), monitor_figure(History().add(events), "What was read.")
    assert len(drawn.data) == len(wanted.data) > 3 and drawn.layout.meta["caption"] == "What was read."  # pyright: ignore
    for one, other in zip(drawn.data, wanted.data, strict=True):
        np.testing.assert_allclose(np.array(one.y, float), np.array(other.y, float), rtol=1e-6)  # pyright: ignore
    assert not monitor().figure().data  # nothing read yet: an empty figure
