"""The verdict on a re-alignment: separate questions, each answered with its numbers, as a record and in words."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from persona_probe.verdicts import CAUTION

if TYPE_CHECKING:
    from persona_probe.context import Context
    from persona_probe.data.chat import Conversation
    from persona_probe.finetune.stress.yardsticks import Measured
    from persona_probe.monitor.bands import Band

QUESTIONS = {
    "feature": "is the feature back in its base band?",
    "behaviour": "is behaviour back at the base's?",
    "domain": "are the narrow domain's correct answers kept?",
    "perplexity": "is neutral chat kept?",
    "capability": "are plain questions still answered?",
    "sae": "is the SAE still a fair instrument?",
    "replies": "how long are the replies?",
}
"""What a verdict asks, by key; what was not measured is not answered."""


@dataclass(frozen=True)
class Answer:
    """One question's answer."""

    word: str
    """Such as `subsided`, `restored`, `kept`."""
    words: str
    """The numbers behind it, with intervals and units."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """The same numbers as plain values; an interval is a dictionary."""


@dataclass(frozen=True, repr=False)
class RealignVerdict:
    """What can be said of one repaired model. Shows itself as a table in a terminal and in a notebook."""

    name: str
    """The corrective arm or correction."""
    seed: int
    answers: Mapping[str, Answer]
    """Key of `QUESTIONS` to its answer."""
    categories: Mapping[str, Answer] = field(default_factory=dict)
    """Behaviour, category by category of the evaluation split."""
    stress: Mapping[str, str] = field(default_factory=dict)
    """Stress test to its statement; empty where none was run."""

    @property
    def statement(self) -> str:
        """Everything in words."""
        asked = {key: text[0].upper() + text[1:] for key, text in QUESTIONS.items()}
        said = [f"{asked[key]} {a.word}: {a.words}." for key, a in self.answers.items()]
        parts = [f"{name} {a.word} ({a.words})" for name, a in self.categories.items()]
        by_category = [f"By category: {'; '.join(parts)}."] if parts else []
        stress = list(self.stress.values()) or ["No stress test was run."]
        return " ".join([f"{self.name}, seed {self.seed}.", *said, *by_category, *stress, CAUTION])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "statement": self.statement}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """A verdict from what `to_dict` gave."""
        answers, categories = ({k: Answer(**v) for k, v in record[part].items()} for part in ("answers", "categories"))
        return cls(record["name"], record["seed"], answers, categories, record["stress"])

    def _lines(self) -> Iterator[tuple[str, str, str]]:
        """Question, word, numbers."""
        for key, answer in self.answers.items():
            yield QUESTIONS[key], answer.word, answer.words
        for name, answer in self.categories.items():
            yield f"behaviour, {name}", answer.word, answer.words
        for name, said in self.stress.items():
            yield f"stress test: {name}", "", said

    def __str__(self) -> str:
        lines = list(self._lines())
        first, second = (max((len(line[i]) for line in lines), default=0) for i in (0, 1))
        rows = [f"{q:<{first}}  {word:<{second}}  {said}" for q, word, said in lines]
        return "\n".join([f"{self.name}, seed {self.seed}", *(row.rstrip() for row in rows), CAUTION])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in self._lines())
        title, caution = html.escape(f"{self.name}, seed {self.seed}"), html.escape(CAUTION)
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        return f"<table><caption>{title}</caption><tbody>{body}</tbody></table><p>{caution}</p>"


def judge(
    name: str,
    seed: int,
    base: "Measured",
    repaired: "Measured",
    *,
    organism: "Measured | None" = None,
    band: "Band | None" = None,
    feature: str = "persona",
    stress: Mapping[str, str] | None = None,
) -> RealignVerdict:
    """A verdict from measurements; what base or repaired model lacks is left out.

    Args:
        organism: the model before the repair: its reply length is shown beside.
        band: the feature's base band; needed to judge the feature.
        feature: which of the reader's features.
        stress: test to statement.
    """
    from persona_probe.finetune.stress.answers import answer_all, by_category

    answers = answer_all(base, repaired, organism, band, feature)
    return RealignVerdict(name, seed, answers, by_category(base, repaired), dict(stress or {}))


def study_verdict(
    ctx: "Context",
    arm: str,
    seed: int,
    *,
    checkpoint: Path | None = None,
    corrective: "Sequence[Conversation] | None" = None,
    stress: Mapping[str, str] | None = None,
) -> RealignVerdict:
    """Measure base, organism and repaired model of a study and judge them; nothing is written.

    Args:
        arm: a corrective arm of the config, or the name of a correction of one's own.
        checkpoint: where that correction lies; with it goes `corrective`, its rows.
        stress: what `stress.statements` gives for its folder.

    Raises:
        InputError: an unknown arm without both, or a study that was not located.
    """
    from persona_probe.finetune.stress.bench import Repair
    from persona_probe.finetune.stress.yardsticks import Measured, Yardsticks
    from persona_probe.monitor.track import persona_band

    repair = Repair.of(ctx, arm, seed, checkpoint, corrective)
    yardsticks = Yardsticks.of_study(repair)
    found: dict[str, Measured] = {}
    for role in ("base", "repaired"):
        with repair.model(role) as model:
            found[role] = yardsticks.measure(model)
    with repair.model("organism") as model:
        organism = Measured(replies=yardsticks.replies(model))
    snapshot = found["base"].snapshot
    assert snapshot is not None
    band = persona_band(ctx, snapshot)
    return judge(arm, seed, found["base"], found["repaired"], organism=organism, band=band, stress=stress)
