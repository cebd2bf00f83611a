"""What readings are compared with: the base of this run, of an earlier one, or one that is given."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persona_probe.errors import InputError
from persona_probe.monitor.band import base_band
from persona_probe.monitor.events import BASE_KEY, Reading, Start
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.reading_records import Anchor, intervals, recorded
from persona_probe.monitor.settings import EVERY, PROBES
from persona_probe.monitor.sinks.files import read_events
from persona_probe.stats import bootstrap_mean
from tests.factories import make_model, make_sae, make_tokenizer
from tests.monitor.monitored_runs import DIRECTION, KeepEvents, adapted, directions, loop, monitor, sft


def base_of(watching: Any, model: Any) -> np.ndarray:
    watching.start(model, make_tokenizer())
    return watching.base.values


def test_the_start_tells_bands_and_base() -> None:
    kept = KeepEvents()
    watching = monitor(sinks=[kept], band_sd=2.0)
    values = base_of(watching, make_model())
    (start,) = kept.of(Start)
    assert start.features == {"persona": 3, "other": 40, "mean difference": -1} and start.layer == 1
    for column, name in enumerate(start.features):
        band = base_band(values[:, column], 2.0)
        assert start.bands[name] == pytest.approx((band.low, band.high))
        assert start.metadata["base"]["mean"][name] == values[:, column].mean()
    assert start.metadata["positions"] == "response" and start.n_probes == 4
    assert "torch" in start.metadata["versions"]


def test_shift_is_in_base_standard_deviations() -> None:
    model, watching = make_model(), directions(every=1)
    values = base_of(watching, model)
    loop(model, 2)
    moved = watching.read(model, 2).values
    wanted = (moved.mean() - values.mean()) / values.std(ddof=1)
    assert watching.readings["shift"].iloc[-1] == pytest.approx(wanted) and abs(wanted) > 1e-5


def test_intervals_are_those_of_the_package() -> None:
    values = np.random.default_rng(0).normal(size=(30, 3))
    low, high = intervals(values)
    for column in range(3):
        wanted = bootstrap_mean(values[:, column])
        assert (low[column], high[column]) == pytest.approx((wanted.ci_low, wanted.ci_high), abs=1e-12)
    values[3, 1] = np.nan
    spoiled, _ = intervals(values)
    assert np.isnan(spoiled[1]) and spoiled[0] == low[0]


def test_a_model_that_diverged_is_read_as_not_a_number() -> None:
    model, watching = make_model(), monitor(every=1)
    with watching.watch(model, make_tokenizer()) as live:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        live.step(1)
    assert watching.faults == []
    rows = watching.readings
    assert rows.query("step == 1")["mean"].isna().all() and rows.query("step == 0")["mean"].notna().all()
    assert rows.query("step == 1")["explained_variance"].isna().all()


def test_a_snapshot_or_an_earlier_file_may_be_the_base(tmp_path: Path) -> None:
    first = directions(path=tmp_path / "first.jsonl")
    values = base_of(first, make_model())
    first.close()
    changed = make_model(seed=3)
    for base in (first.base, tmp_path / "first.jsonl", Anchor({"mean difference": 7.0}, {"mean difference": 2.0})):
        watching = directions(base=base)
        watching.start(changed, make_tokenizer())
        watching.read(changed, 5)
        row = watching.readings.iloc[0]
        wanted = 7.0 if isinstance(base, Anchor) else values.mean()
        assert row["base_mean"] == pytest.approx(wanted) and row["mean"] != pytest.approx(wanted)


def test_the_start_says_how_well_the_sae_fits_the_base(tmp_path: Path) -> None:
    path = tmp_path / "readings.jsonl"
    watching = monitor(path=path)
    watching.start(make_model(), make_tokenizer())
    assert watching.base is not None
    [start] = [event for event in read_events(path) if isinstance(event, Start)]
    assert start.metadata[BASE_KEY] == pytest.approx(watching.base.fit.explained_variance)
    found = recorded(path)
    assert found is not None and found[0].explained_variance == start.metadata[BASE_KEY]


def test_nothing_asked_for_reads_a_few_probes_rarely() -> None:
    watching = FeatureMonitor(make_sae("topk"), {"f": 3})
    assert len(watching.settings.probes) == PROBES and watching.settings.schedule.every == EVERY
    assert len({str(c) for c in watching.settings.probes}) == PROBES


def test_a_base_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no base in .*absent"):
        directions(base=tmp_path / "absent.jsonl").start(make_model(), make_tokenizer())
    other = Anchor({"other": 1.0}, {"other": 1.0})
    with pytest.raises(InputError, match="no reading of 'mean difference': it has other"):
        directions(base=other).start(make_model(), make_tokenizer())


def checkpointed(folder: Path, path: Path | None, model: Any, **arguments: Any) -> tuple[Any, Any]:
    settings = {"save_strategy": "steps", "save_steps": 2, **arguments}
    watching = directions(every=2, path=path)
    return watching, sft(folder, watching, model=model, **settings)


def test_a_resumed_full_model_keeps_the_true_base(tmp_path: Path) -> None:
    path = tmp_path / "readings.jsonl"
    first, trainer = checkpointed(tmp_path, path, make_model(), max_steps=2)
    trainer.train()
    with path.open("a") as torn:
        torn.write('{"event": "reading", "step": 3, "fea')
    again, trainer = checkpointed(tmp_path, path, make_model(), max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert again.base is None and again.readings["step"].unique().tolist() == [2, 4]
    assert again.readings["base_mean"].iloc[0] == first.readings["base_mean"].iloc[0]
    # Resumed where the first run ended, with the true base: the same reading.
    for column in ("mean", "shift"):
        assert again.readings[column].iloc[0] == first.readings[column].iloc[-1]
    events = read_events(path)
    assert [e.step for e in events if isinstance(e, Reading)] == [0, 2, 2, 4]
    assert sum(isinstance(e, Start) for e in events) == 2


def test_a_resumed_run_without_its_file_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, trainer = checkpointed(tmp_path, None, make_model(), max_steps=2)
    trainer.train()
    again, trainer = checkpointed(tmp_path, None, make_model(), max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert "no base was recorded" in caplog.text
    assert again.readings["shift"].iloc[0] == 0 and first.readings["shift"].iloc[-1] != 0


def test_another_question_is_no_base(tmp_path: Path) -> None:
    path = tmp_path / "readings.jsonl"
    base_of(directions(path=path), make_model())
    found = recorded(path)
    assert found is not None
    same, other = directions(path=path), directions(path=path, positions="prompt")
    from persona_probe.monitor.monitored_run import base_fingerprint

    assert base_fingerprint(same.settings) == found[1] != base_fingerprint(other.settings)


def test_an_adapters_base_is_read_again_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "readings.jsonl"
    first, trainer = checkpointed(tmp_path, path, adapted(), max_steps=2)
    trainer.train()
    again, trainer = checkpointed(tmp_path, path, adapted(), max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert again.base is not None and first.base is not None
    assert np.array_equal(again.base.values, first.base.values)


def test_values_of_every_probe_are_on_disk(tmp_path: Path) -> None:
    import pandas as pd

    model, watching = make_model(), monitor(mode="both", every=2, values_path=tmp_path / "values")
    with watching.watch(model, make_tokenizer()) as live:
        loop(model, 2, live)
    files = sorted(p.name for p in (tmp_path / "values").iterdir())
    assert files == ["passive-00000002.parquet", "probe-00000000.parquet", "probe-00000002.parquet"]
    table = pd.read_parquet(tmp_path / "values" / "probe-00000002.parquet")
    assert table.shape == (4, 3) and list(table.columns) == ["persona", "other", "mean difference"]
    rows = watching.readings.query("mode == 'probe' and step == 2")
    assert table.mean().to_numpy() == pytest.approx(rows["mean"].to_numpy(), abs=1e-6)


def test_directions_are_told_apart_by_their_content() -> None:
    from persona_probe.monitor.monitored_run import base_fingerprint

    assert base_fingerprint(directions().settings) == base_fingerprint(directions().settings)
    other = monitor(features={"mean difference": DIRECTION + 1})
    same = monitor(features={"mean difference": DIRECTION})
    assert base_fingerprint(same.settings) != base_fingerprint(other.settings)
