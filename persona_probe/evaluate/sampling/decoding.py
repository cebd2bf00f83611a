"""The decoding loop: rows of different prompts side by side, leaving the batch when done, others taking their place."""

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from persona_probe.data.tokens import Batch, Encoded, collate
from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.generating import Observer, generate_answers
from persona_probe.evaluate.sampling.requests import Finish, SamplingConfig, digest
from persona_probe.models.identity import weights_hash
from persona_probe.models.layers import base_transformer, causal_model, evaluating, transformer_config
from persona_probe.models.logits import NOT_THIS_WAY, own_logits, without_hooks, without_taps
from persona_probe.models.prefix import CACHED_LAYERS, shared_length, without_prefix
from persona_probe.models.taps import AblateTap, ReadTap, SteerTap, Tap, taps_on

log = logging.getLogger(__name__)

# --- Keys and values of rows that come and go: right-aligned, with room to grow

_ROOM = 32
"""New tokens that fit before a buffer is copied into a larger one."""


@dataclass(frozen=True)
class KeyValues:
    """What one layer remembers of one prompt."""

    keys: Float[Tensor, "heads pos d_head"]
    values: Float[Tensor, "heads pos d_head"]


class GrowingLayer(DynamicLayer):
    """One layer's keys and values in buffers with room at the end, so that a new token copies no old one."""

    def __init__(self, buffers: tuple[Tensor, Tensor], length: int) -> None:
        super().__init__()
        self.buffers = buffers
        self.is_initialized = True
        self.dtype, self.device = buffers[0].dtype, buffers[0].device
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (b[:, :, :length] for b in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append new positions; gives all of them."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.buffers[0].shape[2]:
            keys, values = (torch.nn.functional.pad(b, (0, 0, 0, end + _ROOM - b.shape[2])) for b in self.buffers)
            self.buffers = keys, values
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values  # pyright: ignore[reportReturnType]


def stacked(old: Sequence[Tensor], new: Sequence[tuple[Tensor, int]], width: int) -> Float[Tensor, "rows heads pos d"]:
    """Rows kept from before and rows of new prompts in one buffer, all ending at column `width`.

    Args:
        old: none, or one tensor (rows, heads, pos, d) whose rows end at its last column.
        new: keys or values of a prompt (heads, pos, d), and how many rows begin with it.
    """
    like = old[0][0] if old else new[0][0]
    filled = len(old[0]) if old else 0
    rows = filled + sum(times for _, times in new)
    # Zeros, not whatever memory holds: a masked column still takes part in the sum, with weight 0.
    out = like.new_zeros((rows, like.shape[0], width + _ROOM, like.shape[2]))
    if old:
        overlap = min(width, old[0].shape[2])
        out[:filled, :, width - overlap : width] = old[0][:, :, old[0].shape[2] - overlap :]
    for prompt, times in new:
        out[filled : filled + times, :, width - prompt.shape[1] : width] = prompt
        filled += times
    return out


def merged(
    cache: Cache | None, keep: Sequence[int], new: Sequence[tuple[Sequence[KeyValues], int]], width: int
) -> Cache:
    """A cache of the rows `keep` of `cache`, then of new prompts' rows; `width` is the longest row's length."""
    layers = []
    index = torch.tensor(list(keep), dtype=torch.long)
    for number in range(len(cache.layers if cache is not None else new[0][0])):
        old: list[DynamicLayer] = [cache.layers[number]] if cache is not None and keep else []  # pyright: ignore
        keys = [(prompt[number].keys, times) for prompt, times in new]
        values = [(prompt[number].values, times) for prompt, times in new]
        buffers = (
            stacked([_rows(layer.keys, index) for layer in old], keys, width),
            stacked([_rows(layer.values, index) for layer in old], values, width),
        )
        layers.append(GrowingLayer(buffers, width))
    return Cache(layers=layers)


def _rows(states: Tensor | None, index: Tensor) -> Tensor:
    assert states is not None
    return states[index.to(states.device)]


# --- Which positions of a forward pass are prompt, told to the taps that steer only prompt or response

Tell = Callable[[Bool[Tensor, "batch pos"]], None]


@contextmanager
def telling_positions(model: nn.Module) -> Iterator[Tell]:
    """Gives a function to be called with the prompt mask of each forward pass before it runs.

    Sampling orders and groups rows as it likes, so a mask that the caller gave to `steer` cannot fit: it is replaced
    while the block lasts.

    Raises:
        InputError: a tap pushes each row of a batch in its own way.
    """
    steering = [tap for tap in taps_on(model) if isinstance(tap, SteerTap)]
    if any(tap.vector.ndim > 1 for tap in steering):
        raise InputError("sampling groups rows as it likes: steer with one vector (d_model,), not one for each row")
    masks = [tap.prompt_mask for tap in steering]

    def tell(mask: Bool[Tensor, "batch pos"]) -> None:
        for tap in steering:
            tap.prompt_mask = mask

    try:
        yield tell
    finally:
        for tap, mask in zip(steering, masks, strict=True):
            tap.prompt_mask = mask


# --- Prompts run once: their keys and values, for all samples that begin with them


@dataclass(frozen=True)
class PromptCache:
    """A prompt of which all tokens but the last have been run: the last is every sample's first step."""

    length: int
    """Tokens that have been run."""
    last: int
    """The prompt's last token."""
    layers: list[KeyValues]


def _run_prompts(model: nn.Module, prompts: Sequence[Sequence[int]], tell: Tell) -> list[PromptCache]:
    """Run prompts (token ids) in one batch; what they share at the start, mostly a system prompt, is run once."""
    device = next(model.parameters()).device
    # A prompt of one token has nothing to run before it, but a batch needs a column.
    encoded = [Encoded(list(p[:-1]) or list(p), len(p) - 1) for p in prompts]
    batch = collate(encoded, list(range(len(encoded))), 0, set()).to(device)
    cache = _filled(model, batch, tell)
    return [
        PromptCache(len(p) - 1, p[-1], [_of_row(layer, row, len(p) - 1) for layer in cache.layers])
        for row, p in enumerate(prompts)
    ]


def _filled(model: nn.Module, batch: Batch, tell: Tell) -> Cache:
    forward, cache = base_transformer(model), DynamicCache()
    shared = shared_length(batch, transformer_config(model))
    if shared:
        tell(batch.prompt[:1, :shared])
        forward(input_ids=batch.ids[:1, :shared], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(batch.ids))
    rest = without_prefix(batch, shared)
    tell(rest.prompt)
    forward(input_ids=rest.ids, attention_mask=batch.attention, past_key_values=cache, use_cache=True)
    return cache


def _of_row(layer: object, row: int, length: int) -> KeyValues:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    assert isinstance(keys, Tensor) and isinstance(values, Tensor)
    return KeyValues(_as_attended(keys[row, :, :length]), _as_attended(values[row, :, :length]))


def _as_attended(states: Tensor) -> Tensor:
    """In the type to which autocast would otherwise cast them at every step."""
    kind = states.device.type
    return states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states


# --- The next token of each row, from random numbers that belong to that row only

RowKey = np.ndarray
"""Two 64-bit words: the key of a row's counter-based generator."""

_NUCLEUS = 1024
"""Tokens among which a nucleus is looked for first: sorting a whole vocabulary costs more than a forward pass."""


def row_key(seed: int, question_id: str, sample: int) -> RowKey:
    """The generator key of one sample."""
    return np.frombuffer(digest(seed, question_id, sample)[:16], dtype="<u8")


def gumbel(keys: Sequence[RowKey], steps: Sequence[int], vocabulary: int) -> Float[Tensor, "rows vocabulary"]:
    """Standard Gumbel noise for each row at its step: a function of the row's key and the step, and of nothing else.

    Philox is counter-based (Salmon et al. 2011). Float64 draws: with 24 bits a token that is never likely would win
    once in a few hundred steps.
    """
    waits = np.empty((len(keys), vocabulary), dtype=np.float32)
    for row, (key, step) in enumerate(zip(keys, steps, strict=True)):
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, step, 0]))
        waits[row] = generator.standard_exponential(vocabulary)
    return torch.from_numpy(waits).log_().neg_()


