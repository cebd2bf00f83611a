"""Screen a data set before training: every row scored by every ranker, and the shift that training would give."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, split_answer
from persona_probe.screening.calibrate import Calibration
from persona_probe.screening.evidence import available, read_evidence
from persona_probe.screening.feature import ScreenFeature, check_feature
from persona_probe.screening.inputs import check_rows, given_feature, given_model
from persona_probe.screening.packaged import packaged_calibration
from persona_probe.screening.prediction import Shift, predict_for
from persona_probe.screening.rankers import Ranker, choose_rankers, score_rows
from persona_probe.screening.settings import Settings
from persona_probe.screening.words import has_words


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
