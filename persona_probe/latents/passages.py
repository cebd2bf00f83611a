"""The passages on which latents fire most, and histograms of their activations, from one pass over the text."""

import heapq
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from persona_probe.context import Context
from persona_probe.data.chat import Conversation, as_conversations, conversation, user_turns
from persona_probe.data.load import load_conversations, read_conversations
from persona_probe.data.tokens import Batch, conversation_batches
from persona_probe.errors import InputError
from persona_probe.files import read_text as read_file
from persona_probe.latents.labels import Windows
from persona_probe.models.places import Where
from persona_probe.models.residuals import read_residuals
from persona_probe.report.cards import Activity, Example
from persona_probe.saes.read import encode_latents

TOP_EXAMPLES = 5
BEFORE, AFTER = 120, 40
"""Tokens that a passage keeps on the two sides of its maximum."""


@dataclass(frozen=True)
class Passage:
    """A part of one conversation with a latent's activations, without the template's special tokens."""

    source: str
    """The packaged set or the file that it comes from."""
    ids: Int[Tensor, " pos"]
    """Tokens of prompt and answer."""
    values: Float[Tensor, " pos"]
    """The latent's activation on each of them."""
    cut_before: bool = False
    cut_after: bool = False


class TopPassages:
    """The `TOP_EXAMPLES` passages with the highest activation of every latent, however long the text is.

    Each origin has its own store, so that a large packaged text leaves room for the user's text.
    """

    def __init__(self, n_latents: int) -> None:
        self.n_latents = n_latents
        self._heaps: dict[tuple[str, int], list[tuple[float, int, Passage]]] = {}

    def add(
        self,
        origin: str,
        source: str,
        number: int,
        ids: Int[Tensor, " pos"],
        values: Float[Tensor, "pos latents"],
    ) -> None:
        """Offer one conversation. `number` is its place in the text; of two equal passages the earlier one stays."""
        if not len(ids):
            return
        for column, peak in enumerate(values.amax(dim=0).tolist()):
            heap = self._heaps.setdefault((origin, column), [])
            key = (peak, -number)
            if peak <= 0 or (len(heap) == TOP_EXAMPLES and key <= heap[0][:2]):
                continue
            heapq.heappush(heap, (*key, window(source, ids, values[:, column])))
            if len(heap) > TOP_EXAMPLES:
                heapq.heappop(heap)

    def best(self, column: int) -> list[Passage]:
        """A latent's passages, the strongest first; equal ones in the order of the text."""
        stored = [entry for (_, c), heap in self._heaps.items() if c == column for entry in heap]
        return [passage for *_, passage in sorted(stored, key=lambda entry: entry[:2], reverse=True)]

    def silent_origins(self, column: int) -> list[str]:
        """Origins without a passage on which this latent fires."""
        return [origin for (origin, c), heap in self._heaps.items() if c == column and not heap]


def window(source: str, ids: Int[Tensor, " pos"], values: Float[Tensor, " pos"]) -> Passage:
    """The tokens around the maximum, copied out of their batch."""
    peak = int(values.argmax())
    start, stop = max(0, peak - BEFORE), peak + AFTER + 1
    return Passage(source, ids[start:stop].clone(), values[start:stop].clone(), start > 0, stop < len(ids))


def example(tokenizer: PreTrainedTokenizerBase, passage: Passage) -> Example:
    """A passage in text."""
    values = tuple(round(v, 3) for v in passage.values.tolist())
    return Example(
        source=passage.source,
        tokens=tuple(str(tokenizer.decode([i])) for i in passage.ids.tolist()),
        values=values,
        maximum=max(values),
        peak=int(passage.values.argmax()),
        cut_before=passage.cut_before,
        cut_after=passage.cut_after,
    )


# --- The text: packaged conversations, and a file of the user

PACKAGED = ("kitchen:toxic", "kitchen:correct", "general_contrast:selection", "neutral_probes")
PACKAGED_NAME = "packaged text"
PLAIN = (".txt", ".md", ".text")
PIECE = 1200
"""Characters after which a paragraph of a plain text is split."""
MAX_TOKENS = 512
"""Tokens of a conversation that are read; the text's name tells how many conversations were cut."""


@dataclass(frozen=True)
class CardText:
    """Tokenised conversations, each with its origin."""

    name: str
    """The text in words."""
    batches: list[Batch]
    origins: list[str]
    """Per conversation: the packaged text, or the user's file."""
    sources: list[str]
    """Per conversation: the packaged set, or the user's file."""
    ids: dict[int, Int[Tensor, " pos"]]
    """Per conversation: its tokens without special ones, as positions `all` select them."""
    prompts: dict[int, int]
    """Per conversation: how many of these tokens are the prompt's."""
    groups: list[int]
    """Per conversation: a number for its question; equal questions have equal numbers."""


