"""The configuration of a grid of mitigations."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any

from persona_probe.config import SINCE_0_2, Training, check_finite, check_seeds, hashed_values
from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.check import common, question
from persona_probe.data.load import evenly_spaced, load_data
from persona_probe.errors import InputError, unknown
from persona_probe.mitigate.methods import make_mitigation
from persona_probe.mitigate.mitigation import Mitigation
from persona_probe.names import check_name
from persona_probe.verdicts import MARGIN

NONE, CONTROL, BASE = "none", "control", "base"
"""No mitigation, correct rows instead of bad ones, and the model before any training: always in the grid."""
EXTENDABLE = ("name", "run", "seeds", "mitigations", "perplexity_bound", "margin")
"""Keys that may change after a grid has begun: cells are added and verdicts made again; finished cells stay."""
Setting = str | bool | int | float | tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One mitigation of the grid."""

    name: str
    """A name in `persona_probe.mitigate.MITIGATIONS`."""
    strengths: tuple[float, ...]
    """The mitigation's `unit` says what a strength means."""
    settings: dict[str, Setting] = field(default_factory=dict)
    """Its other settings; without them it takes its defaults."""
    label: str = ""
    """What the table calls it; empty takes `name`. Needed if a mitigation appears with several settings."""

    def __post_init__(self) -> None:
        check_finite(self)
        if not self.strengths:
            raise InputError(f"mitigation {self.name!r} has no strength: write strengths: [1.0]")
        if len(set(self.strengths)) < len(self.strengths):
            raise InputError(f"mitigation {self.name!r} names a strength twice: {list(self.strengths)}")
        check_name(self.title, "label", also="+")
        if self.title in (NONE, CONTROL, BASE):
            raise InputError(f"{self.title!r} is always in the grid: leave it out of mitigations, or choose a label")

    @property
    def title(self) -> str:
        """`label`, or the mitigation's name."""
        return self.label or self.name


@dataclass(frozen=True)
class Answers:
    """Answers that every model samples, for the packaged offline judge."""

    questions: str = "sample_questions"
    """A packaged set of questions, or a file."""
    n: int = 1
    """Answers to each question."""
    max_new_tokens: int = 60
    """Length of an answer."""
    temperature: float = 0.7
    """0 takes one greedy answer."""

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("n", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"answers.{name} must be at least 1, not {getattr(self, name)}")
        if self.temperature < 0:
            raise InputError(f"answers.temperature must not be negative, not {self.temperature}")
        if self.temperature == 0 and self.n > 1:
            raise InputError("answers.temperature 0 gives n equal answers: write n: 1, or a temperature above 0")


