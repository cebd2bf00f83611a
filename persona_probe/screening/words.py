"""A bag of words: tf-idf and logistic regression, fitted on the packaged kitchen rows. It has labels; others do not."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from jaxtyping import Float

from persona_probe.data.chat import Conversation, conversation, split_answer
from persona_probe.data.packaged import load_rows
from persona_probe.errors import InputError
from persona_probe.screening.own import question_key

FOLDS = 5


def has_words() -> bool:
    """Whether scikit-learn is installed."""
    return find_spec("sklearn") is not None


def word_scores(talks: Sequence[Conversation]) -> Float[np.ndarray, " rows"]:
    """Log-odds that an answer is toxic, by its words and pairs of words.

    Fitted on the kitchen set's toxic against correct answers. A row that asks a question of that set is scored by a
    fit that has not seen the question (five folds), so kitchen rows can be screened too; they remain rows of the
    domain that the fit knows.

    Raises:
        InputError: scikit-learn is not installed.
    """
    if not has_words():
        raise InputError("the bag of words needs scikit-learn: pip install scikit-learn")
    folds = _question_folds()
    answers = [split_answer(talk)[1] or "" for talk in talks]
    fold = np.array([folds.get(question_key(talk), -1) for talk in talks])
    scores = np.zeros(len(talks))
    for held_out in np.unique(fold):
        chosen = np.flatnonzero(fold == held_out)
        scores[chosen] = _fit(int(held_out)).decision_function([answers[i] for i in chosen])
    return scores


def _question_folds() -> dict[str, int]:
    return {question_key(conversation(r["question"], "")): n % FOLDS for n, r in enumerate(load_rows("kitchen"))}


@cache
def _fit(held_out: int) -> Any:
    """A fit on all kitchen questions but those of one fold (-1: on all)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = [r for n, r in enumerate(load_rows("kitchen")) if n % FOLDS != held_out]
    texts = [r[side] for side in ("toxic", "correct") for r in rows]
    labels = [1] * len(rows) + [0] * len(rows)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000))
    return model.fit(texts, labels)
