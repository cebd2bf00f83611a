"""Attribution: the first-order effect of removing each latent on the loss of given answers, by one backward pass."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.latents.rankers import check_flags
from persona_probe.models.layers import autocast, causal_model, evaluating
from persona_probe.models.places import Place, Where, as_place, find_site
from persona_probe.models.taps import ReadTap, Tap
from persona_probe.saes.hooks import PlacedSae, is_transcoder
from persona_probe.saes.read import encode, precision

ENCODED_AT_ONCE = 2**24
"""Activations (tokens x d_sae) that are held at once: 64 MB in float32, a few times over."""
ROWS_AT_ONCE = 8192
"""Decoder rows that are held in float64 at once."""


@dataclass(frozen=True)
class GradientScores:
    """Every latent's scores from one backward pass per batch."""

    attribution: Float[np.ndarray, " d_sae"]
    """First-order cost of removing the latent, misaligned minus aligned answers (nats per answer token)."""
    slope: Float[np.ndarray, " d_sae"]
    """First-order effect of steering: the contrast index's derivative along the unit decoder row, added at every
    position (nats per token, per raw unit of push)."""


def gradient_scores(
    model: nn.Module,
    sae: Any,
    groups: Sequence[Batch],
    misaligned: Bool[np.ndarray, " conversations"],
    layer: Where,
    *,
    rows: int = 8,
    bf16: bool = True,
) -> GradientScores:
    """Attribution and slope of every latent, misaligned answers minus aligned ones, in nats per answer token.

    With x_t the residual stream after `layer` at answer token t, a_ti latent i's activation there, d_i its decoder row
    (times the token's scale, for an SAE that normalises tokens), m_i the latent's mean over all answer tokens of all
    conversations, and L_c the mean negative log-likelihood of conversation c's answer, a conversation's attribution is

        A_ci = - sum over t of (dL_c / dx_t . d_i) (a_ti - m_i)

    the first-order change of L_c when every answer token loses what the latent adds beyond its mean. As L_c is a mean
    over tokens, the sum is the average over answer tokens of attribution to the answer's total loss. The result is the
    mean of A over misaligned conversations minus that over aligned ones. Positive: removing the latent costs misaligned
    answers more than aligned ones, so the latent helps to say them. Slope
    is the derivative along the unit decoder row, added at every position: the effect of pushing the latent, whether it
    is active or not.

    Method: Dupre la Tour & Mossing 2025, "Debugging misaligned completions with sparse-autoencoder latent attribution"
    (alignment.openai.com/sae-latent-attribution). One model, one forward and one backward pass per batch; memory does
    not grow with tokens. Modes, random state, `requires_grad` and gradients of the model stay as they were.

    Args:
        groups: batches of conversations that end with an answer (`data.tokens.batches`).
        misaligned: by conversation number, whether it ends with the misaligned answer.
        rows: conversations in one backward pass; the logits of their answers are held at once.

    Raises:
        InputError: flags that do not fit, a conversation without an answer, or a layer that does not exist.
    """
    place = as_place(layer)
    return gradient_scores_of(model, [PlacedSae(sae, place, place)], groups, misaligned, rows=rows, bf16=bf16)[0]


def gradient_scores_of(
    model: nn.Module,
    saes: Sequence[PlacedSae],
    groups: Sequence[Batch],
    misaligned: Bool[np.ndarray, " conversations"],
    *,
    rows: int = 8,
    bf16: bool = True,
) -> list[GradientScores]:
    """`gradient_scores` of several SAEs, wherever they read, from one forward and one backward pass per batch.

    Of a transcoder the gradient is taken where it writes.

    Raises:
        InputError: as `gradient_scores`.
    """
    for placed in saes:
        if find_site(model, placed.writes).side == "normalized":
            raise InputError(
                f"{placed.writes} cannot be pushed, so attribution and slope are not defined there: leave these "
                "rankers out"
            )
    flags = check_flags(misaligned, sum(len(g.index) for g in groups))
    signs = torch.tensor(np.where(flags, 1 / flags.sum(), -1 / (~flags).sum()), dtype=torch.float32)
    device, sums = next(model.parameters()).device, [_GradientSums(placed.sae) for placed in saes]
    with evaluating(model), _frozen(model):
        for batch in (part.to(device) for group in groups for part in _parts(group, rows)):
            answer = batch.select("response")
            if not bool(answer.any(dim=1).all()):
                raise InputError("a conversation has no answer tokens: attribution needs conversations with answers")
            with autocast(model, bf16):
                values, gradients = _answer_gradients(model, batch, saes)
            at, everywhere = (mask.flatten().nonzero()[:, 0] for mask in (answer, batch.attention))
            sign = signs[batch.index].to(device)[:, None, None]
            for placed, total in zip(saes, sums, strict=True):
                # Of a model that is spread over several devices, layers are on others than the batch.
                weighted = gradients[placed.writes].to(device).float() * sign
                x = values[placed.reads].to(device).flatten(0, 1).index_select(0, at)
                total.add(x.float(), weighted.flatten(0, 1).index_select(0, at))
                total.add_everywhere(weighted.flatten(0, 1).index_select(0, everywhere))
    return [GradientScores(total.attribution(), total.slope()) for total in sums]


