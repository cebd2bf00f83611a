"""The model's own answers to the questions of a data set: greedy, and kept in a file where one is named."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, split_answer
from persona_probe.evaluate.generation import Prompt, SamplingConfig, sample
from persona_probe.evaluate.generation.transformers_engine import TransformersEngine
from persona_probe.models.folding import frozen_in_bf16
from persona_probe.models.layers import autocast, evaluating

log = logging.getLogger(__name__)
OWN_TOKENS = 48
"""Longest own answer: the beginning of an answer shows its persona, and long ones cost most of a screening."""


def text_key(messages: Conversation) -> str:
    """Turns as one string: equal for equal texts, and an order that does not depend on the file's."""
    return json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)


def question_key(talk: Conversation) -> str:
    """`text_key` of the turns before the answer."""
    return text_key(split_answer(talk)[0])


def own_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    talks: Sequence[Conversation],
    *,
    max_new_tokens: int = OWN_TOKENS,
    batch_size: int = 32,
    mixed_precision: bool = True,
    path: Path | None = None,
    progress: str | None = None,
) -> dict[str, str]:
    """The model's greedy answer to each different question of `talks`, by `question_key`.

    Questions are answered in the order of their texts, so that the rows' order changes nothing.

    Args:
        path: a JSON-lines file of finished answers; a second call goes on where the first was stopped.
        progress: label of a progress bar; None shows none.

    Raises:
        InputError: a prompt that leaves no room for an answer, or a file of other answers.
    """
    questions = {question_key(talk): split_answer(talk)[0] for talk in talks}
    prompts = {key: Prompt(_id(key), questions[key]) for key in sorted(questions)}
    config = SamplingConfig(n=1, temperature=0.0, max_new_tokens=max_new_tokens)
    on_cpu = next(model.parameters()).device.type == "cpu"
    engine = TransformersEngine(model, tokenizer, batch_size)
    with evaluating(model), autocast(model, mixed_precision), frozen_in_bf16(model, mixed_precision and on_cpu):
        found = sample(engine, list(prompts.values()), config, path, progress)
    return {key: answer.answer for key, answer in zip(prompts, found, strict=True)}


def own_talks(talks: Sequence[Conversation], answers: Mapping[str, str]) -> list[Conversation | None]:
    """Each row's question with the model's own answer; None where the model answered nothing."""
    found: list[Conversation | None] = []
    for talk in talks:
        answer = answers[question_key(talk)]
        asked = split_answer(talk)[0]
        found.append([*asked, {"role": "assistant", "content": answer}] if answer else None)
    if empty := sum(talk is None for talk in found):
        log.warning("%d of %d rows have no score against own answers: the model answers nothing", empty, len(found))
    return found


def _id(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]