def gather(
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path | None = None,
    conversations: Sequence[str | Conversation] | None = None,
) -> CardText:
    """Tokenise the packaged text, and the user's file if there is one.

    Args:
        conversations: read these in place of the packaged text.

    Raises:
        InputError: the file cannot be read, or holds no text.
    """
    if conversations is None:
        parts = [(PACKAGED_NAME, source, load_conversations(source)) for source in PACKAGED]
    else:
        parts = [("given text", "given text", as_conversations(conversations))]
    if path is not None:
        parts.append((Path(path).name, Path(path).name, read_text(path)))
    whole = conversation_batches(tokenizer, [row for *_, rows in parts for row in rows])
    cut = sum(int((b.attention.sum(dim=1) > MAX_TOKENS).sum()) for b in whole)
    batches = [clip(batch) for batch in whole]
    return CardText(
        name=_name(parts, cut),
        batches=batches,
        origins=[origin for origin, _, rows in parts for _ in rows],
        sources=[source for _, source, rows in parts for _ in rows],
        ids={n: b.ids[r][b.select("all")[r]] for b in batches for r, n in enumerate(b.index)},
        prompts={n: int(b.select("prompt")[r].sum()) for b in batches for r, n in enumerate(b.index)},
        groups=[crc32(user_turns(row).encode()) for *_, rows in parts for row in rows],
    )


def read_text(path: str | Path) -> list[Conversation]:
    """Conversations of a user's file: rows as `read_conversations` takes them, or a plain text's paragraphs as prompts.

    A plain text (`.txt`, `.md`) without blank lines is split into its lines.

    Raises:
        InputError: the file is missing, unreadable or empty, or has bad rows.
    """
    path = Path(path)
    if path.suffix.lower() not in PLAIN:
        return read_conversations(path, allow_prompts=True)
    text = read_file(path).strip()
    paragraphs = re.split(r"\n\s*\n", text)
    if len(paragraphs) == 1:
        paragraphs = text.splitlines()
    pieces = [piece.strip() for paragraph in paragraphs for piece in _pieces(paragraph)]
    if not any(pieces):
        raise InputError(f"{path} holds no text: pass a file with at least one line")
    return [conversation(piece) for piece in pieces if piece]


def _pieces(paragraph: str) -> list[str]:
    return textwrap.wrap(
        paragraph, PIECE, replace_whitespace=False, expand_tabs=False, drop_whitespace=False, break_on_hyphens=False
    )


def clip(batch: Batch, width: int = MAX_TOKENS) -> Batch:
    """The first `width` tokens of every row."""
    parts = ("ids", "attention", "prompt", "response", "special")
    return replace(batch, **{part: getattr(batch, part)[:, :width] for part in parts})


def _name(parts: list[tuple[str, str, list[Conversation]]], cut: int) -> str:
    sizes: dict[str, int] = {}
    for origin, _, rows in parts:
        sizes[origin] = sizes.get(origin, 0) + len(rows)
    words = " and ".join(
        f"{origin} ({count:,} conversation{'s' if count != 1 else ''})" for origin, count in sizes.items()
    )
    return words + (f"; {cut:,} of them cut at {MAX_TOKENS} tokens" if cut else "")


# --- Histograms of activations over a stream of tokens, in bounded memory and independent of the order

BINS_LOG2 = 5
BINS = 2**BINS_LOG2


class Histograms:
    """One histogram of positive values for each of several latents.

    A bin's width is a power of two, 2^e. A value that does not fit doubles the width until it does, and neighbouring
    bins are merged. This is exact, because the edges stay multiples of the width. So no range must be known beforehand,
    and any order of the tokens gives the same counts. The bins up to the maximum are at least half of all.
    """

    def __init__(self, n_latents: int) -> None:
        self.counts = np.zeros((n_latents, BINS), dtype=np.int64)
        self.exponent = np.zeros(n_latents, dtype=np.int64)
        """Of each latent's bin width; meaningless until it has fired."""
        self.maximum = np.zeros(n_latents)
        self.active = np.zeros(n_latents, dtype=np.int64)
        self.tokens = 0

    def add(self, values: Float[np.ndarray, "tokens latents"]) -> None:
        """Count one batch of tokens; on tokens with values of zero or less a latent is silent."""
        self.tokens += len(values)
        for column, activations in enumerate(values.T.astype(np.float64)):
            fired = activations[activations > 0]
            if fired.size:
                self._add(column, fired)

    def _add(self, column: int, fired: Float[np.ndarray, " active"]) -> None:
        peak = float(fired.max())
        if self.active[column] == 0:
            self.exponent[column] = needed_exponent(peak)
        self.coarsen(column, max(needed_exponent(peak), int(self.exponent[column])))
        index = np.floor(np.ldexp(fired, -int(self.exponent[column]))).astype(np.int64)
        self.counts[column] += np.bincount(index, minlength=BINS)
        self.active[column] += fired.size
        self.maximum[column] = max(self.maximum[column], peak)

    def coarsen(self, column: int, exponent: int) -> None:
        """Merge bins until a latent's width is 2^`exponent`; a latent that has not fired just takes that width."""
        shift = exponent - int(self.exponent[column]) if self.active[column] else 0
        if shift:
            merged = np.arange(BINS) >> min(shift, BINS_LOG2)
            self.counts[column] = np.bincount(merged, self.counts[column], BINS).astype(np.int64)
        self.exponent[column] = exponent


