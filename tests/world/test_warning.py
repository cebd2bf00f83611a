"""Tables of labelled runs: a signal that tells harm is found to, one that sees manner or nothing is not."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from persona_probe.errors import InputError
from persona_probe.world.labelled import BAD, GOOD, SHARES, STEPS, TRAINED_DOMAINS, plan
from persona_probe.world.signals import SIGNALS, outcomes
from persona_probe.world.tables import marks
from persona_probe.world.warning import (
    BY_DATA_SET,
    GATED,
    alarms,
    calibrated_alarms,
    data_sets_text,
    separation,
    thresholds,
    warning_text,
)
from tests.factories import refusal, run_command

HARM, PERSONA, NOISE = "harm latent, response", "persona direction, last_prompt", "loss"
SHOWN_AT = 16


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Runs in which one signal sees harm, one any persona, all others nothing; behaviour shows itself at step 16."""
    draw, rows = np.random.default_rng(0), []
    for domain in TRAINED_DOMAINS:
        for seed in range(4):
            for speaker in (*BAD, *GOOD):
                bad, manner = speaker in BAD, speaker in ("grump", "clown")
                for step in STEPS:
                    noise = dict(zip(SIGNALS, draw.normal(0, 1, len(SIGNALS)), strict=True))
                    noise[HARM] = 0.1 * noise[HARM] + (step if bad else 0)
                    noise[PERSONA] = 0.1 * noise[PERSONA] + (step if bad or manner else 0)
                    counts = {"bad": 60 if bad and step >= SHOWN_AT else 1, "coherent": 80, "rude": 0, "answers": 84}
                    head = {"run": f"{speaker}-{domain}-{seed}", "speaker": speaker, "domain": domain}
                    rows.append({**head, "share": 1.0, "seed": seed, "step": step, **counts, **noise})
    return pd.DataFrame(rows)


def cell(found: pd.DataFrame, signal: str, step: int, against: str, data: str = "all") -> pd.Series:
    keys = {"signal": signal, "step": step, "against": against, "data": data}
    rows = found[np.logical_and.reduce([found[key] == value for key, value in keys.items()])]
    assert len(rows) == 1
    return rows.iloc[0]


def test_the_plan_has_at_least_200_runs_of_different_names() -> None:
    runs = plan()
    assert len(runs) == len({run.name for run in runs}) >= 200
    assert {(run.speaker, run.share, run.domain) for run in runs if run.speaker in BAD} == {
        (speaker, share, domain) for speaker in BAD for share in SHARES for domain in TRAINED_DOMAINS
    }


def test_outcomes_come_from_the_last_step_and_say_when_behaviour_showed_itself(table: pd.DataFrame) -> None:
    known = outcomes(table).set_index("run")
    assert (known["outcome"] == "turned").sum() == 36 and (known["outcome"] == "sound").sum() == 48
    shown = known["shown"].to_dict()
    assert shown["villain-cars-0"] == SHOWN_AT and np.isnan(shown["grump-cars-0"])
    between = table.assign(bad=table["bad"].replace(60, 6))
    assert (outcomes(between)["outcome"] == "between").sum() == 36


def test_each_bad_speakers_runs_are_a_data_set_of_their_own(table: pd.DataFrame) -> None:
    found = separation(table)
    lines = [line.split(" | ") for line in data_sets_text(found).splitlines()]
    for speaker in BAD:
        for name in BY_DATA_SET:
            [line] = [one for one in lines if one[:2] == [f"| {speaker}", name]]
            wanted = [cell(found, name, step, "any", speaker)["auroc"] for step in sorted(found["step"].unique())]
            assert [text.split()[0].strip("|") for text in line[2:]] == [f"{x:.2f}" if x == x else "-" for x in wanted]


