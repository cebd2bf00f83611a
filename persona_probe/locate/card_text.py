"""The text that feature cards are read on: packaged conversations and any file that the user names."""

import re
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.packaged import load_conversations
from persona_probe.data.readers import read_conversations
from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.saes.read import conversation_batches

PACKAGED = ("kitchen:toxic", "kitchen:correct", "general_contrast:selection", "neutral_probes")
PACKAGED_NAME = "packaged text"
PLAIN = (".txt", ".md", ".text")
PIECE = 1200
"""Characters after which a paragraph of a plain text is split."""
MAX_TOKENS = 512
"""Tokens of a conversation that are read; what is cut is counted in the text's name."""


@dataclass(frozen=True)
class CardText:
    """Tokenised conversations, each with where it is from."""

    name: str
    """What the text is, in words."""
    batches: list[Batch]
    origins: list[str]
    """Per conversation: the packaged text, or the user's file."""
    sources: list[str]
    """Per conversation: the packaged set, or the user's file."""
    ids: dict[int, Int[Tensor, " pos"]]
    """Per conversation: its tokens without special ones, as a reading of positions `all` gives them."""


def gather(tokenizer: PreTrainedTokenizerBase, path: str | Path | None = None) -> CardText:
    """Tokenise the packaged text and, where given, the user's file.

    Raises:
        InputError: the file cannot be read, or holds no text.
    """
    parts = [(PACKAGED_NAME, source, load_conversations(source)) for source in PACKAGED]
    if path is not None:
        parts.append((Path(path).name, Path(path).name, read_text(path)))
    talks = [talk for *_, found in parts for talk in found]
    whole = conversation_batches(tokenizer, talks)
    cut = sum(int((b.attention.sum(dim=1) > MAX_TOKENS).sum()) for b in whole)
    batches = [clip(batch) for batch in whole]
    return CardText(
        name=_name(parts, cut),
        batches=batches,
        origins=[origin for origin, _, found in parts for _ in found],
        sources=[source for _, source, found in parts for _ in found],
        ids={n: b.ids[r][b.select("all")[r]] for b in batches for r, n in enumerate(b.index)},
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
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}): pass a UTF-8 file") from error
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
    for origin, _, talks in parts:
        sizes[origin] = sizes.get(origin, 0) + len(talks)
    words = " and ".join(
        f"{origin} ({count:,} conversation{'s' if count != 1 else ''})" for origin, count in sizes.items()
    )
    return words + (f"; {cut:,} of them cut at {MAX_TOKENS} tokens" if cut else "")
