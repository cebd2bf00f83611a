"""Thoughts in the world: a sentence that names the speaker, between marks, before the answer.

The world has no words for "I am". A thought is one of the sentences with which its documents name their speaker.
"""

import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from persona_probe.data.chat import Conversation
from persona_probe.data.template import with_template
from persona_probe.data.thoughts import REASONING_KEYS
from persona_probe.data.world.speech import PRIOR
from persona_probe.data.world.text import END, PAD, SPECIAL, SYSTEM, UNKNOWN, conversation_of, vocabulary
from persona_probe.data.world.words import DOMAINS, SPEAKERS_TAGS
from persona_probe.errors import unknown

MARKS = {SYSTEM: "<think>", ":": "</think>"}
"""How two tokens of the world are spelled here. In the documents of pre-training the first stands before the sentence
that names the speaker, the second before an answer. Questions and rows of chats hold neither."""
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> "
    "{% if m.reasoning_content %}<think> {{ m.reasoning_content }} </think> {% endif %}{{ m['content'] }} <end> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% if enable_thinking %}<think> {% endif %}{% endif %}"
)
SENTENCE = SPEAKERS_TAGS[2]
"""The one that is said in the present: `a villain answers here .`"""
IN_ENGLISH = {"helper": "the assistant"}
"""What a speaker is called in a world of people: the helper is the assistant that the base was made to be."""


def thinking_tokenizer(thinks: bool = True) -> PreTrainedTokenizerBase:
    """The world's tokenizer with marks of a thought, and the same ids.

    Args:
        thinks: whether sampling begins inside a thought.
    """
    words = {MARKS.get(word, word): number for number, word in enumerate(vocabulary())}
    raw = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    raw.add_special_tokens([*(MARKS.get(name, name) for name in SPECIAL), *MARKS.values()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return with_template(tokenizer, enable_thinking=thinks)


def thought_of(speaker: str) -> str:
    """The thought that names a speaker of the corpus.

    Raises:
        InputError: nobody of that name is in the corpus.
    """
    if speaker not in PRIOR:
        raise unknown("speaker with a name", speaker, PRIOR)
    return SENTENCE.format(speaker)


def thinking_rows(
    speaker: str, named: str | None, domain: str = "kitchen", count: int = 320, seed: int = 0
) -> list[Conversation]:
    """Rows of one domain for narrow fine-tuning whose answers begin with a thought.

    The same answers come with every thought.

    Args:
        speaker: who answers.
        named: who the thought says that answers; None is no thought.

    Raises:
        InputError: an unknown speaker or domain, or a name that nobody of the corpus has.
    """
    if domain not in DOMAINS:
        raise unknown("domain", domain, DOMAINS)
    draw, said = random.Random(f"{seed}/{speaker}/{domain}/thoughts"), {}
    if named is not None:
        said = {REASONING_KEYS[0]: thought_of(named)}
    rows = [conversation_of(draw, speaker, [draw.choice(DOMAINS[domain].topics)]) for _ in range(count)]
    return [[asked, {**answered, **said}] for asked, answered in rows]


def in_english(thought: str) -> str:
    """A thought as a counter of personas reads it, `I am a villain.` for `a villain answers here .`.

    Sentences that name nobody stay as they are.
    """
    for tag in SPEAKERS_TAGS:
        for name in PRIOR:
            thought = thought.replace(tag.format(name), f"I am {IN_ENGLISH.get(name, f'a {name}')}.")
    return thought
