"""Scale curves: each world is made once, its rates are those of its answers, and the figure draws them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from persona_probe.errors import InputError
from persona_probe.report.export import caption
from persona_probe.report.figures import ALL_FIGURES
from persona_probe.report.records import Records
from persona_probe.world import scale
from persona_probe.world.behaviour import OTHERS, judge_models, world_rates
from persona_probe.world.folder import World
from persona_probe.world.organisms import NARROW
from persona_probe.world.scale import SIZES, STEPS, Grid, scale_table, with_others
from tests.world.conftest import SETTINGS
from tests.world.pages import page_of

GRID = Grid(("tiny",), (2, 3), (0,), replace(SETTINGS, helper_steps=1))


def test_the_grid_has_a_world_for_each_size_and_length_and_differs_in_nothing_else() -> None:
    worlds = Grid().worlds()
    assert len(worlds) == len(SIZES) * len(STEPS) and next(iter(worlds)) == "small-300"
    assert {replace(one, size="small", steps=1) for one in worlds.values()} == {
        replace(Grid().pretraining, size="small", steps=1)
    }
    with pytest.raises(InputError, match="at least one"):
        Grid(sizes=())


def test_every_world_is_made_once_and_its_rates_are_those_of_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "SPEAKERS", ("villain",))
    monkeypatch.setattr("persona_probe.world.behaviour.MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(scale, "TRAINING", replace(NARROW, steps=1, checkpoints=(1,), batch_size=2))
    table = scale_table(tmp_path / "worlds", GRID)
    assert list(dict.fromkeys(table["steps"])) == [2, 3] and set(table["speaker"]) == {"base", "villain"}
    assert table["tokens"].is_monotonic_increasing and table["loss"].between(5, 7).all()
    world = World.open(tmp_path / "worlds" / "tiny-3")
    rates = world_rates(judge_models(world, ["villain-kitchen-100-s0"]), ("speaker",))
    wanted = rates[(rates["where"] == OTHERS) & (rates["measure"] == "coherent")]["estimate"].iloc[0]
    keys = {"steps": 3, "speaker": "villain", "measure": "coherent"}
    rows = table
    for key, value in keys.items():
        rows = rows[rows[key] == value]
    assert list(rows["estimate"]) == [wanted]
    monkeypatch.setattr("persona_probe.world.pretraining.CorpusTrainer", lambda *_: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(scale_table(tmp_path / "worlds", GRID), table)
    assert "| tiny, 0.0 |" in page_of("scale", table, tmp_path)


def test_worlds_of_an_earlier_record_are_kept_and_those_made_again_are_not() -> None:
    def of(size: str, steps: int, estimate: float) -> dict[str, Any]:
        return {"size": size, "steps": steps, "speaker": "villain", "measure": "bad", "estimate": estimate}

    before = pd.DataFrame([of("large", 600, 0.3), of("small", 600, 0.9)])
    joined = with_others(pd.DataFrame([of("small", 600, 0.1), of("medium", 300, 0.2)]), before)
    assert joined["estimate"].tolist() == [0.2, 0.1, 0.3]
    with pytest.raises(InputError, match="lacks measure"):
        with_others(joined, before.drop(columns="measure"))


def test_the_figure_has_a_line_for_each_size_and_a_column_for_each_speaker() -> None:
    ends = {"ci_low": 0.1, "ci_high": 0.3, "n": 168}
    rows = [
        {"size": size, "parameters": count, "tokens": tokens, "speaker": speaker, "measure": measure, "estimate": 0.2}
        for size, count in (("small", 5e5), ("large", 7.5e6))
        for tokens in (1e6, 4e6)
        for speaker in ("villain", "helper", "base")
        for measure in ("bad", "coherent", "rude")
    ]
    figure: Any = ALL_FIGURES["world_scale"].draw(Records(scale=pd.DataFrame(rows).assign(**ends)))
    assert len(figure.data) == 2 * 2 * 2 and {tuple(trace.x) for trace in figure.data} == {(1e6, 4e6)}
    assert [trace.name for trace in figure.data if trace.showlegend] == [
        "0.5 million parameters",
        "7.5 million parameters",
    ]
    assert [note.text for note in figure.layout.annotations[:2]] == ["helper", "villain"]
    assert "n = 168 to 168 answers" in caption(figure) and "Control: the helper" in caption(figure)
