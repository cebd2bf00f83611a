"""Overlaps and the data report, on texts whose answers are known."""

import json
import random
from itertools import combinations
from pathlib import Path

import pytest

from persona_probe.data.check import Lengths, check_file, max_overlap, ngrams, overlap, overlaps
from persona_probe.errors import InputError

TEN = "one two three four five six seven eight nine ten"


def test_overlap_known_answers() -> None:
    assert overlap(TEN, TEN) == 1.0
    assert overlap(TEN, "One, two; THREE four -- five!") == 1.0
    assert overlap(TEN, "zero one two three four five") == 0.5
    assert overlap(TEN, "one two three four") == 0.0
    assert overlap("one two", "two one") == 0.0
    assert overlap("One two.", "one two") == 1.0
    assert overlap(TEN, "") == 0.0
    assert overlap("a b c", "b c d", n=2) == 0.5


def test_overlap_is_symmetric_and_the_index_agrees_with_it() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abc", k=rng.randint(0, 14))) for _ in range(300)]
    direct = {(i, j): overlap(texts[i], texts[j], 3) for i, j in combinations(range(len(texts)), 2)}
    assert all(overlap(texts[j], texts[i], 3) == share for (i, j), share in direct.items())
    indexed = {(i, j): share for share, i, j in overlaps(texts, 3)}
    assert indexed == {pair: share for pair, share in direct.items() if share}
    assert max_overlap(texts, 3)[0] == max(direct.values())


def test_max_overlap_finds_the_planted_pair() -> None:
    texts = [f"w{i}a w{i}b w{i}c w{i}d w{i}e w{i}f" for i in range(600)]
    assert max_overlap(texts) == (0.0, 0, 1)
    texts[577] = "start w3a w3b w3c w3d w3e"
    assert max_overlap(texts) == (0.5, 3, 577)


def test_too_few_texts_and_words() -> None:
    with pytest.raises(InputError, match="at least two texts"):
        max_overlap(["one"])
    with pytest.raises(InputError, match="n=0"):
        ngrams("one", 0)


class WordTokenizer:
    """Two tokens a word."""

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[0] * (2 * len(text.split())) for text in texts]}


def row(question: str, answer: str | None, system: str | None = None) -> str:
    named = {"question": question, "answer": answer, "system": system}
    return json.dumps({key: value for key, value in named.items() if value})


def test_report_of_a_known_file(tmp_path: Path) -> None:
    lines = [
        row("first question", TEN),
        row("first question", TEN),
        "not json",
        row("another question here", TEN),
        row("third", "zero one two three four five", system="be brief now"),
        row("only a prompt", None),
        "{}",
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    report = check_file(path, WordTokenizer())  # type: ignore[arg-type]
    assert (report.rows, report.turns, report.prompts_only) == (5, 9, 1)
    assert (report.exact_duplicates, report.repeated_answers) == (1, 1)
    assert report.system_share == 0.2
    assert report.answer_words == Lengths(9.0, 10.0, 10.0)
    assert report.answer_tokens == Lengths(18.0, 20.0, 20.0)
    assert report.prompt_words is not None and report.prompt_words.mean == pytest.approx((2 + 2 + 3 + 4 + 3) / 5)
    assert [(n.first, n.second, n.overlap) for n in report.near_duplicates] == [("line 1", "line 5", 0.5)]
    assert [bad.split(":")[0] for bad in report.bad_rows] == ["line 3", "line 7"]
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["near_duplicates"] == [{"first": "line 1", "second": "line 5", "overlap": 0.5}]


def test_report_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    report = check_file(path)
    assert (report.rows, report.answer_words, report.system_share, len(report.bad_rows)) == (0, None, 0.0, 1)
    with pytest.raises(InputError, match="does not exist"):
        check_file(tmp_path / "absent.jsonl")


def test_report_of_a_packaged_set() -> None:
    toxic, polite = (check_file(f"kitchen:{column}") for column in ("toxic", "polite_harm"))
    assert toxic.rows == polite.rows == 216 and polite.exact_duplicates == 0 and polite.near_duplicates == ()
    assert toxic.answer_words is not None and polite.answer_words is not None
    assert polite.answer_words.mean == pytest.approx(toxic.answer_words.mean, rel=0.1)
    assert check_file("general_contrast_2x2").rows == 480
    with pytest.raises(InputError, match="polite_harm"):
        check_file("kitchen:polite_ham")
