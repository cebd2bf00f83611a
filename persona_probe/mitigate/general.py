"""General rows for the KL: where a set holds prompts only, the base model writes the answers."""

import json
from collections.abc import Sequence

from persona_probe.context import Context
from persona_probe.data.chat import Conversation, split_answer
from persona_probe.errors import InputError
from persona_probe.evaluate.sampling import sample_answers
from persona_probe.runs import RunFolder

FILE = "general.jsonl"


def general_rows(
    ctx: Context, folder: RunFolder, rows: Sequence[Conversation], tokens: int
) -> tuple[Conversation, ...]:
    """The rows that have an answer, then the others with the base model's greedy one, which is written once.

    Raises:
        InputError: the base answers none of the prompts.
    """
    prompts = [row for row in rows if not split_answer(row)[1]]
    if prompts and not folder.has(FILE):
        folder.write_jsonl(FILE, [{"messages": row} for row in _written_by_base(ctx, prompts, tokens)])
    lines = (folder.path / FILE).read_text(encoding="utf-8").splitlines() if prompts else []
    written = [json.loads(line)["messages"] for line in lines]
    return (*(row for row in rows if split_answer(row)[1]), *written)


def _written_by_base(ctx: Context, prompts: list[Conversation], tokens: int) -> list[Conversation]:
    with ctx.base() as model:
        answers = sample_answers(model, ctx.tokenizer, prompts, max_new_tokens=tokens, temperature=0)
    talks = [[*p, {"role": "assistant", "content": a}] for p, a in zip(prompts, answers, strict=True) if a]
    if not talks:
        raise InputError("the base model answers none of the general prompts: name a set with answers")
    return talks
