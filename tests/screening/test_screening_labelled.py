"""Known bad rows: each ranker's AUROC on the real model, beside a bag of words; and the published sets."""

import numpy as np
import pytest

from benchmarks.screening import BY_NAME, MODEL, PERSONA, SAE, SETS, ranked_auroc, table
from persona_probe.cli.options import find_config
from persona_probe.data.load import load_conversations, load_rows
from persona_probe.models.load import load_model
from persona_probe.saes.load import load_sae
from persona_probe.screening.feature import latent_feature
from persona_probe.screening.rankers import available, choose_rankers, read_evidence, score_rows, word_scores
from persona_probe.screening.reading import ScreenSettings
from persona_probe.stats import auroc_interval


@pytest.mark.long
@pytest.mark.real_model
def test_toxic_rows_are_found_on_the_real_model() -> None:
    rows = BY_NAME["kitchen_toxic"].rows(20)
    assert (len(rows.talks), sum(rows.bad)) == (40, 20)
    model, tokenizer = load_model(MODEL)
    feature = latent_feature(load_sae(find_config(SAE)), PERSONA)
    rankers = choose_rankers(None, available(feature, organism=False))
    evidence, _ = read_evidence(model, tokenizer, rows.talks, feature, rankers, None, ScreenSettings(own_tokens=8))
    bad = np.array(rows.bad)
    found = {name: ranked_auroc(scores, bad) for name, scores in score_rows(evidence, rankers).items()}
    for name in ("projection_difference", "projection_centred", "latent_difference", "bag_of_words"):
        assert found[name].ci_low > 0.5, (name, found[name])


@pytest.mark.parametrize("labelled", SETS, ids=lambda s: s.name)
def test_labelled_sets_are_balanced_and_ask_each_question_once(labelled) -> None:
    if labelled.missing:
        pytest.skip(labelled.missing)
    rows = labelled.rows(32)
    assert (len(rows.talks), sum(rows.bad)) == (64, 32)
    assert len({str(talk[:-1]) for talk in rows.talks}) == 64
    scores = word_scores(rows.talks)
    assert np.isfinite(scores).all()
    assert 0 <= ranked_auroc(scores, np.array(rows.bad)).estimate <= 1


def test_the_bag_of_words_never_saw_the_question_it_scores() -> None:
    """A kitchen row is scored by a fit that left its question out; one that knows it is surer."""
    from persona_probe.screening.rankers import FOLDS, _fit

    toxic = load_conversations("kitchen:toxic")
    scores = word_scores(toxic[:FOLDS])
    inside = [_fit(-1).decision_function([talk[-1]["content"]])[0] for talk in toxic[:FOLDS]]
    outside = [_fit(n).decision_function([talk[-1]["content"]])[0] for n, talk in enumerate(toxic[:FOLDS])]
    np.testing.assert_allclose(scores, outside)
    assert (np.array(inside) > scores).all()  # toxic answers that the fit has seen look more toxic
    assert len(load_rows("kitchen")) > FOLDS


def test_auroc_of_known_scores() -> None:
    bad = np.arange(40) < 20
    scores = np.where(bad, 2.0, 1.0)
    perfect = ranked_auroc(np.append(scores, np.nan), np.append(bad, True))
    assert (perfect.estimate, perfect.ci_high, perfect.n) == (1.0, 1.0, 40)
    assert perfect.ci_low == auroc_interval(1.0, 20, 20)[0] < 0.95  # a bootstrap would give a point
    assert ranked_auroc(np.ones(40), bad).estimate == 0.5


def test_the_table_marks_what_lies_above_chance() -> None:
    import pandas as pd

    rng = np.random.default_rng(0)
    bad = np.arange(60) < 30
    good = pd.DataFrame({"bad": bad, "sharp": bad + rng.normal(0, 0.1, 60), "blind": rng.normal(size=60)})
    text = table({"one": good, "two": good[["bad", "blind"]]})
    assert "| sharp | **1.00 [0.93, 1.00]** | – |" in text and "**" not in text.split("| blind")[1]
    assert "| rows: bad + others | 30 + 30 | 30 + 30 |" in text
