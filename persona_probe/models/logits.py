"""A model's own logits from its last hidden states: what it does there is asked of the model, never read from names.

Between the last hidden state and the logits a model may do more than multiply by its unembedding: Gemma caps logits,
Cohere, Granite and Falcon-H1 scale them, MiniCPM scales the hidden states, a model of your own does something else. So
the model's own `forward` is called with its decoder (and, for a part of the vocabulary, its unembedding) replaced by a
stub that gives what is already there. Each way of computing is compared once with the whole model on some tokens.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from persona_probe.errors import InputError
from persona_probe.models.layers import base_transformer, causal_model, decoder_layers, evaluating, output_head
from persona_probe.models.places import output_value
from persona_probe.models.taps import Tap

log = logging.getLogger(__name__)

PROBE_TOKENS = 32
"""Tokens of the row on which a model is compared with its parts."""
_SAME = 1e-4
"""Largest difference, relative to the largest logit, of what is the same product of the same numbers."""
_CLOSE = 2e-2
"""The same where a step may be rounded differently: to eight bits under bf16."""
NOT_THIS_WAY = (
    *(TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError),
    *(AssertionError, NotImplementedError),
)
"""What foreign modelling code raises when it is run in parts: another way of computing is taken then."""


@dataclass(frozen=True)
class Logits:
    """How logits follow from the decoder's last hidden states."""

    way: str
    """`product`: the unembedding's output. `elementwise`: that, changed by a function of each logit. `forward`: the
    model's own forward over given hidden states. `whole`: only the whole model gives them."""
    output: type | None = None
    """Class of the decoder's output."""

    @property
    def from_hidden(self) -> bool:
        """Whether they follow from the hidden states at all."""
        return self.way != "whole"


def own_logits(model: nn.Module, **inputs: Any) -> Float[Tensor, "batch pos vocab"]:
    """What the model itself gives for token ids or embeddings, without a cache."""
    out = causal_model(model)(**inputs, use_cache=False)
    return out[0] if isinstance(out, tuple) else out.logits