def choose(
    logits: Float[Tensor, "rows vocabulary"], keys: Sequence[RowKey], steps: Sequence[int], config: SamplingConfig
) -> Int[Tensor, " rows"]:
    """Each row's next token: argmax of logits / temperature + Gumbel noise, which draws from their softmax exactly.

    Why Gumbel noise and no inverse distribution function: logits differ in their last bits between batch shapes. A
    difference of at most e changes a token drawn so with a probability of about e, however long the tail of the
    vocabulary is; with an inverse distribution function every token of the tail changes at once.
    """
    logits = logits.float()
    if config.greedy:
        return logits.argmax(dim=-1)
    scaled = logits / config.temperature
    if config.top_p < 1:
        scaled = keep_top_p(scaled, config.top_p)
    return (scaled + gumbel(keys, steps, logits.shape[-1]).to(scaled.device)).argmax(dim=-1)


def choose_each(
    logits: Float[Tensor, "rows vocabulary"], rows: Sequence[tuple[RowKey, int, SamplingConfig]]
) -> Int[Tensor, " rows"]:
    """`choose` for rows (key, step, configuration) that may be drawn in different ways."""
    kinds: dict[SamplingConfig, list[int]] = {}
    for place, (_, _, config) in enumerate(rows):
        kinds.setdefault(config, []).append(place)
    tokens = torch.zeros(len(rows), dtype=torch.long, device=logits.device)
    for config, places in kinds.items():
        keys, steps = [rows[n][0] for n in places], [rows[n][1] for n in places]
        tokens[places] = choose(logits if len(kinds) == 1 else logits[places], keys, steps, config)
    return tokens


