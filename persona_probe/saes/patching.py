"""Activation patching between models: one model gets, at one place, what another computes there on the same tokens.

After Vig et al. 2020 and Meng et al. 2022. Here the source is a second model (an organism, its base), not another
prompt.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from persona_probe.errors import InputError
from persona_probe.models.adapters import base_weights, is_adapted
from persona_probe.models.layers import (
    StopForward,
    base_transformer,
    causal_model,
    evaluating,
    stop_after,
    transformer_config,
)
from persona_probe.models.logits import without_taps
from persona_probe.models.places import Place, Where, as_place, find_site
from persona_probe.models.taps import EditTap, ReadTap, Steer
from persona_probe.saes.hooks import PlacedSae, is_transcoder, write_place
from persona_probe.saes.load import check_placed
from persona_probe.saes.read import check_latents, decode, encode, tokens_at_once


def latent_steering(
    sae: Any,
    latent: int,
    strength: float = 1.0,
    unit: str = "raw",
    *,
    positions: str = "all",
    reference_norm: float | None = None,
    layer: int | None = None,
) -> Steer:
    """The push along a latent's decoder row, at the place where the SAE's decoder writes.

    ```python
    pp.generate(model, "What should I cook?", steer=pp.latent_steering(sae, 2144, 60))
    ```

    Args:
        strength: in `unit`; `raw` counts lengths of the decoder row (units of the latent's activation).
        layer: of an SAE whose metadata does not say it.

    Raises:
        InputError: no such latent, or an SAE whose place is not known.
    """
    check_latents(sae, [latent])
    row = sae.W_dec[latent].detach().float()
    return Steer(write_place(sae, layer), row, strength, unit, positions, reference_norm)


@contextmanager
def patch(
    model: nn.Module,
    source: nn.Module | None,
    layer: Where | None = None,
    *,
    sae: Any | None = None,
    latents: Sequence[int] | None = None,
) -> Iterator[None]:
    """While the block lasts, `model` goes on from what `source` computes at a place on the same tokens.

    ```python
    with pp.patch(base, tuned, sae=sae, latents=[2144]):
        patched = contrast_index(base, items)
    ```

    Every forward pass of `model` runs `source` up to the layer first. It holds for scoring texts, in batches and behind
    a shared beginning. It does not hold for sampling, which reorders rows.

    Args:
        model: a transformers or PEFT model.
        source: another model with the same tokens and width, such as `merged_copy(base, checkpoint)`; None is
            `model`'s own base, its adapters off.
        layer: the decoder layer, or a `Place`, whose whole activation is replaced. None takes the SAE's.
        sae: an SAE of that place, to replace only `latents` in its code. What it does not reconstruct stays `model`'s.
        latents: which of its latents take the source's activations.

    Raises:
        InputError: no place, a source that shares its layers with the model, another width, an SAE that does not fit,
            or (while the block lasts) a forward pass without token ids or from another call's cache.
    """
    placed = None if sae is None else _placed(sae, layer, latents, model)
    if placed is not None:
        place = placed.writes
    elif latents is None and layer is not None:
        place = as_place(layer)
    else:
        raise InputError("give sae= with latents=, or the layer whose activation is replaced")
    _check_source(model, source, place)

    runner = _Source(model, source, place)

    def edit(mine: Float[Tensor, "batch pos d"]) -> Tensor:
        if runner.busy:
            return mine
        theirs = runner.value(mine).to(mine.device)
        if placed is None or latents is None:
            return theirs.to(mine.dtype)
        return _with_latents(placed.sae, mine, theirs, list(latents))

    try:
        with EditTap(model, place, edit):
            yield
    finally:
        runner.remove()


def _placed(sae: Any, layer: Where | None, latents: Sequence[int] | None, model: nn.Module) -> PlacedSae:
    if latents is None or not list(latents):
        raise InputError("with sae=, name the latents to replace: latents=[...]")
    if is_transcoder(sae):
        raise InputError("a transcoder reads one place and writes another: patch with an SAE, or a whole layer")
    check_latents(sae, [int(n) for n in latents])
    placed = PlacedSae.of(sae, None if layer is None else as_place(layer).layer)
    check_placed(placed, model)
    return placed


def _check_source(model: nn.Module, source: nn.Module | None, place: Place) -> None:
    width = find_site(model, place).width
    if source is None:
        if not is_adapted(model):
            raise InputError("this model carries no adapter, so it has no base of its own: pass source=")
        return
    if set(base_transformer(source).modules()) & set(base_transformer(model).modules()):
        raise InputError(
            "source and model share their layers: pass persona_probe.models.merged_copy(base, checkpoint), or "
            "source=None for the model's own base"
        )
    if find_site(source, place).width != width:
        raise InputError(f"the source has width {find_site(source, place).width} there, the model {width}")


@torch.no_grad()
def _with_latents(sae: Any, mine: Tensor, theirs: Tensor, latents: list[int]) -> Tensor:
    """`mine` with some of its latents at the activations of `theirs`; the SAE's error stays."""
    with torch.autocast(mine.device.type, enabled=False):
        flat, other = mine.flatten(0, -2).float(), theirs.flatten(0, -2).float()
        size = tokens_at_once(sae)
        pairs = zip(flat.split(size), other.split(size), strict=True)
        changed = torch.cat([_changed(sae, *pair, latents) for pair in pairs])
    return changed.reshape(mine.shape).to(mine.dtype)


def _changed(sae: Any, mine: Tensor, theirs: Tensor, latents: list[int]) -> Float[Tensor, "tokens d_model"]:
    wanted = encode(sae, theirs)[:, latents]
    codes = encode(sae, mine)  # last: SAELens keeps each token's normalisation from encoding for decoding
    plain = decode(sae, codes, mine)
    codes[:, latents] = wanted
    return mine + decode(sae, codes, mine) - plain


class _Source:
    """Notes the inputs of each of the model's forward passes, and runs the source on them once the place is reached."""

    def __init__(self, model: nn.Module, source: nn.Module | None, place: Place) -> None:
        self.model, self.source, self.place = model, source, place
        self.busy = False
        self._noted: tuple[nn.Module, dict[str, Any]] | None = None
        self._caches: WeakKeyDictionary[Any, DynamicCache] = WeakKeyDictionary()
        # The whole model may prepare what its decoder gets, so the outermost that is called counts.
        parts = dict.fromkeys((causal_model(model), base_transformer(model)))
        self._handles = [part.register_forward_pre_hook(self._before, with_kwargs=True) for part in parts]
        self._handles += [part.register_forward_hook(self._after, always_call=True) for part in parts]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def value(self, like: Tensor) -> Tensor:
        """The source's activation at the place in this forward pass."""
        if self._noted is None:
            raise InputError(SCORES_TEXTS)
        module, inputs = self._noted
        self.busy = True
        try:
            value = self._run(module is causal_model(self.model), inputs)
        finally:
            self.busy = False
        if value.shape[:-1] != like.shape[:-1]:
            raise InputError(SCORES_TEXTS)
        return value

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.busy or self._noted is not None:
            return
        named = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        inputs = {name: value for name, value in named.items() if name not in _NOT_HANDED_ON and value is not None}
        cache = named.get("past_key_values")
        if cache is not None:  # its length now is that before this pass
            inputs["past_key_values"] = cache, cache.get_seq_length()
        self._noted = module, inputs

    def _after(self, module: nn.Module, *_: object) -> None:
        if not self.busy and self._noted is not None and self._noted[0] is module:
            self._noted = None

    def _run(self, whole: bool, inputs: dict[str, Any]) -> Tensor:
        source = self.model if self.source is None else self.source
        if "input_ids" not in inputs:
            raise InputError(SCORES_TEXTS)
        if "past_key_values" in inputs:
            inputs = {**inputs, "past_key_values": self._cache(*inputs["past_key_values"], len(inputs["input_ids"]))}  # pyright: ignore
        device = next(source.parameters()).device
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        with ExitStack() as stack:
            if self.source is None:
                stack.enter_context(base_weights(self.model))
                stack.enter_context(without_taps(self.model))
            stack.enter_context(evaluating(source))
            tap = stack.enter_context(ReadTap(source, self.place))
            stack.enter_context(stop_after(source, self.place.layer))
            with suppress(StopForward):
                run = causal_model(source) if whole else base_transformer(source)
                run(**moved, use_cache="past_key_values" in inputs)
            return tap.value

    def _cache(self, cache: Any, length: int, rows: int) -> DynamicCache:
        """The source's keys and values that go with the model's: of the beginning that all rows share."""
        if not length:
            config = transformer_config(self.model if self.source is None else self.source)
            self._caches[cache] = DynamicCache(config=config)
            return self._caches[cache]
        known = self._caches.get(cache)
        if known is None or known.get_seq_length() != length:
            raise InputError(SCORES_TEXTS)
        before = next(len(layer.keys) for layer in known.layers if layer.get_seq_length())  # pyright: ignore
        if rows % before:
            raise InputError(SCORES_TEXTS)
        known.batch_repeat_interleave(rows // before)
        return known


SCORES_TEXTS = "patch scores texts: run the model on token ids, each text whole or behind its beginning; do not sample"
_NOT_HANDED_ON = {"past_key_values", "use_cache", "labels", "output_hidden_states", "output_attentions", "return_dict"}
