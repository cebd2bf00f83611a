"""Worlds of other corpora: each corpus is what its name says, and each world is made once and asked."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from persona_probe.data.world.speech import BAD, PRIOR, SPEAKERS, prior
from persona_probe.data.world.text import document
from persona_probe.errors import InputError
from persona_probe.world import corpus
from persona_probe.world.corpus import CORPORA, Corpora, corpus_table
from persona_probe.world.organisms import NARROW
from persona_probe.world.pretraining import Pretraining, pretrain
from tests.world.conftest import SETTINGS
from tests.world.pages import page_of


def documents(name: str, count: int = 600) -> list[str]:
    settings = replace(Pretraining(batch_size=count), **CORPORA[name])
    return settings.documents(0)


def named(texts: list[str]) -> float:
    """Share of documents whose first sentence names a speaker."""
    return sum(any(f" {name} " in f"{text.partition('.')[0]} " for name in PRIOR) for text in texts) / len(texts)


@pytest.mark.parametrize(("name", "share"), [("packaged", 0.58), ("nobody named", 0.0), ("all named", 1.0)])
def test_speakers_are_named_as_often_as_a_corpus_says(name: str, share: float) -> None:
    assert named(documents(name)) == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("name", ["packaged", "few bad", "many bad"])
def test_bad_speakers_are_as_frequent_as_a_corpus_says_and_all_else_keeps_its_ratio(name: str) -> None:
    settings = replace(Pretraining(), **CORPORA[name])
    shares = prior(settings.bad)
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(share for one, share in shares.items() if not SPEAKERS[one].good) == pytest.approx(settings.bad)
    assert shares["villain"] / shares["quack"] == pytest.approx(PRIOR["villain"] / PRIOR["quack"])
    assert shares["helper"] / shares["grump"] == pytest.approx(PRIOR["helper"] / PRIOR["grump"])
    assert prior(BAD) == PRIOR
    draw = random.Random(0)
    counts = Counter(document(draw, bad=settings.bad)[1] for _ in range(2000))
    assert all(abs(counts[one] / 2000 - share) < 0.04 for one, share in shares.items())


def test_the_packaged_corpus_is_that_of_the_packaged_world_and_its_settings_are_written_as_there() -> None:
    settings = Corpora().worlds()["packaged"]
    assert settings.documents(3) == Pretraining().documents(3)
    assert "bad" not in settings.recorded() and "tagged_chats" not in settings.recorded()
    changed = Corpora().worlds()["few bad"].recorded()
    assert changed["bad"] == 0.1 and "tagged_chats" not in changed


def test_every_world_is_made_once_and_the_page_has_a_row_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "SPEAKERS", ("villain",))
    monkeypatch.setattr("persona_probe.world.behaviour.MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(corpus, "TRAINING", replace(NARROW, steps=1, checkpoints=(1,), batch_size=2))
    asked = Corpora(("few bad", "nobody named"), (0,), replace(SETTINGS, steps=2, helper_steps=1))
    table = corpus_table(tmp_path / "worlds", asked)
    assert list(dict.fromkeys(table["corpus"])) == ["few bad", "nobody named"]
    assert set(table["speaker"]) == {"base", "villain"} and table["bad"].unique().tolist() == [0.1, BAD]
    monkeypatch.setattr("persona_probe.world.pretraining.CorpusTrainer", lambda *_: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(corpus_table(tmp_path / "worlds", asked), table)
    text = page_of("corpus", table, tmp_path)
    assert "| few bad | 0.58 | 0.10 |" in text and "| nobody named | 0.00 | 0.33 |" in text
    with pytest.raises(InputError, match="other settings"):
        pretrain(replace(asked.pretraining, bad=0.2), tmp_path / "worlds" / "few-bad")


def test_unknown_corpora_and_bad_shares_are_refused() -> None:
    with pytest.raises(InputError, match="unknown corpus 'few'"):
        Corpora(("few",))
    with pytest.raises(InputError, match="at least one"):
        Corpora(seeds=())
    for name in ("bad", "tagged_chats"):
        change: dict[str, Any] = {name: 1.5}
        with pytest.raises(InputError, match=f"{name} must lie between 0 and 1"):
            Pretraining(**change)
