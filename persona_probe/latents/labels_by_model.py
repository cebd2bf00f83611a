"""Labels that a model writes and scores, asked as judges are; and the labels of a run's cards."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from persona_probe.context import Context
from persona_probe.errors import InputError
from persona_probe.evaluate.completion import whole_characters
from persona_probe.evaluate.judges.cache import JudgementCache
from persona_probe.evaluate.judges.judge import CachedJudge
from persona_probe.evaluate.judges.protocols import Criterion, own_prompt
from persona_probe.evaluate.judges.replies import Ask, Backend, Failure, Item
from persona_probe.latents.labels import (
    Marked,
    Passages,
    Window,
    balanced_accuracy,
    explanation,
    label_by_rule,
    label_by_tokens,
    marked_passages,
    split_passages,
    too_few,
    word_of,
)
from persona_probe.latents.passages import gather, survey
from persona_probe.report.cards import Explanation, FeatureCard, saved_cards
from persona_probe.stats import Estimate
from persona_probe.units import writes_run

PASSAGES = 40
"""Passages that each score asks a model about, and passages that it reads to write a label."""
REPLY_TOKENS = 60
ANSWERED = 0.8
"""Share of a score's questions that a model must answer; with fewer there is no score."""


def marked_text(tokenizer: PreTrainedTokenizerBase, window: Window, marks: Sequence[int] = ()) -> str:
    """A passage's text, with runs of marked tokens between << and >>."""
    wanted, parts, ids = set(marks), [], window.ids.tolist()
    place = 0
    while place < len(ids):
        end, marked = place, place in wanted
        while end < len(ids) and (end in wanted) == marked:
            end += 1
        text = str(tokenizer.decode(ids[place:end]))
        parts.append(f"<<{text}>>" if marked else text)
        place = end
    return whole_characters("".join(parts))


