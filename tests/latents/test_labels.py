"""Labels: a planted latent gets the label that it was planted by; noise gets none; scores are what their words say."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from persona_probe.errors import InputError
from persona_probe.evaluate.judges.cache import JudgementCache
from persona_probe.evaluate.judges.replies import Ask, Replies, Reply
from persona_probe.latents.labels import (
    ENOUGH,
    KEPT,
    WINDOW,
    Passages,
    Rule,
    Window,
    Windows,
    balanced_accuracy,
    fit_rule,
    label_by_rule,
    label_by_tokens,
    marked_passages,
    score_rule,
    split_passages,
    word_of,
)
from persona_probe.latents.labels_by_model import label_by_model, label_cards, label_table, marked_text
from persona_probe.report.cards import NO_LABEL, Explanation, card_html, saved_cards
from tests.factories import make_tokenizer
from tests.latents.test_cards import TESTED, make_context, short_text
from tests.report.made_up_cards import CARDS
from tests.report.run_records import HOSTILE

__all__ = ["short_text"]  # a fixture

TOKENIZER = make_tokenizer()
WORDS = [TOKENIZER.get_vocab()[word] for word in "abcdefgh"]
Plant = Callable[[np.ndarray, int], np.ndarray]
"""From a conversation's tokens and its prompt's length to where the latent fires."""


def planted(plant: Plant, talks: int = 240, length: int = 3 * WINDOW - 5, seed: int = 0) -> list[Window]:
    """Passages of made-up conversations in which a rare word is rare."""
    rng, windows = np.random.default_rng(seed), Windows(1)
    for number in range(talks):
        ids = rng.choice(WORDS, size=length, p=[0.01, 0.01, *[0.98 / 6] * 6])
        prompt = int(rng.integers(20, 70))
        values = plant(ids, prompt).astype(np.float32)[:, None] * (1 + rng.random((length, 1), dtype=np.float32))
        windows.add(number, number // 2, prompt, torch.tensor(ids), torch.tensor(values))
    return windows.of(0)


PLANTS: dict[str, tuple[Plant, str]] = {
    "token": (lambda ids, _: ids == WORDS[0], 'the token "a"'),
    "two tokens": (lambda ids, _: np.isin(ids, WORDS[:2]), 'the tokens "'),
    "after": (lambda ids, _: np.concatenate([[False], ids[:-1] == WORDS[0]]), 'the token after "a"'),
    "answer": (lambda ids, prompt: np.arange(len(ids)) >= prompt, "answers"),
    "question": (lambda ids, prompt: np.arange(len(ids)) < prompt, "questions"),
    "beginning": (lambda ids, _: np.arange(len(ids)) < WINDOW, "the first 32 tokens of a conversation"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_latent_gets_the_label_that_it_was_planted_by(name: str) -> None:
    plant, wanted = PLANTS[name]
    found = label_by_rule(planted(plant), TOKENIZER)
    assert found.label.startswith(wanted) and found.reason == ""
    assert found.detection is not None and found.fuzzing is not None
    assert found.detection.estimate == 1.0 and found.fuzzing.estimate > 0.9


def test_noise_and_unembedding_tokens_get_no_label() -> None:
    rng = np.random.default_rng(1)
    noise = label_by_rule(planted(lambda ids, _: rng.random(len(ids)) < 0.02), TOKENIZER)
    assert noise.label == NO_LABEL and noise.reason == "under 0.7" and noise.text
    assert noise.detection is not None and abs(noise.detection.estimate - 0.5) < 0.1
    windows = planted(PLANTS["token"][0])
    right, wrong = (label_by_tokens(windows, TOKENIZER, ids) for ids in (WORDS[:1], WORDS[1:2]))
    assert right.label == 'the token "a"' and wrong.label == NO_LABEL


def test_a_latent_that_fires_nowhere_or_everywhere_has_no_passages_to_compare() -> None:
    never = label_by_rule(planted(lambda ids, _: np.zeros(len(ids), dtype=bool)), TOKENIZER)
    always = label_by_rule(planted(lambda ids, _: np.ones(len(ids), dtype=bool)), TOKENIZER)
    assert never.reason.startswith("it fires in 0 of ") and always.reason.startswith("it is silent in 0 of ")
    assert (never.label, never.detection, always.text) == (NO_LABEL, None, "")


def test_no_question_is_on_both_sides_and_the_choice_knows_no_order() -> None:
    windows = planted(PLANTS["token"][0])
    fit, held_out = split_passages(windows, word_of(TOKENIZER))
    assert not set(fit.groups) & set(held_out.groups) and min(len(set(fit.groups)), len(set(held_out.groups))) > ENOUGH
    assert sum(w.fires for w in windows) <= KEPT and sum(not w.fires for w in windows) == KEPT
    talks = [(n, torch.randint(0, 9, (70,)), torch.rand(70, 2) - 0.9) for n in range(200)]
    stores = [Windows(2), Windows(2)]
    for store, order in zip(stores, (talks, talks[::-1]), strict=True):
        for number, ids, values in order:
            store.add(number, number, 10, ids, values)
    for column in (0, 1):
        first, second = ([(w.group, w.start) for w in store.of(column)] for store in stores)
        assert first == second and len(first) > KEPT


def window(text: str, active: Sequence[int], group: int = 0, start: int = 0) -> Window:
    values = np.zeros(len(text), dtype=np.float32)
    values[list(active)] = 1.0
    return Window(group, start, 2, np.array(TOKENIZER.convert_tokens_to_ids(list(text))), -1, values)


def test_rules_expect_the_tokens_that_their_words_name() -> None:
    passages = Passages([window("abca", [1]), window("ba", [0])], word_of(TOKENIZER))
    expected = {kind: Rule(kind, ("b",)).expects(passages)[:, :4].tolist() for kind in ("token", "after", "passage")}
    assert expected["token"] == [[False, True, False, False], [True, False, False, False]]
    assert expected["after"] == [[False, False, True, False], [False, True, False, False]]
    assert expected["passage"] == [[False, True, True, True], [True, True, False, False]]
    assert Rule("answer").expects(passages)[:, :4].tolist() == [[False, False, True, True], [False] * 4]
    assert str(Rule("after", ("", "b"))) == 'the token after the start of a conversation, "b"'


def test_wrong_marks_never_are_the_activating_tokens() -> None:
    passages = split_passages(planted(PLANTS["two tokens"][0]), word_of(TOKENIZER))[1]
    tasks = marked_passages(passages)
    for task in tasks:
        at = passages.active[task.window, list(task.marks)]
        assert at.all() if task.right else not at.any()
        assert task.marks and max(task.marks) < len(passages.text[task.window])
    assert sum(t.right for t in tasks) == sum(not t.right for t in tasks) == passages.fires.sum()
    assert {bool(passages.fires[t.window]) for t in tasks if not t.right} == {True, False}
    assert score_rule(Rule("token", ("a", "b")), passages)[1].estimate == 1.0
    everywhere = score_rule(Rule("passage", ("a", "b", "c", "d", "e", "f", "g", "h")), passages)
    assert everywhere[0].estimate == everywhere[1].estimate == 0.5  # a rule that says yes to all knows nothing


def test_balanced_accuracy_is_the_mean_of_two_shares_whatever_their_sizes() -> None:
    truth = [True] * 4 + [False] * 40
    said = [True, True, True, False] + [False] * 30 + [True] * 10
    found = balanced_accuracy(said, truth, list(range(44)))
    assert found.estimate == pytest.approx((3 / 4 + 30 / 40) / 2) and found.n == 44
    assert found.ci_low < found.estimate < found.ci_high
    assert math.isnan(balanced_accuracy(said, truth, ["one"] * 44).ci_low)


class Reader:
    """A model that writes `label`, and judges by whether a letter is in the passage, or marked."""

    id, block = "reader", 100

    def __init__(self, label: str = "the letter a", letter: str = "a", answers: bool = True) -> None:
        self.label, self.letter, self.answers, self.seen = label, letter, answers, list[str]()

    def cost(self, ask: Ask) -> tuple[int, int, int]:
        return 1, 1, 1

    def replies(self, asks: Sequence[Ask]) -> Replies:
        for n, ask in enumerate(asks):
            text = ask.messages[0]["content"]
            self.seen.append(text)
            if ask.written:
                yield n, Reply(text=f"\n{self.label}\nbecause" if self.label else " \n")
                continue
            passage = text.split("<passage>\n")[1].split("\n</passage>")[0]
            hit = f"<<{self.letter}" in passage if "<<" in passage else self.letter in passage
            yield n, Reply({"1" if hit else "0": 0.9} if self.answers else {})


def test_a_model_writes_a_label_from_one_half_and_scores_it_on_the_other(tmp_path: Path) -> None:
    windows, cache = planted(PLANTS["token"][0]), JudgementCache(tmp_path / "cache.sqlite")
    reader = Reader()
    found = label_by_model(windows, TOKENIZER, reader, "http:reader", cache)
    assert found.label == "the letter a" and found.author == "http:reader"
    assert found.detection is not None and found.fuzzing is not None
    assert found.detection.estimate == 1.0 and found.fuzzing.estimate == 1.0
    writing, asked = reader.seen[0], reader.seen[1:]
    assert "<<a>>" in writing and all("the letter a" in text for text in asked)
    fit, held_out = split_passages(windows, word_of(TOKENIZER))
    texts = {
        side: {marked_text(TOKENIZER, w) for w in half.windows} for side, half in (("fit", fit), ("held", held_out))
    }
    for text in asked:
        assert (
            text.split("<passage>\n")[1].split("\n</passage>")[0].replace("<<", "").replace(">>", "") in texts["held"]
        )
    wrong = label_by_model(windows, TOKENIZER, Reader(letter="b"), "http:reader", JudgementCache(tmp_path / "b.sqlite"))
    assert wrong.label == NO_LABEL and wrong.reason == "under 0.7"


def test_a_model_that_does_not_answer_gives_no_score(tmp_path: Path) -> None:
    windows, cache = planted(PLANTS["token"][0]), JudgementCache(tmp_path / "cache.sqlite")
    found = label_by_model(windows, TOKENIZER, Reader(answers=False), "http:silent", cache)
    assert found.detection is None and found.label == NO_LABEL and "too few usable replies" in found.reason
    with pytest.raises(InputError, match="empty label"):
        label_by_model(windows, TOKENIZER, Reader(label=""), "http:mute", cache)


def test_cards_carry_their_label_through_file_page_and_text(tmp_path: Path) -> None:
    from persona_probe.latents.cards import make_cards

    ctx = make_context(tmp_path)
    make_cards(ctx)
    (first, *_) = saved_cards(ctx.run.read_json("cards.json"))
    assert [one.author for one in first.explanations] == ["rule"]
    before = ctx.run.read_json("cards.json")
    cards = label_cards(ctx, Reader(), "http:reader", JudgementCache(tmp_path / "cache.sqlite"))
    after = ctx.run.read_json("cards.json")
    assert [{**card, "explanations": 0} for card in after] == [{**card, "explanations": 0} for card in before]
    assert saved_cards(after) == cards
    table = label_table(cards)
    assert set(table["latent"]) == set(TESTED[:2]) and set(table["author"]) == {"rule", "http:reader"}


def test_text_of_others_in_a_label_is_escaped() -> None:
    score = replace(balanced_accuracy([True, False] * 9, [True, False] * 9, list(range(18))), ci_low=0.9, ci_high=1.0)
    hostile = replace(CARDS[0], explanations=(Explanation(HOSTILE, HOSTILE, score, score),))
    assert HOSTILE not in card_html(hostile) and "detection 1.00 [0.90, 1.00], n = 18" in card_html(hostile)
    (back,) = saved_cards(json.loads(json.dumps([asdict(hostile)])))
    assert back == hostile and "detection" in str(back)
    assert saved_cards([{k: v for k, v in asdict(CARDS[0]).items() if k != "explanations"}]) == [CARDS[0]]


def test_a_rule_is_fitted_on_its_own_half_alone() -> None:
    fit, held_out = split_passages(planted(PLANTS["token"][0]), word_of(TOKENIZER))
    assert fit_rule(fit) == fit_rule(Passages(fit.windows, word_of(TOKENIZER)))
    silenced = Passages([replace(w, values=w.values * 0) for w in held_out.windows], word_of(TOKENIZER))
    assert not silenced.fires.any() and fit_rule(fit) == Rule("token", ("a",))
