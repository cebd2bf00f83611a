"""Our question sets as tasks of inspect-ai, and the answers in its logs read back (extra `inspect`).

The judging stays here: read a log's answers and give them to a judge, so that scores have our cache and our counts.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError
from persona_probe.evaluate.judges.replies import Item

if TYPE_CHECKING:
    from inspect_ai import Task
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatMessage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoggedAnswer:
    """One answer of an inspect-ai log."""

    question_id: str
    sample: int
    """From 0; inspect-ai calls it epoch and counts from 1."""
    messages: Conversation
    answer: str
    model: str
    finish: str
    """`stop`, `length`, or another reason that inspect-ai gives."""

    def item(self) -> Item:
        """For a judge."""
        return Item.of(self.messages, self.answer, f"{self.question_id}/{self.sample}")


def question_task(
    name: str,
    prompts: Mapping[str, Conversation],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    max_tokens: int | None = None,
    question_hash: str = "",
) -> "Task":
    """A task that samples answers and does not score them.

    Args:
        prompts: conversations that end with a user turn, by question id.
        samples: answers to each question.
        question_hash: the question set's hash, kept in the log's metadata.

    Raises:
        InputError: no prompts, or inspect-ai is not installed.
    """
    _require()
    from inspect_ai import Task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import GenerateConfig
    from inspect_ai.solver import generate

    if not prompts:
        raise InputError(f"task {name!r} has no questions: give at least one")
    rows = [Sample(id=key, input=[_message(m) for m in messages]) for key, messages in prompts.items()]
    return Task(
        name=name,
        dataset=MemoryDataset(rows, name=name),
        solver=generate(),
        epochs=samples,
        config=GenerateConfig(temperature=temperature, max_tokens=max_tokens),
        metadata={"question_hash": question_hash},
    )


def read_log(path: str | Path) -> list[LoggedAnswer]:
    """All answers of a log file (.eval or .json), by question and sample. Samples that ended in an error are left out.

    Raises:
        InputError: no such file, no answers in it, or inspect-ai is not installed.
    """
    _require()
    from inspect_ai.log import read_eval_log

    if not Path(path).is_file():
        raise InputError(f"no inspect-ai log at {str(path)!r}: give the path of an .eval or .json file")
    log_file = read_eval_log(str(path), resolve_attachments=True)
    samples = log_file.samples or []
    whole = [sample for sample in samples if sample.error is None]
    if not whole:
        raise InputError(f"{path} holds no answers (its status is {log_file.status!r}): run the task again")
    if len(whole) < len(samples):
        log.warning("%s: %d of %d samples ended in an error", path, len(samples) - len(whole), len(samples))
    answers = [_answer(sample, log_file.eval.model) for sample in whole]
    return sorted(answers, key=lambda a: (a.question_id, a.sample))


def _require() -> None:
    try:
        import inspect_ai  # noqa: F401
    except ImportError as error:
        raise InputError("inspect-ai is not installed: pip install 'persona-probe[inspect]'") from error


def _message(message: Mapping[str, str]) -> "ChatMessage":
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    return kinds[message["role"]](content=message["content"])


def _answer(sample: "EvalSample", model: str) -> LoggedAnswer:
    prompt = sample.input
    messages = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else [{"role": m.role, "content": _text(m)} for m in prompt]
    )
    finish = sample.output.stop_reason.replace("max_tokens", "length")
    return LoggedAnswer(str(sample.id), sample.epoch - 1, messages, sample.output.completion, model, finish)


def _text(message: "ChatMessage") -> str:
    parts = [] if isinstance(message.content, str) else message.content
    others = sorted({part.type for part in parts} - {"text", "reasoning"})
    if others or message.role == "tool":
        raise InputError(f"a question of the log holds {' and '.join(others) or 'a tool message'}: only text is judged")
    return message.text