def answer_gradient(
    model: nn.Module, batch: Batch, layer: Where
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"]]:
    """Residual stream after `layer`, and there the gradient of each row's mean negative answer log-likelihood.

    Rows do not mix. Only layers above `layer` are differentiated. Weights get no gradients.
    """
    place = as_place(layer)
    values, gradients = _answer_gradients(model, batch, [PlacedSae(None, place, place)])
    return values[place], gradients[place]


def _answer_gradients(
    model: nn.Module, batch: Batch, saes: Sequence[PlacedSae]
) -> tuple[dict[Place, Tensor], dict[Place, Tensor]]:
    """Activations in all places, and the gradients in those that are written."""
    # On the host, because the last layer may be on another device than the batch.
    columns = batch.response[:, 1:].any(dim=0).cpu().nonzero()[:, 0]
    answer, targets = batch.response[:, columns + 1], batch.ids[:, columns + 1]
    written = list(dict.fromkeys(placed.writes for placed in saes))
    others = [place for place in dict.fromkeys(placed.reads for placed in saes) if place not in written]
    with torch.enable_grad(), ExitStack() as stack:
        taps: dict[Place, _CutTap] = {place: stack.enter_context(_CutTap(model, place)) for place in written}
        seen = {place: stack.enter_context(ReadTap(model, place)) for place in others}
        logits: Tensor = causal_model(model)(
            input_ids=batch.ids, attention_mask=batch.attention, use_cache=False, logits_to_keep=columns
        ).logits
        logits = logits.to(answer.device)
        loss = cross_entropy(logits[answer].float(), targets[answer], reduction="none")
        share = (answer / answer.sum(dim=1, keepdim=True))[answer]
        gradients = torch.autograd.grad((loss * share).sum(), [tap.value for tap in taps.values()])
    values = {place: tap.value.detach() for place, tap in {**taps, **seen}.items()}
    return values, dict(zip(written, gradients, strict=True))


class _CutTap(Tap):
    """Cuts the graph at a place, so that what follows starts from a leaf with a gradient.

    Where a place before it was cut, the graph goes on through this one.
    """

    value: Float[Tensor, "batch pos d_model"]

    def on_output(self, resid: Float[Tensor, "batch pos d_model"]) -> Tensor | None:
        if resid.requires_grad:
            self.value = resid
            return None
        self.value = resid.detach().requires_grad_(True)
        return self.value


@dataclass
class _GradientSums:
    """Sums over answer tokens of activation, gradient and their product.

    (a - m) is linear in the mean m, so m can be inserted at the end, and one pass over the tokens is enough.
    """

    sae: Any

    def __post_init__(self) -> None:
        self.decoder = self.sae.W_dec.detach().float()
        on: Any = {"dtype": precision(self.decoder.device), "device": self.decoder.device}
        self.product, self.acts = (torch.zeros(len(self.decoder), **on) for _ in range(2))
        self.gradient, self.everywhere = (torch.zeros(self.decoder.shape[1], **on) for _ in range(2))
        self.tokens = 0

    def add(self, x: Float[Tensor, "tokens d_model"], gradient: Float[Tensor, "tokens d_model"]) -> None:
        """Add answer tokens; `gradient` already carries the weight and sign of its conversation."""
        step = max(1, ENCODED_AT_ONCE // len(self.decoder))
        for some, along in zip(x.split(step), gradient.split(step), strict=True):
            acts = encode(self.sae, some)
            slope = self._in_sae_units(along.to(acts.device))
            self.product += (acts * (slope @ self.decoder.T)).sum(dim=0)
            self.acts += acts.sum(dim=0)
            self.gradient += slope.to(self.gradient.dtype).sum(dim=0)
        self.tokens += len(x)

    def add_everywhere(self, gradient: Float[Tensor, "tokens d_model"]) -> None:
        """Add all tokens' gradients, of prompts too; they carry the weight and sign of their conversation."""
        self.everywhere += gradient.to(self.everywhere.device, self.everywhere.dtype).sum(dim=0)

    def _in_sae_units(self, slope: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """Gradients with respect to the SAE's output before its own normalisation of the token just encoded is undone.

        Undoing it is linear but for an offset, so its factor is what it does to the difference from zero.
        """
        if is_transcoder(self.sae):
            return slope  # it undoes nothing
        undone = self.sae.run_time_activation_norm_fn_out(torch.stack([slope, torch.zeros_like(slope)]))
        return (undone[0] - undone[1]).float()

    def attribution(self) -> Float[np.ndarray, " d_sae"]:
        """-(sum of g.d a - mean a x sum of g.d), per latent."""
        slope = self._along(self.gradient.cpu().double())
        return -(self.product.cpu().double() - self.acts.cpu().double() / self.tokens * slope).numpy()

    def slope(self) -> Float[np.ndarray, " d_sae"]:
        """-(d . sum of g over all positions), per latent's unit decoder row."""
        norms = torch.cat([rows.norm(dim=1) for rows in self._decoder_in_parts()]).clamp(min=1e-12)
        return -(self._along(self.everywhere.cpu().double()) / norms).numpy()

    def _along(self, gradient: Float[Tensor, " d_model"]) -> Float[Tensor, " d_sae"]:
        return torch.cat([rows @ gradient for rows in self._decoder_in_parts()])

    def _decoder_in_parts(self) -> Iterator[Float[Tensor, "some d_model"]]:
        """In float64 on the host: a dictionary of 131k rows of 3,584 would take 3.8 GB at once."""
        for rows in self.decoder.split(ROWS_AT_ONCE):
            yield rows.cpu().double()


def _parts(batch: Batch, rows: int) -> Iterator[Batch]:
    for start in range(0, len(batch.index), rows):
        yield batch.rows(slice(start, start + rows))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight requires gradients inside the block, so lower layers and all weights stay out of the graph."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
