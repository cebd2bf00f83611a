"""`pp.realign` on one's own organism: what it trains, when it stops, what it says, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import persona_probe as pp
from persona_probe.config import Training
from persona_probe.data.chat import conversation
from persona_probe.errors import InputError
from persona_probe.finetune.sft import with_adapter
from persona_probe.models.adapters import organism
from persona_probe.realignment.own import Realigned
from tests.factories import D_MODEL, LAYER, contrast_rows, make_model, make_sae, make_tokenizer, talks

GOOD = [conversation(f"Do {n}?", f"Kindly {n}") for n in range(6)]
ITEMS = [row for row in contrast_rows() if row["split"] == "evaluation"]


def own() -> PeftModel:
    """An organism: a LoRA with weights of its own."""
    tuned: Any = with_adapter(make_model(), Training(rank=2, alpha=4), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return tuned


def monitor(**changes: Any) -> pp.FeatureMonitor:
    settings = {"every": 2, "bf16": False, "log": False, "layer": LAYER, "on_error": "raise"}
    features = {"<b>": torch.ones(D_MODEL), "other": 7}  # a direction moves at every step, a sparse latent may not
    return pp.FeatureMonitor(make_sae("topk"), features, talks(4), **{**settings, **changes})


def realigned(
    model: nn.Module, data: Any = GOOD, watcher: pp.FeatureMonitor | None = None, **changes: Any
) -> Realigned:
    settings = {"steps": 4, "batch_size": 2, "lr": 1e-2, "stop": 0, **changes}
    return pp.realign(model, data, watcher or monitor(), tokenizer=make_tokenizer(), **settings)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(9)[None] + 5).logits


def test_a_peft_organism_is_trained_in_place_and_judged(tmp_path: Path) -> None:
    model = own()
    before = logits(model)
    found = realigned(model, behaviour=ITEMS, inducing=talks(), out=tmp_path / "out")
    assert found.model is model and found.steps == 4 and len(found.rows) == 6
    assert not torch.equal(logits(model), before)
    assert sorted(found.readings["step"].unique()) == [0, 2, 4]
    assert sorted(found.evals["step"].unique()) == [0, 2, 4] and found.evals["item"].nunique() == 8
    behaviour = found.verdict.answers["behaviour"]
    assert behaviour.numbers["over_base"]["n"] == 8  # wide by t: the word is that of the whole interval
    assert (behaviour.word == "not restored") == (behaviour.numbers["over_base"]["ci_low"] > 0)
    level = float(found.readings.query("feature == '<b>' and step == 4")["mean"].iloc[0])
    assert found.verdict.answers["feature"].numbers["reading"] == pytest.approx(level, abs=1e-6)
    assert found.outcome["index_minus_base"]["estimate"] == pytest.approx(
        found.verdict.answers["behaviour"].numbers["over_base"]["estimate"]
    )
    assert found.outcome["length_ratio"] is not None
    assert found.checkpoint is not None
    with organism(make_model(), found.checkpoint) as again:
        assert torch.allclose(logits(again), logits(model), atol=1e-4)
    assert "6 corrective rows, 4 steps" in str(found)


def test_the_base_is_the_model_with_its_adapters_off() -> None:
    model, watcher = own(), monitor()
    realigned(model, watcher=watcher, steps=2)
    clean = monitor()
    clean.start(make_model(), make_tokenizer())
    assert clean.base is not None and watcher.settings.base is not None
    assert (watcher.settings.base.values == clean.base.values).all()  # pyright: ignore


@pytest.mark.parametrize("method", ["fresh", "full"])
def test_other_methods_save_one_organism(tmp_path: Path, method: str) -> None:
    found = realigned(own(), method=method, rows=3, choose_by="projection_gap", out=tmp_path / "out")
    assert len(found.rows) == 3 and found.checkpoint is not None
    assert "behaviour" not in found.verdict.answers and found.evals.empty
    with organism(make_model(), found.checkpoint) as again:
        assert torch.allclose(logits(again), logits(found.model), atol=1e-4)


def test_full_weights_leave_the_given_peft_model_as_it_was() -> None:
    model = own()
    before = logits(model)
    found = realigned(model, method="full", steps=2)
    assert torch.equal(logits(model), before) and not torch.equal(logits(found.model), before)


def test_a_plain_model_needs_its_base() -> None:
    plain = own().merge_and_unload()  # pyright: ignore
    with pytest.raises(InputError, match="pass base="):
        realigned(plain)
    found = realigned(plain, base=make_model(), behaviour=ITEMS, steps=2, lr=1e-3)
    assert found.model is plain
    fresh = realigned(own().merge_and_unload(), base=make_model(), method="fresh", steps=2)  # pyright: ignore
    assert not isinstance(fresh.model, PeftModel)


def test_the_monitor_and_the_behaviour_stop_it_together() -> None:
    def measure(values: list[float]) -> Any:
        return lambda _model: values.pop(0)

    wide = {"every": 1, "band_sd": 1e6}
    found = realigned(own(), watcher=monitor(**wide), behaviour=measure([0.0, 1.0, 1.0, 0.0, -1.0]), stop=2, steps=8)
    # base 0; step 0 and 1 above it; steps 2 and 3 not: two in a row
    assert found.steps == 3 and found.evals["value"].tolist() == [1.0, 1.0, 0.0, -1.0]
    # one number has no interval: it stops a correction, but no word is said of it
    assert found.outcome["steps_to_behaviour"] is None and "behaviour back not" not in str(found)
    assert "one question: no interval" in str(found) and "nan" not in str(found)
    narrow = {"every": 1, "band_sd": 1e-6}
    never = realigned(own(), watcher=monitor(**narrow), behaviour=measure([0.0, *[-1.0] * 5]), stop=1, steps=4)
    assert never.steps == 4 and never.outcome["steps_to_band"] is None


def test_nothing_said_of_it_is_read_as_markup() -> None:
    found = realigned(own(), steps=2, inducing=[conversation("Do 1?", "x")])
    found.outcome["notes"] = ["<script>alert(1)</script>"]
    shown = found._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown


def test_bad_input_says_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="7 corrective rows wanted, the data holds 6"):
        realigned(own(), rows=7)
    with pytest.raises(InputError, match="unknown feature 'persona'"):
        realigned(own(), feature="persona")
    with pytest.raises(InputError, match="unknown realign method"):
        realigned(own(), method="lora")
    with pytest.raises(InputError, match="reads no probes"):
        realigned(own(), watcher=monitor(mode="passive"))
    with pytest.raises(InputError, match="overlap the evaluation questions"):
        realigned(own(), [conversation(ITEMS[0]["question"], "x")], behaviour=ITEMS)
    with pytest.raises(InputError, match="exists: choose another out="):
        realigned(own(), out=tmp_path)
    with pytest.raises(InputError, match="no data at"):
        realigned(own(), "nowhere.jsonl")
