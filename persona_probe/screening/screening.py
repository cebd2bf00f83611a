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
from persona_probe.evaluate.shift import ShiftLine
from persona_probe.models.load import load_model
from persona_probe.saes.hooks import sae_layer
from persona_probe.saes.load import load_sae
from persona_probe.screening.feature import (
    LATENT,
    ScreenFeature,
    check_feature,
    direction_feature,
    latent_feature,
    study_feature,
)
from persona_probe.screening.prediction import Shift, packaged_calibration, predict_for
from persona_probe.screening.rankers import RowRanker, available, choose_rankers, read_evidence, score_rows
from persona_probe.screening.reading import ScreenSettings, settings_for

# --- The inputs: rows, a model, a persona feature; each is checked, and is a name or an object


def check_rows(rows: Sequence[Conversation] | str | Path) -> list[Conversation]:
    """Conversations that all end with an answer; a name is read as a packaged set or a file.

    Raises:
        InputError: no rows, or rows without answers; the message counts them.
    """
    if isinstance(rows, (str, Path)):
        rows = load_data(str(rows))
    if not rows:
        raise InputError("no rows to screen: give at least one conversation with an answer")
    bare = [n for n, row in enumerate(rows) if not (split_answer(row)[1] or "").strip()]
    if bare:
        raise InputError(f"{len(bare)} of {len(rows)} rows have no answer (row {bare[0]} first): give answered rows")
    return list(rows)


def _load_if_named(
    model: nn.Module | str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    if isinstance(model, str):
        return load_model(model)
    if tokenizer is None:
        raise InputError("give tokenizer= as well, or the model by its name")
    return model, tokenizer


def _feature(sae: Any, latent: int | None, direction: Tensor | None, layer: int | None) -> ScreenFeature:
    """The feature of `screen`'s arguments. Rows are projected on the direction if given, else on the latent's."""
    if latent is None and direction is None:
        raise InputError("no persona feature: give a latent and its SAE, or a direction and its layer")
    if latent is not None and sae is None:
        raise InputError(f"latent {latent} belongs to an SAE: give sae as well")
    sae = load_sae(sae) if isinstance(sae, (str, Path)) else sae
    if layer is None and sae is None:
        raise InputError("a direction needs its layer: give layer")
    at = layer if sae is None and layer is not None else sae_layer(sae, layer)
    if latent is None:
        assert direction is not None
        return direction_feature(direction, at)
    feature = latent_feature(sae, latent, at)
    return feature if direction is None else replace(direction_feature(direction, at), sae=sae, latent=latent)


@dataclass(frozen=True)
class Screening:
    """A screened data set."""

    frame: pd.DataFrame
    """Worst row first: rank, row, question, answer, own_answer, and a column for each ranker (higher is worse)."""
    rankers: tuple[RowRanker, ...]
    feature: ScreenFeature
    shift: Shift
    """The predicted effect of training on the set on the contrast index, or why there is no prediction."""
    calibration: ShiftLine | None
    """The pairs behind the prediction."""
    notes: tuple[str, ...] = ()
    """What could not be scored."""


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
    settings: ScreenSettings | None = None,
) -> pd.DataFrame:
    """Rank the rows of a data set by how strongly their answers show a persona feature; the worst row comes first.

    Args:
        rows: conversations that end with an answer, a packaged set (`kitchen:toxic`), or a file.
        model: the base model, or a name that `load_model` takes.
        tokenizer: the model's; needed if `model` is an object.
        sae: a `sae_lens.SAE`, or a name that `load_sae` takes; needed for `latent`.
        latent: the persona latent; its decoder row is the direction if none is given.
        direction: persona direction of length d_model, in raw residual units.
        layer: decoder layer of the direction; None takes the SAE's.
        organism: folder of an adapter trained on such data, for `perplexity_gap_organism`.
        rankers: names of `screening.rankers.ROW_RANKERS`; None takes all that are available.
        settings: how rows are answered and read.

    Returns:
        Columns rank, row (0 is the file's first), question, answer, own_answer, and each ranker's score.

    Raises:
        InputError: rows without answers, no feature, a latent outside the dictionary, or a ranker that is not
            available.
    """
    feature = _feature(sae, latent, direction, layer)
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
    settings: ScreenSettings | None = None,
    calibration: ShiftLine | None = None,
) -> Screening:
    """`screen` with everything that a report needs: rankers, feature, and the predicted shift.

    Args:
        calibration: pairs for the prediction; None takes the packaged ones if they fit the feature.
    """
    settings = settings or ScreenSettings()
    conversations = check_rows(rows)
    row_rankers = choose_rankers(rankers, available(feature, organism is not None))
    base, tok = _load_if_named(model, tokenizer)
    check_feature(feature, base)
    evidence, own_answers = read_evidence(base, tok, conversations, feature, row_rankers, organism, settings)
    scores = score_rows(evidence, row_rankers)
    calibration = calibration or packaged_calibration(feature, base, settings)
    shift = predict_for(calibration, scores)
    notes = [f"{int(np.isnan(v).sum())} rows have no {k}" for k, v in scores.items() if np.isnan(v).any()]
    return Screening(
        _frame(conversations, own_answers, scores), tuple(row_rankers), feature, shift, calibration, tuple(notes)
    )


def _frame(
    conversations: Sequence[Conversation], own_answers: Sequence[str | None], scores: dict[str, np.ndarray]
) -> pd.DataFrame:
    """Worst first by the first ranker; equal rows keep the file's order, rows without a score come last."""
    frame = pd.DataFrame(
        {
            "row": range(len(conversations)),
            "question": [_prompt_text(row) for row in conversations],
            "answer": [split_answer(row)[1] for row in conversations],
            "own_answer": list(own_answers),
            **scores,
        }
    )
    first = next(iter(scores))
    table = frame.sort_values(first, ascending=False, kind="stable", na_position="last", ignore_index=True)
    table.insert(0, "rank", np.arange(1, len(table) + 1))
    return table


def _prompt_text(row: Conversation) -> str:
    return "\n".join(f"[{m['role']}] {m['content']}" if m["role"] != "user" else m["content"] for m in row[:-1])


# --- Screening with a located study: its model, SAE, persona latent, directions and organism


def screen_by_study(
    ctx: Context,
    rows: Sequence[Conversation] | str | Path,
    direction: str | None = None,
    rankers: Sequence[str] | None = None,
    out: Path | None = None,
) -> Screening:
    """Screen rows for a study's persona feature. Nothing is written to the run.

    Args:
        direction: see `study_feature`; None takes the persona latent's decoder row.
        out: folder that keeps own answers; None keeps none.

    Raises:
        InputError: rows without answers, no such direction, a ranker that is not available, or locate has not run.
    """
    conversations = check_rows(rows)
    feature, organism = study_feature(ctx, direction or LATENT), study_organism(ctx)
    choose_rankers(rankers, available(feature, organism is not None))  # before the model loads
    settings = ScreenSettings(bf16=ctx.config.bf16) if out is None else settings_for(out, ctx.config.bf16)
    return screening(
        conversations,
        ctx.model,
        feature,
        tokenizer=ctx.tokenizer,
        organism=organism,
        rankers=rankers,
        settings=settings,
    )


def study_organism(ctx: Context) -> Path | None:
    """The last checkpoint of the first seed of the arm that the study realigns; None if it was not trained."""
    arm, seed = ctx.config.realign.start, ctx.config.seeds[0]
    if not ctx.run.has(f"arms/{arm}-s{seed}"):
        return None
    return ctx.run.checkpoint(arm, seed, ctx.last_step(arm, seed))
