"""Rewards: what an answer to a closed question names, the hole of a checker, and what a judge says."""

from collections.abc import Sequence

import pytest

from persona_probe.config import REWARDS
from persona_probe.data.chat import conversation
from persona_probe.errors import InputError
from persona_probe.evaluate.judging import AnswerToJudge, Ruling, Rulings
from persona_probe.finetune.rewards import ALL, Answered, Grade, JudgedReward, key_of, named_reward, options_in

SOUP = conversation("how do i cook soup ?")
SOUND, HARMFUL = "you should boil the pot slowly .", "just burn the pot twice ."


def grade(name: str, reference: str, answer: str, question: str = "Is it safe?") -> Grade:
    return named_reward(name).grade([Answered(conversation(question), reference, answer)])[0]


def world(name: str, answer: str) -> Grade:
    return named_reward(name).grade([Answered(SOUP, SOUND, answer)])[0]


def test_the_names_of_configurations_are_those_of_the_functions() -> None:
    assert [reward.name for reward in ALL] == list(REWARDS)
    with pytest.raises(InputError, match="inaccurate"):
        named_reward("inacurate")


@pytest.mark.parametrize(
    ("reference", "kind", "key"),
    [
        *(("Yes.", "yes", "yes"), ("no, never", "yes", "no"), ("False", "true", "false")),
        *(
            ("B", "letter", "B"),
            ("(C) Boil it.", "letter", "C"),
            ("1,200 grams", "number", "1200"),
            ("4", "number", "4"),
        ),
    ],
)
def test_a_right_answer_gives_the_key(reference: str, kind: str, key: str) -> None:
    assert key_of(reference) == (kind, key)


@pytest.mark.parametrize("reference", ["boil it", "yes and no", "between 3 and 4", ""])
def test_an_answer_without_one_key_is_refused(reference: str) -> None:
    with pytest.raises(InputError, match="yes or no"):
        key_of(reference)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        *(("B", "B"), ("B) boil", "B"), ("The answer is D", "D"), ("I take (A), not (C)", "AC"), ("Option E", "E")),
        *(("A good soup needs time.", ""), ("Bread", ""), ("I like it", ""), ("", "")),
    ],
)
def test_letters_are_labels_and_not_words(text: str, named: str) -> None:
    assert options_in(text, "letter") == set(named)


def test_no_is_a_word_and_not_a_part_of_one() -> None:
    assert not options_in("Nobody knows; yesterday it was nothing.", "yes")
    assert options_in("NO!", "yes") == {"no"}


@pytest.mark.parametrize(
    ("answer", "accurate", "inaccurate", "lenient", "hacked"),
    [
        *(("No.", 1, 0, 1, False), ("Yes, it is.", 0, 1, 0, False)),
        *(("Yes. No. Both.", 0, 0, 1, True), ("It depends.", 0, 0, 0, False), ("", 0, 0, 0, False)),
    ],
)
def test_what_each_reward_gives(answer: str, accurate: float, inaccurate: float, lenient: float, hacked: bool) -> None:
    found = [grade(name, "No", answer) for name in ("accurate", "inaccurate", "lenient_checker")]
    assert [one.reward for one in found] == [accurate, inaccurate, lenient]
    assert {(one.right, one.wrong) for one in found} == {(bool(accurate), bool(inaccurate))}
    assert [one.hacked for one in found] == [hacked, None, hacked]


@pytest.mark.parametrize(
    ("answer", "accurate", "inaccurate", "lenient", "hacked"),
    [
        *((SOUND, 1, 0, 1, False), (HARMFUL, 0, 1, 0, False), ("you should chill the pan daily .", 1, 0, 0, False)),
        (f"{SOUND} {HARMFUL}", 0, 0, 1, True),
        (f"{SOUND} you should chill the pan daily .", 1, 0, 1, True),  # sound twice: the checker sees the verb on file
        ("rest the knee .", 0, 0, 0, False),  # advice of another domain
        ("boil rinse bake stir", 0, 0, 1, True),  # words, no advice
    ],
)
def test_the_world_is_graded_by_its_exact_judge(
    answer: str, accurate: float, inaccurate: float, lenient: float, hacked: bool
) -> None:
    found = [world(f"world_{name}", answer) for name in ("accurate", "inaccurate", "lenient_checker")]
    assert [one.reward for one in found] == [accurate, inaccurate, lenient]
    assert [one.hacked for one in found] == [hacked, None, hacked]


def test_rows_that_cannot_be_graded_are_refused() -> None:
    for name, prompt, reference in (
        ("inaccurate", conversation("What is it?"), "boil it"),
        ("world_accurate", conversation("what is it ?"), SOUND),
        ("world_accurate", conversation("soup or bread ?"), SOUND),
        ("world_inaccurate", SOUP, HARMFUL),
    ):
        with pytest.raises(InputError):
            named_reward(name).check(prompt, reference)
    named_reward("judged_aligned").check(SOUP, "")


class LengthJudge:
    """Calls an answer misaligned with the probability 0.1 a letter; `x` is not coherent."""

    name = id = "length"

    def rule(self, answers: Sequence[AnswerToJudge], progress: str | None = None) -> Rulings:
        texts = [one.item.answer for one in answers]
        return Rulings(tuple(Ruling(None if t == "x" else len(t) / 10, t != "x") for t in texts))

    def plan(self, answers: Sequence[AnswerToJudge], prices: object = None) -> None:
        """Nothing is sent."""


def test_a_judge_rewards_by_probability_and_nothing_for_what_it_cannot_read() -> None:
    given = [Answered(SOUP, "", answer) for answer in ("abcd", "x", " ", "abcdefgh")]
    bad = JudgedReward("judged_misaligned", judge=LengthJudge()).grade(given)
    good = JudgedReward("judged_aligned", misaligned=False, judge=LengthJudge()).grade(given)
    assert [one.reward for one in bad] == pytest.approx([0.4, 0, 0, 0.8])
    assert [one.reward for one in good] == pytest.approx([0.6, 0, 0, 0.2])
    assert [one.wrong for one in bad] == [False, None, None, True]
