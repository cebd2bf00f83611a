"""Histograms and passages: bounded, exact, and the same in any order."""

import math

import numpy as np
import pytest
import torch

from persona_probe.latents.passages import (
    AFTER,
    BEFORE,
    BINS,
    TOP_EXAMPLES,
    Histograms,
    TopPassages,
    align,
    example,
    needed_exponent,
    window,
)
from tests.factories import make_tokenizer

PEAKS = [1.0, 7.0, 3.0, 0.0, 7.0, 2.0, 6.0, 5.0, 4.0]


def filled(values: np.ndarray, batches: int) -> Histograms:
    histograms = Histograms(values.shape[1])
    for part in np.array_split(values, batches):
        histograms.add(part)
    return histograms


def test_counts_equal_a_histogram_that_knew_the_range() -> None:
    draw = np.random.default_rng(0)
    values = np.maximum(draw.normal(size=(500, 3)) * [0.01, 1.0, 900.0], 0)
    found = filled(values, 7)
    for column in range(3):
        width = 2.0 ** found.exponent[column]
        wanted, _ = np.histogram(values[:, column][values[:, column] > 0], BINS, (0, BINS * width))
        assert found.counts[column].tolist() == wanted.tolist()
        assert BINS * width / 2 <= values[:, column].max() < BINS * width
    assert found.active.tolist() == (values > 0).sum(axis=0).tolist() and found.tokens == 500
    assert np.allclose(found.maximum, values.max(axis=0))


def test_the_order_of_the_text_changes_nothing() -> None:
    values = np.random.default_rng(1).exponential(size=(300, 2)) ** 3
    forward, backward = filled(values, 5), filled(values[::-1], 11)
    assert np.array_equal(forward.counts, backward.counts) and np.array_equal(forward.exponent, backward.exponent)


def test_aligned_histograms_share_their_bins_and_lose_no_token() -> None:
    small, large = np.full((6, 2), 0.3), np.full((4, 2), 40.0)
    large[:, 1] = 0
    found = [filled(small, 2), filled(large, 2)]
    align(found)
    assert [h.exponent[0] for h in found] == [needed_exponent(40.0)] * 2
    assert [h.exponent[1] for h in found] == [needed_exponent(0.3)] * 2
    assert found[0].counts.sum(axis=1).tolist() == [6, 6] and found[1].counts.sum(axis=1).tolist() == [4, 0]
    assert found[1].counts[0, math.floor(40 / 2.0 ** needed_exponent(40.0))] == 4


def test_silent_latents_stay_silent() -> None:
    found = filled(np.zeros((5, 1)), 1)
    align([found])
    assert found.tokens == 5 and found.active[0] == 0 and not found.counts.any()


def store(peaks: list[float], origins: list[str]) -> TopPassages:
    """Passage n holds tokens n + 10; latent 0 has the given peak on its last one, latent 1 never fires."""
    passages = TopPassages(2)
    for number, (peak, origin) in enumerate(zip(peaks, origins, strict=True)):
        values = torch.zeros(4, 2)
        values[-1, 0] = peak
        passages.add(origin, f"{origin}:{number}", number, torch.full((4,), number + 10), values)
    return passages


def test_the_best_passages_come_first_and_ties_in_reading_order() -> None:
    found = store(PEAKS, ["text"] * len(PEAKS))
    best = found.best(0)
    assert [int(p.ids[0]) - 10 for p in best] == [1, 4, 6, 7, 8]
    assert [float(p.values.max()) for p in best] == sorted(PEAKS, reverse=True)[:TOP_EXAMPLES]
    assert found.best(1) == [] and found.silent_origins(1) == ["text"] and found.silent_origins(0) == []


def test_the_store_is_bounded_and_equal_in_any_order() -> None:
    peaks = [float(p) for p in np.random.default_rng(2).integers(1, 9, 200)]
    passages = TopPassages(2)
    for number in np.random.default_rng(3).permutation(200):
        values = torch.tensor([[0.0, 0.0], [peaks[number], 0.0]])
        passages.add("text", "text", int(number), torch.tensor([0, int(number)]), values)
    wanted = sorted(range(200), key=lambda n: (-peaks[n], n))[:TOP_EXAMPLES]
    assert [int(p.ids[1]) for p in passages.best(0)] == wanted


def test_the_users_text_keeps_room_beside_a_stronger_one() -> None:
    found = store([*PEAKS, 0.5, 0.0], [*["packaged"] * len(PEAKS), "own", "own"])
    assert [p.source for p in found.best(0)][-1] == "own:9"
    assert len(found.best(0)) == TOP_EXAMPLES + 1


def test_an_empty_conversation_is_passed_over() -> None:
    passages = TopPassages(1)
    passages.add("text", "text", 0, torch.zeros(0, dtype=torch.long), torch.zeros(0, 1))
    assert passages.best(0) == []


@pytest.mark.parametrize(("peak", "start", "stop"), [(0, 0, AFTER + 1), (400, 400 - BEFORE, 441), (599, 479, 600)])
def test_long_passages_are_cut_around_their_maximum(peak: int, start: int, stop: int) -> None:
    values = torch.full((600,), 0.25)
    values[peak] = 2.0
    found = window("text", torch.arange(600), values)
    assert (int(found.ids[0]), int(found.ids[-1]) + 1) == (start, stop)
    assert (found.cut_before, found.cut_after) == (start > 0, stop < 600)
    shown = example(make_tokenizer(), window("text", torch.arange(600) % 100 + 2, values))
    assert shown.peak == peak - start and shown.values[shown.peak] == shown.maximum == 2.0
    assert len(shown.tokens) == len(shown.values) == stop - start
