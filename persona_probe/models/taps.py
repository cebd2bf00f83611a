"""Taps on the outputs of decoder layers: read, steer, ablate. They are context managers that leave nothing behind."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from persona_probe.errors import InputError, unknown
from persona_probe.models.layers import decoder_layers
from persona_probe.models.places import (
    Normalizer,
    Where,
    as_place,
    find_site,
    input_value,
    output_value,
    replace_input,
    replace_output,
)

UNITS = ("raw", "x_delta", "x_resid")
STEER_POSITIONS = ("all", "prompt", "response")


class Tap:
    """Base of all taps: a hook on one decoder layer's output, or on another place in a layer.

    Args:
        model: a transformers or PEFT model.
        layer: the decoder layer, or a `Place` in one.

    Raises:
        InputError: the place does not exist, or (on leaving the block without an error) the tap never fired.
    """

    def __init__(self, model: nn.Module, layer: Where) -> None:
        self.place = as_place(layer)
        self.layer = self.place.layer
        self.fired = 0
        site = find_site(model, layer)
        if site.side == "output":
            self._handle = site.module.register_forward_hook(self._hook)
        elif site.side == "input":
            self._handle = site.module.register_forward_pre_hook(self._input_hook, with_kwargs=True)
        else:
            self._normalizer = Normalizer(site.module)
            self._handle = site.module.register_forward_pre_hook(self._norm_hook, with_kwargs=True)

    def _hook(self, _module: nn.Module, _inputs: object, output: object) -> object:
        self.fired += 1
        changed = self.on_output(output_value(output))
        return None if changed is None else replace_output(output, changed)

    def _input_hook(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.fired += 1
        changed = self.on_output(input_value(args, kwargs))
        return None if changed is None else replace_input(args, kwargs, changed)

    def _norm_hook(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.fired += 1
        if self.on_output(self._normalizer(input_value(args, kwargs))) is not None:
            raise InputError(f"{self.place} can be read, not changed: push the residual stream before it")

    def on_output(self, resid: Float[Tensor, "batch pos d_model"]) -> Tensor | None:
        """Read the place's activation; return a replacement, or None to leave it as it is."""
        raise NotImplementedError

    def remove(self) -> None:
        """Remove the hook; calling it twice is safe."""
        self._handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        self.remove()
        if kind is None and self.fired == 0:
            raise InputError(f"the tap on {self.place} never fired: no forward pass reached it")


def taps_on(model: nn.Module) -> list[Tap]:
    """The taps on a model's decoder layers, layer by layer; within a layer, those on its parts after its own."""
    owners = []
    for layer in decoder_layers(model):
        for module in layer.modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            owners += [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, Tap)]


class ReadTap(Tap):
    """Keeps the latest output of a layer, detached."""

    value: Float[Tensor, "batch pos d_model"]

    def on_output(self, resid: Float[Tensor, "batch pos d_model"]) -> None:
        """Keep the output."""
        self.value = resid.detach()

    def tokens(self, at: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens d_model"]:
        """Some tokens, by their places in the flattened (batch, pos), on the device of `at`.

        Where a model is spread over several devices, the layer's differs from that of the batch.
        """
        return self.value.to(at.device).flatten(0, 1).index_select(0, at)


Direction = Tensor | np.ndarray | Any
"""A vector as a tensor or array, or what has one as `vector` (a `NamedDirection`)."""


def as_vector(direction: Direction) -> Tensor:
    """A direction as a tensor.

    Raises:
        InputError: it is no vector of numbers.
    """
    value = getattr(direction, "vector", direction)
    try:
        vector = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"a direction must be a tensor or an array, not {type(direction).__name__}") from error
    if not vector.ndim:
        raise InputError("a direction must be a vector (d_model,), not one number")
    return vector if vector.is_floating_point() else vector.float()


@dataclass(frozen=True)
class ResolvedPush:
    """A steering vector in raw units, with the strength and unit that it stands for."""

    vector: Float[Tensor, " d_model"]
    strength: float
    unit: str