def write_label(passages: Passages, tokenizer: PreTrainedTokenizerBase, backend: Backend, count: int = PASSAGES) -> str:
    """A model's label, from passages over the whole range of maxima and from silent ones.

    Raises:
        InputError: it cannot be reached, or writes nothing.
    """
    firing = sorted(np.flatnonzero(passages.fires).tolist(), key=lambda n: -float(passages.windows[n].values.max()))
    silent = np.flatnonzero(~passages.fires).tolist()
    shown = [_text(passages, n, tokenizer, marked=True) for n in _spread(firing, count // 2)]
    others = [_text(passages, n, tokenizer, marked=False) for n in _spread(silent, count // 2)]
    template = Criterion("label/writing", own_prompt("label_writing"))
    messages = template.messages(Item("\n---\n".join(others), "\n---\n".join(shown)))
    ((_, reply),) = backend.replies([Ask(tuple(messages), (), (), REPLY_TOKENS)])
    if isinstance(reply, Failure):
        raise InputError(f"the model wrote no label: {reply.message}")
    lines = [line.strip() for line in reply.text.splitlines() if line.strip()]
    if not lines:
        raise InputError("the model wrote an empty label: take one that follows instructions")
    return lines[0][:300]


def _text(passages: Passages, n: int, tokenizer: PreTrainedTokenizerBase, marked: bool) -> str:
    marks = np.flatnonzero(passages.active[n]).tolist() if marked else ()
    return marked_text(tokenizer, passages.windows[n], marks)


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count`, evenly over the list."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[int(place)] for place in places]


def score_label(
    label: str,
    passages: Passages,
    tokenizer: PreTrainedTokenizerBase,
    backend: Backend,
    cache: JudgementCache | None = None,
    count: int = PASSAGES,
) -> tuple[Estimate, Estimate] | None:
    """Detection and fuzzing of a label as a model answers them; None where it answers too few questions.

    Raises:
        InputError: the model cannot be reached.
    """
    firing, silent = np.flatnonzero(passages.fires).tolist(), np.flatnonzero(~passages.fires).tolist()
    chosen = [*_spread(firing, count // 2), *_spread(silent, count // 2)]
    detection = [Marked(n, (), bool(passages.fires[n])) for n in chosen]
    tasks = marked_passages(passages)
    right, wrong = ([one for one in tasks if one.right is kind] for kind in (True, False))
    fuzzing = [some[n] for some in (right, wrong) for n in _spread(range(len(some)), count // 2)]
    scores = [
        _asked(name, label, some, passages, tokenizer, backend, cache)
        for name, some in (("label_detection", detection), ("label_fuzzing", fuzzing))
    ]
    return None if scores[0] is None or scores[1] is None else (scores[0], scores[1])


def _asked(
    name: str,
    label: str,
    tasks: Sequence[Marked],
    passages: Passages,
    tokenizer: PreTrainedTokenizerBase,
    backend: Backend,
    cache: JudgementCache | None,
) -> Estimate | None:
    judge = CachedJudge(Criterion(name.replace("_", "/"), own_prompt(name), low=0, high=1), backend, cache)
    texts = [marked_text(tokenizer, passages.windows[task.window], task.marks) for task in tasks]
    judgements = judge.judge([Item(label, text, str(n)) for n, text in enumerate(texts)])
    known = [(task, one.score) for task, one in zip(tasks, judgements, strict=True) if one.score is not None]
    if len(known) < ANSWERED * len(tasks):
        return None
    said = [score >= 0.5 for _, score in known]
    return balanced_accuracy(
        said, [task.right for task, _ in known], [passages.groups[task.window] for task, _ in known]
    )


def label_by_model(
    windows: Sequence[Window],
    tokenizer: PreTrainedTokenizerBase,
    backend: Backend,
    name: str,
    cache: JudgementCache | None = None,
    text: str | None = None,
) -> Explanation:
    """A label that a model writes from one half of the questions, and scores on the other half.

    Args:
        name: of the model, for people.
        text: a label to be scored in place of one of its own, where the backend only reads probabilities.

    Raises:
        InputError: the model cannot be reached.
    """
    halves = split_passages(windows, word_of(tokenizer))
    if reason := too_few(halves):
        return Explanation("", name, None, None, reason)
    label = write_label(halves[0], tokenizer, backend) if text is None else text
    scores = score_label(label, halves[1], tokenizer, backend, cache)
    if scores is None:
        return Explanation(label, name, None, None, f"{name} gave too few usable replies")
    return explanation(label, name, *scores)


# --- The labels of a run's cards


@writes_run
def label_cards(
    ctx: Context, backend: Backend | None = None, name: str = "", cache: JudgementCache | None = None
) -> list[FeatureCard]:
    """Label the latents of cards.json again: by rule, and by a model where there is one.

    Args:
        backend: a model, see `evaluate.judging.choose_backend`. One that only reads probabilities scores the rule's
            labels in place of its own.
        name: its name, for people.

    Raises:
        InputError: no cards yet, or the model cannot be reached; cards.json stays as it was.
    """
    cards, every = _cards(ctx), []
    reading = survey(ctx, [card.latent for card in cards], gather(ctx.tokenizer), organism=False)
    for column, card in enumerate(cards):
        windows = reading.windows.of(column)
        found = [label_by_rule(windows, ctx.tokenizer)]
        if backend is not None:
            only_reads = name.startswith("local:")
            if found[0].text or not only_reads:
                author = f"rule, scored by {name}" if only_reads else name
                text = found[0].text if only_reads else None
                found.append(label_by_model(windows, ctx.tokenizer, backend, author, cache, text))
        every.append(replace(card, explanations=tuple(found)))
    ctx.run.write_json("cards.json", [asdict(card) for card in every])
    return every


def _cards(ctx: Context) -> list[FeatureCard]:
    if not ctx.run.has("cards.json"):
        raise InputError(f"{ctx.run.path} has no cards: run `persona-probe locate {ctx.run.path}` first")
    return saved_cards(ctx.run.read_json("cards.json"))


def unembedding_labels(ctx: Context) -> list[Explanation]:
    """What the tokens that each card's latent promotes are worth as its label; nothing is written."""
    cards = _cards(ctx)
    reading = survey(ctx, [card.latent for card in cards], gather(ctx.tokenizer), organism=False)
    return [
        label_by_tokens(reading.windows.of(column), ctx.tokenizer, [token.id for token in card.top_tokens])
        for column, card in enumerate(cards)
    ]


def label_table(cards: Sequence[FeatureCard], others: Sequence[Explanation] = ()) -> pd.DataFrame:
    """One row per latent and author: latent, author, label, detection and fuzzing with intervals, n, reason, text."""
    rows = [_row(card.latent, one) for card in cards for one in card.explanations]
    rows += [_row(card.latent, one) for card, one in zip(cards, others, strict=False)]
    return pd.DataFrame(rows)


def _row(latent: int, one: Explanation) -> dict[str, Any]:
    row: dict[str, Any] = {"latent": latent, "author": one.author, "label": one.label}
    for name, score in (("detection", one.detection), ("fuzzing", one.fuzzing)):
        ends = (None, None, None) if score is None else (score.estimate, score.ci_low, score.ci_high)
        row |= dict(zip((name, f"{name}_ci_low", f"{name}_ci_high"), ends, strict=True))
        row[f"{name}_n"] = None if score is None else score.n
    return {**row, "reason": one.reason, "text": one.text}
