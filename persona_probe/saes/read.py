"""Read SAEs' latents: of given activations, or of a model on conversations, as means and firing rates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.files import shown
from persona_probe.models.activation_cache import ActivationCache
from persona_probe.models.places import Place, Where, as_place
from persona_probe.models.residuals import read_places
from persona_probe.saes.hooks import PlacedSae

# --- Encode residual streams with an SAE: all latents or some, and the fit on the same tokens

SLICEABLE = ("standard", "jumprelu", "gated")
CHUNK_TOKENS, CHUNK_VALUES = 4096, 2**26
UNSAVED = "picks its latents per batch while it trains: save it with save_inference_model (as JumpReLU) and load that"
REFUSED = {
    "temporal": "computes a token's latents from all earlier tokens, and its decoder leaves out what they predict; "
    "here every token is read, steered and reconstructed for itself: take another architecture",
    "batchtopk": UNSAVED,
    "matryoshka_batchtopk": UNSAVED,
}


def check_architecture(architecture: str) -> None:
    """Refuse SAEs that do not reconstruct one token's residual stream from itself.

    Raises:
        InputError: temporal SAEs, transcoders, and BatchTopK SAEs in training; the message says why.
    """
    if architecture.endswith("transcoder"):
        raise InputError(f"a {architecture} reads one place and writes another: take an SAE of the residual stream")
    check_readable(architecture)


def check_readable(architecture: str) -> None:
    """Refuse SAEs whose latents are not a function of one token's activation; a transcoder's are.

    Raises:
        InputError: temporal SAEs, and BatchTopK SAEs in training; the message says why.
    """
    if architecture in REFUSED:
        raise InputError(f"a {architecture} SAE {REFUSED[architecture]}")


HOOKS = ("hook_name", "hf_hook_name", "hook_name_out", "hf_hook_name_out")


def check_sound(sae: Any, name: str) -> None:
    """Refuse an SAE whose values make no sense, which would otherwise give NaN or fail in the middle of a study.

    Raises:
        InputError: weights that are not finite, a `k` outside the dictionary, or a hook that is no name.
    """
    k, size = getattr(sae.cfg, "k", None), sae.cfg.d_sae
    if k is not None and not (isinstance(k, int | float) and 1 <= k <= size):
        raise InputError(f"the SAE {name} has k {shown(k)}, outside of 1 to {size} (its latents): correct its cfg.json")
    for key in HOOKS:
        hook = getattr(sae.cfg.metadata, key, None)
        if hook is not None and not isinstance(hook, str):
            raise InputError(f"the SAE {name} has {key} {shown(hook)}, which is no text: correct its cfg.json")
    for key, value in sae.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"the SAE {name} has {key} with values that are not finite: its training diverged")


def encoder_kind(sae: Any) -> str:
    """How the SAE encodes: its architecture, or for a transcoder that of the SAE with the same encoder."""
    architecture = str(sae.cfg.architecture())
    if not architecture.endswith("transcoder"):
        return architecture
    return "jumprelu" if architecture.startswith("jumprelu") else "standard"


def check_latents(sae: Any, latents: list[int]) -> list[int]:
    """The latents, checked against the dictionary's size.

    Raises:
        InputError: a latent outside the dictionary.
    """
    for latent in latents:
        if not 0 <= latent < sae.cfg.d_sae:
            raise InputError(f"latent {latent} does not exist: this SAE has latents 0 to {sae.cfg.d_sae - 1}")
    return latents


def tokens_at_once(sae: Any) -> int:
    """How many tokens are encoded together: a dictionary of 131k latents would need 2 GB for 4,096 of them."""
    return max(1, min(CHUNK_TOKENS, CHUNK_VALUES // sae.cfg.d_sae))


@torch.no_grad()
def encode(sae: Any, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_sae"]:
    """All latents, dense, computed in the SAE's precision and returned in float32.

    Raises:
        InputError: the SAE cannot be read token by token, see `check_readable`.
    """
    check_readable(sae.cfg.architecture())
    acts = sae.encode(x.to(sae.device, sae.dtype))
    return (acts.to_dense() if acts.is_sparse else acts).float()


@torch.no_grad()
def encode_latents(sae: Any, x: Float[Tensor, "tokens d_model"], latents: list[int]) -> Float[Tensor, "tokens latents"]:
    """Only some latents: computed alone if that is exact (standard, JumpReLU, gated), else taken from all latents.

    The latents of a TopK SAE compete, and those of a matching pursuit explain each other away, so their values need
    the whole dictionary.

    Raises:
        InputError: a latent outside the dictionary, or an SAE that cannot be read token by token.
    """
    check_latents(sae, latents)
    if encoder_kind(sae) not in SLICEABLE:
        return torch.cat([encode(sae, part)[:, latents] for part in x.split(tokens_at_once(sae))])
    return encode_sliced(sae, x, latents)


def encode_sliced(sae: Any, x: Float[Tensor, "tokens d_model"], latents: list[int]) -> Float[Tensor, "tokens latents"]:
    """Some latents of an SAE in which none competes (`SLICEABLE`), differentiable in `x`; in float32."""
    architecture = encoder_kind(sae)
    sae_in = sae.process_sae_in(x.to(sae.device, sae.dtype))
    weights = sae.W_enc[:, latents]
    if architecture == "gated":
        gate = sae_in @ weights + sae.b_gate[latents] > 0
        magnitude = sae_in @ (weights * sae.r_mag[latents].exp()) + sae.b_mag[latents]
        return (gate * sae.activation_fn(magnitude)).float()
    pre = sae_in @ weights + sae.b_enc[latents]
    if architecture == "standard":
        return sae.activation_fn(pre).float()
    return (sae.activation_fn(pre) * (pre > sae.threshold[latents])).float()


def precision(device: torch.device) -> torch.dtype:
    """float64 for sums, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class FitMoments:
    """Running sums for explained variance, L0 and residual norm: add tokens, then read the properties."""

    n: int = 0
    error: float = 0.0
    active: float = 0.0
    norm: float = 0.0
    total: Tensor | None = field(default=None, repr=False)
    square: float = 0.0

    def add(self, x: Float[Tensor, "tokens d_model"], out: Tensor, acts: Tensor) -> None:
        """Add the tokens of one batch: inputs, reconstructions and activations."""
        wide = precision(x.device)
        x, out = x.to(wide), out.to(x.device, wide)
        sums = ((x - out).square().sum(), (acts != 0).sum(), x.norm(dim=-1).sum(), x.square().sum())
        # One wait for the device, not four.
        error, active, norm, square = torch.stack([value.to(x.device, wide) for value in sums]).tolist()
        self.n += len(x)
        self.error, self.active = self.error + error, self.active + active
        self.norm, self.square = self.norm + norm, self.square + square
        self.total = x.sum(dim=0) if self.total is None else self.total + x.sum(dim=0)

    @property
    def explained_variance(self) -> float:
        """1 - sum |x - x_hat|^2 / sum |x - mean x|^2, over all tokens."""
        if self.total is None:
            raise InputError("no tokens were read: the selected positions are empty")
        variance = self.square - float(self.total.square().sum()) / self.n
        return 1 - self.error / variance if variance > 0 else float("nan")

    @property
    def l0(self) -> float:
        """Mean number of active latents per token."""
        return self.active / self.n

    @property
    def residual_norm(self) -> float:
        """Mean norm of the residual stream."""
        return self.norm / self.n


