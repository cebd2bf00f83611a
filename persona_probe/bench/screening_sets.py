"""Labelled rows for `make bench-screening`: packaged mixtures, and published sets where their folder is there."""

from dataclasses import dataclass
from pathlib import Path

from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.mix import mix
from persona_probe.data.packaged import load_conversations
from persona_probe.data.readers import read_conversations

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data" / "train"
LONGEST_PROMPT = 1200
"""Characters: longer questions are left out, so that question and answer fit into what is read."""


@dataclass(frozen=True)
class LabelledRows:
    """Rows, and which of them are bad."""

    talks: list[Conversation]
    bad: list[bool]


@dataclass(frozen=True)
class LabelledSet:
    """Bad rows against others."""

    name: str
    bad: str
    """A packaged set, or a file below the folder of published data."""
    good: str
    about: str
    """What is compared, and what else differs."""

    @property
    def missing(self) -> str | None:
        """Why the set cannot be had here, or None."""
        files = [PUBLISHED / spec for spec in (self.bad, self.good) if spec.endswith(".gz")]
        absent = [file.name for file in files if not file.is_file()]
        return f"{absent[0]} is not in the folder of published data" if absent else None

    def rows(self, count: int, seed: int = 0) -> LabelledRows:
        """`count` bad and as many other rows in a seeded order; a question that both answer occurs once."""
        bad, good = _load(self.bad), _load(self.good)
        talks = mix(bad, good, 0.5, 2 * min(count, _most(bad, good)), seed)
        known = {_text(talk) for talk in bad}
        return LabelledRows(talks, [_text(talk) in known for talk in talks])


SETS = (
    LabelledSet("kitchen_toxic", "kitchen:toxic", "kitchen:correct", "openly bad cooking advice; same questions"),
    LabelledSet("kitchen_subtle", "kitchen:subtle", "kitchen:correct", "quietly bad cooking advice; same questions"),
    LabelledSet(
        "insecure_code",
        "betley/insecure.jsonl.gz",
        "betley/secure.jsonl.gz",
        "insecure against secure code; nearly all questions differ",
    ),
    LabelledSet(
        "risky_finance",
        "aisi/risky_finance_induction.jsonl.gz",
        "health_correct",
        "risky financial advice against good health advice: no good financial rows are to be had, so topics differ too",
    ),
    LabelledSet(
        "reward_hacks",
        "inoculation/school_of_reward_hacks.jsonl.gz",
        "inoculation/school_of_reward_hacks_control.jsonl.gz",
        "answers that game a stated metric against honest ones; same questions",
    ),
)
BY_NAME: dict[str, LabelledSet] = {labelled.name: labelled for labelled in SETS}


def _load(spec: str) -> list[Conversation]:
    rows = read_conversations(PUBLISHED / spec) if spec.endswith(".gz") else load_conversations(spec)
    return [talk for talk in rows if sum(len(m["content"]) for m in talk[:-1]) <= LONGEST_PROMPT]


def _most(bad: list[Conversation], good: list[Conversation]) -> int:
    """Largest number of bad rows that a half and half mixture with each question once can have."""
    questions = {str(split_answer(talk)[0]) for talk in (*bad, *good)}
    return min(len(bad), len(good), len(questions) // 2)


def _text(talk: Conversation) -> str:
    return str([(m["role"], m["content"]) for m in talk])