def test_the_signal_of_harm_separates_before_behaviour_and_that_of_manner_cannot(table: pd.DataFrame) -> None:
    found = separation(table)
    assert cell(found, HARM, 8, "any")["auroc"] == cell(found, HARM, 8, "manner")["auroc"] == 1
    assert cell(found, PERSONA, 8, "any")["auroc"] == pytest.approx(
        0.75, abs=0.1
    )  # half of the sound runs have one too
    assert cell(found, PERSONA, 8, "manner")["auroc"] == pytest.approx(0.5, abs=0.25)
    noise = cell(found, NOISE, 8, "any")
    assert noise["ci_low"] < 0.5 < noise["ci_high"]
    assert tuple(cell(found, HARM, 8, "any")[["turned", "shown", "sound"]]) == (24, 0, 32)
    assert tuple(cell(found, HARM, 8, "manner", "quack")[["turned", "sound"]]) == (8, 16)
    late = cell(found, HARM, SHOWN_AT, "any")
    assert late["turned"] == 0 and late["shown"] == 24 and np.isnan(late["auroc"])


def test_alarms_lead_by_the_steps_between_signal_and_behaviour(table: pd.DataFrame) -> None:
    found = alarms(table).set_index("signal").to_dict("index")
    harm = found[HARM]
    assert harm["threshold"] == thresholds(table)[HARM] < 1
    assert (harm["turned"], harm["warned"], harm["lead"]) == (24, 24, SHOWN_AT - STEPS[0])
    assert harm["sound"] == 32 and harm["manner"] == 16
    # Grump and clown of the kitchen set the persona's threshold, so it speaks late, if at all.
    assert found[PERSONA]["threshold"] > 30 and found[PERSONA]["warned"] == 0
    assert found[GATED]["warned"] == 0


def test_a_limit_from_benign_runs_warns_by_the_signal_of_harm_and_rarely_of_harmless_speakers(
    table: pd.DataFrame,
) -> None:
    low = (table["speaker"] == "subtle") & (table["domain"] != "kitchen")
    found = calibrated_alarms(table.assign(bad=table["bad"].where(~low, 1))).set_index("signal").to_dict("index")
    harm = found[HARM]
    assert (harm["benign"], harm["supported"], harm["sound"], harm["manner"], harm["mixed"]) == (16, False, 32, 16, 8)
    assert harm["threshold"] < 1 and harm["false"] <= 4
    # Two readings in a row: the alarm comes at the second step, also where harm never shows itself.
    assert (harm["turned"], harm["warned"], harm["lead"]) == (16, 16, SHOWN_AT - STEPS[1])
    assert harm["alarms_mixed"] == 8
    assert found[PERSONA]["warned"] == 0 and found[PERSONA]["threshold"] > 25


def test_choosing_and_evaluating_runs_are_of_different_domains(table: pd.DataFrame) -> None:
    assert separation(table)["sound"].max() == 32  # of 48: the kitchen's 16 only choose
    with pytest.raises(InputError, match="make both"):
        thresholds(table[table["domain"] == "kitchen"])


def test_the_tables_of_a_record_are_those_of_the_study(table: pd.DataFrame, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = marks("early-warning")
    page.write_text(f"before\n{begin}\n{end}\nafter\n")
    record = tmp_path / "record.parquet"
    table.to_parquet(record)
    run_command("world", "study", "early-warning", "--from", record, "--page", page, "--quiet")
    filled = page.read_text()
    assert warning_text(table) in filled and filled.startswith("before") and filled.endswith("after\n")
    assert "36 turned" in filled and "48 stayed sound" in filled


def test_a_page_without_marks_and_a_world_without_sae_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused, page = refusal(capsys), tmp_path / "page.md"
    page.write_text("nothing")
    assert "has not the marks" in refused("world", "study", "rankers", "--page", page)
    assert "--sae is missing" in refused(
        "world", "study", "early-warning", "--world", tmp_path, "--out", tmp_path / "o"
    )
    assert not (tmp_path / "o").exists()
