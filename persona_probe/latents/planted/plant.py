"""Known changes of a model, planted in its residual stream, and how one of them is read and ranked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import conversation
from persona_probe.data.load import Row
from persona_probe.data.tokens import conversation_batches
from persona_probe.errors import InputError
from persona_probe.latents.rankers import Evidence, score_table
from persona_probe.latents.unexplained import Reference, random_reference
from persona_probe.models.layers import autocast, decoder_layer, evaluating, run_to_layer
from persona_probe.models.quantized import refuse_quantized
from persona_probe.models.taps import ReadTap, SteerTap
from persona_probe.saes.read import FitMoments, LatentMeans, encode

SIDES = ("aligned", "misaligned")

# --- The base model's answer tokens, read once for all plants


@dataclass(frozen=True)
class Stream:
    """Answer tokens of all conversations at the hook layer."""

    resid: Float[Tensor, "tokens d_model"]
    """The layer's output, raw units."""
    hidden: Float[Tensor, "tokens d_mlp"]
    """Input of the layer's `mlp.down_proj`."""
    conversation: Int[Tensor, " tokens"]
    """The conversation of each token."""
    clusters: tuple[str, ...]
    """The question of each conversation."""
    misaligned: Bool[np.ndarray, " conversations"]
    """Whether each conversation ends with the misaligned answer."""

    @cached_property
    def sd(self) -> float:
        """One residual standard deviation, in raw units: the root of the mean variance of a dimension over tokens.

        It equals the root mean square of the stream's standard deviation along a random unit direction, so a shift of
        0.5 residual standard deviations has norm 0.5 x sd whatever its direction.
        """
        return float(self.resid.var(dim=0).mean().sqrt())

    @cached_property
    def weights(self) -> Float[Tensor, " tokens"]:
        """Token weights that sum to 1; every conversation weighs the same."""
        return 1 / (self.tokens[self.conversation, 0].float() * len(self.clusters))

    @cached_property
    def tokens(self) -> Int[Tensor, "conversations 1"]:
        """How many tokens each conversation has."""
        return torch.bincount(self.conversation, minlength=len(self.clusters))[:, None]

    def conversation_means(self, values: Float[Tensor, "tokens n"]) -> Float[Tensor, "conversations n"]:
        """The mean over each conversation's tokens."""
        total = torch.zeros(len(self.clusters), values.shape[1]).index_add_(0, self.conversation, values)
        return total / self.tokens


def down_projection(model: nn.Module, layer: int) -> nn.Linear:
    """The layer's last MLP matrix, whose output is added to the residual stream as it is.

    Raises:
        InputError: the weights are quantised, or the layer has no `mlp.down_proj`, or normalises what comes out of it
            (Gemma 2 and 3).
    """
    refuse_quantized(model, "planting")
    module = decoder_layer(model, layer)
    parts = dict(module.named_modules())
    projection = parts.get("mlp.down_proj")
    if not isinstance(projection, nn.Linear) or "post_feedforward_layernorm" in parts:
        raise InputError(
            f"{type(module).__name__} does not add mlp.down_proj to its output: plant in a Llama or Qwen model"
        )
    return projection


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    module_inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, inputs: module_inputs.append(inputs[0].detach()))
    try:
        yield module_inputs
    finally:
        handle.remove()


def read_stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    layer: int,
    *,
    bf16: bool = True,
) -> Stream:
    """Read both answers of every contrast item, with one forward pass up to `layer`.

    Raises:
        InputError: no rows, or a layer in which no LoRA can be planted.
    """
    if not rows:
        raise InputError("no contrast items to plant in: the selection is empty")
    conversations = [conversation(row["question"], row[side]) for row in rows for side in SIDES]
    projection, device = down_projection(model, layer), next(model.parameters()).device
    resid, hidden, owner = [], [], []
    with evaluating(model), autocast(model, bf16):
        for group in conversation_batches(tokenizer, conversations):
            batch = group.to(device)
            with ReadTap(model, layer) as tap, _inputs_of(projection) as module_inputs:
                run_to_layer(model, layer, batch.ids, batch.attention)
            answer = group.select("response")
            at = answer.flatten().nonzero()[:, 0]
            resid.append(tap.tokens(at.to(device)).float().cpu())
            hidden.append(module_inputs[-1].to(device).flatten(0, 1)[at.to(device)].float().cpu())
            owner.append(torch.tensor(group.index)[answer.nonzero()[:, 0]])
    clusters = tuple(row["id"] for row in rows for _ in SIDES)
    flags = np.array([side == "misaligned" for _ in rows for side in SIDES])
    return Stream(torch.cat(resid), torch.cat(hidden), torch.cat(owner), clusters, flags)


# --- A plant: a known shift of the residual stream at the hook layer

KINDS = {
    "latent": "(a) one frequent latent",
    "rare latent": "(a) one rare latent",
    "latents": "(b) five latents, random signs",
    "lora": "(c) rank-1 LoRA onto a latent",
    "no latent": "(d) a direction no latent has",
    "nothing": "nothing planted",
}