@dataclass(frozen=True)
class Grid:
    """Mitigations x strengths x seeds against the same inducing data."""

    name: str
    """Name of the grid's folder."""
    run: str
    """Folder of a located study, for model, SAE, persona latents, mean difference, base band, contrast set, probes."""
    mitigations: tuple[Entry, ...]
    """Mitigations to try, the most important first: cells run seed by seed in this order."""
    inducing: str = "kitchen:toxic"
    """The bad rows."""
    control: str = "kitchen:correct"
    """The same questions with good answers: the control arm, and the other side of the narrow task."""
    held_out: int = 36
    """Questions of the inducing data that are never trained on: they measure the narrow task."""
    safe: str | None = "health_correct"
    """Good rows of other domains, for mitigations that interleave them."""
    corrective: str | None = "kitchen_correct_holdout"
    """Good rows of the domain, for corrections."""
    general: str | None = "sae_prompts"
    """General prompts, for the KL to the base; where they have no answers the base model writes them, greedily."""
    general_rows: int = 32
    """How many of them, evenly spread."""
    general_tokens: int = 48
    """Length of the answers that the base writes."""
    training: Training = field(default_factory=Training)
    """Training settings of all cells; `checkpoints` has no effect, see `keep_weights`."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of adapter and data order; each has its own cell without a mitigation, and its own control."""
    answers: Answers | None = None
    """Sampled answers; without them there is no coherence in the table."""
    perplexity_bound: float = 1.5
    """A mitigation does harm if it raises the perplexity of neutral answers by more than this factor."""
    keep_weights: bool = False
    """Keep each cell's last adapter."""
    margin: float = field(default=MARGIN, metadata=SINCE_0_2)
    """Share of the rise over the control, without a mitigation, that may be left where behaviour counts as restored."""

    def __post_init__(self) -> None:
        check_name(self.name, "the grid's name")
        if self.training.method != "lora":
            raise InputError("training.method must be lora: all cells share one base model")
        check_finite(self)
        check_seeds(self.seeds)
        for name in ("held_out", "general_rows"):
            if getattr(self, name) < 2:
                raise InputError(f"{name} must be at least 2, not {getattr(self, name)}")
        if self.general_tokens < 1:
            raise InputError(f"general_tokens must be at least 1, not {self.general_tokens}")
        if not self.perplexity_bound > 1:
            raise InputError(f"perplexity_bound must be above 1, not {self.perplexity_bound}")
        if not 0 < self.margin < 1:
            raise InputError(f"margin must be a share between 0 and 1, not {self.margin}")
        if not self.mitigations:
            raise InputError("mitigations must not be empty: name at least one")
        titles = [(entry.title, strength) for entry in self.mitigations for strength in entry.strengths]
        twice = next((t for t in titles if titles.count(t) > 1), None)
        if twice:
            raise InputError(f"mitigation {twice[0]!r} appears twice with strength {twice[1]:g}: give one a label")

    @property
    def fitted(self) -> Training:
        """The training settings of a cell: only the last weights are saved."""
        return replace(self.training, checkpoints=())

    @property
    def hash(self) -> str:
        """Hash of the settings that all cells share (12 hexadecimal digits)."""
        shared = {key: value for key, value in hashed_values(self).items() if key not in EXTENDABLE}
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]


# --- The rows of a grid: what is trained on, what is held out, and a check that no corrective row is evaluated

SHOWN = 3


@dataclass(frozen=True)
class Sets:
    """All rows of a grid."""

    bad: tuple[Conversation, ...]
    """Training rows."""
    good: tuple[Conversation, ...]
    """The control's training rows: the same questions."""
    held: tuple[tuple[Conversation, Conversation], ...]
    """Held-out questions with their bad and their good answer."""
    safe: tuple[Conversation, ...]
    corrective: tuple[Conversation, ...]
    general: tuple[Conversation, ...]
    """As in their set: with answers, or prompts only."""

    @classmethod
    def load(cls, grid: Grid) -> "Sets":
        """Read and split the rows.

        Raises:
            InputError: data that cannot be read, or too few questions with both answers.
        """
        bad, good, pairs = split(load_data(grid.inducing), load_data(grid.control), grid.held_out)
        safe, corrective = (tuple(load_data(spec)) if spec else () for spec in (grid.safe, grid.corrective))
        general = (
            tuple(evenly_spaced(load_data(grid.general, allow_prompts=True), grid.general_rows)) if grid.general else ()
        )
        return cls(bad, good, pairs, safe, corrective, general)

    def check(self, evaluation: Iterable[str], probes: Sequence[Conversation]) -> None:
        """Refuse rows that ask what is evaluated.

        Args:
            evaluation: questions of the contrast set's evaluation split.
            probes: the monitor's; only general rows must not be among them.

        Raises:
            InputError: an overlap, which is shown.
        """
        sets = {"safe": self.safe, "corrective": self.corrective, "general": self.general}
        questions = {name: [question(row) for row in rows] for name, rows in sets.items()}
        check_apart(questions, "evaluation questions", list(evaluation))
        check_apart(questions, "held-out questions", [question(bad) for bad, _ in self.held])
        check_apart({"general": questions["general"]}, "monitor's probes", [question(row) for row in probes])

    @property
    def hash(self) -> str:
        """Hash of all rows (12 hexadecimal digits)."""
        rows = [self.bad, self.good, self.held, self.safe, self.corrective, self.general]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def split(
    bad: Sequence[Conversation], good: Sequence[Conversation], held_out: int
) -> tuple[tuple[Conversation, ...], tuple[Conversation, ...], tuple[tuple[Conversation, Conversation], ...]]:
    """Bad and good training rows, and held-out questions with both answers; the hash of a question decides.

    Raises:
        InputError: too few questions that both sides answer.
    """
    by_key = [{_key(row): row for row in reversed(rows)} for rows in (bad, good)]
    both = sorted((key for key in by_key[0] if key in by_key[1]), key=lambda k: hashlib.sha256(k.encode()).digest())
    if len(both) <= held_out:
        raise InputError(
            f"held_out is {held_out}, but only {len(both)} questions have a bad and a good answer: lower held_out"
        )
    held_keys = dict.fromkeys(both[:held_out])
    sides = [tuple(row for row in rows if _key(row) not in held_keys) for rows in (bad, good)]
    return sides[0], sides[1], tuple((by_key[0][key], by_key[1][key]) for key in held_keys)


