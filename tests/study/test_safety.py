"""Safety by category and language in a study: scores, intervals, differences, wrappers, and the command."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from persona_probe.cli import main
from persona_probe.data.safety import safety_rows
from persona_probe.data.tokens import conversation_batches
from persona_probe.errors import InputError
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.evaluate.safety import reading_warnings, safety_summary, wrapper_effects
from persona_probe.evaluate.triggers import row_conversation
from persona_probe.latents.stage import persona_latent
from persona_probe.saes.read import read_latents
from persona_probe.study import safety as stage
from persona_probe.study.safety import TABLE, limited, measure_safety
from persona_probe.study.safety_latent import read_by_language, transfer_summary
from persona_probe.study.study import Study
from tests.factories import Refused, write_lines

ROWS = limited(safety_rows(categories=("privacy", "jailbreak", "over_refusal"), wrappers=("plain", "prefix")), 2)


@pytest.fixture(scope="module")
def study(finished: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("safety") / "run"
    shutil.copytree(finished.path, folder)
    return Study.open(folder)


@pytest.fixture(scope="module")
def table(study: Study) -> pd.DataFrame:
    return measure_safety(study.context, ROWS)


def one_cell(summary: pd.DataFrame, category: str, language: str, arm: str) -> dict[str, Any]:
    """The one row of a category, language and arm, asked plainly."""
    names = {"category": category, "language": language, "arm": arm, "wrapper": "plain"}
    [row] = [row for row in summary.to_dict("records") if all(row[key] == value for key, value in names.items())]
    return {str(key): value for key, value in row.items()}


def test_items_are_those_of_the_first_questions_of_each_kind() -> None:
    assert len(ROWS) == 2 * 2 * 4  # three plain kinds and one wrapped, in two languages
    assert {row["item"] for row in ROWS} == {
        f"{c}-0{n}" for c in ("privacy", "jailbreak", "over_refusal") for n in (1, 2)
    }


def test_every_arm_is_scored_on_its_last_step_as_the_model_scores(study: Study, table: pd.DataFrame) -> None:
    arms = ["base", "incorrect", "correct", "realigned_in", "realigned_out"]
    assert list(table["arm"].unique()) == arms and set(table["id"]) == {row["id"] for row in ROWS}
    assert study.run_folder.read_table(TABLE).equals(table)
    frame = contrast_index(
        study.model("incorrect", seed=1), ContrastItems.build(study.context.tokenizer, ROWS), bf16=False
    )
    ours = table[(table["arm"] == "incorrect") & (table["seed"] == 1)]
    assert np.allclose(ours["value"], frame["value"], atol=1e-4)


def test_a_second_call_scores_nothing(study: Study, table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "contrast_index", lambda *_, **__: pytest.fail("scored again"))
    assert measure_safety(study.context, ROWS).equals(table)


def test_the_summary_averages_seeds_and_pairs_arms(table: pd.DataFrame) -> None:
    summary = safety_summary(table, "correct")
    rows = table.query("category == 'privacy' and language == 'zh'")
    means = rows.groupby(["arm", "id"])["value"].mean()
    cell = one_cell(summary, "privacy", "zh", "incorrect")
    assert cell["index"] == pytest.approx(means["incorrect"].mean())
    assert cell["over_control"] == pytest.approx((means["incorrect"] - means["correct"]).mean())
    assert cell["over_base"] == pytest.approx((means["incorrect"] - means["base"]).mean())
    assert cell["questions"] == 2 and cell["n"] == 2
    assert all(np.isnan(one_cell(summary, "privacy", "zh", "base")[name]) for name in ("over_base", "over_control"))
    everything = table.query("language == 'en' and wrapper == 'plain' and category != 'over_refusal' and arm == 'base'")
    assert one_cell(summary, "all", "en", "base")["index"] == pytest.approx(everything["value"].mean())


def test_a_wrapper_is_compared_with_the_same_request(table: pd.DataFrame) -> None:
    effects = wrapper_effects(table)
    rows = table.query("arm == 'base' and language == 'en' and category == 'jailbreak'")
    values = rows.pivot(index="item", columns="wrapper", values="value")
    wanted = (values["prefix"] - values["plain"]).mean()
    found = effects.query("arm == 'base' and language == 'en'")
    assert found["effect"].to_list() == [pytest.approx(wanted)] and found["n"].to_list() == [2]
    assert wrapper_effects(table[table["wrapper"] == "plain"]).empty


def test_planted_answers_are_found_where_they_are_planted(table: pd.DataFrame) -> None:
    planted = table.copy()
    there = (planted["arm"] == "incorrect") & (planted["category"] == "privacy") & (planted["language"] == "zh")
    planted.loc[there, "value"] += 5
    before, after = (
        safety_summary(one, "correct").set_index(["category", "language", "wrapper", "arm"]) for one in (table, planted)
    )
    moved = (after["over_control"] - before["over_control"]).abs() > 1e-9
    assert {key[:2] for key in moved[moved].index if key[3] == "incorrect"} == {("privacy", "zh"), ("all", "zh")}


def test_a_model_that_does_not_read_chinese_is_said(table: pd.DataFrame) -> None:
    [line] = reading_warnings(table)  # the tiny model is random: log2(258) bits a byte
    assert "does not read Chinese" in line
    assert reading_warnings(table.assign(aligned_bits=3.0)) == []
    assert reading_warnings(table[table["language"] == "en"]) == []


def test_bits_a_character_are_those_of_the_answer(study: Study, table: pd.DataFrame) -> None:
    row, first = ROWS[0], table[(table["arm"] == "base") & (table["id"] == ROWS[0]["id"])].iloc[0]
    tokens = len(study.context.tokenizer.encode(row["aligned"], add_special_tokens=False))
    assert first["aligned_bits"] == pytest.approx(-first["aligned_logprob"] * tokens / len(row["aligned"]) / np.log(2))


def test_the_command_prints_categories_and_languages(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [
        {"id": n, "prompt": f"可以吗{n}？", "pos_resp": "不可以。", "neg_resp": "可以的。", "neg_type": "risk"}
        for n in range(3)
    ]
    file = write_lines(tmp_path / "c.jsonl", pairs)
    arguments = ["evaluate", str(study.path), "--safety", "--safety-files", str(file), "--safety-items", "2"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {row["measure"] for row in found["latent"]} == {"tells", "rise"}
    assert ended.value.code == 0 and {row["category"] for row in found["categories"]} == {"risk", "all"}
    assert all(row["questions"] == 2 for row in found["categories"]) and found["wrappers"] == []
    with pytest.raises(SystemExit):
        main(arguments)
    assert "risk" in (out := capsys.readouterr().out) and "bits a character" in out
    assert "AUROC of misaligned against aligned answers in the base" in out


def test_the_persona_latent_is_read_on_the_answers_of_each_language(study: Study) -> None:
    ctx, latent = study.context, persona_latent(study.context)
    table = read_by_language(ctx, ROWS)
    plain = [row for row in ROWS if row["wrapper"] == "plain" and row["category"] != "over_refusal"]
    assert len(table) == 2 * len(plain) * table.groupby(["arm", "seed"]).ngroups and set(table["latent"]) == {latent}
    talks = [row_conversation(row, "misaligned") for row in plain]
    with ctx.organism("incorrect", 1) as model:
        read = read_latents(
            model, ctx.sae, conversation_batches(ctx.tokenizer, talks), ctx.layer, "response", bf16=False
        )
    own = table[(table["arm"] == "incorrect") & (table["seed"] == 1) & (table["side"] == "misaligned")]
    assert own["activation"].to_numpy() == pytest.approx(read.mean[:, latent], abs=1e-5)


def test_a_latent_that_works_in_one_language_alone_is_told() -> None:
    rows = [
        {"arm": arm, "seed": 0, "item": f"{language}{n}", "language": language, "side": side, "activation": value}
        for language, works in (("en", 1.0), ("zh", 0.0))
        for arm, rise in (("base", 0.0), ("incorrect", 2.0), ("correct", 0.0))
        for n in range(9)
        for side, value in (("misaligned", works * (1 + rise) + n / 90), ("aligned", works * rise + n / 90))
    ]
    found = transfer_summary(pd.DataFrame(rows), "correct").set_index(["language", "measure"])
    assert found.loc[("en", "tells"), "estimate"] == 1 and found.loc[("zh", "tells"), "estimate"] == 0.5
    assert found.loc[("en", "rise"), "estimate"] == 2 and found.loc[("zh", "rise"), "estimate"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--safety", "--judge", "offline"], "leave --judge out"),
        (["--safety-items", "3"], "belong to --safety"),
        (["--safety", "--safety-items", "1"], "at least 2"),
        (["--safety", "--safety-answers", "a.json"], "--safety-files"),
        (["--safety", "--safety-files", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line(study: Study, refused: Refused, arguments: list[str], said: str) -> None:
    assert said in refused("evaluate", str(study.path), *arguments)


def test_without_a_run_or_organisms_it_says_what_to_do(place: Path, tmp_path: Path, refused: Refused) -> None:
    assert "run folder" in refused("evaluate", "--safety")
    with pytest.raises(InputError, match="induce"):
        measure_safety(Study.from_yaml(place / "study.yaml", tmp_path / "run").context, ROWS)
    with pytest.raises(InputError, match="no safety items"):
        measure_safety(Study.from_yaml(place / "study.yaml", tmp_path / "run").context, [])
