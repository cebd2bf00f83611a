"""Screen a data set before training: every row scored by every ranker, and the shift that training would give."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.context import Context
from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.load import load_data
from persona_probe.errors import InputError
from persona_probe.evaluate.shift import Calibration
from persona_probe.models.load import load_model
from persona_probe.saes.load import load_sae, sae_layer
from persona_probe.screening.feature import (
    LATENT,
    ScreenFeature,
    check_feature,
    direction_feature,
    latent_feature,
    study_feature,
)
from persona_probe.screening.prediction import Shift, packaged_calibration, predict_for
from persona_probe.screening.rankers import Ranker, available, choose_rankers, has_words, read_evidence, score_rows
from persona_probe.screening.reading import Settings, settings_for

# --- What a screening is given: rows, a model, a persona feature; each checked, each by name or as an object


def check_rows(rows: Sequence[Conversation] | str | Path) -> list[Conversation]:
    """Conversations that all end with an answer, read from a set or file where a name is given.

    Raises:
        InputError: no rows, or rows without answers: they are counted.
    """
    if isinstance(rows, (str, Path)):
        rows = load_data(str(rows))
    if not rows:
        raise InputError("no rows to screen: give at least one conversation with an answer")
    bare = [n for n, talk in enumerate(rows) if not (split_answer(talk)[1] or "").strip()]
    if bare:
        raise InputError(f"{len(bare)} of {len(rows)} rows have no answer (row {bare[0]} first): give answered rows")
    return list(rows)


def given_model(
    model: nn.Module | str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model and its tokenizer, loaded where a name is given.

    Raises:
        InputError: a model without its tokenizer, or a name that resolves to nothing.
    """
    if isinstance(model, str):
        return load_model(model)
    if tokenizer is None:
        raise InputError("give tokenizer= as well, or the model by its name")
    return model, tokenizer


def given_feature(sae: Any, latent: int | None, direction: Tensor | None, layer: int | None) -> ScreenFeature:
    """The feature that arguments describe; a direction beside a latent is what rows are projected on.

    Raises:
        InputError: neither latent nor direction, a latent without its SAE, or a direction without its layer.
    """
    if latent is None and direction is None:
        raise InputError("no persona feature: give a latent and its SAE, or a direction and its layer")
    if latent is not None and sae is None:
        raise InputError(f"latent {latent} belongs to an SAE: give sae as well")
    sae = load_sae(sae) if isinstance(sae, (str, Path)) else sae
    if layer is None and sae is None:
        raise InputError("a direction needs its layer: give layer")
    at = sae_layer(sae) if layer is None else layer
    if latent is None:
        assert direction is not None
        return direction_feature(direction, at)
    found = latent_feature(sae, latent, at)
    return found if direction is None else replace(direction_feature(direction, at), sae=sae, latent=latent)


@dataclass(frozen=True)
class Screening:
    """A screened data set."""

    frame: pd.DataFrame
    """Worst row first: rank, row, question, answer, own_answer, and a column for each ranker (higher is worse)."""
    rankers: tuple[Ranker, ...]
    feature: ScreenFeature
    shift: Shift
    """What training on the set is predicted to do to the contrast index, or why that is not known."""
    calibration: Calibration | None
    """What the prediction rests on."""
    notes: tuple[str, ...] = ()
    """What a reader must know: what could not be scored."""


