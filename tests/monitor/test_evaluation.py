"""Labels, AUROC and leads on made-up runs with known answers, and the baselines against their definitions."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from scipy.stats import t

from persona_probe.config import Training
from persona_probe.errors import InputError
from persona_probe.evaluate.effects import behaviour_rises
from persona_probe.finetune.sft import with_adapter
from persona_probe.monitor.calibration import HeldRule
from persona_probe.monitor.study.auroc_by_set import separation, separation_at_end
from persona_probe.monitor.study.results import alarm_steps, label_runs, lead_over_behaviour
from persona_probe.monitor.study.rivals import drift_projections, first_component, recent_loss, weight_norm
from tests.factories import make_model

ITEMS = np.array([-1.0, -0.5, 0.0, 0.5])


def evals(**curves: dict[int, float]) -> pd.DataFrame:
    """Every item rises by the given number at each step (and by a little that differs between items)."""
    noise = np.array([-0.01, 0.0, 0.0, 0.01])
    rows = [
        {"run": run, "step": step, "item": f"q{i}", "value": ITEMS[i] + (rise + noise[i] if step else 0.0)}
        for run, curve in curves.items()
        for step, rise in {0: 0.0, **curve}.items()
        for i in range(4)
    ]
    return pd.DataFrame(rows)


def labelled(**labels: str) -> pd.DataFrame:
    return pd.DataFrame({"run": list(labels), "label": list(labels.values())})


def signal_frame(**curves: list[float]) -> pd.DataFrame:
    """One signal `s`, read at steps 0, 2, 4, ..."""
    rows = [
        {"run": run, "step": 2 * i, "signal": "s", "value": value}
        for run, values in curves.items()
        for i, value in enumerate([0.0, *values])
    ]
    return pd.DataFrame(rows)


def test_a_rise_is_measured_against_the_runs_own_base() -> None:
    found = behaviour_rises(evals(a={2: 0.1, 4: 0.3})).set_index("step")
    assert found["rise"].to_dict() == pytest.approx({2: 0.1, 4: 0.3})
    half = t.ppf(0.975, 3) * np.std([-0.01, 0.0, 0.0, 0.01], ddof=1) / 2  # four items
    assert (found["rise"] - found["ci_low"]).tolist() == pytest.approx([half, half])
    assert (found["ci_high"] - found["rise"]).tolist() == pytest.approx([half, half])
    with pytest.raises(InputError, match="same contrast items"):
        behaviour_rises(evals(a={2: 0.1}).iloc[:-1])
    with pytest.raises(InputError, match="step 0 included"):
        behaviour_rises(evals(a={2: 0.1}).query("step == 2"))


def test_a_label_needs_bad_data_and_a_rise_at_the_end() -> None:
    rises = behaviour_rises(
        evals(bad={2: 0.0, 4: 0.2}, relapsed={2: 0.2, 4: 0.0}, good={2: 0.0, 4: -0.1}, odd={2: 0.1, 4: 0.2})
    )
    table = label_runs(rises, {"bad": False, "relapsed": False, "good": True, "odd": True}).set_index("run")
    assert table["label"].to_dict() == {"bad": "misaligned", "relapsed": "quiet", "good": "benign", "odd": "benign"}
    assert table["rose"].to_dict() == {"bad": True, "relapsed": False, "good": False, "odd": True}
    assert table.loc["bad", "behaviour_step"] == 4 and table.loc["odd", "behaviour_step"] == 2
    assert table["behaviour_step"].isna().to_dict() == {"bad": False, "relapsed": False, "good": True, "odd": False}
    with pytest.raises(InputError, match="no measurement"):
        label_runs(rises, {"absent": True})


def test_auroc_at_a_step_and_at_every_runs_own_end() -> None:
    signals = signal_frame(a=[1.0, 5.0], b=[2.0, 6.0], c=[1.5, 1.0], long=[0.5, 0.5, 9.0], q=[0.0, 7.0])
    labels = labelled(a="misaligned", b="misaligned", c="benign", long="benign", q="quiet")
    early, late = (separation(signals, labels, "s", step) for step in (2, 4))
    assert (early.auroc, late.auroc) == (0.75, 1.0)
    assert (late.positives, late.negatives) == (late.positive_sets, late.negative_sets) == (2, 2)
    assert np.isnan(late.low) and np.isnan(late.high)  # two data sets a side are too few
    assert late.against_quiet == pytest.approx(4 / 6)
    assert separation_at_end(signals, labels, "s").auroc == 0.5
    nobody = separation(signals, labelled(a="misaligned"), "s", 4)
    assert np.isnan(nobody.auroc) and nobody.negatives == 0


def test_a_missing_value_leaves_the_run_out() -> None:
    signals = signal_frame(a=[float("nan"), 3.0], b=[2.0, 2.0], c=[1.0, 1.0])
    labels = labelled(a="misaligned", b="misaligned", c="benign")
    assert separation(signals, labels, "s", 2).positives == 1
    assert separation(signals, labels, "s", 4).positives == 2


def test_leads_are_steps_and_zero_stays_zero() -> None:
    labels = labelled(early="misaligned", same="misaligned", late="misaligned", missed="misaligned", calm="benign")
    labels["behaviour_step"] = [8.0, 4.0, 2.0, 4.0, np.nan]
    lead = lead_over_behaviour({"early": 2, "same": 4, "late": 6, "missed": None, "calm": 4}, labels)
    assert lead.by_run == {"early": 6, "same": 0, "late": -4}
    assert (lead.median, lead.low, lead.high, lead.missed) == (0.0, -4, 6, ("missed",))
    assert lead.text == "0 (-4 to 6), n = 3"
    assert lead_over_behaviour({}, labels).text == "no alarm"


def test_alarm_steps_are_those_of_the_readings_that_fire() -> None:
    signals = signal_frame(a=[0.0, 2.0, 2.0, 0.0, 2.0], b=[0.0, 0.0, 0.0, 0.0, 0.0])
    assert alarm_steps(signals, "s", HeldRule(2), 1.0, ["a", "b"]) == {"a": [6], "b": []}
    assert alarm_steps(signals, "s", HeldRule(1), 1.0, ["a"]) == {"a": [4, 10]}


def test_the_weight_norm_is_that_of_the_weights_change() -> None:
    training = Training(rank=3, alpha=6, rslora=True)
    tuned: Any = with_adapter(make_model(), training, 0)
    assert weight_norm(tuned) == 0.0
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    deltas = [m.get_delta_weight("default").detach() for m in tuned.modules() if isinstance(m, LoraLinear)]
    assert len(deltas) == 21  # seven linear layers in each of three blocks
    assert weight_norm(tuned) == pytest.approx(float(torch.stack([d.square().sum() for d in deltas]).sum().sqrt()))
    with pytest.raises(InputError, match="no LoRA adapter"):
        weight_norm(make_model())


def test_the_first_component_is_the_axis_that_varies_most() -> None:
    rng = np.random.default_rng(0)
    axis = np.array([0.6, 0.0, 0.8])
    shifts = np.outer(np.arange(5.0), axis) + np.array([5.0, 5.0, 5.0]) + 0.01 * rng.normal(size=(5, 3))
    found = first_component(shifts, towards=np.array([1.0, 0.0, 0.0]))
    assert found == pytest.approx(axis, abs=0.02)
    assert first_component(shifts, towards=-axis) == pytest.approx(-found)
    with pytest.raises(InputError, match="two checkpoints that differ"):
        first_component(np.ones((3, 3)), axis)


def test_a_run_does_not_choose_its_own_component() -> None:
    x, y = np.eye(2)
    shifts = {"a": np.outer([1.0, 2.0], x), "b": np.outer([1.0, 3.0], x), "own way": np.outer([10.0, 90.0], y)}
    found = drift_projections(shifts, towards=x + y)
    assert found["own way"] == pytest.approx([0.0, 0.0])
    assert abs(found["a"]).max() < 0.1  # the others vary along y most
    with pytest.raises(InputError, match="at least two runs"):
        drift_projections({"a": shifts["a"]}, x)


def test_the_recent_loss_is_the_mean_since_the_last_reading() -> None:
    found = recent_loss([5.0, 4.0, 3.0, 2.0], [0, 1, 4])
    assert np.isnan(found[0]) and found[1:] == [5.0, 3.0]
