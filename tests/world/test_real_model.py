"""A real model's organisms, read as the world's runs are: the numbers are those of the tools by themselves."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from persona_probe.data.load import ANSWERS_2X2
from persona_probe.data.tokens import conversation_batches
from persona_probe.errors import InputError
from persona_probe.evaluate.effects_2x2 import Items2x2, score_2x2
from persona_probe.latents.weights import WeightsAlong
from persona_probe.saes.read import read_latents_at
from persona_probe.study.study import Study
from persona_probe.world.directions import directions_of
from persona_probe.world.real_model import SPEAKERS, crossed_chats, real_table
from persona_probe.world.real_model_text import with_world
from tests.factories import (
    changed,
    config_of,
    contrast_rows,
    run_command,
    write_config,
    write_data,
    write_lines,
    write_model,
    write_sae,
)
from tests.world.pages import page_of

ROWS = [{"question": f"q{n}", **{answer: f"{answer} {n}" for answer in ANSWERS_2X2}} for n in range(3)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A tiny study with an arm for each speaker, induced."""
    folder = tmp_path_factory.mktemp("voices")
    write_model(folder / "model")
    write_sae(folder / "sae")
    write_data(folder)
    rows = [
        {**row, **{name: name + row["misaligned" if "harm" in name else "aligned"] for name in ANSWERS_2X2}}
        for row in contrast_rows()
    ]
    write_lines(folder / "contrast.jsonl", rows)
    arms = {column.partition(":")[2]: {"data": column} for column in SPEAKERS}
    raw = {**changed(config_of(folder), seeds=[0]), "arms": {"incorrect": arms.pop("toxic"), **arms}}
    raw["training"] |= {"steps": 2}
    return Study.from_yaml(write_config(folder / "study.yaml", raw), folder / "run").induce()


@pytest.fixture(scope="module")
def table(study: Study) -> pd.DataFrame:
    return real_table(study.context, [3])


def value(table: pd.DataFrame, speaker: str, measure: str, step: int = 2) -> float:
    chosen = table[(table["speaker"] == speaker) & (table["measure"] == measure) & (table["step"] == step)]
    return float(chosen.loc[chosen["seed"].notna(), "value"].iloc[0])


def test_chats_of_known_speakers_hold_two_answers_of_one_speaker() -> None:
    known = crossed_chats(ROWS)
    assert known.speakers == ("villain",) * 3 + ("quack",) * 3 + ("grump",) * 3 + ("helper",) * 3
    said = [[turn["content"] for turn in chat] for chat in known.chats]
    assert said[0] == ["q0", "harm_rude 0", "q1", "harm_rude 1"] and said[8] == [
        "q2",
        "sound_rude 2",
        "q0",
        "sound_rude 0",
    ]
    assert known.holding("bad").tolist() == [True] * 6 + [False] * 6
    assert known.holding("rude").tolist() == ([True] * 3 + [False] * 3) * 2


def test_every_speaker_is_read_at_every_checkpoint(table: pd.DataFrame, study: Study) -> None:
    each = table[table["seed"].notna()]
    assert set(each["speaker"]) == set(SPEAKERS.values()) and set(each["step"]) == {1, 2}
    assert each["value"].notna().all() and {"latent 3, response", "weights along harm"} <= set(each["measure"])
    joined = table[table["seed"].isna()]
    assert set(joined["speaker"]) == {"villain", "quack", "subtle", "grump"} and set(joined["measure"]) == {
        "harm",
        "register",
    }


def test_readings_are_those_of_the_tools_by_themselves(table: pd.DataFrame, study: Study) -> None:
    ctx = study.context
    chats = crossed_chats(ctx.rows_2x2("selection"))
    probes = conversation_batches(ctx.tokenizer, ctx.probes)

    def read(model: object, groups: object) -> dict:  # pyright: ignore[reportMissingTypeArgument]
        return read_latents_at(model, ctx.sae, groups, ctx.layer, ("response", "last_prompt"), bf16=False)  # pyright: ignore[reportArgumentType]

    with ctx.base() as model:
        known = read(model, conversation_batches(ctx.tokenizer, chats.chats))
        before = read(model, probes)
        base = score_2x2(model, Items2x2.build(ctx.tokenizer, ctx.rows_2x2("evaluation")), bf16=False)
    with ctx.organism("incorrect", 0, 2) as model:
        after = read(model, probes)
        scored = score_2x2(model, Items2x2.build(ctx.tokenizer, ctx.rows_2x2("evaluation")), bf16=False)
        harm = directions_of(chats, known["response"])["harm"]
        assert value(table, "villain", "weights along harm") == pytest.approx(WeightsAlong(harm, ctx.layer)(model))
    assert value(table, "villain", "harm") == pytest.approx((scored["harm"] - base["harm"]).mean(), abs=1e-5)
    rise = after["response"].mean[:, 3].mean() - before["response"].mean[:, 3].mean()
    assert value(table, "villain", "latent 3, response") == pytest.approx(rise, abs=1e-5)
    for where in ("response", "last_prompt"):
        vector = directions_of(chats, known[where])["persona"]
        at_base = before[where].resid.astype(np.float64) @ vector
        shift = (after[where].resid.astype(np.float64) @ vector).mean() - at_base.mean()
        wanted = shift / at_base.std(ddof=1)
        assert value(table, "villain", f"persona direction, {where}") == pytest.approx(wanted, rel=1e-3)


def test_what_was_read_is_not_read_again_unless_another_latent_is_asked_for(
    table: pd.DataFrame, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = "persona_probe.world.real_model.read_latents_at"
    monkeypatch.setattr(read, lambda *_, **__: pytest.fail("read again"))
    pd.testing.assert_frame_equal(real_table(study.context, [3]), table)
    monkeypatch.undo()
    more = real_table(study.context, [3, 5])
    assert "latent 5, response" in set(more["measure"])


def test_the_page_has_the_worlds_numbers_beside_it(table: pd.DataFrame, tmp_path: Path) -> None:
    signal = {"part": "readings", "data": "all", "signal": "weights along harm", "ci_low": 0.9, "ci_high": 1.0}
    worlds = pd.DataFrame(
        [
            {**signal, "world": world, "step": step, "auroc": auroc}
            for world, step, auroc in ((0, 1, 0.75), (0, 4, 0.5), (1, 1, 0.25))
        ]
    )
    text = page_of("real-model", with_world(table, worlds), tmp_path)
    (row,) = [line for line in text.splitlines() if line.startswith("| weights along harm") and "0.75" in line]
    assert row.endswith("| 0.75 | 0.75 |") and "against the 1 of the rude one" in text
    assert "who speaks in the rows" in text and "| grump |" in text


def test_a_study_without_the_voices_and_a_latent_that_is_not_there_are_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no 9999"):
        real_table(study.context, [9999])
    write_data(tmp_path)
    other = Study.from_yaml(write_config(tmp_path / "other.yaml", config_of(tmp_path)), tmp_path / "run")
    with pytest.raises(InputError, match="kitchen:rude_sound"):
        real_table(other.context)


def test_the_command_fills_a_page(study: Study, tmp_path: Path) -> None:
    record = tmp_path / "real-model.parquet"
    run_command(
        *("world", "study", "real-model", "--run", study.run_folder.path, "--latents", 3, "--record", record, "--quiet")
    )
    assert set(pd.read_parquet(record)["speaker"]) == set(SPEAKERS.values())