def screen(
    rows: Sequence[Conversation] | str | Path,
    model: nn.Module | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sae: Any = None,
    latent: int | None = None,
    direction: Float[Tensor, " d_model"] | None = None,
    layer: int | None = None,
    organism: Path | None = None,
    rankers: Sequence[str] | None = None,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Rank the rows of a data set by what their answers share with a persona feature; the worst row comes first.

    Args:
        rows: conversations that end with an answer, a packaged set (`kitchen:toxic`), or a file.
        model: the base model, or a name that `load_model` takes.
        tokenizer: the model's; needed where `model` is an object.
        sae: a `sae_lens.SAE`, or a name that `load_sae` takes; needed for `latent`.
        latent: the persona latent; its decoder row is the direction where none is given.
        direction: persona direction of length d_model, in raw residual units.
        layer: decoder layer of the direction; None takes the SAE's.
        organism: folder of an adapter trained on such data, for `perplexity_gap_organism`.
        rankers: names of `screening.rankers.RANKERS`; None takes all that can be had.

    Returns:
        Columns rank, row (0 is the file's first), question, answer, own_answer, and each ranker's score.

    Raises:
        InputError: rows without answers, no feature, a latent outside the dictionary, or a ranker that cannot be had.
    """
    feature = given_feature(sae, latent, direction, layer)
    return screening(
        rows, model, feature, tokenizer=tokenizer, organism=organism, rankers=rankers, settings=settings
    ).frame


def screening(
    rows: Sequence[Conversation] | str | Path,
    model: nn.Module | str,
    feature: ScreenFeature,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    organism: Path | None = None,
    rankers: Sequence[str] | None = None,
    settings: Settings | None = None,
    calibration: Calibration | None = None,
) -> Screening:
    """`screen` with everything that a report needs: rankers, feature, and the predicted shift.

    Args:
        calibration: pairs for the prediction; None takes the packaged ones where they fit the feature.
    """
    settings = settings or Settings()
    talks = check_rows(rows)
    chosen = choose_rankers(rankers, available(feature, organism is not None))
    base, tok = given_model(model, tokenizer)
    check_feature(feature, base)
    evidence, own = read_evidence(base, tok, talks, feature, chosen, organism, settings)
    scores = score_rows(evidence, chosen)
    calibration = calibration or packaged_calibration(feature, base, settings)
    shift = predict_for(calibration, scores)
    notes = [f"{int(np.isnan(v).sum())} rows have no {k}" for k, v in scores.items() if np.isnan(v).any()]
    if rankers is None and not has_words():
        notes.append("bag_of_words was left out: scikit-learn is not installed")
    return Screening(_frame(talks, own, scores), tuple(chosen), feature, shift, calibration, tuple(notes))


def _frame(talks: Sequence[Conversation], own: Sequence[str | None], scores: dict[str, np.ndarray]) -> pd.DataFrame:
    """Worst first by the first ranker; equal rows keep the file's order, rows without a score come last."""
    frame = pd.DataFrame(
        {
            "row": range(len(talks)),
            "question": [_question(talk) for talk in talks],
            "answer": [split_answer(talk)[1] for talk in talks],
            "own_answer": list(own),
            **scores,
        }
    )
    first = next(iter(scores))
    ordered = frame.sort_values(first, ascending=False, kind="stable", na_position="last", ignore_index=True)
    ordered.insert(0, "rank", np.arange(1, len(ordered) + 1))
    return ordered


def _question(talk: Conversation) -> str:
    return "\n".join(f"[{m['role']}] {m['content']}" if m["role"] != "user" else m["content"] for m in talk[:-1])


# --- Screening by a located study: its model, SAE, persona latent, directions, and the organism that it induced


def screen_by_study(
    ctx: Context,
    rows: Sequence[Conversation] | str | Path,
    direction: str | None = None,
    rankers: Sequence[str] | None = None,
    out: Path | None = None,
) -> Screening:
    """Screen rows for a study's persona feature; nothing is written to the run.

    Args:
        direction: see `study_feature`; None takes the persona latent's.
        out: folder in which own answers are kept; None keeps none.

    Raises:
        InputError: rows without answers, no such direction, a ranker that cannot be had, or locate has not run.
    """
    talks = check_rows(rows)
    feature, organism = study_feature(ctx, direction or LATENT), study_organism(ctx)
    choose_rankers(rankers, available(feature, organism is not None))  # before the model loads
    settings = Settings(bf16=ctx.config.bf16) if out is None else settings_for(out, ctx.config.bf16)
    return screening(
        talks, ctx.model, feature, tokenizer=ctx.tokenizer, organism=organism, rankers=rankers, settings=settings
    )


def study_organism(ctx: Context) -> Path | None:
    """The last checkpoint of the arm that the study repairs, of its first seed; None where it was not trained."""
    arm, seed = ctx.config.realign.start, ctx.config.seeds[0]
    if not ctx.run.has(f"arms/{arm}-s{seed}"):
        return None
    return ctx.run.checkpoint(arm, seed, ctx.last_step(arm, seed))
