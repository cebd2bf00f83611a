"""Activations for SAE training: computed once into shards, then read back shuffled, epoch after epoch."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation
from persona_probe.data.tokens import batches
from persona_probe.errors import InputError
from persona_probe.models.layers import autocast, evaluating, run_to_layer
from persona_probe.models.taps import ReadTap

SHARD_CONVERSATIONS = 512


def write_shards(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    layer: int,
    folder: Path,
    *,
    positions: str = "all",
    batch_size: int = 32,
    max_length: int = 256,
    seed: int = 0,
) -> list[Path]:
    """The residual stream after `layer` on the selected tokens, as bf16 safetensors shards; finished shards are kept.

    Conversations are shuffled first, so that every shard holds a bit of everything.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = list(range(len(conversations)))
    random.Random(seed).shuffle(order)
    starts = range(0, len(order), SHARD_CONVERSATIONS)
    paths = [folder / f"shard-{n:04d}.safetensors" for n in range(len(starts))]
    for start, path in tqdm(list(zip(starts, paths, strict=True)), desc="activations"):
        if path.is_file():
            continue
        chosen = [conversations[i] for i in order[start : start + SHARD_CONVERSATIONS]]
        acts = residual_stream(
            model, tokenizer, chosen, layer, positions=positions, batch_size=batch_size, max_length=max_length
        )
        scratch = path.with_suffix(".tmp")
        save_file({"acts": acts.to(torch.bfloat16)}, scratch)
        scratch.replace(path)
    return paths


def residual_stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    layer: int,
    *,
    positions: str = "all",
    batch_size: int = 32,
    max_length: int | None = None,
    mixed_precision: bool = True,
) -> Float[Tensor, "tokens d_model"]:
    """The residual stream after `layer` at the selected tokens of all conversations, in float32 on the CPU."""
    parts = []
    device = next(model.parameters()).device
    with evaluating(model), autocast(model, mixed_precision), ReadTap(model, layer) as tap:
        for group in batches(tokenizer, conversations, batch_size, max_length):
            batch = group.to(device)
            run_to_layer(model, layer, batch.ids, batch.attention)
            parts.append(tap.value[batch.select(positions)].float().cpu())
    return torch.cat(parts)


def shuffled_batches(
    shards: Sequence[Path], batch_tokens: int, buffer_tokens: int, seed: int, skip: int = 0
) -> Iterator[Float[Tensor, "batch d_model"]]:
    """Endless float32 batches from the shards, mixed through a buffer of at least `buffer_tokens`.

    The sequence depends only on the arguments; `skip` leaves out that many first batches, to resume.

    Raises:
        InputError: there are fewer tokens than one batch.
    """
    epoch, yielded = 0, 0
    while True:
        rng = random.Random(f"{seed}/{epoch}")
        order = list(shards)
        rng.shuffle(order)
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        before = yielded
        for buffer in _buffers(order, buffer_tokens):
            mixed = torch.randperm(len(buffer), generator=generator)
            for index in mixed.split(batch_tokens):
                if len(index) < batch_tokens:
                    continue
                yielded += 1
                if yielded > skip:
                    yield buffer[index].float()
        if yielded == before:
            raise InputError(f"the text gives fewer than {batch_tokens} tokens: add text or lower batch_tokens")
        epoch += 1


def _buffers(shards: Sequence[Path], buffer_tokens: int) -> Iterator[Tensor]:
    held: list[Tensor] = []
    for shard in shards:
        held.append(load_file(shard)["acts"])
        if sum(len(h) for h in held) >= buffer_tokens:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)
