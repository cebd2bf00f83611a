"""A tiny study that was induced, located, tracked and corrected once; read only but for what tests write elsewhere."""

from dataclasses import replace
from pathlib import Path

import pytest

from persona_probe.context import Context
from persona_probe.finetune.sft import with_adapter
from persona_probe.latents.stage import locate
from persona_probe.models.adapters import merged_copy
from persona_probe.realignment.corrected import CorrectedOrganism
from persona_probe.study.study import Study
from tests.factories import changed, config_of, write_config, write_data, write_model, write_sae
from tests.made_once import made_once, own_copy


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    def make(place: Path) -> None:
        write_model(place / "model")
        write_sae(place / "sae")
        write_data(place)
        raw = config_of(place)
        arms = {"realigned_in": raw["realign"]["arms"]["realigned_in"]}
        raw = changed(raw, seeds=[0], realign={"arms": arms})
        made = Study.from_yaml(write_config(place / "study.yaml", raw), place / "run").induce()
        locate(made.context)
        made.track().realign()

    return own_copy(tmp_path_factory, made_once(tmp_path_factory, "stress-study", make) / "run")


@pytest.fixture
def ctx(study: Study) -> Context:
    return study.context


@pytest.fixture
def corrected(ctx: Context) -> CorrectedOrganism:
    return CorrectedOrganism.of(ctx, "realigned_in", 0)


@pytest.fixture
def untouched(corrected: CorrectedOrganism, tmp_path: Path) -> CorrectedOrganism:
    """A correction whose adapter changes nothing: LoRA begins at zero."""
    fresh = with_adapter(merged_copy(corrected.ctx.model, None), corrected.ctx.config.training, 0)
    fresh.save_pretrained(str(tmp_path / "checkpoint-2"))  # pyright: ignore[reportCallIssue]
    return replace(corrected, arm="untouched", checkpoint=tmp_path / "checkpoint-2")
