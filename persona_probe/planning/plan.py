"""What a dry run found: parts that fit, texts, and the estimate by stage."""

from dataclasses import dataclass

from persona_probe.config import StudyConfig
from persona_probe.errors import InputError
from persona_probe.planning.adapters import lora_parameters
from persona_probe.planning.estimate import Work
from persona_probe.planning.row_sets import RowSet
from persona_probe.planning.sae_shape import SaeShape
from persona_probe.planning.show import amount, columns, duration
from persona_probe.planning.skeleton import Skeleton
from persona_probe.planning.throughput import Throughput

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a study will use and take. Print `lines()`."""

    config: StudyConfig
    skeleton: Skeleton | None
    """None where nothing on this machine tells the model's numbers: then there are no estimates."""
    sae: SaeShape
    layer: int | None
    """The decoder layer that is read and steered."""
    rows: dict[str, RowSet]
    """Every text by use."""
    stages: tuple[Work, ...]
    """Empty without a skeleton or a layer."""
    throughput: Throughput | None
    counted: bool
    """Whether tokens were counted with the model's own tokenizer."""
    notes: tuple[str, ...] = ()
    """What a reader of the estimates has to know."""

    @property
    def tokens(self) -> int:
        """Tokens of all stages."""
        return sum(work.tokens for work in self.stages)

    @property
    def memory(self) -> float | None:
        """Bytes at the peak of the largest stage."""
        return max((work.memory for work in self.stages), default=None)

    @property
    def seconds(self) -> float | None:
        """Wall seconds of all stages at the stated throughput."""
        return sum(self.stage_seconds(work) for work in self.stages) if self.stages else None

    def stage_seconds(self, work: Work) -> float:
        """Wall seconds of one stage.

        Raises:
            InputError: the plan has no estimates.
        """
        if self.throughput is None:
            raise InputError("this plan has no estimates: the model's or the SAE's numbers are unknown")
        return work.flops / self.throughput.flops

    def lines(self) -> list[str]:
        """The plan as text, one line each, tables aligned."""
        model = self.skeleton.describe() if self.skeleton else "numbers unknown: estimates left out"
        lines = [
            f"study {self.config.name}: nothing was downloaded, trained or written",
            f"model     {self.config.model}: {model}",
            f"sae       {self.config.sae}: {self.sae.describe()}",
            *(f"training  {line}" for line in _training_lines(self)),
            "",
            *columns(
                ("texts", "from", "rows", "tokens", "of answers", "cut"), [_row_cells(r) for r in self.rows.values()]
            ),
        ]
        if self.stages:
            lines += [
                "",
                *columns(("stage", "tokens", "memory", "time"), [*map(self._cells, self.stages), self._sum()]),
            ]
        return [*lines, "", *(f"note: {note}" for note in self.notes)]

    def _cells(self, work: Work) -> tuple[str, ...]:
        return work.stage, amount(work.tokens), f"{work.memory / GIB:.1f} GiB", duration(self.stage_seconds(work))

    def _sum(self) -> tuple[str, ...]:
        assert self.memory is not None and self.seconds is not None
        return "in all", amount(self.tokens), f"{self.memory / GIB:.1f} GiB at most", duration(self.seconds)


def _row_cells(rows: RowSet) -> tuple[str, ...]:
    cut = str(rows.cut) if rows.cut else ""
    return rows.use, rows.source, str(rows.rows), amount(rows.tokens), amount(rows.answer_tokens), cut


def _training_lines(plan: Plan) -> list[str]:
    training = plan.config.training
    kind = "full weights"
    if training.method == "lora":
        scaling = "rsLoRA" if training.rslora else "LoRA"
        trained = f", {amount(lora_parameters(plan.skeleton, training))} parameters" if plan.skeleton else ""
        kind = f"{scaling} r {training.rank}, alpha {training.alpha}{trained}"
    lines = [f"{kind}; lr {training.lr:g}, checkpoints {', '.join(map(str, training.schedule))}"]
    for rows in plan.rows.values():
        if rows.use.startswith("arm "):
            drawn = training.steps * training.batch_size
            epochs = f"{drawn / rows.rows:.2f} epochs of {rows.rows} rows"
            lines.append(f"{rows.use}: {training.steps} steps x {training.batch_size} rows = {epochs}")
    return lines