def hidden_to_logits(model: nn.Module, how: Logits, hidden: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
    """All logits after each hidden state, as the model gives them."""
    head = output_head(model)
    if how.way == "forward":
        return _by_forward(model, how, hidden)
    logits = head(hidden)
    return elementwise(model, how, logits) if how.way == "elementwise" else logits


def elementwise(model: nn.Module, how: Logits, products: Float[Tensor, "n columns"]) -> Float[Tensor, "n columns"]:
    """The unembedding's products for some tokens of the vocabulary as the model's logits.

    As all columns are treated alike, they are handed to the model as the vocabulary of a single position.
    """
    if how.way == "product":
        return products
    head, flat = output_head(model), products.float().reshape(1, 1, -1)
    with _replaced(head, lambda *_, **__: flat):
        hidden = flat.new_zeros(1, _width(model))
        return _by_forward(model, how, hidden).reshape(products.shape)


def _width(model: nn.Module) -> int:
    weight = getattr(output_head(model), "weight", None)
    return int(weight.shape[1]) if isinstance(weight, Tensor) and weight.ndim == 2 else 1


def _by_forward(model: nn.Module, how: Logits, hidden: Float[Tensor, "n d_model"]) -> Tensor:
    """The model's forward with its decoder replaced by one that has computed already."""
    inner, decoder = causal_model(model), base_transformer(model)
    assert how.output is not None
    output = hidden[None] if how.output is Tensor else how.output(last_hidden_state=hidden[None])
    output = (hidden[None],) if how.output is tuple else output
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    with _replaced(decoder, lambda *_, **__: output):
        out = inner.forward(input_ids=ids, use_cache=False)
    return (out[0] if isinstance(out, tuple) else out.logits)[0]


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward")
        if before is not None:
            module.__dict__["forward"] = before


# --- The norm between the last layer and the unembedding, found in a forward pass and not by its name


@torch.no_grad()
def final_norm(model: nn.Module) -> nn.Module | None:
    """The module that turns the last layer's output into the decoder's output; None if they are the same.

    A forward pass finds it, once for each model.

    Raises:
        InputError: more than one module stands between them.
    """
    decoder = base_transformer(model)
    known = _norms.get(decoder)
    if known is None or known not in set(decoder.modules()):
        known = _norms[decoder] = _found_norm(model, decoder)
    return None if known is decoder else known


_norms: "WeakKeyDictionary[nn.Module, nn.Module]" = WeakKeyDictionary()
"""By decoder, its final norm; the decoder itself where there is none."""


def _found_norm(model: nn.Module, decoder: nn.Module) -> nn.Module:
    layers = decoder_layers(model)
    inside = {part for layer in layers for part in layer.modules()}
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    seen: dict[str, Tensor] = {}

    def called(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if module is layers[-1]:
            seen["last"] = output_value(output)
        elif given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            calls.append((module, given[0], output))

    modules = [part for part in decoder.modules() if part is layers[-1] or (part not in inside and part is not decoder)]
    handles = [part.register_forward_hook(called) for part in modules]
    try:
        with evaluating(model), without_taps(model):
            ids = torch.tensor([[1, 2]], device=_device(causal_model(model)))
            final = _last_hidden(decoder(input_ids=ids, use_cache=False))
    finally:
        for handle in handles:
            handle.remove()
    if torch.equal(seen["last"], final):
        return decoder
    for module, given, output in calls:
        if given.shape == output.shape and torch.equal(given, seen["last"]) and torch.equal(output, final):
            return module
    raise InputError(f"{type(decoder).__name__} does more than norm its last layer's output: it has no logit lens")


# --- Which way a model takes, found once

_known: "WeakKeyDictionary[nn.Module, dict[Any, Logits]]" = WeakKeyDictionary()


def logits_of(model: nn.Module, ids: Int[Tensor, " pos"]) -> Logits:
    """How this model's logits follow from its hidden states; asked once for a model, its unembedding and its forward.

    Args:
        ids: some tokens of text, for the row on which the whole model and its parts are compared.
    """
    inner = causal_model(model)
    known = _known.setdefault(inner, {})
    key = _state(inner)
    if key not in known:
        known[key] = _ask(inner, ids[:PROBE_TOKENS])
        if not known[key].from_hidden:
            log.warning(
                "%s gives other logits than its decoder and unembedding: every score takes whole forward passes",
                type(inner).__name__,
            )
    return known[key]


def _state(inner: PreTrainedModel) -> tuple[Any, ...]:
    """What the answer depends on: the unembedding's kind (an adapter wraps it), and who has replaced a forward."""
    head, decoder = output_head(inner), base_transformer(inner)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (head, inner)]
    numbers = (value for value in vars(inner.config).values() if isinstance(value, float))
    return id(head), type(head), type(decoder), id(inner.__dict__.get("forward")), *hooks, *numbers


def _ask(inner: PreTrainedModel, ids: Int[Tensor, " pos"]) -> Logits:
    decoder, seen = base_transformer(inner), []
    row = ids.to(_device(inner))[None]
    # In the caller's precision: folded layers have no other.
    with evaluating(inner), without_taps(inner):
        handle = decoder.register_forward_hook(lambda _m, _i, output: seen.append(output))
        try:
            wanted = own_logits(inner, input_ids=row)[0]
        finally:
            handle.remove()
        if len(seen) != 1:
            return Logits("whole")
        hidden = _last_hidden(seen[0])[0]
        for way in ("product", "elementwise", "forward"):
            try:
                # Else the model prepares what its decoder gets, and the decoder alone gives something else.
                alone = _last_hidden(decoder(input_ids=row, use_cache=False))[0]
                how = Logits(way, type(seen[0]))
                if _agree(alone, hidden, _CLOSE) and _gives(inner, how, hidden, wanted):
                    return how
            except NOT_THIS_WAY:
                continue
    return Logits("whole")


def _gives(inner: PreTrainedModel, how: Logits, hidden: Tensor, wanted: Tensor) -> bool:
    if how.way == "product":
        return _agree(output_head(inner)(hidden), wanted, _SAME)
    if how.way == "forward":
        # In another order: what depends on a token's place does not follow from its hidden state.
        return _agree(_by_forward(inner, how, hidden.flip(0)).flip(0), wanted, _CLOSE)
    products = output_head(inner)(hidden)
    halves = products.tensor_split(2, dim=1)
    return _agree(torch.cat([elementwise(inner, how, half) for half in halves], dim=1), wanted, _CLOSE)


def _device(inner: PreTrainedModel) -> torch.device:
    parameter = next(inner.get_input_embeddings().parameters())
    return parameter.device


def _last_hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _agree(values: Tensor, wanted: Tensor, tolerance: float) -> bool:
    if values.shape != wanted.shape:
        return False
    values, wanted = values.float(), wanted.float().to(values.device)
    # Tokens that are ruled out (-inf) agree if both rule them out.
    difference = torch.where(values == wanted, 0.0, (values - wanted).abs())
    size = wanted[wanted.isfinite()].abs().max().clamp(min=1e-3)
    return bool(difference.max() <= tolerance * size)


@contextmanager
def without_taps(model: nn.Module) -> Iterator[None]:
    """Inside this block no tap on the model's layers fires."""
    with ExitStack() as stack:
        for module in {m for layer in decoder_layers(model) for m in layer.modules()}:
            stack.enter_context(without_hooks(module, Tap))
        yield


@contextmanager
def without_hooks(module: nn.Module, owner: type = object) -> Iterator[None]:
    """Inside this block no hook on this module fires; only those that are methods of an `owner`, if one is given."""
    before = [(hooks, list(hooks.items())) for hooks in (module._forward_hooks, module._forward_pre_hooks) if hooks]
    for hooks, items in before:
        for key, hook in items:
            if owner is object or isinstance(getattr(hook, "__self__", None), owner):
                del hooks[key]
    try:
        yield
    finally:
        for hooks, items in before:
            hooks.clear()
            hooks.update(items)