def keep_top_p(logits: Float[Tensor, "rows vocabulary"], top_p: float) -> Float[Tensor, "rows vocabulary"]:
    """Logits with -inf outside the smallest set of tokens whose probability reaches `top_p`; ties stay together."""
    logprobs = logits.log_softmax(dim=-1)
    top = logprobs.topk(min(_NUCLEUS, logits.shape[-1])).values
    if bool((top.exp().sum(dim=-1) < top_p).any()):
        top = logprobs.sort(descending=True).values
    mass_before = top.exp().cumsum(dim=-1) - top.exp()
    size = (mass_before < top_p).sum(dim=-1, keepdim=True)
    return logits.masked_fill(logprobs < top.gather(1, (size - 1).clamp(min=0)), -torch.inf)


_SLACK = 8
"""The batch is repacked when one row in this many is done: packing copies all keys and values."""
_PROMPTS_AT_ONCE = 8
"""At least this many prompts are run together, so that what they share is run once."""


@dataclass(frozen=True)
class AnswerRequest:
    """One answer to decode: the prompt's token ids, and the key of its random draws."""

    ids: tuple[int, ...]
    key: RowKey
    config: SamplingConfig | None = None
    """How it is drawn; None is as all others."""


@dataclass
class _DecodingRow:
    """An answer that is being decoded."""

    number: int
    """Which of the wanted answers it is."""
    key: RowKey
    length: int
    """Tokens whose keys and values are held."""
    token: int
    """The token to run next."""
    config: SamplingConfig
    made: list[int] = field(default_factory=list)
    done: bool = False


Finished = Callable[[int, list[int], Finish], None]
"""Called with a wanted answer's number, its tokens without the stop token, and why it ended."""


