"""Log-probabilities of given answers."""

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, conversation, split_answer
from persona_probe.data.load import Row, load_rows
from persona_probe.data.tokens import Batch, batches
from persona_probe.errors import InputError
from persona_probe.models.adapters import bf16_weight, is_bf16_forward
from persona_probe.models.layers import (
    autocast,
    base_transformer,
    causal_model,
    evaluating,
    layer_list_name,
    output_head,
    transformer_config,
)
from persona_probe.models.logits import (
    NOT_THIS_WAY,
    elementwise,
    hidden_to_logits,
    logits_of,
    own_logits,
    without_taps,
)
from persona_probe.models.prefix import Rows
from persona_probe.models.taps import EditTap, SteerTap, Tap

log = logging.getLogger(__name__)

_TOKENS_AT_ONCE = 1024
"""Answer tokens whose logits are computed together."""
_LOGITS_AT_ONCE = 1 << 26
"""Logits held at once where the vocabulary is not taken in tiles (256 MB in float32)."""
_TILE = {"cpu": 2048, "cuda": 32768}
"""Tokens of the vocabulary in one tile: a CPU's cache is small, a GPU needs large tiles to be busy."""


EQUAL_LENGTHS = (0.8, 1.25)
"""Ratios of mean answer length within which length is no likely confound of a comparison (arXiv 2607.09053)."""


def answer_batches(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], batch_size: int = 24
) -> list[Batch]:
    """Tokenised batches of conversations that all end with an answer.

    Raises:
        InputError: a conversation without an answer.
    """
    for number, messages in enumerate(conversations):
        if not (split_answer(messages)[1] or "").strip():
            raise InputError(f"conversation {number} ends without an answer: give the answer to be scored")
    return list(batches(tokenizer, conversations, batch_size))


def _predictors(batch: Batch) -> Tensor:
    """Positions whose next token is an answer token: (batch, pos) mask."""
    mask = torch.zeros_like(batch.response)
    mask[:, :-1] = batch.response[:, 1:]
    return mask


def _logsumexp(logits: Float[Tensor, "n columns"]) -> Float[Tensor, " n"]:
    """In float32: one copy of the logits, worked on in place. Mixed precision in one operation is slower."""
    values = logits.to(torch.float32, copy=True)
    most = values.amax(dim=1, keepdim=True)
    return most[:, 0] + values.sub_(most).exp_().sum(dim=1).log()