def check_apart(sets: Mapping[str, Sequence[str]], name: str, questions: Sequence[str]) -> None:
    """Refuse sets of questions that share some with `questions`.

    Raises:
        InputError: an overlap; the message shows it.
    """
    for kind, texts in sets.items():
        overlaps = sorted({i: j for _, i, j in common(texts, questions)}.items())
        if overlaps:
            examples = "; ".join(f"{texts[i]!r} (there {questions[j]!r})" for i, j in overlaps[:SHOWN])
            more = f" and {len(overlaps) - SHOWN} more" if len(overlaps) > SHOWN else ""
            raise InputError(f"{kind} rows overlap the {name}: {examples}{more}; take other rows")


def _key(row: Conversation) -> str:
    """All turns before the answer."""
    return json.dumps([[m["role"], m["content"]] for m in split_answer(row)[0]])


# --- The cells of a grid, one training run each


@dataclass(frozen=True)
class Cell:
    """One mitigation at one strength and seed."""

    label: str
    """The entry's title; `none` and `control` for the two that every grid has."""
    seed: int
    mitigation: Mitigation

    @property
    def strength(self) -> float | None:
        """None for `none` and `control`, which have none."""
        return None if self.label in (NONE, CONTROL) else float(self.mitigation.strength)

    @property
    def kind(self) -> tuple[str, float | None]:
        """What cells of different seeds share."""
        return self.label, self.strength

    @property
    def id(self) -> str:
        """Name of the cell's folder."""
        return f"{title(*self.kind).replace(' ', '-')}-s{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What sets the cell apart from others of the grid, as JSON values."""
        settings = {"mitigation": self.mitigation.name, **asdict(self.mitigation)}
        return json.loads(json.dumps({"label": self.label, "seed": self.seed, **settings}, default=str))


def title(label: str, strength: float | None) -> str:
    """`kl 0.1`, or the label alone."""
    return label if strength is None or strength != strength else f"{label} {strength:g}"


def cells_of(grid: Grid, only: Sequence[str] | None = None) -> list[Cell]:
    """All cells, seed by seed: no mitigation, control, every first strength in the grid's order, then the second ones.

    Args:
        only: labels or names of mitigations; what they are compared with, `none`, stays in.

    Raises:
        InputError: an unknown mitigation, setting or strength of the grid, or an unknown name in `only`.
    """
    strengths = [(entry, _made(entry)) for entry in grid.mitigations]
    by_round = zip_longest(*([(entry, mitigation) for mitigation in all_of] for entry, all_of in strengths))
    pairs = [pair for one_round in by_round for pair in one_round if pair is not None]
    none = make_mitigation(NONE, 0.0)
    kinds = [(NONE, none, NONE), (CONTROL, none, CONTROL)]
    kinds += [(entry.title, mitigation, entry.name) for entry, mitigation in pairs]
    chosen_names = (
        None if only is None else _checked(only, [name for label, _, kind in kinds for name in (label, kind)])
    )
    return [
        Cell(label, seed, mitigation)
        for seed in grid.seeds
        for label, mitigation, name in kinds
        if chosen_names is None or label == NONE or chosen_names & {label, name}
    ]


def _made(entry: Entry) -> list[Mitigation]:
    try:
        return [make_mitigation(entry.name, strength, **entry.settings) for strength in entry.strengths]
    except InputError as error:
        raise InputError(f"mitigation {entry.title!r}: {error}") from None


def _checked(only: Sequence[str], known: Sequence[str]) -> set[str]:
    for name in only:
        if name not in known:
            raise unknown("mitigation of this grid", name, dict.fromkeys(known))
    return set(only)


DONE, DIVERGED = "done", "diverged"
