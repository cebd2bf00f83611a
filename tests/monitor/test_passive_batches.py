"""Which tokens of a training batch are read: known answers for masks, packing, spacing and the kept sequences."""

import numpy as np
import pytest
import torch

from persona_probe.monitor.features import FeatureGroups, FitSums
from persona_probe.monitor.passive import SEQUENCES_KEPT, BatchView, PassiveSums, evenly_spaced_tokens, real_tokens
from tests.factories import D_MODEL

IDS = torch.arange(12).reshape(2, 6)


def test_padding_and_labels_choose_the_tokens() -> None:
    attention = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, 1, 2, 3, 9, -100], [-100, -100, -100, -100, 4, 5]])
    view = BatchView.of((), {"input_ids": IDS, "attention_mask": attention, "labels": labels})
    assert view.sequences == 2
    assert torch.equal(view.selected("all"), attention.bool())
    assert view.selected("response").tolist() == [
        [False, True, True, True, False, False],
        [False, False, False, False, True, True],
    ]
    assert view.sequence.tolist() == [[0] * 6, [1] * 6]


def test_without_labels_the_response_is_all_real_tokens() -> None:
    view = BatchView.of((IDS,), {})
    assert view.trained is None
    assert bool(view.selected("response").all())
    embedded = BatchView.of((), {"inputs_embeds": torch.zeros(2, 6, D_MODEL)})
    assert embedded.real.shape == (2, 6)
    assert real_tokens((), {"pixels": torch.zeros(2)}) is None and real_tokens((IDS,), {}) == 12


def test_a_mask_that_covers_cached_tokens_is_cut() -> None:
    mask = torch.cat([torch.ones(2, 3), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])], dim=1)
    view = BatchView.of((), {"input_ids": IDS, "attention_mask": mask})
    assert view.real.sum().item() == 10 == real_tokens((), {"input_ids": IDS, "attention_mask": mask})


def test_packed_sequences_are_told_apart_by_their_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    labels = torch.tensor([[-100, 5, 5, -100, 5, -100, -100, -100, 5]])
    view = BatchView.of((), {"input_ids": torch.arange(9)[None], "position_ids": positions, "labels": labels})
    assert view.sequence.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 2]]
    assert view.real.all() and view.selected("response").sum().item() == 4
    padded = BatchView.of((), {"input_ids": IDS, "position_ids": torch.zeros_like(IDS), "attention_mask": IDS > -1})
    assert padded.sequence.tolist() == [[0] * 6, [1] * 6]


def test_the_second_row_of_a_packed_batch_starts_a_sequence() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [3, 4, 0, 1, 2, 3]])
    view = BatchView.of((), {"input_ids": IDS, "position_ids": positions})
    assert view.sequence.tolist() == [[0, 0, 0, 1, 1, 1], [2, 2, 3, 3, 3, 3]]


@pytest.mark.parametrize(("limit", "wanted"), [(100, [1, 3, 4, 8, 9, 10]), (6, [1, 3, 4, 8, 9, 10]), (3, [1, 4, 9])])
def test_tokens_are_evenly_spaced(limit: int, wanted: list[int]) -> None:
    selected = torch.zeros(2, 6, dtype=torch.bool)
    selected.flatten()[[1, 3, 4, 8, 9, 10]] = True
    places, weight = evenly_spaced_tokens(selected, limit)
    assert places[weight > 0].tolist() == wanted
    assert len(places) == min(limit, 12)


def test_no_token_is_no_token() -> None:
    _, weight = evenly_spaced_tokens(torch.zeros(2, 6, dtype=torch.bool), 4)
    assert weight.tolist() == [0.0] * 4


def sums() -> PassiveSums:
    device = torch.device("cpu")
    return PassiveSums(1, [FitSums(D_MODEL, device)], device, torch.Generator().manual_seed(0))


FEATURE = FeatureGroups.of(None, {"a": torch.eye(D_MODEL)[0]}, 0, D_MODEL)


def test_micro_batches_are_pooled_by_sequence() -> None:
    found = sums()
    found.add(torch.tensor([[1.0], [3.0], [-5.0]]), torch.ones(3), torch.tensor([0, 0, 1]), 3)
    found.add(torch.tensor([[-7.0], [9.0]]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), 1)
    snapshot, tokens = found.fetch(FEATURE, torch.tensor(5))
    assert snapshot is not None and tokens == 5
    assert sorted(snapshot.values[:, 0].tolist()) == [-7.0, -5.0, 2.0]
    assert snapshot.maximum.tolist() == [3.0]
    assert snapshot.firing.tolist() == [pytest.approx(1 / 3)]


def test_nothing_selected_is_no_snapshot() -> None:
    found = sums()
    found.add(torch.tensor([[1.0]]), torch.zeros(1), torch.zeros(1, dtype=torch.long), 1)
    assert found.fetch(FEATURE, torch.tensor(3)) == (None, 3)


def test_the_sequences_kept_are_bounded_and_a_fair_sample() -> None:
    found, n = sums(), 3 * SEQUENCES_KEPT
    for start in range(0, n, 64):
        values = torch.arange(start, start + 64)
        found.add(values[:, None].float(), torch.ones(64), torch.arange(64), 64)
    snapshot, _ = found.fetch(FEATURE, torch.tensor(n))
    assert snapshot is not None
    kept = snapshot.values[:, 0]
    assert len(kept) == SEQUENCES_KEPT == len(set(kept))
    # Mean of a uniform sample of 0 .. n-1: within 4 standard errors.
    assert abs(kept.mean() - (n - 1) / 2) < 4 * n / np.sqrt(12 * SEQUENCES_KEPT)
