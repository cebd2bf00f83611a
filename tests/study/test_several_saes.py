"""A study with `saes:` ranks and tracks them all; one with `sae:` writes what it wrote before."""

from pathlib import Path

import pandas as pd
import pytest

from persona_probe.config import StudyConfig, from_dict
from persona_probe.errors import InputError
from persona_probe.study.study import Study
from tests.factories import Row, changed, make_sae


@pytest.fixture(scope="module")
def both(raw: Row, place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Study]:
    """The tiny study with its SAE alone, and with two more."""
    folder = tmp_path_factory.mktemp("several")
    make_sae("standard", seed=3, hook="blocks.1.hook_mlp_out").save_model(str(folder / "mlp"))
    make_sae("jumprelu", seed=4, hook="unheard.of").save_model(str(folder / "deep"))
    more = [{"sae": str(folder / "mlp")}, {"sae": str(folder / "deep"), "layer": 2, "name": "third layer"}]
    studies = []
    for name, extra in (("one", {}), ("many", {"saes": more})):
        config = from_dict(StudyConfig, changed(raw, seeds=[0], **extra))
        studies.append(Study.from_config(config, folder / name).induce().locate().track())
    return studies[0], studies[1]


def test_the_first_sae_is_ranked_and_tested_as_alone(both: tuple[Study, Study]) -> None:
    one, many = both
    pd.testing.assert_frame_equal(one.features, many.features, check_exact=True)
    own = many.readings[many.readings["sae"].isin(["sae", ""])].drop(columns="sae").reset_index(drop=True)
    fit = ["explained_variance", "l0"]  # of a direction NaN, where several SAEs are read
    pd.testing.assert_frame_equal(own.drop(columns=fit), one.readings.drop(columns=fit), check_exact=True)
    latents = own["latent"] >= 0
    pd.testing.assert_frame_equal(own.loc[latents, fit], one.readings.loc[latents, fit], check_exact=True)
    assert not one.run_folder.has("latents_by_sae.parquet") and "sae" not in one.readings


def test_the_further_ones_are_ranked_and_their_best_latents_tracked(both: tuple[Study, Study]) -> None:
    many = both[1]
    table = many.run_folder.read_table("latents_by_sae.parquet")
    heads = table[["sae", "place"]].drop_duplicates().to_numpy().tolist()
    assert heads == [["sae", "L1"], ["mlp", "L1.mlp_out"], ["third layer", "L2"]]
    assert table.groupby("sae")["explained_variance"].nunique().eq(1).all()
    tracked = many.readings[many.readings["feature"].str.startswith("best of")]
    assert set(tracked["sae"]) == {"mlp", "third layer"} and set(tracked["arm"]) == {"base", "incorrect", "correct"}
    for name in ("mlp", "third layer"):
        best = table[table["sae"] == name].sort_values("rank")["latent"].iloc[0]
        assert set(tracked[tracked["sae"] == name]["latent"]) == {best}


def test_the_hash_of_a_study_with_one_sae_is_as_before(raw: Row) -> None:
    config = from_dict(StudyConfig, raw)
    alone = {key: value for key, value in raw.items() if key != "sae"}
    listed = from_dict(StudyConfig, {**alone, "saes": [{"sae": raw["sae"]}]})
    assert listed.sae == config.sae and listed.all_saes == config.all_saes
    assert from_dict(StudyConfig, {**raw, "saes": []}).hash == config.hash != listed.hash


def test_saes_that_cannot_be_told_apart_or_are_missing(raw: Row) -> None:
    with pytest.raises(InputError, match=r"two of the saes are called \['a'\]: give each a name"):
        from_dict(StudyConfig, {**raw, "saes": [{"sae": "x/a"}, {"sae": "y/a"}]})
    with pytest.raises(InputError, match="key 'sae' is missing"):
        from_dict(StudyConfig, {key: value for key, value in raw.items() if key != "sae"})
    with pytest.raises(InputError, match="unknown key 'lyaer'"):
        from_dict(StudyConfig, {**raw, "saes": [{"sae": "x/a", "lyaer": 3}]})


def test_a_further_sae_that_does_not_fit_stops_the_study_before_it_trains(raw: Row, tmp_path: Path) -> None:
    make_sae("topk", hook="blocks.9.hook_mlp_out").save_model(str(tmp_path / "high"))
    for sae, problem in ((tmp_path / "high", "reads layer 9 but the model has layers 0 to 2"), ("./gone", "no SAE at")):
        config = from_dict(StudyConfig, changed(raw, seeds=[0], saes=[{"sae": str(sae)}]))
        with pytest.raises(InputError, match=problem):
            Study.from_config(config, tmp_path / Path(str(sae)).name / "run").check()