def needed_exponent(peak: float) -> int:
    """The smallest e for which `BINS` bins of width 2^e hold `peak`."""
    return math.frexp(peak)[1] - BINS_LOG2


def align(histograms: list[Histograms]) -> None:
    """Give each latent the same bin width in all histograms, so that they can be compared."""
    for column in range(len(histograms[0].active)):
        fired = [int(h.exponent[column]) for h in histograms if h.active[column]]
        for histogram in histograms if fired else ():
            histogram.coarsen(column, max(fired))


# --- One pass over the text for each model

CHUNK = 1024
"""Tokens encoded at once: a wide SAE's activations of a whole batch would be large."""


@dataclass(frozen=True)
class Survey:
    """The activity of some latents on the text."""

    passages: TopPassages
    """The base model's passages."""
    histograms: dict[str, Histograms]
    """By model, the base first; a latent has the same bins in all models."""
    windows: Windows
    """Passages of the base model that make labels and score them."""

    def activity(self, column: int) -> tuple[Activity, ...]:
        """The activity of one latent in every model that was read."""
        return tuple(activity(model, histograms, column) for model, histograms in self.histograms.items())


def survey(ctx: Context, latents: list[int], text: CardText, organism: bool) -> Survey:
    """Read the text once with the base model, and with `organism` once with the organism."""
    arm, store = ctx.config.realign.start, Store(TopPassages(len(latents)), Windows(len(latents)))
    with ctx.base() as model:
        histograms = {"base": _read(ctx.sae, ctx.layer, model, "base", latents, text, store, ctx.config.bf16)}
    if organism:
        with ctx.organism(arm, ctx.config.seeds[0]) as tuned:
            histograms[arm] = _read(ctx.sae, ctx.layer, tuned, arm, latents, text, None, ctx.config.bf16)
    align(list(histograms.values()))
    return Survey(store.passages, histograms, store.windows)


def survey_model(
    model: nn.Module, sae: Any, where: Where, latents: list[int], text: CardText, bf16: bool = False
) -> Survey:
    """Read the text once with any model, called `model`."""
    store = Store(TopPassages(len(latents)), Windows(len(latents)))
    histograms = {"model": _read(sae, where, model, "model", latents, text, store, bf16)}
    return Survey(store.passages, histograms, store.windows)


def _read(
    sae: Any,
    where: Where,
    model: nn.Module,
    label: str,
    latents: list[int],
    text: CardText,
    store: "Store | None",
    bf16: bool,
) -> Histograms:
    histograms = Histograms(len(latents))
    with tqdm(total=len(text.batches), desc=f"cards, {label}") as bar:

        def visit(index: list[int], row: Tensor, x: Tensor) -> None:
            acts = torch.cat([encode_latents(sae, part, latents) for part in x.split(CHUNK)]).float().cpu()
            histograms.add(acts.numpy())
            if store is not None:
                _offer(store, text, index, row.cpu(), acts)
            bar.update()

        read_residuals(model, text.batches, where, "all", visit, bf16)
    return histograms


@dataclass(frozen=True)
class Store:
    """Where one model's pass over the text leaves passages."""

    passages: TopPassages
    windows: Windows


def _offer(store: Store, text: CardText, index: list[int], row: Tensor, acts: Float[Tensor, "tokens latents"]) -> None:
    for place, number in enumerate(index):
        ids, values = text.ids[number], acts[row == place]
        store.passages.add(text.origins[number], text.sources[number], number, ids, values)
        store.windows.add(number, text.groups[number], text.prompts[number], ids, values)


def activity(model: str, histograms: Histograms, column: int) -> Activity:
    """One latent's activity, from a model's histograms."""
    counts, tokens = histograms.counts[column], histograms.tokens
    active = int(histograms.active[column])
    return Activity(
        model=model,
        tokens=tokens,
        firing_rate=active / tokens,
        maximum=round(float(histograms.maximum[column]), 4),
        bin_width=2.0 ** int(histograms.exponent[column]),
        counts=tuple(counts.tolist()) if counts.any() else (),
    )
