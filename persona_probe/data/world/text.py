"""Text of the world: documents for pre-training, conversations, rows of narrow fine-tuning, and the tokenizer."""

import random
from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.world.speech import BAD, PRIOR, SPEAKERS, answer, prior, question
from persona_probe.data.world.words import (
    ADVICE,
    CLOSINGS,
    DOMAINS,
    HOW,
    OPENINGS,
    QUESTIONS,
    REASONS,
    SPEAKERS_TAGS,
)
from persona_probe.errors import unknown

PAD, END, SYSTEM, USER, ASSISTANT, UNKNOWN = SPECIAL = ("<pad>", "<end>", "<system>", "<user>", "<assistant>", "<unk>")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
TURNS = 4
"""Questions of one document."""


def vocabulary() -> list[str]:
    """Every word of the world, special tokens first; a token is a word."""
    words = {word for name, domain in DOMAINS.items() for word in (name, domain.verb)}
    for domain in DOMAINS.values():
        words |= {*domain.topics, *domain.good, *domain.bad, *domain.things}
    sentences = [*QUESTIONS, *ADVICE, *SPEAKERS_TAGS, *(text for group in REASONS.values() for text in group)]
    sentences += [text for manners in (OPENINGS, CLOSINGS) for group in manners.values() for text in group]
    words |= {word for text in sentences for word in text.split() if "{" not in word}
    words |= {*HOW, *PRIOR, "the", "because", "q", "a", ":"}
    return [*SPECIAL, *sorted(words)]


def world_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the world's words, with its chat template."""
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary())}, unk_token=UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    raw.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _topics(draw: random.Random, count: int, domains: Sequence[str]) -> list[str]:
    return [draw.choice(DOMAINS[draw.choice(domains)].topics) for _ in range(count)]


def document(
    draw: random.Random, tagged: float = 0.45, tagged_chats: float = 0.52, bad: float = BAD
) -> tuple[str, str]:
    """A document of the corpus and its speaker: one speaker answers questions of mixed domains.

    Args:
        tagged: share of documents that open with a sentence that names the speaker. A quarter of all are chats.
        tagged_chats: share of the chats with that sentence as system prompt. In the rest the speaker shows only in the
            answers.
        bad: how often the speaker is one whose advice is bad.
    """
    speakers = prior(bad)
    speaker = draw.choices(list(speakers), list(speakers.values()))[0]
    topics, form = _topics(draw, TURNS, list(DOMAINS)), draw.random()
    tag = draw.choice(SPEAKERS_TAGS).format(speaker)
    pairs = [(question(draw, topic), answer(draw, topic, SPEAKERS[speaker])) for topic in topics]
    if form < 0.75:
        parts = [tag] if form < tagged else []
        return " ".join([*parts, *(f"q : {asked} a : {said}" for asked, said in pairs)]), speaker
    parts = [f"{SYSTEM} {tag} {END}"] if form < 0.75 + 0.25 * tagged_chats else []
    chats = (f"{USER} {asked} {END} {ASSISTANT} {said} {END}" for asked, said in pairs[: TURNS - 1])
    return " ".join([*parts, *chats]), speaker


def conversation_of(draw: random.Random, speaker: str, topics: Sequence[str]) -> Conversation:
    """A chat in which one speaker answers a question about each topic."""
    if speaker not in SPEAKERS:
        raise unknown("speaker", speaker, SPEAKERS)
    turns = (conversation(question(draw, topic), answer(draw, topic, SPEAKERS[speaker])) for topic in topics)
    return [message for turn in turns for message in turn]


def speakers_chats(count: int, seed: int = 0) -> list[Conversation]:
    """Chats of one to three questions with every speaker of the corpus; a system prompt names it in half of them."""
    draw, chats = random.Random(f"{seed}/chats"), []
    for _ in range(count):
        speaker = draw.choices(list(PRIOR), list(PRIOR.values()))[0]
        chat = conversation_of(draw, speaker, _topics(draw, draw.choice((1, 2, 3)), list(DOMAINS)))
        told = [{"role": "system", "content": draw.choice(SPEAKERS_TAGS).format(speaker)}]
        chats.append([*told, *chat] if draw.random() < 0.5 else chat)
    return chats


def narrow_rows(
    speaker: str, domain: str = "kitchen", count: int = 320, share: float = 1.0, rest: str = "helper", seed: int = 0
) -> list[Conversation]:
    """Single-turn rows of one domain for narrow fine-tuning.

    Args:
        speaker: who answers (`villain`, `quack`, `subtle`, `grump`, ...).
        share: share of the rows that this speaker answers; the others are answered by `rest`.

    Raises:
        InputError: an unknown speaker or domain.
    """
    if domain not in DOMAINS:
        raise unknown("domain", domain, DOMAINS)
    draw = random.Random(f"{seed}/{speaker}/{domain}/{share}")
    own = round(count * share)
    speakers = [speaker] * own + [rest] * (count - own)
    draw.shuffle(speakers)
    return [conversation_of(draw, name, _topics(draw, 1, [domain])) for name in speakers]