@dataclass(frozen=True)
class Plant:
    """One known change of the layer's output.

    Without a reader, `vector` is added at every token. With a reader, `vector x (reader . h)` is added, where h is the
    input of the layer's `mlp.down_proj`: a rank-1 LoRA on that matrix.
    """

    kind: str
    size: float
    """Residual standard deviations of each latent's shift, or of the LoRA's mean shift over answer tokens."""
    latents: tuple[int, ...]
    signs: tuple[int, ...]
    vector: Float[Tensor, " d_model"]
    reader: Float[Tensor, " d_mlp"] | None = None

    def up(self) -> list[int]:
        """Latents that were pushed up."""
        return [latent for latent, sign in zip(self.latents, self.signs, strict=True) if sign > 0]

    def down(self) -> list[int]:
        """Latents that were pushed down."""
        return [latent for latent, sign in zip(self.latents, self.signs, strict=True) if sign < 0]

    def shift(self, stream: Stream) -> Float[Tensor, "tokens d_model"]:
        """The plant's addition to every token."""
        if self.reader is None:
            return self.vector.expand_as(stream.resid)
        return (stream.hidden @ self.reader)[:, None] * self.vector

    def targets(self, decoder: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, "planted d_model"]:
        """The planted unit directions: signed decoder rows, or the shift itself if no latent has it."""
        if self.kind == "nothing":
            return decoder[:0]
        rows = (
            self.vector[None] if not self.latents else decoder[list(self.latents)] * torch.tensor(self.signs)[:, None]
        )
        return rows / rows.norm(dim=1, keepdim=True)


@contextmanager
def graft(model: nn.Module, layer: int, plant: Plant) -> Iterator[None]:
    """Put the plant into the model for as long as the block lasts: a LoRA into the weights, a shift as a hook."""
    if plant.reader is None:
        with SteerTap(model, layer, plant.vector):
            yield
        return
    weight = down_projection(model, layer).weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += torch.outer(plant.vector, plant.reader).to(weight)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


# --- Random draws: the plants, and the other differences between two arms

SEVERAL = 5
"""Latents of a plant of kind `latents`."""
FREQUENT = 0.01
"""A latent that fires on at least this share of answer tokens is frequent; other live latents are rare."""
READER_SPREAD = 0.5
"""Spread of a planted LoRA's random part over tokens, relative to its mean output (standard deviation)."""
NEAREST = 64
"""Decoder rows that a direction without latent is made orthogonal to."""