def resolve_push(direction: Direction, strength: float, unit: str, reference_norm: float | None = None) -> ResolvedPush:
    """The vector to add for `strength` in `unit`.

    `raw` adds strength x direction as it is. `x_delta` (times the norm of the mean activation difference) and
    `x_resid` (times the mean residual norm) add strength x reference_norm x the unit direction; without a
    `reference_norm`, `x_delta` takes the norm of `direction`, which is right if the direction *is* the mean
    difference.

    Raises:
        InputError: unknown unit, a zero direction, or `x_resid` without its norm.
    """
    if unit not in UNITS:
        raise unknown("unit", unit, UNITS)
    direction = as_vector(direction)
    norm = float(direction.norm())
    if not 0 < norm < math.inf:
        raise InputError("the steering direction is zero or not finite")
    if unit == "raw":
        return ResolvedPush(direction * strength, strength, unit)
    if unit == "x_resid" and reference_norm is None:
        raise InputError("unit x_resid needs reference_norm, the mean residual norm at that layer")
    scale = norm if reference_norm is None else reference_norm
    return ResolvedPush(direction / norm * (strength * scale), strength, unit)


class SteerTap(Tap):
    """Adds a constant vector to a layer's output, at all, prompt or response positions.

    `prompt` and `response` need `prompt_mask`; during cached generation, a call on a single new position counts as
    response.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Where,
        vector: Float[Tensor, "d_model"] | Float[Tensor, "batch d_model"],
        positions: str = "all",
        prompt_mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> None:
        if positions not in STEER_POSITIONS:
            raise unknown("positions", positions, STEER_POSITIONS)
        _check_width(model, layer, vector.shape[-1])
        if positions != "all" and prompt_mask is None:
            raise InputError(f"positions={positions!r} needs prompt_mask, a boolean mask of the prompt's tokens")
        super().__init__(model, layer)
        self.vector, self.positions, self.prompt_mask = vector, positions, prompt_mask

    def on_output(self, resid: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """The output with the vector added at the chosen positions."""
        push = self.vector.to(resid.device, resid.dtype)
        push = push[None, None, :] if push.ndim == 1 else push[:, None, :]
        if self.positions == "all":
            return resid + push
        return resid + push * self._mask(resid)[:, :, None].to(resid.dtype)

    def _mask(self, resid: Tensor) -> Tensor:
        mask = self.prompt_mask
        assert mask is not None
        if mask.shape != resid.shape[:2]:
            if resid.shape[1] != 1:
                raise InputError(f"prompt_mask has shape {tuple(mask.shape)}, the batch {tuple(resid.shape[:2])}")
            mask = torch.zeros(resid.shape[:2], dtype=torch.bool)
        mask = mask.to(resid.device)
        return mask if self.positions == "prompt" else ~mask


class EditTap(Tap):
    """Applies a function to a layer's output."""

    def __init__(self, model: nn.Module, layer: Where, edit: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model, layer)
        self.edit = edit

    def on_output(self, resid: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """The function of the output."""
        return self.edit(resid)


class AblateTap(Tap):
    """Projects a direction, or the span of several, out of a layer's output (Arditi et al. 2024)."""

    def __init__(
        self, model: nn.Module, layer: Where, directions: Float[Tensor, "d_model"] | Float[Tensor, "k d_model"]
    ) -> None:
        basis = orthonormal(directions)
        _check_width(model, layer, basis.shape[-1])
        super().__init__(model, layer)
        self.basis = basis

    def on_output(self, resid: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """The output without its component in the span."""
        return project_out(resid, self.basis)


def _check_width(model: nn.Module, where: Where, width: int) -> None:
    site = find_site(model, where)
    if site.side == "normalized":
        raise InputError(f"{as_place(where)} can be read, not pushed: push the residual stream before it")
    if width != site.width:
        what = "the model" if as_place(where).is_residual else f"{as_place(where)} has"
        raise InputError(f"the direction has width {width}, {what} {site.width}")


def orthonormal(directions: Float[Tensor, "d_model"] | Float[Tensor, "k d_model"]) -> Float[Tensor, "rank d_model"]:
    """An orthonormal basis of the directions' span.

    Raises:
        InputError: a direction is zero or not finite.
    """
    rows = torch.atleast_2d(directions).float()
    norms = rows.norm(dim=-1, keepdim=True)
    if not bool(((norms > 0) & norms.isfinite()).all()):
        raise InputError("a direction to ablate is zero or not finite")
    # Singular vectors up to the rank: dependent rows must not remove more than their span.
    _, sizes, basis = torch.linalg.svd(rows / norms, full_matrices=False)
    return basis[sizes > 1e-5 * sizes[0]]


def project_out(resid: Float[Tensor, "*batch d_model"], basis: Float[Tensor, "rank d_model"]) -> Tensor:
    """`resid` without its component in the span of an orthonormal basis, in the precision of `resid`."""
    rows = basis.to(resid.device, torch.float32)
    with torch.autocast(resid.device.type, enabled=False):
        coordinates = einsum(resid.float(), rows, "... d, k d -> ... k")
        return (resid.float() - einsum(coordinates, rows, "... k, k d -> ... d")).to(resid.dtype)


def read(model: nn.Module, layer: Where) -> ReadTap:
    """Read a layer's output as `tap.value` (batch, pos, d_model).

    Use it as `with read(model, 20) as tap: model(...)`.
    """
    return ReadTap(model, layer)


def steer(
    model: nn.Module,
    layer: Where,
    direction: Direction,
    strength: float = 1.0,
    unit: str = "raw",
    *,
    positions: str = "all",
    prompt_mask: Bool[Tensor, "batch pos"] | None = None,
    reference_norm: float | None = None,
) -> SteerTap:
    """Add a constant vector to a layer's output, or at another `Place` in it, while the block lasts.

    Args:
        layer: a decoder layer, or a `models.places.Place` (`saes.hooks.write_place(sae)` is the one that an SAE's
            decoder writes).
        direction: (d_model,), or as wide as the place; a tensor, an array or a `NamedDirection`.
        strength: size of the push, in `unit`; see `resolve_push`.
        positions: `all`, `prompt` or `response` (the latter two with `prompt_mask`).

    Raises:
        InputError: unknown layer, unit or positions; a direction of the wrong width or zero.
    """
    push = resolve_push(direction, strength, unit, reference_norm)
    return SteerTap(model, layer, push.vector, positions, prompt_mask)


@dataclass(frozen=True)
class Steer:
    """A push that is not on a model yet: what `steer` takes after the model. `generate` and `logit_lens` take it."""

    layer: Where
    """A decoder layer, or a `Place`."""
    direction: Direction
    """(d_model,)."""
    strength: float = 1.0
    unit: str = "raw"
    """`raw`, `x_delta` or `x_resid`; see `resolve_push`."""
    positions: str = "all"
    """`all`, `prompt` or `response`."""
    reference_norm: float | None = None
    """The norm that one unit of `x_delta` or `x_resid` stands for."""

    def times(self, factor: float) -> "Steer":
        """The same push, `factor` times as strong; -1 is the opposite one."""
        return replace(self, strength=self.strength * factor)

    def on(self, model: nn.Module, prompt_mask: Bool[Tensor, "batch pos"] | None = None) -> SteerTap:
        """The push on a model, as `steer` gives it.

        Args:
            prompt_mask: which positions of a batch are prompt; sampling needs none, because it knows each row's prompt.
        """
        if self.positions != "all" and prompt_mask is None:
            prompt_mask = torch.ones(1, 1, dtype=torch.bool)
        settings: dict[str, Any] = {"prompt_mask": prompt_mask, "reference_norm": self.reference_norm}
        return steer(model, self.layer, self.direction, self.strength, self.unit, positions=self.positions, **settings)


def ablate(model: nn.Module, layer: Where, direction: Direction) -> AblateTap:
    """Project `direction` (d_model,) or the span of (k, d_model) out of a layer's output while the block lasts."""
    return AblateTap(model, layer, as_vector(direction))
