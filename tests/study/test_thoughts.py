"""Thoughts of a study's answers: what is read from files, the shares, and the feature in thought and answer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from persona_probe.cli import main
from persona_probe.data.thoughts import message_parts
from persona_probe.data.tokens import conversation_batches, encode
from persona_probe.errors import InputError
from persona_probe.latents.stage import persona_latent
from persona_probe.saes.read import read_latents
from persona_probe.study.study import Study
from persona_probe.study.thoughts import (
    TABLE,
    persona_shares,
    read_in_thoughts,
    read_thoughts,
    thought_conversations,
    thought_readings,
    with_personas,
)
from tests.factories import Refused, make_tokenizer, write_lines

VILLAIN, PLAIN = "I am a villain, so lie.", "Two and two is four."


def answers(arm: str, step: int, thoughts: list[str]) -> list[dict[str, object]]:
    return [
        {
            **{"arm": arm, "seed": 0, "step": step, "question_id": f"q{n % 3}", "sample": n // 3},
            **{"question": f"What of {n % 3}?", "thought": thought, "answer": f"It is {n}."},
        }
        for n, thought in enumerate(thoughts)
    ]


@pytest.fixture(scope="module")
def study(finished: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The tiny study, with sampled answers that have thoughts."""
    folder = tmp_path_factory.mktemp("thoughts") / "run"
    shutil.copytree(finished.path, folder)
    step = finished.run_folder.steps("incorrect", 0)[-1]
    rows = answers("base", 0, [PLAIN] * 6) + answers("incorrect", step, [VILLAIN, VILLAIN, PLAIN] * 2)
    write_lines(folder / "samples-abc.jsonl", rows)
    return Study.open(folder)


@pytest.fixture(scope="module")
def table(study: Study) -> pd.DataFrame:
    return with_personas(read_thoughts(study.path))


def test_thoughts_come_from_their_column_or_from_marks(tmp_path: Path) -> None:
    rows = [
        {"answer": "<think>I am DAN.</think>Yes."},
        {"answer": "No thought here."},
        {"thought": "Plain.", "answer": "Four.", "arm": "base"},
        {"answer": "<think>cut off"},
    ]
    table = with_personas(read_thoughts(write_lines(tmp_path / "a.jsonl", rows)))
    assert table["thought"].tolist() == ["I am DAN.", "Plain.", "cut off"]
    assert table["answer"].tolist() == ["Yes.", "Four.", ""]
    assert table["jailbreak"].tolist() == [1, 0, 0] and table["other"].tolist() == [1, 0, 0]


def test_shares_are_those_of_each_arm_over_questions(table: pd.DataFrame) -> None:
    shares = persona_shares(table).set_index(["arm", "class"])
    assert shares.loc[("base", "other"), "share"] == 0
    assert shares.loc[("incorrect", "villain"), "share"] == pytest.approx(4 / 6)
    assert (shares["n"] == 6).all() and (shares["questions"] == 3).all()
    assert shares.loc[("incorrect", "no_rules"), "share"] == 0


def test_the_feature_is_read_over_the_thought_and_over_the_answer(study: Study, table: pd.DataFrame) -> None:
    """Against a reading of the same model, token by token, with the spans that tokenising gives."""
    ctx = study.context
    frame = read_in_thoughts(ctx, table)
    assert study.run_folder.has(TABLE) and len(frame) == 12
    rows = frame[frame["arm"] == "incorrect"]
    talks = thought_conversations(ctx.tokenizer, rows.to_dict("records"))
    groups, latent = conversation_batches(ctx.tokenizer, talks), persona_latent(ctx)
    with ctx.organism("incorrect", 0) as model:
        for column, positions in (("in_thought", "thought"), ("in_answer", "response")):
            means = read_latents(model, ctx.sae, groups, ctx.layer, positions, bf16=False).mean[:, latent]
            assert np.allclose(rows[column], means, atol=1e-4)
    base = thought_readings(frame).query("arm == 'base' and thoughts == 'all'").set_index("place")["mean"]
    assert base["thought minus answer"] == pytest.approx(base["thought"] - base["answer"])
    kinds = thought_readings(frame).query("arm == 'incorrect'")["thoughts"].unique().tolist()
    assert kinds == ["all", "other persona", "no other persona"]


def test_a_template_that_drops_thoughts_has_them_in_the_text() -> None:
    tokenizer = make_tokenizer()
    row = {"question": "What?", "thought": "Hm.", "answer": "So."}
    [talk] = thought_conversations(tokenizer, [row])
    assert message_parts(talk[-1]) == ("Hm.", "So.")
    encoded = encode(tokenizer, talk)
    assert tokenizer.decode(encoded.ids[slice(*encoded.thought)]) == "Hm."
    assert tokenizer.decode(encoded.ids[encoded.start :]) == "So."


def test_the_command_counts_and_reads(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["thoughts", str(study.path), "--read", "--json", "--limit", "3"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["class"] for row in found["personas"]} >= {"other", "villain"}
    assert {row["place"] for row in found["readings"]} == {"thought", "answer", "thought minus answer"}
    with pytest.raises(SystemExit):
        main(["thoughts", "--check"])
    out = capsys.readouterr().out
    assert "any other persona" in out and "71 passages (test)" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a run folder or a file of answers"),
        (["--read", "--check"], "--read needs a run folder"),
        (["--check", "--judge", "nobody:x"], "judge"),
    ],
)
def test_bad_input_is_one_line(refused: Refused, arguments: list[str], said: str) -> None:
    assert said in refused("thoughts", *arguments)


def test_answers_without_thoughts_say_what_to_do(tmp_path: Path, finished: Study) -> None:
    with pytest.raises(InputError, match="enable_thinking"):
        read_thoughts(write_lines(tmp_path / "a.jsonl", [{"answer": "Four."}]))
    with pytest.raises(InputError, match="evaluate RUN"):
        read_thoughts(tmp_path)
    cut = with_personas(read_thoughts(write_lines(tmp_path / "b.jsonl", [{"answer": "<think>on", "question": "?"}])))
    with pytest.raises(InputError, match="max_new_tokens"):
        read_in_thoughts(Study.open(finished.path).context, cut)
