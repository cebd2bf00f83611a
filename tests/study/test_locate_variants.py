"""Locate with everything on: all rankers, sets, refined strengths, directions, cards, and more rankers afterwards."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from persona_probe.config import StudyConfig, from_dict
from persona_probe.errors import InputError
from persona_probe.latents.rankers import RANKERS
from persona_probe.study.study import Study
from tests.factories import Row, changed


@pytest.fixture(scope="module")
def located(raw: Row, tmp_path_factory: pytest.TempPathFactory) -> Study:
    locate = {
        **raw["locate"],
        "rankers": list(RANKERS),
        "choose_by": ["rise", "cosine", "slope"],
        "directions": ["logistic_probe", "persona_vector"],
        "set_size": 2,
        "strength_refinements": 1,
        "candidates": 4,
        "strengths": [0.5, 1.0],
    }
    config = from_dict(StudyConfig, changed(raw, seeds=[0], locate=locate))
    return Study.from_config(config, tmp_path_factory.mktemp("located") / "run").induce().locate()


def test_every_ranker_has_its_columns(located: Study) -> None:
    table = located.features
    for name in set(RANKERS) - {"rise"}:
        assert sorted(table[f"{name}_rank"]) == list(range(1, len(table) + 1))
    assert table["q_value"].between(0, 1).all()
    assert np.corrcoef(table["slope"], table["attribution"])[0, 1] < 0.99
    pairs = located.agreement
    assert len(pairs) == len(RANKERS) * (len(RANKERS) - 1) // 2
    assert pairs["share"].between(0, 1).all()


def test_the_table_says_what_was_tested_and_how_it_ended(located: Study) -> None:
    tested = located.features.query("kind == 'candidate'")
    assert len(tested) == 4
    proven = tested.dropna(subset=["effect_base"])
    assert proven[["effect_organism", "ablation", "ablation_low", "ablation_high"]].notna().all().all()
    assert np.allclose(proven["shrinkage"], 1 - proven["effect_base"] / proven["effect_selection"])
    random = located.features.query("kind == 'random'")
    for column in ("effect_base", "effect_organism", "ablation"):
        limit = np.quantile(random[column].abs(), 0.95)
        assert (proven.loc[proven["causal"], f"{column}_low"] > limit).all()
    assert not located.features.query("kind != 'candidate'")["causal"].any()


def test_directions_are_tested_like_latents(located: Study) -> None:
    entries = {e["key"]: e for e in located.run_folder.read_json("directions.json")}
    assert set(entries) == {"mean_difference", "logistic_probe", "persona_vector"}
    assert 0 <= entries["logistic_probe"]["held_out_auroc"] <= 1
    assert all(0 <= e["unexplained"] <= 1 for e in entries.values())
    names = set(located.run_folder.read_table("steering.parquet").query("kind == 'direction'")["name"])
    assert names == {"logistic probe", "persona vector"}


def test_sets_grow_from_the_strongest_latent(located: Study) -> None:
    sets = located.run_folder.read_table("sets.parquet")
    assert sets["size"].tolist() == [1, 2]
    first, both = (list(map(int, latents)) for latents in sets["latents"])
    assert first[0] in both
    strongest = located.features.sort_values("effect_selection", ascending=False)["latent"].iloc[0]
    assert first == [strongest]
    row = sets.iloc[1]
    assert row["effect_base_low"] <= row["effect_base"] <= row["effect_base_high"]
    assert np.isfinite(row["ablation"])


def test_cards_and_their_page(located: Study) -> None:
    latent = int(located.features["latent"].iloc[0])
    card = located.card(latent, name="my <b>name</b>")
    assert card.latent == latent and "my &lt;b&gt;name&lt;/b&gt;" in card._repr_html_()
    page = located.cards(5).read_text()
    assert page.count('<article class="feature-card') == 5
    with pytest.raises(InputError, match="latent 64 does not exist"):
        located.card(64)


def test_other_rankers_can_be_asked_for_later(finished: Study, tmp_path: Path) -> None:
    study = Study.open(shutil.copytree(finished.path, tmp_path / "run"))
    before = study.features
    assert "slope" not in before
    after = study.locate(rankers=["slope"]).features
    assert "slope_rank" in after
    columns = ["latent", "effect_base", "effect_organism", "persona"]
    assert before[columns].equals(after[columns])
    with pytest.raises(InputError, match="unknown ranker 'slop'"):
        study.locate(rankers=["slop"])
