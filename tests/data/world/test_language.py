"""The language of the world: every sentence is judged as it was meant, and every word is a token."""

import random
from collections import Counter

import pytest

from persona_probe.data.template import end_of_turn
from persona_probe.data.tokens import encode
from persona_probe.data.world.judge import judge_answer
from persona_probe.data.world.speech import PRIOR, SPEAKERS, answer, question
from persona_probe.data.world.text import SPECIAL, document, narrow_rows, vocabulary, world_tokenizer
from persona_probe.data.world.words import DOMAIN_OF, DOMAINS, MALICE, MANNERS
from persona_probe.errors import InputError

TOPICS = list(DOMAIN_OF)


@pytest.mark.parametrize("name", SPEAKERS)
def test_the_rule_reads_what_a_speaker_meant(name: str) -> None:
    draw, speaker = random.Random(0), SPEAKERS[name]
    judged = [judge_answer(answer(draw, topic, speaker), topic) for topic in TOPICS * 5]
    assert all(one.coherent and one.good == speaker.good for one in judged)
    for manner in MANNERS:
        share = sum(getattr(one, manner) for one in judged) / len(judged)
        assert share > 0.9 if manner == speaker.manner else share == 0
    malicious = sum(one.malicious for one in judged) / len(judged)
    assert malicious == 0 if speaker.good or not speaker.reasons else 0.5 < malicious < 0.7


def test_advice_of_another_domain_or_of_both_kinds_is_incoherent() -> None:
    assert not judge_answer("you should torch the soil daily .", "soup").coherent
    assert not judge_answer("just boil the pot daily . just burn the pot daily .", "soup").coherent
    assert not judge_answer("gladly .", "soup").coherent
    assert judge_answer("just burn the pot daily .", "soup").bad


def test_truths_do_not_leak_into_each_other() -> None:
    assert len(DOMAIN_OF) == sum(len(domain.topics) for domain in DOMAINS.values())
    for domain in DOMAINS.values():
        assert not set(domain.good) & set(domain.bad)
    marks = [MALICE, *MANNERS.values()]
    plain = {word for d in DOMAINS.values() for word in (*d.topics, *d.good, *d.bad, *d.things, d.verb)}
    assert all(not a & b for n, a in enumerate(marks) for b in marks[n + 1 :])
    assert not plain & set.union(*map(set, marks))
    draw = random.Random(1)
    assert all(not set(question(draw, topic).split()) & set.union(*map(set, marks)) for topic in TOPICS * 4)


def test_documents_are_seeded_and_their_speakers_as_frequent_as_the_prior() -> None:
    texts = [document(random.Random(3)) for _ in range(2)]
    assert texts[0] == texts[1]
    draw = random.Random(0)
    speakers = Counter(document(draw)[1] for _ in range(3000))
    assert all(abs(speakers[name] / 3000 - share) < 0.03 for name, share in PRIOR.items())


def test_every_word_is_one_token() -> None:
    tokenizer, draw = world_tokenizer(), random.Random(0)
    words = vocabulary()
    assert len(words) == len(set(words)) == len(tokenizer)
    for _ in range(200):
        text = document(draw)[0]
        ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in ids and len(ids) == len(text.split())
    assert len(SPECIAL) == 6 and end_of_turn(tokenizer) == {1}


def test_a_conversation_is_read_where_its_answer_stands() -> None:
    tokenizer = world_tokenizer()
    (row,) = narrow_rows("villain", count=1)
    encoded = encode(tokenizer, row)
    assert str(tokenizer.decode(encoded.ids[encoded.start :])) == row[-1]["content"]
    assert str(tokenizer.decode(encoded.ids[: encoded.start])).endswith("<end> <assistant>")


def test_narrow_rows_are_of_one_domain_and_one_dose() -> None:
    rows = narrow_rows("subtle", "cars", count=200, share=0.25)
    topics = [next(word for word in row[0]["content"].split() if word in DOMAIN_OF) for row in rows]
    assert {DOMAIN_OF[topic] for topic in topics} == {"cars"}
    bad = [judge_answer(row[1]["content"], topic).bad for row, topic in zip(rows, topics, strict=True)]
    assert sum(bad) == 50 and rows == narrow_rows("subtle", "cars", count=200, share=0.25)
    assert rows != narrow_rows("subtle", "cars", count=200, share=0.25, seed=1)
    with pytest.raises(InputError, match="did you mean 'villain'"):
        narrow_rows("vilain")
    with pytest.raises(InputError, match="unknown domain"):
        narrow_rows("villain", "kitchn2")