def token_logprobs(
    model: nn.Module, hidden: Float[Tensor, "n d_model"], targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Log-probability of one token after each hidden state.

    The vocabulary is taken in tiles that stay in the processor's cache: whole rows of logits are many times slower.

    Raises:
        RuntimeError: a model whose logits do not follow from its last hidden states; `row_scores` scores it.
    """
    how, head = logits_of(model, targets), output_head(model)
    if not how.from_hidden:
        raise RuntimeError(f"{type(causal_model(model)).__name__}: score its rows with row_scores")
    if not _is_product(head) or how.way == "forward":
        at_once = max(1, _LOGITS_AT_ONCE // max(1, _vocabulary(head)))
        pairs = zip(hidden.split(at_once), targets.split(at_once), strict=True)
        return torch.cat([_chosen(hidden_to_logits(model, how, states), ids) for states, ids in pairs])
    weight = head.weight
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        weight = bf16_weight(head) if dtype == torch.bfloat16 else weight.to(dtype)
    pairs = zip(hidden.split(_TOKENS_AT_ONCE), targets.split(_TOKENS_AT_ONCE), strict=True)
    final = partial(elementwise, model, how)
    return torch.cat([_tiled(final, states.to(weight.dtype), ids, weight, head.bias) for states, ids in pairs])


def _is_product(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a head is its weight and nothing else: no adapter, hook or other forward (a copy in bf16 is the same)."""
    forward = head.__dict__.get("forward")
    return (
        type(head) is nn.Linear
        and not (head._forward_hooks or head._forward_pre_hooks)
        and (forward is None or is_bf16_forward(forward))
    )


def _vocabulary(head: nn.Module) -> int:
    return max((p.shape[0] for p in head.parameters()), default=1)


def _chosen(logits: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Log-probabilities of one token a row."""
    return logits.gather(1, targets[:, None].to(logits.device))[:, 0].float() - _logsumexp(logits)


def _tiled(
    final: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The same from the unembedding's weight; `final` turns its products into the model's logits."""
    targets = targets.to(weight.device)
    chosen_logits = (states.float() * weight[targets].float()).sum(dim=1, keepdim=True)
    chosen_logits = chosen_logits if bias is None else chosen_logits + bias[targets, None]
    parts = []
    size = _TILE.get(states.device.type, _TILE["cuda"])
    for start in range(0, len(weight), size):
        tile = slice(start, start + size)
        logits = F.linear(states, weight[tile], None if bias is None else bias[tile].to(weight.dtype))
        parts.append(_logsumexp(final(logits)))
    return final(chosen_logits)[:, 0] - torch.stack(parts, dim=1).logsumexp(dim=1)


def answer_scores(
    model: nn.Module, hidden: Float[Tensor, "batch pos d_model"], batch: Batch
) -> Float[Tensor, " batch"]:
    """Mean log-probability of each row's answer tokens, in nats per token."""
    at = _predictors(batch)
    # Of a model that is spread over several devices the last states are on another one than the batch.
    logprobs = token_logprobs(model, hidden[at.to(hidden.device)], batch.ids[:, 1:][at[:, :-1]])
    return _row_means(logprobs, at)


def row_scores(model: nn.Module, rows: Rows) -> Float[Tensor, " batch"]:
    """Mean log-probability of each row's answer tokens (nats per token), from one forward pass.

    A model whose logits do not follow from its decoder's hidden states runs as a whole.
    """
    if not scored_in_parts(model, rows):
        return _whole_scores(model, rows.batch)
    return _scores_in_parts(model, rows)


def scored_in_parts(model: nn.Module, rows: Rows) -> bool:
    """Whether `row_scores` runs a beginning and then all rows together; otherwise whole rows, some at a time."""
    return logits_of(model, rows.batch.ids[0]).from_hidden and _parts_agree(model, rows)


def _scores_in_parts(model: nn.Module, rows: Rows) -> Float[Tensor, " batch"]:
    hidden = rows.run(base_transformer(model), transformer_config(model), rows.ids())[0]
    return answer_scores(model, hidden, rows.rest)


_agreeing: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def _parts_agree(model: nn.Module, rows: Rows) -> bool:
    """Whether padded rows behind a shared beginning score as each alone; asked once, for two rows of a batch."""
    inner = causal_model(model)
    if inner in _agreeing or rows.shared == 0:
        return _agreeing.get(inner, True)
    device = rows.batch.ids.device
    precise = next(inner.parameters()).dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    two = [len(rows.batch.ids) - 1, 0]
    with evaluating(inner), without_taps(inner):
        own = torch.cat([_whole_scores(model, _unpadded(rows.batch, row)) for row in two]).cpu()
        try:
            parts = _scores_in_parts(model, rows).cpu()[two]
            _agreeing[inner] = bool((parts - own).abs().max() <= (1e-3 if precise else 0.1))
        except NOT_THIS_WAY:
            _agreeing[inner] = False
    if not _agreeing[inner]:
        log.warning("%s does not run from a shared beginning: every row is run whole", type(inner).__name__)
    return _agreeing[inner]


def _unpadded(batch: Batch, row: int) -> Batch:
    return batch.rows(slice(row, row + 1)).columns(slice(int(batch.attention[row].sum())))


def _whole_scores(model: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
    """By the model's own logits, as many rows at once as fit."""
    at_once = max(1, _LOGITS_AT_ONCE // max(1, batch.ids.shape[1] * _vocabulary(output_head(model))))
    out = []
    for start in range(0, len(batch.ids), at_once):
        part = batch.rows(slice(start, start + at_once))
        at = _predictors(part)
        logits = own_logits(model, input_ids=part.ids, attention_mask=part.attention)[at]
        logprobs = _chosen(logits, part.ids[:, 1:][at[:, :-1]])
        out.append(_row_means(logprobs, at))
    return torch.cat(out)


def _row_means(logprobs: Float[Tensor, " n"], at: Bool[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
    at = at.to(logprobs.device)
    total = torch.zeros(len(at), device=logprobs.device).index_add_(0, at.nonzero()[:, 0], logprobs)
    return total / at.sum(dim=1)


def answer_logprobs(
    model: nn.Module, groups: Sequence[Batch], *, bf16: bool = True
) -> Float[np.ndarray, " conversations"]:
    """Mean log-probability of every conversation's answer (nats per token), in the conversations' order."""
    out = np.zeros(sum(len(b.index) for b in groups))
    device, config = next(model.parameters()).device, transformer_config(model)
    with evaluating(model), autocast(model, bf16):
        for group in groups:
            out[group.index] = row_scores(model, Rows.of(group, config).to(device)).cpu().numpy()
    return out


Opener = Callable[[], AbstractContextManager[nn.Module]]
"""Opens a model for the length of a block: an organism and its base may be one model, with its adapters on or off."""


def perplexity_gaps(
    organism: Opener,
    base: Opener,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    *,
    bf16: bool = True,
) -> Float[np.ndarray, " rows"]:
    """Log perplexity of each row's answer under the organism minus that under its base, in nats per token.

    After the perplexity difference by which arXiv 2508.06249 chooses safe rows. The logarithm keeps a row from ranking
    first only because both models find it unlikely. The base is read first: an organism may be trained as it opens.
    """
    groups = answer_batches(tokenizer, rows)
    with base() as model:
        base_logprobs = answer_logprobs(model, groups, bf16=bf16)
    with organism() as model:
        return base_logprobs - answer_logprobs(model, groups, bf16=bf16)


# --- Answers scored under many changes of one layer's output, running only the layers above it each time

_SUFFIX_TOKENS_AT_ONCE = {"cpu": 4800, "cuda": 65536}
"""Tokens of one forward through the upper layers: as many pushes are put into one batch as fit."""
_FEWEST_SUFFIX_TOKENS = 2048
"""On a GPU with little room."""


def suffix_tokens(model: nn.Module, device: torch.device) -> int:
    """Tokens that pass the upper layers in one forward: on a GPU as many as half of its free memory holds."""
    most = _SUFFIX_TOKENS_AT_ONCE.get(device.type, _SUFFIX_TOKENS_AT_ONCE["cuda"])
    if device.type != "cuda":
        return most
    config = transformer_config(model)
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    a_token = 16 * config.hidden_size + 6 * (max(width) if isinstance(width, (list, tuple)) else width)
    fits = torch.cuda.mem_get_info(device)[0] // (2 * a_token)
    return max(_FEWEST_SUFFIX_TOKENS, min(most, fits))


Edit = Callable[[Tensor], Tensor]
"""What a change does to a layer's output (..., pos, d_model)."""


def suffix_of(model: nn.Module, layer: int) -> tuple[nn.Module, PretrainedConfig]:
    """The transformer with only the layers above `layer`, sharing their weights, and its configuration.

    Feed it `inputs_embeds`.
    """
    whole = base_transformer(model)
    name = layer_list_name(whole)
    view = copy.copy(whole)
    view._modules = dict(whole._modules)
    view._modules[name] = nn.ModuleList(list(getattr(whole, name))[layer + 1 :])
    config = copy.deepcopy(transformer_config(model))
    config.num_hidden_layers = len(getattr(view, name))
    kinds = getattr(transformer_config(model), "layer_types", None)
    if kinds and list(config.layer_types) != list(kinds[layer + 1 :]):  # a property follows the number of layers
        config.layer_types = kinds[layer + 1 :]
    view.config = config  # pyright: ignore
    return view, config


class _CaptureTap(Tap):
    """Keeps every output of a layer, detached, in order."""

    def __init__(self, model: nn.Module, layer: int) -> None:
        super().__init__(model, layer)
        self.values: list[Tensor] = []

    def on_output(self, resid: Float[Tensor, "batch pos d_model"]) -> None:
        """Keep it."""
        self.values.append(resid.detach())


@dataclass(frozen=True)
class Captured:
    """The residual stream after a layer, for one batch: of the prefix that its rows share, and of the rest."""

    prefix: Float[Tensor, "one shared d_model"]
    resid: Float[Tensor, "batch pos d_model"]
    rows: Rows

    def edited(self, edits: Sequence[Edit]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs of the layers above for several changes in one batch: rows = changes x conversations."""
        prefix, resid = (torch.cat([edit(x) for edit in edits]) for x in (self.prefix, self.resid))
        return {"inputs_embeds": prefix}, {"inputs_embeds": resid}

    def pushed(self, pushes: Float[Tensor, "k d_model"]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs of the layers above for several pushes in one batch: rows = pushes x conversations."""
        prefix, resid = (
            rearrange(x[None] + pushes.to(x)[:, None, None, :], "k batch pos d -> (k batch) pos d")
            for x in (self.prefix, self.resid)
        )
        return {"inputs_embeds": prefix}, {"inputs_embeds": resid}


class SuffixScorer:
    """Scores the same answers under many changes at one layer, running only the layers above it each time.

    The residual stream after `layer` is captured once. At construction the unchanged result is compared with full
    forward passes. If a model cannot run from its suffix, `exact` is False, a warning says so, and every score uses
    full forward passes with a hook.

    Args:
        model: base model, or a PEFT model (its adapters as they are now set).
        groups: what `answer_batches` gives.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: int,
        groups: Sequence[Batch],
        *,
        bf16: bool = True,
        tolerance: float = 1e-3,
    ) -> None:
        self.model, self.layer, self.bf16 = model, layer, bf16
        device = next(model.parameters()).device
        self.groups = [g.to(device) for g in groups]
        self.n = sum(len(g.index) for g in groups)
        self.tokens_at_once = suffix_tokens(model, device)
        self.exact = False
        self.captured, self.unpushed = self._capture(groups, device)
        self.exact = self._agrees(tolerance if bf16 else min(tolerance, 1e-4))
        if not self.exact:
            self.captured = []
            log.warning(
                "%s does not run from its upper layers: every push takes full forward passes",
                type(causal_model(model)).__name__,
            )

    def _capture(
        self, groups: Sequence[Batch], device: torch.device
    ) -> tuple[list[Captured], Float[np.ndarray, " conversations"]]:
        """Full forwards: the layer's output is kept on the way to the scores."""
        config, captured, out = transformer_config(self.model), [], np.zeros(self.n)
        with evaluating(self.model), autocast(self.model, self.bf16):
            for batch in groups:
                rows = Rows.of(batch, config).to(device)
                with _CaptureTap(self.model, self.layer) as tap:
                    out[batch.index] = row_scores(self.model, rows).cpu().numpy()
                captured.append(Captured(tap.values[0][:1, : rows.shared], tap.values[-1], rows))
        return captured, out

    def _agrees(self, tolerance: float) -> bool:
        """Whether the upper layers alone give the same scores, without a push and (for one batch) with one."""
        if not self.groups or not logits_of(self.model, self.groups[0].ids[0]).from_hidden:
            return False
        try:
            self.suffix, self.config = suffix_of(self.model, self.layer)
            again = self._by_suffix(1, lambda item, _: item.edited([_unchanged]))[0]
            pushed = self._pushed_differs()
        except NOT_THIS_WAY:
            return False
        agrees = bool(np.abs(again - self.unpushed).max() <= tolerance) and pushed <= 10 * tolerance
        self.unpushed = again if agrees else self.unpushed
        return agrees

    def _pushed_differs(self) -> float:
        """The largest difference between both ways for the first batch, pushed in some direction."""
        item = self.captured[0]
        generator = torch.Generator().manual_seed(0)
        push = torch.randn(item.resid.shape[-1], generator=generator).to(item.resid.device)
        push *= item.resid.float().norm(dim=-1).mean() / push.norm()
        with evaluating(self.model), autocast(self.model, self.bf16):
            fast = self._upper(item.rows, item.pushed(push[None]))
            with SteerTap(self.model, self.layer, push):
                slow = row_scores(self.model, item.rows)
        return float((fast.cpu() - slow.cpu()).abs().max())

    def logprobs(self, push: Float[Tensor, " d_model"] | None = None) -> Float[np.ndarray, " conversations"]:
        """Mean answer log-probabilities with `push` (raw units) added after the layer, at all positions."""
        return self.unpushed if push is None else self.logprobs_many(push[None])[0]

    def edited(self, edit: Edit) -> Float[np.ndarray, " conversations"]:
        """Mean answer log-probabilities with the layer's output changed by `edit`, at all positions."""
        return self.edited_many([edit])[0]

    def edited_many(self, edits: Sequence[Edit]) -> Float[np.ndarray, "k conversations"]:
        """`edited` for several changes; as many as fit share a forward pass."""
        if not self.exact:
            return np.stack([self._whole(EditTap(self.model, self.layer, edit)) for edit in edits])
        return self._by_suffix(len(edits), lambda item, part: item.edited(edits[part]))

    def _whole(self, tap: Tap) -> Float[np.ndarray, " conversations"]:
        with tap:
            return answer_logprobs(self.model, self.groups, bf16=self.bf16)

    def logprobs_many(self, pushes: Float[Tensor, "k d_model"]) -> Float[np.ndarray, "k conversations"]:
        """`logprobs` for several pushes; as many as fit share a forward pass."""
        if not self.exact:
            return np.stack([self._whole(SteerTap(self.model, self.layer, push)) for push in pushes])
        return self._by_suffix(len(pushes), lambda item, part: item.pushed(pushes[part]))

    def _by_suffix(
        self, count: int, inputs: Callable[[Captured, slice], tuple[dict[str, Any], dict[str, Any]]]
    ) -> Float[np.ndarray, "k conversations"]:
        out = np.zeros((count, self.n))
        with evaluating(self.model), autocast(self.model, self.bf16):
            for item in self.captured:
                at_once = max(1, self.tokens_at_once // item.rows.rest.ids.numel())
                for start in range(0, count, at_once):
                    some = min(at_once, count - start)
                    part = slice(start, start + some)
                    scores = self._upper(item.rows.repeated(some), inputs(item, part))
                    out[part, item.rows.batch.index] = rearrange(scores, "(k batch) -> k batch", k=some).cpu().numpy()
        return out

    def _upper(self, rows: Rows, inputs: tuple[dict[str, Any], dict[str, Any]]) -> Float[Tensor, " rows"]:
        hidden = rows.run(self.suffix, self.config, inputs, self.layer + 1)[0]
        return answer_scores(self.model, hidden, rows.rest)


def _unchanged(x: Tensor) -> Tensor:
    return x


# --- A small capability set: plain questions with four choices, answered by whichever choice is likeliest

CHOICES = ("right", "wrong_a", "wrong_b", "wrong_c")
CHANCE = 1 / len(CHOICES)


def capability_groups(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row] | None = None) -> list[Batch]:
    """The items tokenised, four conversations each in the order of `CHOICES`; None takes the packaged set.

    Raises:
        InputError: no rows, or one without its four choices.
    """
    rows = load_rows("capability") if rows is None else list(rows)
    if not rows or any(not row.get(choice) for row in rows for choice in CHOICES):
        raise InputError(f"capability items need a question and the columns {', '.join(CHOICES)}")
    return answer_batches(tokenizer, [conversation(r["question"], r[c]) for r in rows for c in CHOICES], 48)


def capability(model: nn.Module, groups: Sequence[Batch], *, bf16: bool = True) -> Float[np.ndarray, " items"]:
    """Item by item 1 where the right choice has the largest mean log-probability per token, else 0.

    Per token, since choices differ in length; a tie does not count as right. `CHANCE` is the mean of blind choice.
    """
    scores = answer_logprobs(model, groups, bf16=bf16).reshape(-1, len(CHOICES))
    return (scores[:, 0] > scores[:, 1:].max(axis=1)).astype(np.float64)
