"""What the causal test shows: differences in differences by item, places among random latents, and the words."""

import numpy as np
import pandas as pd
import pytest

from persona_probe.latents.proof import item_differences, standing, with_verdict

N = 64


def items(shift: float) -> pd.DataFrame:
    """Two directions over six items of three questions, and a named direction that is no latent."""
    questions = ["a", "a", "b", "b", "c", "c"]
    rows = []
    for place, name in enumerate(["latent 3", "latent 11", "mean difference"]):
        for item, question in enumerate(questions):
            odd, fall = place + 0.1 * item + shift, 2 * place + shift * item
            rows.append({"name": name, "item": item, "question": question, "odd": odd, "fall": fall})
    return pd.DataFrame(rows)


def test_differences_are_paired_by_item() -> None:
    found = item_differences(items(0.5), items(0.2).sample(frac=1, random_state=0))
    assert found.index.tolist() == [3, 11]
    assert found["effect_difference"].tolist() == pytest.approx([0.3, 0.3])
    assert found["ablation_difference"].tolist() == pytest.approx([0.75, 0.75])
    assert (found["ablation_difference_low"] < 0.75).all()
    assert found["effect_difference_low"].tolist() == pytest.approx([0.3, 0.3])


def test_without_a_control_there_is_no_difference() -> None:
    found = item_differences(items(0.5), None)
    assert found.isna().all(axis=None)
    assert found.index.tolist() == [3, 11]


def latents(persona: float, n: int = N) -> pd.DataFrame:
    """A persona latent 0, another candidate 1, `n` random latents with effects up to 0.1, and two that moved."""
    rng = np.random.default_rng(0)
    effects = {
        "random": rng.uniform(-0.1, 0.1, n),
        "candidate": np.array([persona, 0.0]),
        "moved": np.array([0.3, 0.0]),
    }
    parts = []
    for kind, start in (("candidate", 0), ("moved", 2), ("random", 10)):
        values = effects[kind]
        frame = pd.DataFrame({"latent": start + np.arange(len(values)), "kind": kind, "effect_selection": values})
        for column in ("effect_base", "effect_organism", "effect_difference", "ablation", "ablation_difference"):
            frame[column], frame[f"{column}_low"], frame[f"{column}_high"] = values, values - 0.02, values + 0.02
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


def test_place_among_random_latents_and_those_that_moved() -> None:
    found = standing(latents(0.2), 0, "base", tries=2)
    assert found is not None
    assert (found.rank, found.controls, found.p) == (1, N, pytest.approx(1 / (N + 1)))
    assert (found.moved, found.n_moved) == (2, 2)
    assert found.beyond
    assert found.p_best == 0
    weak = standing(latents(0.05), 0, "base", tries=2)
    assert weak is not None
    larger = int((latents(0.05).query("kind == 'random'")["effect_base"].abs() >= 0.05).sum())
    assert (weak.rank, weak.p) == (larger + 1, pytest.approx((larger + 1) / (N + 1)))
    assert not weak.beyond


def test_few_random_latents_support_no_verdict() -> None:
    found = standing(latents(0.2, n=20), 0, "base", tries=2)
    assert found is not None
    assert found.rank == 1
    assert not found.beyond


def test_an_effect_that_was_not_measured_has_no_place() -> None:
    table = latents(0.2).assign(ablation_difference=np.nan)
    assert standing(table, 0, "removal_difference", tries=2) is None
    assert words(with_verdict(table, 2)) == [True, False, False]
    old = latents(0.2).drop(columns=[f"ablation_difference{end}" for end in ("", "_low", "_high")])
    assert standing(old, 0, "removal_difference", tries=2) is None


def words(verdict: pd.DataFrame, latent: int = 0) -> list[bool]:
    """Moves, needed and causal of one latent."""
    row = verdict.set_index("latent").to_dict("index")[latent]
    return [bool(row[name]) for name in ("moves", "needed", "causal")]


def test_moves_needed_and_both() -> None:
    verdict = with_verdict(latents(0.2), 2)
    assert words(verdict) == [True, True, True]
    assert not any(any(words(verdict, latent)) for latent in verdict["latent"] if latent != 0)
    table = latents(0.2)
    table.loc[0, "effect_organism_low"] = 0.0
    assert words(with_verdict(table, 2)) == [False, True, False]
