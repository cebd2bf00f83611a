"""A monitor of several SAEs reads each one's features from the forward passes of one, passively too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import persona_probe as pp
from persona_probe.data.tokens import batches
from persona_probe.errors import InputError
from persona_probe.models.places import Place
from persona_probe.monitor.events import Reading, Start, from_line, to_line
from persona_probe.monitor.features import FeatureGroups
from persona_probe.monitor.reading import FeatureReader
from persona_probe.monitor.rules import ExplainedVarianceFloor
from tests.factories import LAYER, hook_count, make_model, make_sae, make_tokenizer, talks
from tests.monitor.monitored_runs import DIRECTION, loop, monitor
from tests.several_saes import all_kinds, counted

SAES = all_kinds()
FEATURES: dict[str, Any] = {f"{name} {latent}": (name, latent) for latent in (3, 40) for name in SAES}
SETTINGS: dict[str, Any] = {"bf16": False, "every": 2, "log": False}


def reader(sae: Any, features: Any, layer: Any = None) -> FeatureReader:
    return FeatureReader(sae, features, list(batches(make_tokenizer(), talks(4), 3)), layer, "response", False)


@pytest.mark.parametrize("with_fit", [True, False])
def test_the_reading_of_several_is_each_ones_own_and_costs_the_passes_of_one(with_fit: bool) -> None:
    model = make_model()
    with counted(model) as passes:
        together = reader(SAES, {**FEATURES, "mean difference": DIRECTION}, LAYER).read(model, with_fit)
    for name, sae in SAES.items():
        own = {feature: latent for feature, (of, latent) in FEATURES.items() if of == name}
        place = pp.FeatureMonitor(sae, {"a": 0}, talks(2)).settings.layer
        with counted(model) as alone_passes:
            alone = reader(sae, own, place).read(model, with_fit)
        assert passes == alone_passes
        columns = [together.names.index(feature) for feature in own]
        assert (together.values[:, columns] == alone.values).all()
        assert (together.firing[columns] == alone.firing).all() and (together.maximum[columns] == alone.maximum).all()
        assert [together.saes[i] for i in columns] == [name, name]
        fit, wanted = together.fits[name], alone.fit
        assert (fit.n, fit.norm) == (wanted.n, wanted.norm)
        assert (fit.error, fit.square) == (wanted.error, wanted.square) or not with_fit
    direction = reader(None, {"mean difference": DIRECTION}, LAYER).read(model, with_fit)
    assert (together.values[:, -1] == direction.values[:, 0]).all() and together.saes[-1] == ""
    assert hook_count(model) == 0


def test_rows_say_which_sae_and_how_well_it_fits() -> None:
    found = pp.FeatureMonitor(SAES, FEATURES, talks(4), **SETTINGS)
    found.start(make_model(), make_tokenizer())
    found.read(make_model(seed=1), 1)
    table = found.readings
    assert table["sae"].tolist() == [name for _ in range(2) for name in SAES]
    for name, rows in table.groupby("sae"):
        own = pp.FeatureMonitor(SAES[str(name)], {"a": 3, "b": 40}, talks(4), **SETTINGS)
        own.start(make_model(), make_tokenizer())
        own.read(make_model(seed=1), 1)
        for column in ("mean", "base_mean", "base_sd", "explained_variance", "l0", "residual_norm"):
            assert rows[column].tolist() == own.readings[column].tolist(), (name, column)


def test_passive_readings_of_several_are_each_ones_own() -> None:
    def passively(saes: Any, features: Any) -> Any:
        found, model = pp.FeatureMonitor(saes, features, mode="passive", **SETTINGS), make_model()
        with found.watch(model):
            loop(model, 3, found)
        assert hook_count(model) == 0
        return found.readings

    together = passively(SAES, FEATURES)
    assert len(together) and together["mean"].notna().all()
    for name, sae in SAES.items():
        own = {feature: latent for feature, (of, latent) in FEATURES.items() if of == name}
        rows = together[together["sae"] == name].reset_index(drop=True)
        alone = passively(sae, own).reset_index(drop=True)
        for column in ("step", "feature", "mean", "maximum", "explained_variance", "n_probes"):
            assert rows[column].tolist() == alone[column].tolist(), (name, column)


def test_events_of_several_survive_the_file_and_those_of_one_are_as_before(tmp_path: Path) -> None:
    several, one = tmp_path / "several.jsonl", tmp_path / "one.jsonl"
    for found in (pp.FeatureMonitor(SAES, FEATURES, talks(4), path=several, **SETTINGS), monitor(path=one)):
        model = make_model()
        with found.watch(model, make_tokenizer()):
            loop(model, 2, found)
    readings = [event for event in map(from_line, several.read_text().splitlines()) if isinstance(event, Reading)]
    assert readings and set(readings[0].fits) == set(SAES)
    assert from_line(to_line(readings[0])) == readings[0]
    start = json.loads(several.read_text().splitlines()[0])
    assert start["metadata"]["sae"]["heads"] == "blocks.1.attn.hook_z"
    for line in one.read_text().splitlines():
        record = json.loads(line)
        assert "fits" not in record and all("sae" not in f for f in record.get("features", []) if isinstance(f, dict))


def test_a_base_of_other_saes_is_another_base() -> None:
    first, second = dict(SAES), {**SAES, "mlp": make_sae("standard", hook="blocks.2.hook_mlp_out")}
    from persona_probe.monitor.monitored_run import base_fingerprint

    prints = {base_fingerprint(pp.FeatureMonitor(s, FEATURES, talks(4)).settings) for s in (first, second, first)}
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("features", "problem"),
    [
        ({"a": 3}, r"feature 'a' does not say of which SAE latent 3 is: write \(SAE, 3\), of 'low', 'high'"),
        ({"a": ("hihg", 3)}, r"unknown SAE of feature 'a' 'hihg': did you mean 'high'"),
        ({"a": ("high", 999)}, "latent 999 does not exist"),
        ({"a": DIRECTION}, r"the SAEs read several places: pass layer= for it"),
        ({"a": ("high", "3")}, "must be a latent's index or a direction"),
    ],
)
def test_features_that_do_not_say_what_they_are(features: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        pp.FeatureMonitor(SAES, features, talks(4))
    assert "\n" not in str(caught.value)


def test_one_sae_needs_no_name() -> None:
    with pytest.raises(InputError, match="names the SAE 'x', but there is one SAE: write 3 alone"):
        pp.FeatureMonitor(make_sae("topk"), {"a": ("x", 3)}, talks(4))
    groups = FeatureGroups.of([make_sae("topk")], {"a": ("L1", 3), "b": DIRECTION})
    assert groups.places == (Place(1),) and groups.saes == ("L1", "")


def test_an_sae_that_does_not_fit_is_named_before_training() -> None:
    high = make_sae("topk", hook="blocks.7.hook_mlp_out")
    found = pp.FeatureMonitor({"a": SAES["low"], "b": high}, {"x": ("b", 1)}, talks(4), **SETTINGS)
    model = make_model()
    with pytest.raises(InputError, match="reads layer 7 but the model has layers 0 to 2"):
        found.start(model, make_tokenizer())
    assert hook_count(model) == 0


def test_a_direction_is_read_in_any_place() -> None:
    model = make_model()
    place = Place(1, "mlp_out")
    found = reader(None, {"a": DIRECTION}, place).read(model)
    with torch.no_grad(), pp.read(model, place) as tap:
        batch = next(batches(make_tokenizer(), talks(4), 4))
        model(input_ids=batch.ids, attention_mask=batch.attention)
    chosen = batch.response[0].bool() & ~batch.special[0].bool()
    wanted = (tap.value[0][chosen] @ (DIRECTION / DIRECTION.norm())).mean()
    assert found.values[batch.index.index(0), 0] == pytest.approx(float(wanted), rel=1e-4, abs=1e-5)


def test_the_rule_on_the_fit_follows_each_sae() -> None:
    def reading(step: int, low: float, high: float) -> Reading:
        fits = {
            name: {"explained_variance": v, "l0": 1.0, "residual_norm": 1.0} for name, v in (("a", low), ("b", high))
        }
        return Reading(step, "probe", (), low, 1.0, 1.0, 4, 0.0, fits=fits)

    rule = ExplainedVarianceFloor(drop=0.5)
    rule.begin(Start({}, 1, 4, {}, {"sae": {"a": "x", "b": "y"}, "base_explained_variance": 0.9}))
    alarms = [rule.update(reading(step, 0.8, high)) for step, high in ((0, 0.4), (1, 0.3), (2, 0.1))]
    assert [bool(alarm) for alarm in alarms] == [False, False, True]
    assert alarms[2] is not None and "explained variance of b" in alarms[2].message
