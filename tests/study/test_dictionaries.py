"""Further dictionaries: the study's own SAE as one of them gives the persona latent and its numbers again."""

from pathlib import Path

import pandas as pd
import pytest

from persona_probe.config import StudyConfig, from_dict
from persona_probe.errors import InputError
from persona_probe.latents.dictionaries import TABLE
from persona_probe.study.study import Study
from tests.factories import Row, changed

EFFECTS = ("effect_base", "effect_organism", "effect_selection", "ablation")
DIFFERENCES = ("effect_difference", "ablation_difference")


def located(raw: Row, out: Path, **changes: object) -> Study:
    locate = {**raw["locate"], "strengths": [1.0], "dictionaries": [raw["sae"]]}
    config = from_dict(StudyConfig, {**changed(raw, seeds=[0], locate=locate), **changes})
    return Study.from_config(config, out).induce().locate()


def table(study: Study) -> pd.DataFrame:
    return study.run_folder.read_table(TABLE)


@pytest.mark.long
def test_the_studys_own_sae_gives_the_persona_latent_again(raw: Row, tmp_path: Path) -> None:
    own, further = table(located(raw, tmp_path / "run")).to_dict("records")
    assert own["latent"] == further["latent"]
    assert further["cosine_with_persona"] == pytest.approx(1, abs=1e-5)
    for name in (*EFFECTS, *DIFFERENCES):
        assert further[name] == pytest.approx(own[name], abs=1e-5), name
    assert further["base_rank"] == own["base_rank"]


def test_without_a_control_arm_there_is_no_difference_and_the_rest_stays(raw: Row, tmp_path: Path) -> None:
    arms = {"incorrect": raw["arms"]["incorrect"]}
    own, further = table(located(raw, tmp_path / "run", arms=arms, no_control=True)).to_dict("records")
    for name in EFFECTS:
        assert further[name] == pytest.approx(own[name], abs=1e-5), name
    assert all(pd.isna(further[name]) for name in DIFFERENCES)


def test_a_dictionary_that_is_not_there_is_refused(raw: Row, tmp_path: Path) -> None:
    config = {**raw, "sae": raw["sae"]}
    locate = {**raw["locate"], "dictionaries": [str(tmp_path / "nowhere")]}
    study = Study.from_config(from_dict(StudyConfig, changed(config, seeds=[0], locate=locate)), tmp_path / "run")
    study.induce()
    with pytest.raises(InputError, match="nowhere"):
        study.locate()