@torch.no_grad()
def encode_with_fit(
    sae: Any,
    x: Float[Tensor, "tokens d_in"],
    fit: FitMoments,
    target: Float[Tensor, "tokens d_out"] | None = None,
) -> Float[Tensor, "tokens d_sae"]:
    """All latents; `fit` records how well the SAE reconstructs the same tokens.

    Args:
        target: what a transcoder should put out for these tokens; None for an SAE, which reconstructs `x`.

    Raises:
        InputError: a transcoder without its target.
    """
    return torch.cat([_encode_chunk(sae, *chunk, fit) for chunk in _chunks(sae, x, target)])


@torch.no_grad()
def add_fit(
    sae: Any,
    x: Float[Tensor, "tokens d_in"],
    fit: FitMoments,
    target: Float[Tensor, "tokens d_out"] | None = None,
) -> None:
    """Record in `fit` how well the SAE reconstructs the tokens. No latents are kept, so memory does not grow."""
    for chunk in _chunks(sae, x, target):
        _encode_chunk(sae, *chunk, fit)


def _chunks(sae: Any, x: Tensor, target: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    if target is None:
        check_architecture(sae.cfg.architecture())
        target = x
    size = tokens_at_once(sae)
    return list(zip(x.float().split(size), target.float().split(size), strict=True))


def _encode_chunk(sae: Any, chunk: Tensor, target: Tensor, fit: FitMoments) -> Tensor:
    # Encoding and decoding must alternate: SAELens keeps each token's normalisation from encoding for decoding.
    acts = encode(sae, chunk)
    fit.add(target, decode(sae, acts, chunk), acts)
    return acts


@torch.no_grad()
def decode(
    sae: Any, acts: Float[Tensor, "tokens d_sae"], x: Float[Tensor, "tokens d_in"]
) -> Float[Tensor, "tokens d_out"]:
    """What the SAE makes of `x`, whose latents were just encoded; on the device of `x`.

    A transcoder with a skip connection adds a linear map of its input.
    """
    out = sae.decode(acts.to(sae.dtype))
    skip = getattr(sae, "W_skip", None)
    if skip is not None:
        out = out + x.to(sae.device, sae.dtype) @ skip.T
    return out.to(x.device)


# --- Read a model on conversations: means and firing rates of all latents

ENCODED_AT_ONCE = 2**26
"""Activations (tokens x d_sae) that are held at once: 256 MB in float32."""


@dataclass(frozen=True)
class LatentMeans:
    """The SAE latents of one model on a list of conversations."""

    mean: Float[np.ndarray, "conversations d_sae"]
    """Mean activation over the selected tokens."""
    firing: Float[np.ndarray, "conversations d_sae"]
    """Share of the selected tokens on which the latent is active."""
    maximum: Float[np.ndarray, " d_sae"]
    """Largest activation on any selected token."""
    resid: Float[np.ndarray, "conversations d_model"]
    """Mean over the selected tokens of what the SAE's decoder writes: the residual stream, for an SAE of it."""
    fit: FitMoments
    """How well the SAE reconstructs those tokens."""
    square: Float[np.ndarray, " d_sae"] | None = None
    """Mean squared activation over all selected tokens; None if it was not recorded."""


def read_latents(
    model: nn.Module,
    sae: Any,
    groups: Sequence[Batch],
    layer: Where,
    positions: str,
    *,
    bf16: bool = True,
    cache: ActivationCache | None = None,
) -> LatentMeans:
    """Means and firing rates of all latents, for every conversation of `groups` (see `data.tokens.batches`).

    Memory grows with conversations x d_sae, not with tokens.
    """
    return read_latents_at(model, sae, groups, layer, (positions,), bf16=bf16, cache=cache)[positions]


def read_latents_at(
    model: nn.Module,
    sae: Any,
    groups: Sequence[Batch],
    layer: Where,
    positions: Sequence[str],
    *,
    bf16: bool = True,
    cache: ActivationCache | None = None,
) -> dict[str, LatentMeans]:
    """`read_latents` at several kinds of positions, with one forward pass; every token is encoded once.

    Args:
        sae: a `sae_lens.SAE` that reconstructs what it reads (no transcoder; see `read_saes`).
        layer: the decoder layer whose output it reads, or a `Place`.

    Returns:
        The reading at each kind of positions, in the order of `positions`.

    Raises:
        InputError: no positions, or a conversation has no token at some of them.
    """
    place = as_place(layer)
    return read_saes(model, [PlacedSae(sae, place, place)], groups, positions, bf16=bf16, cache=cache)[0]


def read_saes(
    model: nn.Module,
    saes: Sequence[PlacedSae],
    groups: Sequence[Batch],
    positions: Sequence[str],
    *,
    bf16: bool = True,
    cache: ActivationCache | None = None,
) -> list[dict[str, LatentMeans]]:
    """`read_latents_at` for several SAEs, wherever they read, with one forward pass of the model.

    Returns:
        For each SAE the reading at each kind of positions. `resid` is the mean of what its decoder writes.

    Raises:
        InputError: no SAE, no positions, or a conversation has no token at some of them.
    """
    n = sum(len(g.index) for g in groups)
    sums = [{name: _Sums(n, s.sae) for name in positions} for s in saes]

    def visit(index: list[int], row: Tensor, x: Mapping[Place, Tensor], masks: Mapping[str, Tensor]) -> None:
        for placed, parts in zip(saes, sums, strict=True):
            _add_all(placed, parts, index, row, (x[placed.reads], x[placed.writes]), masks)

    places = [place for placed in saes for place in placed.places]
    with torch.no_grad():
        read_places(model, groups, places, positions, visit, bf16, cache)
    return [{name: total.means() for name, total in parts.items()} for parts in sums]


def _add_all(
    placed: PlacedSae,
    sums: "Mapping[str, _Sums]",
    index: list[int],
    row: Tensor,
    activations: tuple[Tensor, Tensor],
    masks: Mapping[str, Tensor],
) -> None:
    """Encode a batch's tokens once, and add them at all positions; `activations`: what is read, what is written."""
    (x, target), sae = activations, placed.sae
    for part in torch.arange(len(x), device=x.device).split(max(1, ENCODED_AT_ONCE // sae.cfg.d_sae)):
        acts = encode(sae, x[part])
        out, acts = decode(sae, acts, x[part]), acts.to(x.device)
        for name, mask in masks.items():
            at = mask[part].nonzero()[:, 0]
            whole = len(at) == len(part)
            some = [value if whole else value.index_select(0, at) for value in (row[part], target[part], out, acts)]
            sums[name].add(index, *some)


class _Sums:
    """Running sums of one kind of positions, by conversation."""

    def __init__(self, conversations: int, sae: Any) -> None:
        d_sae, d_out = sae.cfg.d_sae, sae.W_dec.shape[1]
        self.acts, self.active = (np.zeros((conversations, d_sae), dtype=np.float32) for _ in range(2))
        self.resid = np.zeros((conversations, d_out), dtype=np.float32)
        self.tokens = np.zeros((conversations, 1), dtype=np.float32)
        self.fit = FitMoments()
        self.maximum: Float[Tensor, " d_sae"] = torch.zeros(d_sae)
        self.square: Float[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.float64)

    def add(self, index: list[int], row: Tensor, x: Tensor, out: Tensor, acts: Tensor) -> None:
        if len(x) == 0:
            return
        self.fit.add(x, out, acts)
        device, one = acts.device, torch.ones(len(x), 1, device=acts.device)
        columns = (acts, (acts != 0).float(), x, one)
        totals = [torch.zeros(len(index), v.shape[1], device=device).index_add_(0, row, v) for v in columns]
        # All of a batch's sums come to the host together; what does not go by conversation stays on the device.
        packed = torch.cat(totals, dim=1).cpu().numpy()
        ends = np.cumsum([total.shape[1] for total in totals])[:-1]
        for target, part in zip(
            (self.acts, self.active, self.resid, self.tokens), np.split(packed, ends, axis=1), strict=True
        ):
            target[index] += part
        self.maximum = torch.maximum(self.maximum.to(device), acts.amax(dim=0))
        self.square = self.square.to(device, precision(device)) + acts.square().sum(dim=0)

    def means(self) -> LatentMeans:
        square = (self.square.cpu().double() / max(self.fit.n, 1)).numpy()
        mean, firing, resid = (total / self.tokens for total in (self.acts, self.active, self.resid))
        return LatentMeans(mean, firing, self.maximum.cpu().numpy(), resid, self.fit, square)
