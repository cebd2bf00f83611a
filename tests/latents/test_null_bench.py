"""`make null`: rules applied to runs whose truth the test makes."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import null
from benchmarks.null import causal_words, error_table, pair_table, pair_words, read_run, table_text
from persona_probe.data.load import load_contrast
from persona_probe.latents.unexplained import random_reference

CONVERSATIONS = 2 * len(load_contrast("selection"))
LATENTS, WIDTH = 96, 24
CATEGORIES = ("a", "b", "c", "d", "e", "f")


def write_run(place: Path, seed: int, rise: float = 0.0) -> None:
    """A run as `measure` leaves it: noise of the questions, and one latent that does nothing."""
    rng = np.random.default_rng(seed)
    place.mkdir(parents=True)
    questions = np.random.default_rng(0).normal(0, 0.5, 60)
    items = {"item": [f"q{n}" for n in range(60)], "category": [CATEGORIES[n % 6] for n in range(60)]}
    values = questions + rise + rng.normal(0, 0.1, 60)
    pd.DataFrame({**items, "split": "evaluation", "value": values}).to_parquet(place / "items.parquet")
    mean = np.abs(rng.normal(0, 0.1, (CONVERSATIONS, LATENTS)))
    resid = rng.normal(size=(CONVERSATIONS, WIDTH))
    np.savez(
        place / "latents.npz",
        mean=mean.astype(np.float16),
        firing=(mean > 0.1).astype(np.float16),
        resid=resid.astype(np.float32),
        total=np.zeros(WIDTH),
    )
    record = {"values": rng.normal(rise, 0.1, 64).tolist(), "fit": {"n": 100, "error": 1.0, "square": 4.0}}
    (place / "reading.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("null")
    for number, name in enumerate(("base", *(f"run-{n:03d}" for n in range(4)))):
        write_run(folder / name, number)
    write_run(folder / "woken", 9, rise=0.8)
    return folder


def test_runs_without_an_effect_say_nothing_and_one_with_an_effect_does(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = np.random.default_rng(5).normal(size=(LATENTS, WIDTH))
    monkeypatch.setattr(null, "_decoder", lambda: decoder)
    monkeypatch.setattr(null, "_reference", lambda: random_reference(decoder, n_random=100))
    words = pair_table(runs, 4)
    assert len(words) == 2
    assert not words[["woken", "beyond control", "rise: the reading leaves the base band"]].to_numpy().any()
    woken = pair_words(*(read_run(runs / name) for name in ("base", "woken", "run-000", "run-001")))
    assert woken["woken"] and woken["rise: the reading leaves the base band"]


def test_the_table_counts_errors_with_exact_intervals() -> None:
    words = pd.DataFrame({"one": [True, False, False, False], "none": [False] * 4})
    table = error_table(words, draws=50).set_index("rule")
    assert tuple(table.loc["one", ["errors", "n"]]) == (1, 4)
    assert (table.loc["none", "low"], table.loc["none", "high"]) == (0, pytest.approx(0.6024, abs=1e-4))
    assert "| one | 1 of 4 | 0.250 |" in table_text(table.reset_index())


def test_random_latents_of_the_record_are_rarely_called_causes() -> None:
    shares = causal_words(draws=400)
    assert set(shares) == {"moves", "needed", "causal"}
    assert max(shares.values()) < 0.2
