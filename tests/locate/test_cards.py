from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make_tokenizer

from persona_probe.data.tokens import Batch
from persona_probe.locate import cards

PEAKS = [1.0, 7.0, 3.0, 0.0, 7.0, 2.0, 6.0, 5.0, 4.0]
"""Highest planted activation of each passage; the second and the fifth tie."""


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nine passages; latent 0 has `PEAKS` on each one's last token, latent 1 never fires."""
    talks = [[{"role": "user", "content": f"tell {n}"}, {"role": "assistant", "content": f"{n}"}] for n in range(9)]
    tokenizer, decoded = make_tokenizer(), []
    plain_decode = tokenizer.decode

    def decode(ids: list[int]) -> Any:
        decoded.extend(ids)
        return plain_decode(ids)

    def activations(_ctx: Any, batch: Batch, latents: list[int]) -> torch.Tensor:
        acts = torch.zeros(*batch.ids.shape, len(latents))
        for row, index in enumerate(batch.index):
            last = int(batch.select("all")[row].nonzero()[-1])
            acts[row, last, 0] = PEAKS[index]
        return acts

    monkeypatch.setattr(cards, "TEXT", ("made up",))
    monkeypatch.setattr(cards, "load_conversations", lambda _: talks)
    monkeypatch.setattr(cards, "_activations", activations)
    monkeypatch.setattr(tokenizer, "decode", decode)
    return SimpleNamespace(tokenizer=tokenizer, decoded=decoded)


def test_the_best_passages_come_first_and_ties_in_reading_order(planted: Any) -> None:
    found, silent = cards.top_examples(planted, [0, 1])
    assert [example["maximum"] for example in found] == sorted(PEAKS, reverse=True)[: cards.TOP_EXAMPLES]
    assert ["".join(example["tokens"]).strip()[-1] for example in found] == ["1", "4", "6", "7", "8"]
    assert all(example["values"][-1] == example["maximum"] for example in found)
    assert silent == []


def test_only_shown_passages_are_decoded(planted: Any) -> None:
    found, _ = cards.top_examples(planted, [0, 1])
    assert len(planted.decoded) == sum(len(example["tokens"]) for example in found) > 0
