"""Shards and shuffled batches: every token once an epoch, the same sequence every time."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.data.tokens import batches
from persona_probe.errors import InputError
from persona_probe.models.taps import read
from persona_probe.saes import stream
from persona_probe.saes.stream import residual_stream, shuffled_batches, write_shards
from tests.factories import LAYER, talks


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Four shards of ten numbered tokens each."""
    paths = [tmp_path / f"shard-{n}.safetensors" for n in range(4)]
    for n, path in enumerate(paths):
        save_file({"acts": torch.arange(10 * n, 10 * n + 10, dtype=torch.bfloat16)[:, None]}, path)
    return paths


def taken(shards: list[Path], count: int, **kwargs: int) -> list[list[int]]:
    arguments = {"batch_tokens": 5, "buffer_tokens": 20, "seed": 3, **kwargs}
    return [b[:, 0].int().tolist() for b in islice(shuffled_batches(shards, **arguments), count)]


def test_every_token_once_an_epoch_and_epochs_differ(shards: list[Path]) -> None:
    drawn = taken(shards, 16)
    first, second = [[n for batch in part for n in batch] for part in (drawn[:8], drawn[8:])]
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second and first != sorted(first)


def test_the_sequence_depends_on_the_arguments_only(shards: list[Path]) -> None:
    drawn = taken(shards, 16)
    torch.manual_seed(99)
    assert taken(shards, 16) == drawn
    assert taken(shards, 16, seed=4) != drawn


@pytest.mark.parametrize("skip", [1, 7, 8, 13])
def test_skipping_is_dropping_the_first(shards: list[Path], skip: int) -> None:
    assert taken(shards, 20 - skip, skip=skip) == taken(shards, 20)[skip:]


def test_too_few_tokens_for_a_batch(shards: list[Path]) -> None:
    with pytest.raises(InputError, match="fewer than 50 tokens"):
        taken(shards, 1, batch_tokens=50, buffer_tokens=100)


def test_residual_stream_holds_the_selected_tokens(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = talks(4)
    found = residual_stream(tiny_model, tiny_tokenizer, rows, LAYER, positions="response", batch_size=2, bf16=False)
    parts = []
    for batch in batches(tiny_tokenizer, rows, 2):
        with torch.no_grad(), read(tiny_model, LAYER) as tap:
            tiny_model(batch.ids, attention_mask=batch.attention)
        parts.append(tap.value[batch.select("response")])
    assert torch.allclose(found, torch.cat(parts), atol=1e-5)


def test_finished_shards_are_kept_and_stopped_ones_made_again(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "SHARD_CONVERSATIONS", 2)
    paths = write_shards(tiny_model, tiny_tokenizer, talks(), LAYER, tmp_path)
    assert len(paths) == 3
    whole = [load_file(p)["acts"] for p in paths]
    paths[1].unlink()
    stamp = paths[0].stat().st_mtime_ns
    again = write_shards(tiny_model, tiny_tokenizer, talks(), LAYER, tmp_path)
    assert paths[0].stat().st_mtime_ns == stamp
    assert all(torch.equal(load_file(p)["acts"], acts) for p, acts in zip(again, whole, strict=True))
    wanted = len(residual_stream(tiny_model, tiny_tokenizer, talks(), LAYER))
    assert sum(len(acts) for acts in whole) == wanted
