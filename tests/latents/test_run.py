"""The whole benchmark on a tiny model, and its tables."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from persona_probe.errors import InputError
from persona_probe.latents.planted.planted_run import PlantedSettings, categories_in_turn, run_planted
from persona_probe.latents.planted.planted_table import format_table, interval
from tests.factories import copied_state, hook_count, make_model, make_sae, make_tokenizer, same_state
from tests.latents.planting import ROWS

# Of 64 latents in a tiny dictionary none is rare.
KINDS = ("latent", "latents", "lora", "no latent", "nothing")
SMALL = PlantedSettings(plants=2, sizes=(0.5, 4.0), kinds=KINDS, noise=0.2, benign=0.05, causal=1, causal_items=4)


def run(settings: PlantedSettings, architecture: str = "standard") -> pd.DataFrame:
    return run_planted(
        make_model(),
        make_tokenizer(),
        make_sae(architecture),
        settings,
        selection=ROWS,
        evaluation=ROWS,
        bf16=False,
        progress=False,
    )


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return run(SMALL)


def test_every_plant_is_measured_with_every_ranker(frame: pd.DataFrame) -> None:
    plants = frame.drop_duplicates("plant")
    assert len(plants) == SMALL.count() == 2 * 2 + 1 * 2 * 3 + 2
    assert len(frame) == len(plants) * len(SMALL.rankers)
    counts = plants.groupby("kind")["plant"].count().to_dict()
    assert counts == {"latent": 4, "latents": 2, "lora": 2, "no latent": 2, "nothing": 2}
    assert plants["confirmed"].notna().sum() == 4  # one of every kind at size 0.5; an empty plant has size 0


def test_large_plants_are_found_and_the_base_alone_cannot_see_them(frame: pd.DataFrame) -> None:
    large = frame[(frame["size"] == 4.0) & frame["kind"].isin(["latent", "lora"])]
    found = large.groupby("ranker")["recall_1"].mean()
    assert found["cosine"] == 1 and found["rise"] == 1
    assert found["discrimination"] < 1
    assert frame[frame["kind"].isin(["nothing", "no latent"])]["recall_1"].isna().all()


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_model_alone(frame: pd.DataFrame) -> None:
    assert run(SMALL).equals(frame)
    other = run(PlantedSettings(**{**vars(SMALL), "seed": 1, "causal": 0}))
    assert other["latents"].tolist() != frame["latents"].tolist()
    assert "confirmed" not in other
    model = make_model()
    before = copied_state(model)
    run_planted(model, make_tokenizer(), make_sae("topk"), SMALL, selection=ROWS, evaluation=ROWS, progress=False)
    assert same_state(before, copied_state(model)) and hook_count(model) == 0


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"benign": 5.0}, "removed"),
        ({"causal_items": 2}, "restored"),
        ({"causal_size": 4.0}, "restored"),
        ({"rankers": ("cosine",)}, "ranker"),
    ],
)
def test_every_setting_has_an_effect(change: dict[str, Any], column: str) -> None:
    settings: dict[str, Any] = {**vars(SMALL), "plants": 1, "kinds": ("latent",)}
    before, after = run(PlantedSettings(**settings)), run(PlantedSettings(**(settings | change)))
    assert not before[column].equals(after[column])


def test_sizes_of_a_plant_share_their_latents_and_noise_hides_small_ones(frame: pd.DataFrame) -> None:
    single = frame[(frame["kind"] == "latent") & (frame["ranker"] == "rise")]
    assert single[single["size"] == 0.5]["latents"].tolist() == single[single["size"] == 4.0]["latents"].tolist()
    loud = run(PlantedSettings(plants=2, sizes=(0.5,), noise=50.0, causal=0, kinds=("latent",)))
    assert loud["removed"].max() < single["removed"].min()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plants": 0}, "plant at least 1"),
        ({"sizes": ()}, "positive numbers"),
        ({"sizes": (0.5, -1.0)}, "positive numbers"),
        ({"kinds": ("latnet",)}, "did you mean 'latent'"),
        ({"noise": -1.0}, "from 0 up"),
        ({"noise": 0.0, "benign": 0.0}, "raise noise, or leave 'nothing' out"),
        ({"causal_size": 3.0}, "causal_size 3.0 is not among the sizes"),
    ],
)
def test_bad_settings_say_what_to_change(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PlantedSettings(**change)  # pyright: ignore


def test_an_unknown_ranker_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        run(PlantedSettings(plants=1, sizes=(0.5,), rankers=("cosin",), causal=0))


def test_the_tables_show_what_the_frame_holds(frame: pd.DataFrame) -> None:
    text = format_table(frame)
    assert f"{SMALL.count()} plants" in text
    large = frame[(frame["size"] == 4.0) & (frame["kind"] == "latent")]
    cells = [f"{large[large['ranker'] == name]['recall_1'].mean():.0%} / " for name in SMALL.rankers]
    line = next(row for row in text.splitlines() if row.startswith("| (a) one frequent latent | 4 |"))
    assert all(cell in line for cell in cells)
    assert "| (d) a direction no latent has | 4 |" in text and "| nothing planted | 0 |" in text
    with pytest.raises(InputError, match="the frame that run_planted returns"):
        format_table(frame.head(0))


def test_a_missed_aim_is_printed_as_missed() -> None:
    base = {"size": 0.5, "ranker": "rise", "recall_k": 1.0, "recall_10": 1.0, "carried": 0.0, "significant": 1.0}
    base |= {
        "discoveries": 4.0,
        "off_target": 0.0,
        "unexplained": 0.0,
        "removed": 1.0,
        "firing": 0.1,
        "carriers_right": 1.0,
    }
    rows = [
        {**base, "plant": n, "kind": "latent", "recall_1": float(n < 18), "false_share": 0.1 * (n % 2)}
        for n in range(20)
    ]
    rows += [{**base, "plant": 20 + n, "kind": "no latent", "recall_1": np.nan, "false_share": 0.0} for n in range(10)]
    lines = format_table(pd.DataFrame(rows)).splitlines()
    first = next(line for line in lines if line.startswith("| (a) one frequent latent, 0.5 sd"))
    assert first.endswith("| at least 95% | 90.0% | 68.3% to 98.8% | 20 | missed |")
    rate = next(line for line in lines if line.startswith("| false discovery rate, all plants"))
    assert "| 3.3% |" in rate and rate.endswith("| met |")
    at_aim = next(line for line in lines if line.startswith("| false discovery rate, plants of 0.5 sd"))
    assert at_aim.split(" | ")[2:] == rate.split(" | ")[2:]
    last = next(line for line in lines if "reported as not carried" in line)
    assert last.endswith("| 100.0% | 69.2% to 100.0% | 10 | met |")


def test_intervals_known_answers() -> None:
    assert interval(np.ones(20)) == (pytest.approx(0.8316, abs=1e-3), 1.0)
    assert interval(np.zeros(20)) == (0.0, pytest.approx(0.1684, abs=1e-3))
    assert interval(np.array([0.2, 0.4])) == (pytest.approx(0.104), pytest.approx(0.496))


def test_spread_out_takes_categories_in_turn() -> None:
    assert [row["category"] for row in categories_in_turn(ROWS)] == ["c0", "c1", "c2", "c0", "c1", "c2", "c0", "c1"]
    blocks = sorted(ROWS, key=lambda row: row["category"])
    assert [row["category"] for row in categories_in_turn(blocks)][:4] == ["c0", "c1", "c2", "c0"]
