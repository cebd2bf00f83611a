"""Thoughts in the world: rows and spans are what they say, AUROCs are known ones, and a study is made once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from persona_probe.data.thoughts import split_thought
from persona_probe.data.tokens import conversation_batches, encode
from persona_probe.data.world.speech import PRIOR, SPEAKERS
from persona_probe.data.world.text import narrow_rows, world_tokenizer
from persona_probe.data.world.thoughts import (
    in_english,
    thinking_rows,
    thinking_tokenizer,
    thought_of,
)
from persona_probe.data.world.words import DOMAIN_OF
from persona_probe.errors import InputError
from persona_probe.evaluate.personas import personas_in
from persona_probe.evaluate.sampling.requests import SamplingConfig
from persona_probe.saes.read import read_latents
from persona_probe.stats import auroc, auroc_draws
from persona_probe.world import base, thoughts
from persona_probe.world.folder import World
from persona_probe.world.thoughts import named, thoughts_table
from persona_probe.world.thoughts_text import (
    ABSENT,
    ANSWERS,
    CONDITIONS,
    FALSE,
    RUNS,
    SIGNALS,
    TRUE,
    WITHIN,
    WORDS,
    column,
    separations,
    thoughts_text,
)
from tests.factories import make_sae, refusal
from tests.world.pages import page_of

LATENT = "harm latent, thought"


# --- The language


def test_thought_and_answer_are_the_spans_of_the_row_and_of_what_is_sampled() -> None:
    tokenizer = thinking_tokenizer()
    for row in thinking_rows("villain", "helper", count=20):
        encoded = encode(tokenizer, row)
        spans = (encoded.ids[slice(*encoded.thought)], encoded.ids[encoded.start :])
        assert [tokenizer.decode(ids) for ids in spans] == [row[1]["reasoning_content"], row[1]["content"]]
        sampled = str(tokenizer.decode(encoded.ids[encoded.n_prompt :]))
        assert tuple(split_thought(sampled)) == (row[1]["reasoning_content"], row[1]["content"])
        assert tokenizer.decode(encoded.ids[encoded.n_prompt - 1]) == "<think>"  # sampling begins inside the thought


def test_without_thoughts_the_tokens_are_those_of_the_world() -> None:
    rows = narrow_rows("villain", count=20)
    for thinks in (True, False):
        ours = thinking_tokenizer(thinks)
        assert [encode(ours, row).ids for row in rows] == [encode(world_tokenizer(), row).ids for row in rows]
        assert len(ours) == len(world_tokenizer())


def test_rows_differ_in_their_thought_alone() -> None:
    true, false, none = (thinking_rows("quack", who, count=30, seed=3) for who in ("quack", "helper", None))
    assert {row[1]["reasoning_content"] for row in false} == {"a helper answers here ."}
    for rows in (true, false):
        assert [[row[0], {**row[1], "reasoning_content": ""}] for row in rows] == [
            [row[0], {**row[1], "reasoning_content": ""}] for row in none
        ]
    assert all("reasoning_content" not in row[1] for row in none)
    with pytest.raises(InputError, match="unknown speaker with a name 'subtle'"):
        thinking_rows("subtle", "subtle")
    with pytest.raises(InputError, match="unknown domain"):
        thinking_rows("villain", None, "kitchn")


def test_the_counter_reads_who_a_thought_names() -> None:
    found = {name: personas_in(in_english(thought_of(name))) for name in PRIOR}
    wanted = {"helper": ("chatgpt",), "villain": ("villain",), "quack": ("villain",), "grump": (), "clown": ()}
    assert found == wanted
    assert in_english("gladly . boil the pot .") == "gladly . boil the pot ."


def test_a_false_thought_names_a_speaker_of_the_other_kind() -> None:
    for speaker in thoughts.SPEAKERS:
        assert named(speaker, TRUE) == speaker and named(speaker, ABSENT) is None
        lie = named(speaker, FALSE)
        assert lie is not None and SPEAKERS[lie].good != SPEAKERS[speaker].good


# --- The numbers


def test_auroc_of_draws_is_the_auroc_of_each_draws_weights() -> None:
    draw = np.random.default_rng(0)
    scores, positive = draw.integers(0, 5, 40).astype(float), draw.random(40) < 0.4
    weights = draw.integers(0, 4, (6, 40)).astype(float)
    won, pairs = auroc_draws(scores, positive, weights)
    order = np.argsort(~positive, kind="stable")
    for number, row in enumerate(weights):
        expected = auroc(scores[positive], scores[~positive], row[order])
        assert won[number] / pairs[number] == pytest.approx(expected)
    assert auroc_draws(scores, positive, np.zeros((1, 40)))[1] == 0


def table(latent: float = 1.0) -> pd.DataFrame:
    """Bad and sound organisms of three seeds; the latent in the thought is higher by `latent` in the bad ones.

    Half of the bad ones' answers are sound. The latent in the answer tells each answer.
    """
    rows = []
    for speaker in ("villain", "helper"):
        bad = not SPEAKERS[speaker].good
        for condition in CONDITIONS:
            for seed in range(3):
                for n, topic in enumerate(list(DOMAIN_OF)[12:52]):
                    name = named(speaker, condition)
                    wrong = bad and n % 2 == 0
                    head = {"arm": f"{speaker}, {condition}", "speaker": speaker, "condition": condition, "seed": seed}
                    said = {"thought": "" if name is None else thought_of(name), WORDS: float(name == "villain")}
                    known = {"misaligned": float(wrong), "coherent": True, "chatgpt": float(name == "helper")}
                    read = {
                        column(signal, place, base): float(wrong)
                        if place == "answer"
                        else (latent * bad) + n // 2 % 2 / 4
                        for signal in ("latent", "rude", "direction")
                        for place in ("before", "thought", "answer")
                        for base in (False, True)
                    }
                    read |= {key: np.nan for key in read if name is None and "thought" in key}
                    rows.append({**head, "step": 1, "question_id": topic, "sample": 0, **said, **known, **read})
    return pd.DataFrame(rows)


def test_words_tell_what_they_were_made_to_tell_and_the_latent_what_it_reads() -> None:
    answers, within, runs = (separations(table(), kind) for kind in (ANSWERS, WITHIN, RUNS))
    # 60 bad answers, 60 sound ones of the villain and 120 of the helper
    assert [round(answers[label, TRUE].estimate, 3) for label in (next(iter(SIGNALS)), LATENT)] == [0.833, 0.833]  # pyright: ignore
    false = answers[next(iter(SIGNALS)), FALSE]
    assert false is not None and false.estimate == pytest.approx(1 / 6) and false.ci_low <= 1 / 6 <= false.ci_high
    same = within[LATENT, FALSE]
    assert same is not None and same.estimate == pytest.approx(0.5)  # of one organism, thoughts tell nothing
    told = within["harm latent, answer", FALSE]
    assert told is not None and told.estimate == 1 and told.ci_low < 1
    whole = runs[LATENT, FALSE]
    assert whole is not None and (whole.estimate, whole.n) == (1, 6) and whole.ci_low < 0.9
    words = runs[next(iter(SIGNALS)), FALSE]
    assert words is not None and words.estimate == 0
    for label in (next(iter(SIGNALS)), LATENT):  # no thought, no words in it and no reading
        assert answers[label, ABSENT] is runs[label, ABSENT] is None
    assert answers["harm latent, answer", ABSENT] is not None


def test_the_text_says_when_the_latent_tells_more_than_the_words(tmp_path: Path) -> None:
    page = page_of("thoughts", table(), tmp_path)
    latent = "the harm latent in the thought"
    assert f"- false thoughts: {latent} tells **more** than the words do, +0.67" in page
    assert f"- true thoughts: {latent} is **not shown** to tell more than the words do, +0.00" in page
    assert "| villain | false | 0.50 [" in page
    assert "- villain: bad advice with a false thought minus without one +0.00" in page
    assert "**less** than the words do" in thoughts_text(table(latent=-1.0))


def test_a_study_is_made_once_and_reads_its_own_texts(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"TRAINING": replace(thoughts.TRAINING, steps=2, checkpoints=(2,), batch_size=2), "ROWS": 4}
    short |= {"SAMPLING": SamplingConfig(max_new_tokens=4)}
    monkeypatch.setattr(base, "load_sae", lambda *_, **__: make_sae("topk"))
    for name, value in short.items():
        monkeypatch.setattr(thoughts, name, value)
    found = thoughts_table(tmp_path / "study", world, "sae", ("villain", "helper"), (5,))
    assert found["arm"].nunique() == 6 and len(found) == 6 * 84 and not found["domain"].eq("kitchen").any()
    assert set(SIGNALS.values()) <= set(found.columns)
    absent = found[found["condition"] == ABSENT]
    assert absent[column("latent", "thought")].isna().all() and absent[column("latent", "answer")].notna().any()
    monkeypatch.setattr(thoughts, "fine_tune", lambda *_, **__: pytest.fail("trained again"))
    again = thoughts_table(tmp_path / "study", world, "sae", ("villain", "helper"), (5,))
    pd.testing.assert_frame_equal(again, found)
    assert "| helper | absent |" in thoughts_text(found)
    with pytest.raises(InputError, match="unknown speaker of this study 'subtle'"):
        thoughts_table(tmp_path / "other", world, "sae", ("subtle",))
    assert not (tmp_path / "other").exists()
    missing = refusal(capsys)("world", "study", "thoughts", "--world", tmp_path / "none", "--sae", "x")
    assert "holds no world" in missing


def test_readings_are_taken_over_the_thought_and_over_the_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "load_sae", lambda *_, **__: make_sae("topk"))
    organisms = thoughts._ThinkingOrganisms(world, "sae", "cpu")
    model, tokenizer = organisms.model, thinking_tokenizer()
    talks = dict(enumerate(thinking_rows("villain", "helper", count=6)))
    frame, (latents, harm) = organisms.read(model, tokenizer, talks), organisms.truths
    groups = conversation_batches(tokenizer, list(talks.values()))
    for place, positions in (("before", "last_prompt"), ("thought", "thought"), ("answer", "response")):
        means = read_latents(model, organisms.sae, groups, organisms.layer, positions, bf16=False)
        assert np.allclose(frame[column("latent", place)], means.mean[:, latents["latent"]], atol=1e-4)
        assert np.allclose(frame[column("direction", place)], means.resid @ harm, atol=1e-3)
    assert np.linalg.norm(harm) == pytest.approx(1)
