"""Random draws: what is planted, and what else tells two arms apart."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError
from persona_probe.planted.plants import Plant
from persona_probe.planted.stream import Stream

SEVERAL = 5
"""Latents of a plant of kind `latents`."""
FREQUENT = 0.01
"""Share of answer tokens from which on a latent counts as frequent; the rest of the live ones are rare."""
READER_SPREAD = 0.5
"""Standard deviation over tokens of a planted LoRA's random part, relative to its mean output."""
NEAREST = 64
"""Decoder rows that a direction without latent is made orthogonal to."""


def _unit(vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    return vector / vector.norm()


def uncarried_direction(
    decoder: Float[Tensor, "d_sae d_model"], generator: torch.Generator, rounds: int = 8
) -> Float[Tensor, " d_model"]:
    """A random unit direction from which the nearest decoder rows are projected out, again in every round.

    At most half of the model's dimensions are taken away, so that the direction stays random.
    """
    rows = decoder[decoder.norm(dim=1) > 0]
    direction = _unit(torch.randn(rows.shape[1], generator=generator))
    count = min(NEAREST, len(rows), rows.shape[1] // (2 * rounds))
    taken = rows[:0]
    for _ in range(rounds):
        near = (rows @ direction / rows.norm(dim=1)).abs().topk(max(count, 1)).indices
        taken = torch.cat([taken, rows[near]])
        basis = torch.linalg.qr(taken.T).Q
        direction = _unit(direction - basis @ (basis.T @ direction))
    return direction


def _reader(stream: Stream, generator: torch.Generator) -> Float[Tensor, " d_mlp"]:
    """Reads the mean activation, and something random: mean output exactly 1 over answer tokens."""
    mean = stream.weights @ stream.hidden
    other = torch.randn(len(mean), generator=generator)
    reader = mean / mean.square().sum() + READER_SPREAD * other / (stream.hidden @ other).std()
    size = float(mean @ reader)
    if size <= 0:
        raise InputError("the random part of a planted LoRA outweighs its mean: lower READER_SPREAD or read more text")
    return reader / size


def pools(rates: Float[Tensor, " d_sae"]) -> dict[str, list[int]]:
    """Live latents to plant, frequent and rare, by the share of answer tokens on which they fire in the base.

    Raises:
        InputError: the SAE is nearly dead on this text.
    """
    frequent = (rates >= FREQUENT).nonzero()[:, 0].tolist()
    rare = ((rates > 0) & (rates < FREQUENT)).nonzero()[:, 0].tolist()
    if len(frequent) < SEVERAL:
        raise InputError(
            f"only {len(frequent)} latents fire on {FREQUENT:.0%} of the tokens: this SAE does not fit the model"
        )
    return {"frequent": frequent, "rare": rare}


def draw_latents(pool: Sequence[int], count: int, n_latents: int, generator: torch.Generator) -> tuple[int, ...]:
    """The first of the pool in a random order of the whole dictionary.

    Rates come from a reading, whose last digits depend on the number of threads: a latent that enters or leaves the
    pool must not change every draw.

    Raises:
        InputError: an empty pool.
    """
    if not pool:
        raise InputError(f"every live latent fires on {FREQUENT:.0%} of the tokens: leave 'rare latent' out of kinds")
    allowed = set(pool)
    return tuple(i for i in torch.randperm(n_latents, generator=generator).tolist() if i in allowed)[:count]


def make_plants(
    kind: str,
    sizes: Sequence[float],
    stream: Stream,
    decoder: Float[Tensor, "d_sae d_model"],
    pool: dict[str, list[int]],
    generator: torch.Generator,
) -> list[Plant]:
    """One random plant of a kind, at every size; `nothing` has the one size 0.

    Raises:
        InputError: there is no latent of that kind to plant.
    """
    unit, zero = stream.sd, torch.zeros(decoder.shape[1])
    if kind == "nothing":
        return [Plant(kind, 0.0, (), (), zero)]
    if kind == "no latent":
        direction = uncarried_direction(decoder, generator)
        return [Plant(kind, size, (), (), direction * size * unit) for size in sizes]
    chosen, count = pool["rare" if kind == "rare latent" else "frequent"], SEVERAL if kind == "latents" else 1
    names = draw_latents(chosen, count, len(decoder), generator)
    coins = (torch.randint(0, 2, (len(names),), generator=generator) * 2 - 1).tolist()
    signs = tuple(coins) if kind == "latents" else (1,)
    reader = _reader(stream, generator) if kind == "lora" else None
    rows = torch.stack([_unit(decoder[latent]) * sign for latent, sign in zip(names, signs, strict=True)])
    return [Plant(kind, size, names, signs, rows.sum(dim=0) * size * unit, reader) for size in sizes]


def disturbance(
    stream: Stream, generator: torch.Generator, noise: float, benign: float
) -> Float[Tensor, "tokens d_model"]:
    """What else tells one arm from another: every arm draws its own, so that incorrect minus correct is never clean.

    Args:
        noise: norm, in residual standard deviations, of a random vector added to each conversation.
        benign: root mean square norm, in the same unit, of the output of a random rank-1 LoRA: a small change without
            meaning that is the same function in every conversation, so that resampling questions cannot see it.
    """
    width = stream.resid.shape[1]
    by_talk = torch.randn(len(stream.clusters), width, generator=generator) * (noise * stream.sd / width**0.5)
    output = stream.hidden @ torch.randn(stream.hidden.shape[1], generator=generator)
    output *= benign * stream.sd / output.square().mean().sqrt()
    return by_talk[stream.conversation] + output[:, None] * _unit(torch.randn(width, generator=generator))
