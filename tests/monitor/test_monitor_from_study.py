"""A monitor of what a study found, from its run folder."""

from pathlib import Path
from typing import Any

import pytest

from persona_probe.errors import InputError
from persona_probe.models.load import load_model
from persona_probe.monitor import monitor as study_source
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.study.study import Study
from tests.factories import D_MODEL, config_of, make_tokenizer, write_config, write_data, write_model, write_sae
from tests.monitor.monitored_runs import FEATURES


@pytest.fixture
def study(tmp_path: Path) -> Study:
    write_model(tmp_path / "model")
    write_sae(tmp_path / "sae")
    write_data(tmp_path)
    raw = config_of(tmp_path)
    raw["monitor"] = {**raw.get("monitor", {}), "band_sd": 1.5, "limit": 5}
    write_config(tmp_path / "study.yaml", raw)
    return Study.from_yaml(tmp_path / "study.yaml", tmp_path / "run")


@pytest.fixture
def located(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What locate would have found."""
    monkeypatch.setattr(study_source, "study_features", lambda ctx: FEATURES)
    return FEATURES


@pytest.mark.parametrize("by_path", [True, False])
def test_the_study_says_what_is_read(study: Study, located: dict[str, Any], by_path: bool) -> None:
    watching = FeatureMonitor.from_study(study.path if by_path else study, every=3, positions="prompt")
    setup = watching.settings
    assert setup.features is located and setup.sae.cfg.d_in == D_MODEL  # pyright: ignore
    assert (setup.layer, setup.band_sd, len(setup.probes)) == (study.context.layer, 1.5, 5)
    assert setup.schedule.every == 3 and setup.positions == "prompt"
    model, _ = load_model(study.config.model)
    watching.start(model, make_tokenizer())
    assert watching.base is not None and watching.base.values.shape == (5, 3)


def test_a_study_that_was_not_located_says_so(study: Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="locate"):
        FeatureMonitor.from_study(study)
    with pytest.raises(InputError, match="no run folder"):
        FeatureMonitor.from_study(tmp_path / "nothing")