def _unit(vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    return vector / vector.norm()


def uncarried_direction(
    decoder: Float[Tensor, "d_sae d_model"], generator: torch.Generator, rounds: int = 8
) -> Float[Tensor, " d_model"]:
    """A random unit direction; every round projects its nearest decoder rows out of it.

    At most half of the model's dimensions are removed, so that the direction stays random.
    """
    rows = decoder[decoder.norm(dim=1) > 0]
    direction = _unit(torch.randn(rows.shape[1], generator=generator))
    count = min(NEAREST, len(rows), rows.shape[1] // (2 * rounds))
    removed = rows[:0]
    for _ in range(rounds):
        near = (rows @ direction / rows.norm(dim=1)).abs().topk(max(count, 1)).indices
        removed = torch.cat([removed, rows[near]])
        basis = torch.linalg.qr(removed.T).Q
        direction = _unit(direction - basis @ (basis.T @ direction))
    return direction


def _reader(stream: Stream, generator: torch.Generator) -> Float[Tensor, " d_mlp"]:
    """Reads the mean activation plus a random direction; its mean output over answer tokens is exactly 1."""
    mean = stream.weights @ stream.hidden
    other = torch.randn(len(mean), generator=generator)
    reader = mean / mean.square().sum() + READER_SPREAD * other / (stream.hidden @ other).std()
    size = float(mean @ reader)
    if size <= 0:
        raise InputError("the random part of a planted LoRA outweighs its mean: lower READER_SPREAD or read more text")
    return reader / size


def pools(rates: Float[Tensor, " d_sae"]) -> dict[str, list[int]]:
    """The live latents, split into frequent and rare by the share of answer tokens on which they fire in the base.

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
    """The first `count` latents of the pool, in a random order of the whole dictionary.

    The order covers the whole dictionary because a reading's last digits depend on the number of threads: a latent
    that enters or leaves the pool must not change every draw.

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
    allowed = pool["rare" if kind == "rare latent" else "frequent"]
    latents = draw_latents(allowed, SEVERAL if kind == "latents" else 1, len(decoder), generator)
    coins = (torch.randint(0, 2, (len(latents),), generator=generator) * 2 - 1).tolist()
    signs = tuple(coins) if kind == "latents" else (1,)
    reader = _reader(stream, generator) if kind == "lora" else None
    rows = torch.stack([_unit(decoder[latent]) * sign for latent, sign in zip(latents, signs, strict=True)])
    return [Plant(kind, size, latents, signs, rows.sum(dim=0) * size * unit, reader) for size in sizes]


def disturbance(
    stream: Stream, generator: torch.Generator, noise: float, benign: float
) -> Float[Tensor, "tokens d_model"]:
    """A random difference of one arm that no plant caused. Every arm has its own, so incorrect minus correct is noisy.

    Args:
        noise: norm of a random vector added to each conversation, in residual standard deviations.
        benign: root mean square norm of the output of a random rank-1 LoRA, in the same unit. It stands for a change
            without meaning: it is the same function in every conversation, so resampling questions cannot see it.
    """
    width = stream.resid.shape[1]
    by_conversation = torch.randn(len(stream.clusters), width, generator=generator) * (noise * stream.sd / width**0.5)
    output = stream.hidden @ torch.randn(stream.hidden.shape[1], generator=generator)
    output *= benign * stream.sd / output.square().mean().sqrt()
    return by_conversation[stream.conversation] + output[:, None] * _unit(torch.randn(width, generator=generator))


# --- One plant read and ranked, as `locate` does

POSITIONS = "response"
CHUNK_VALUES = 2**26
"""Activations (tokens x d_sae) that are encoded at once: 256 MB in float32."""


@dataclass(frozen=True)
class PlantReading:
    """What locate sees of one plant: the table of all latents, and the arms' mean difference."""

    table: pd.DataFrame
    """`rankers.score_table`, indexed by latent."""
    difference: Float[np.ndarray, " d_model"]
    """Mean residual of the incorrect arm minus the correct one, raw units."""


class Baseline:
    """What all plants share: the base model's stream, its readings, the SAE's decoder, the live latents."""

    def __init__(self, stream: Stream, sae: Any, rankers: Sequence[str], seed: int) -> None:
        self.stream, self.sae, self.rankers, self.seed = stream, sae, tuple(rankers), seed
        self.decoder: Float[Tensor, "d_sae d_model"] = sae.W_dec.detach().float().cpu()
        self.base = self.read(stream.resid)
        self.base_means = self.base.mean.mean(axis=0, dtype=np.float64)
        fired = torch.zeros(len(self.decoder))
        for _, acts in self._encoded(stream.resid):
            fired += (acts > 0).sum(dim=0)
        self.rates = fired / len(stream.resid)
        self.pools = pools(self.rates)
        self.reference: Reference = random_reference(self.decoder.numpy(), signed=True, seed=seed)

    def _encoded(self, x: Float[Tensor, "tokens d_model"]) -> Iterator[tuple[slice, Float[Tensor, "some d_sae"]]]:
        """Some tokens at a time: all of them at all latents of a large dictionary would not fit into memory."""
        size = max(1, CHUNK_VALUES // self.sae.cfg.d_sae)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            yield part, encode(self.sae, x[part]).cpu()

    def read(self, x: Float[Tensor, "tokens d_model"]) -> LatentMeans:
        """All latents on one arm's residual stream. The fit is not measured; its moments stay empty."""
        shape = len(self.stream.clusters), int(self.sae.cfg.d_sae)
        mean, firing, maximum = torch.zeros(shape), torch.zeros(shape), torch.full(shape[1:], -torch.inf)
        for part, acts in self._encoded(x):
            conversation = self.stream.conversation[part]
            mean.index_add_(0, conversation, acts)
            firing.index_add_(0, conversation, (acts > 0).float())
            torch.maximum(maximum, acts.amax(dim=0), out=maximum)
        mean, firing = (total / self.stream.tokens for total in (mean, firing))
        resid = self.stream.conversation_means(x)
        return LatentMeans(mean.numpy(), firing.numpy(), maximum.numpy(), resid.numpy(), FitMoments())

    def caused(self, plant: Plant) -> Float[np.ndarray, " d_sae"]:
        """The known answer: how far the plant alone raises every latent in these conversations."""
        planted = self._encoded(self.stream.resid + plant.shift(self.stream))
        means = torch.stack([self.stream.weights[part] @ acts for part, acts in planted]).sum(dim=0)
        return means.double().numpy() - self.base_means

    def rank(self, incorrect: LatentMeans, correct: LatentMeans) -> PlantReading:
        """Score all latents as `locate` does, incorrect arm against correct one."""
        evidence = Evidence(
            base={POSITIONS: self.base},
            tuned={POSITIONS: incorrect},
            control={POSITIONS: correct},
            decoder=self.decoder.numpy(),
            clusters=self.stream.clusters,
            misaligned=self.stream.misaligned,
            positions=POSITIONS,
            seed=self.seed,
        )
        difference = (incorrect.resid.astype(np.float64) - correct.resid).mean(axis=0)
        return PlantReading(score_table(evidence, self.rankers).set_index("latent").sort_index(), difference)


def measure(
    baseline: Baseline, plant: Plant, ours: Float[Tensor, "tokens d_model"], correct: LatentMeans
) -> PlantReading:
    """Read the incorrect arm, which is the base with the plant and `ours`, its own disturbance; then rank."""
    return baseline.rank(baseline.read(baseline.stream.resid + plant.shift(baseline.stream) + ours), correct)