class Decoder:
    """Decodes answers with one model; see `decode`."""

    def __init__(
        self,
        model: nn.Module,
        config: SamplingConfig,
        stop: frozenset[int],
        batch_size: int,
        observer: Observer | None = None,
    ) -> None:
        self.model, self.config, self.stop, self.batch_size = model, config, stop, batch_size
        self.observer = observer
        self.device = next(model.parameters()).device
        self.requests: dict[int, AnswerRequest] = {}
        self.rows: list[_DecodingRow] = []
        self.cache: Cache | None = None
        self.waiting: deque[tuple[tuple[int, ...], deque[int]]] = deque()
        self.ready: deque[tuple[PromptCache, deque[int]]] = deque()

    def run(self, requests: Sequence[AnswerRequest], tell: Tell, finished: Finished) -> None:
        """Decode all of `requests`, longest prompts first: what is too large for memory shows at once."""
        self.add(dict(enumerate(requests)))
        while self.busy:
            self.advance(tell, finished)

    def add(self, requests: Mapping[int, AnswerRequest]) -> None:
        """Let further answers wait, by number."""
        numbers: dict[tuple[int, ...], deque[int]] = {}
        for number, request in requests.items():
            numbers.setdefault(request.ids, deque()).append(number)
        self.requests.update(requests)
        self.waiting.extend(sorted(numbers.items(), key=lambda item: -len(item[0])))

    @property
    def busy(self) -> bool:
        """Whether an answer is under way or waits."""
        return bool(self.waiting or self.ready) or not all(row.done for row in self.rows)

    @property
    def live(self) -> int:
        """Answers under way."""
        return sum(not row.done for row in self.rows)

    def advance(self, tell: Tell, finished: Finished, join: bool = False) -> None:
        """One token of every answer under way.

        Args:
            join: let those that wait begin now, where there is room, and not only once enough rows are done.
        """
        if _SLACK * sum(row.done for row in self.rows) >= len(self.rows) or (join and self.live < self.batch_size):
            self._pack(tell)
        self._step(tell, finished)

    def _pack(self, tell: Tell) -> None:
        """Drop the rows that are done and begin others in their place."""
        keep = [place for place, row in enumerate(self.rows) if not row.done]
        rows = [self.rows[place] for place in keep]
        new = []
        while len(rows) < self.batch_size and (self.ready or self.waiting):
            if not self.ready:
                self._begin(self.batch_size - len(rows), tell)
            prompt, numbers = self.ready[0]
            numbers_now = [numbers.popleft() for _ in range(min(len(numbers), self.batch_size - len(rows)))]
            rows += [self._row(n, prompt) for n in numbers_now]
            new.append((prompt.layers, len(numbers_now)))
            if not numbers:
                self.ready.popleft()
        self.rows = rows
        self.cache = merged(self.cache, keep, new, max(row.length for row in rows))

    def _row(self, number: int, prompt: PromptCache) -> _DecodingRow:
        request = self.requests.pop(number)
        return _DecodingRow(number, request.key, prompt.length, prompt.last, request.config or self.config)

    def _begin(self, free: int, tell: Tell) -> None:
        """Run the next prompts: enough for the free places, and some in advance."""
        chunk, places = [], 0
        while self.waiting and (len(chunk) < _PROMPTS_AT_ONCE or places < free):
            chunk.append(self.waiting.popleft())
            places += len(chunk[-1][1])
        if self.observer is not None:
            self.observer.before(())
        caches = _run_prompts(self.model, [ids for ids, _ in chunk], tell)
        self.ready.extend(zip(caches, (numbers for _, numbers in chunk), strict=True))

    def _step(self, tell: Tell, finished: Finished) -> None:
        live = [place for place, row in enumerate(self.rows) if not row.done]
        logits = self._logits(tell)
        if self.observer is not None and not (live := self._observed(self.observer, live, finished)):
            return
        logits = logits if len(live) == len(self.rows) else logits[live]
        rows = [self.rows[place] for place in live]
        tokens = choose_each(logits, [(row.key, len(row.made), row.config) for row in rows]).tolist()
        for row, token in zip(rows, tokens, strict=True):
            row.length, row.token = row.length + 1, token
            if token in self.stop:
                row.done = True
                finished(row.number, row.made, "stop")
                continue
            row.made.append(token)
            if len(row.made) == row.config.max_new_tokens:
                row.done = True
                finished(row.number, row.made, "length")

    def _observed(self, observer: Observer, live: list[int], finished: Finished) -> list[int]:
        """Show the rows to the observer; gives those that go on."""
        rows = [self.rows[place] for place in live]
        over = observer.after(live, [row.number for row in rows], [row.made for row in rows])
        for row in rows:
            if row.number in over:
                row.done = True
                finished(row.number, row.made, "stop")
        return [place for place in live if not self.rows[place].done]

    def _logits(self, tell: Tell) -> Tensor:
        """Logits (rows, vocabulary) after each row's next token; rows that are done run along."""
        assert self.cache is not None
        width = self.cache.get_seq_length() + 1
        lengths = torch.tensor([row.length for row in self.rows])[:, None]
        tell(torch.tensor([[not row.made] for row in self.rows]))
        if self.observer is not None:
            self.observer.before([None if row.done else row.number for row in self.rows])
        out = causal_model(self.model)(
            input_ids=torch.tensor([[row.token] for row in self.rows], device=self.device),
            attention_mask=(torch.arange(width) >= width - 1 - lengths).to(self.device, torch.long),
            position_ids=lengths.to(self.device),
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.logits[:, -1]


def decode(
    model: nn.Module,
    requests: Sequence[AnswerRequest],
    config: SamplingConfig,
    stop: frozenset[int],
    batch_size: int,
    finished: Finished,
    observer: Observer | None = None,
) -> None:
    """Decode answers inside whatever steers, ablates or casts the model now; nothing of the model is changed after.

    Equal prompts are run once for all their answers. `finished` is called for each answer as it ends. A model that
    keeps another state than keys and values is sampled from by its own `generate`, with the same draws.

    Raises:
        InputError: a model that cannot generate, or taps that push each row differently.
    """
    with evaluating(model):
        joins = requests and rows_can_join(model, requests[0].ids)
        with telling_positions(model) as tell:
            if joins:
                Decoder(model, config, stop, batch_size, observer).run(requests, tell, finished)
            else:
                by_generate(model, dict(enumerate(requests)), config, stop, batch_size, tell, finished, observer)


def by_generate(
    model: nn.Module,
    requests: Mapping[int, AnswerRequest],
    config: SamplingConfig,
    stop: frozenset[int],
    batch_size: int,
    tell: Tell,
    finished: Finished,
    observer: Observer | None = None,
) -> None:
    """Decode answers, by number, with the model's own `generate`: what `decode` does where rows cannot join."""
    configs = {number: request.config or config for number, request in requests.items()}

    def pick(logits: Tensor, numbers: Sequence[int], step: int) -> Tensor:
        return choose_each(logits, [(requests[n].key, step, configs[n]) for n in numbers])

    def ended(number: int, made: list[int], stopped: bool) -> None:
        finished(number, made, "stop" if stopped else "length")

    for longest in sorted({c.max_new_tokens for c in configs.values()}):
        prompts = {n: r.ids for n, r in requests.items() if configs[n].max_new_tokens == longest}
        generate_answers(model, prompts, pick, stop, longest, batch_size, tell, ended, observer)


# --- Whether a model's rows can come and go: asked once, as its kinds of layers do not tell it

_joining: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()
_PROBE_TOKENS = 8


def rows_can_join(model: nn.Module, ids: Sequence[int]) -> bool:
    """Whether rows of different lengths, with keys and values put together here, get the model's own logits.

    Args:
        ids: some tokens of text.
    """
    inner = causal_model(model)
    kinds = set(getattr(transformer_config(model), "layer_types", None) or ())
    if inner._is_stateful or not kinds <= CACHED_LAYERS:
        return False
    if inner not in _joining:
        with torch.no_grad(), without_taps(inner), without_hooks(base_transformer(inner)):
            _joining[inner] = _joined_rows_agree(model, (*ids, *ids, *ids)[:_PROBE_TOKENS])
        if not _joining[inner]:
            log.warning("%s is sampled by its own generate: its rows cannot come and go", type(inner).__name__)
    return _joining[inner]


def _joined_rows_agree(model: nn.Module, ids: Sequence[int]) -> bool:
    """Two rows of different lengths, two steps each, against whole forward passes."""
    rows = [list(ids[: len(ids) // 2]), list(ids)]
    decoder = Decoder(model, SamplingConfig(temperature=0), frozenset(), len(rows))
    # bf16 moves logits by some hundredths of the largest, a wrong cache by its size.
    precise = next(model.parameters()).dtype == torch.float32 and not torch.is_autocast_enabled(decoder.device.type)
    tolerance = 1e-3 if precise else 0.1
    try:
        caches = _run_prompts(model, rows, _nobody)
        decoder.rows = [
            _DecodingRow(n, row_key(0, "", n), c.length, c.last, decoder.config) for n, c in enumerate(caches)
        ]
        decoder.cache = merged(None, [], [(c.layers, 1) for c in caches], max(c.length for c in caches))
        for _ in range(2):
            joined = decoder._logits(_nobody).float()
            alone = [own_logits(model, input_ids=torch.tensor([row], device=decoder.device))[0, -1] for row in rows]
            wanted = torch.stack(alone).float().to(joined.device)
            size = wanted[wanted.isfinite()].abs().max()
            if not bool((torch.where(joined == wanted, 0.0, (joined - wanted).abs()) <= tolerance * size).all()):
                return False
            for row, state in zip(rows, decoder.rows, strict=True):
                state.length, state.token = state.length + 1, row[0]
                row.append(row[0])
    except NOT_THIS_WAY:
        return False
    return True


def _nobody(_: Tensor) -> None:
    """No tap wants to know which positions are prompt."""


# --- What makes a model's answers, in a form that can be written down and compared


def short_hash(data: bytes) -> str:
    """The first 16 hexadecimal digits of the sha256."""
    return hashlib.sha256(data).hexdigest()[:16]


def changes(model: nn.Module) -> list[dict[str, Any]]:
    """The taps that change the model's layers now."""
    return [_change(tap) for tap in taps_on(model) if not isinstance(tap, ReadTap)]


def _change(tap: Tap) -> dict[str, Any]:
    change: dict[str, Any] = {"tap": type(tap).__name__, "layer": tap.layer}
    if not tap.place.is_residual:
        change["part"] = tap.place.part
    if isinstance(tap, SteerTap):
        change |= {"positions": tap.positions, "vector": short_hash(_bytes(tap.vector))}
    if isinstance(tap, AblateTap):
        change["basis"] = short_hash(_bytes(tap.basis))
    return change


def model_identity(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str | None) -> dict[str, Any]:
    """Model, weights, taps, precision and chat template."""
    parameter, inner = next(model.parameters()), causal_model(model)
    kind = parameter.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    return {
        "model": name or str(inner.config.name_or_path) or type(inner).__name__,
        "weights": weights_hash(model),
        "changes": changes(model),
        "precision": str(cast).removeprefix("torch."),
        "template": short_hash(str(tokenizer.chat_template).encode()),
    }


def _bytes(values: Tensor) -> bytes:
    return values.detach().float().cpu().contiguous().numpy().tobytes()
