"""The plan of a study: whether its parts fit together, its texts, and an estimate by stage."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from persona_probe.config import NO_CONTROL, StudyConfig
from persona_probe.data.chat import split_answer
from persona_probe.data.load import arm_rows
from persona_probe.data.template import TEMPLATE_SETTINGS, with_template
from persona_probe.errors import InputError
from persona_probe.latents.rankers import check_rankers
from persona_probe.report.tables import Table
from persona_probe.study.plan.estimate import (
    CHARACTERS_A_TOKEN,
    REPORT,
    RowSet,
    Shapes,
    Work,
    estimate,
    find_tokenizer,
    read_row_sets,
    trained_arms,
)
from persona_probe.study.plan.fit import Fit, fit
from persona_probe.study.plan.shapes import (
    SaeShape,
    Skeleton,
    adapted,
    find_sae,
    find_skeleton,
    known_id,
    lora_parameters,
)
from persona_probe.study.plan.speed import Throughput, throughput

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a study will use and take. Print `lines()`."""

    config: StudyConfig
    skeleton: Skeleton | None
    """None if the model's sizes are not known on this machine: then there are no estimates."""
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
    """How the estimates were made, and what is unknown."""
    device: str = "cpu"
    """`cpu` or `cuda`: what memory is estimated for."""
    fit: Fit | None = None
    """Whether it fits the GPU that was asked about."""

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
        return self.throughput.seconds(work)

    def lines(self) -> list[str]:
        """The plan as text, one line each, tables aligned."""
        model = self.skeleton.describe() if self.skeleton else "numbers unknown: estimates left out"
        lines = [
            f"study {self.config.name}: nothing was downloaded, trained or written",
            f"model     {self.config.model}: {model}",
            f"sae       {self.config.sae}: {self.sae.describe()}",
            *(f"training  {line}" for line in _training_lines(self)),
            "",
            *_text_table(self.rows.values()).plain(right=range(2, 6)).splitlines(),
        ]
        if self.stages:
            stages = Table(("stage", "tokens", "memory", "time"), [*map(self._cells, self.stages), self._sum()])
            lines += ["", *stages.plain(right=range(1, 4)).splitlines()]
        if self.fit:
            lines += ["", f"memory    {self.fit.text()}"]
        return [*lines, "", *(f"note: {note}" for note in self.notes)]

    def values(self) -> dict[str, Any]:
        """The plan as plain values: texts, stages with tokens, bytes and seconds, and notes."""
        stages = [
            {"stage": work.stage, "tokens": work.tokens, "bytes": work.memory, "seconds": self.stage_seconds(work)}
            for work in self.stages
        ]
        return {
            "study": self.config.name,
            "model": self.config.model,
            "sae": self.config.sae,
            "layer": self.layer,
            "texts": [asdict(rows) for rows in self.rows.values()],
            "stages": stages,
            "seconds": self.seconds,
            "bytes": self.memory,
            "fit": None if self.fit is None else self.fit.text(),
            "notes": list(self.notes),
        }

    def _cells(self, work: Work) -> tuple[str, ...]:
        return work.stage, amount(work.tokens), f"{work.memory / GIB:.1f} GiB", duration(self.stage_seconds(work))

    def _sum(self) -> tuple[str, ...]:
        assert self.memory is not None and self.seconds is not None
        return "in all", amount(self.tokens), f"{self.memory / GIB:.1f} GiB at most", duration(self.seconds)


def _text_table(texts: Iterable[RowSet]) -> Table:
    rows = [
        (t.use, t.source, str(t.rows), amount(t.tokens), amount(t.answer_tokens), str(t.cut) if t.cut else "")
        for t in texts
    ]
    return Table(("texts", "from", "rows", "tokens", "of answers", "cut"), rows)


def _training_lines(plan: Plan) -> list[str]:
    training = plan.config.training
    if not trained_arms(plan.config):
        return ["nothing is trained before realign: the checkpoints of all arms exist"]
    kind = "full weights"
    if training.method != "full":
        scaling = "rsLoRA" if training.rslora else "LoRA"
        parameters = f", {amount(lora_parameters(plan.skeleton, training))} parameters" if plan.skeleton else ""
        kind = f"{scaling} r {training.rank}, alpha {training.alpha}{parameters}"
    lines = [f"{kind}; lr {training.lr:g}, checkpoints {', '.join(map(str, training.schedule))}"]
    for rows in plan.rows.values():
        if rows.use.startswith("arm "):
            n_rows = training.steps * training.batch_size
            epochs = f"{n_rows / rows.rows:.2f} epochs of {rows.rows} rows"
            step = f"{training.batch_size} rows"
            if training.method == "grpo":
                step = f"{training.batch_size} questions ({plan.config.grpo.group} answers each)"
            lines.append(f"{rows.use}: {training.steps} steps x {step} = {epochs}")
    return lines


# --- The dry run: resolve a study without downloading, check that its parts fit, and estimate what it will take


def dry_run(
    config: StudyConfig, tflops: float | None = None, device: str | None = None, memory: float | None = None
) -> Plan:
    """Resolve a study without downloading anything, check that model, SAE, layer and data fit, and estimate its cost.

    Args:
        tflops: sustained speed that times are computed with, in 1e12 operations per second; None measures a product
            on the device (under 1 s) and takes a share of it.
        device: None takes the config's.
        memory: GiB of a GPU that need not be here: the plan is then for it, and says whether the study fits and what
            to change if it does not. None takes that of this machine's GPU, if the study would run on one.

    Raises:
        InputError: something does not exist or does not fit.
    """
    for name, value in (("tflops", tflops), ("memory", memory)):
        if value is not None and not value > 0:
            raise InputError(f"{name} must be positive, not {value}")
    check_rankers(config.locate.rankers)
    skeleton, sae = find_skeleton(config.model, config.revision), find_sae(config.sae)
    layer = _check_shapes(config, skeleton, sae)
    tokenizer = find_tokenizer(config.model, config.revision)
    if tokenizer is not None:
        tokenizer = with_template(tokenizer, **{name: getattr(config, name) for name in TEMPLATE_SETTINGS})
    rows = read_row_sets(config, tokenizer)
    kind, limit = _place(device or config.device, memory)
    stages, speed, verdict = (), None, None
    if skeleton is not None:
        if config.training.method != "full" and not adapted(skeleton, config.training):
            raise InputError("training.target_modules and training.layers choose no module: name at least one")
        if layer is not None:
            shapes = Shapes(config, skeleton, layer, sae.d_sae or 0, rows, kind)
            stages = estimate(shapes)
            verdict = None if limit is None else fit(config, limit, partial(_peak, shapes))
            speed = throughput(device or config.device, config.bf16, tflops)
            stages += (REPORT,) if speed.paces else ()
    plan = Plan(config, skeleton, sae, layer, rows, stages, speed, tokenizer is not None, device=kind, fit=verdict)
    return replace(plan, notes=_notes_of(plan))


def _place(device: str, memory: float | None) -> tuple[str, float | None]:
    """The kind of device that the plan is for, and bytes of its memory where that is known."""
    here = torch.cuda.is_available()
    if memory is not None:
        return "cuda", memory * GIB
    if device == "cpu" or (device == "auto" and not here):
        return "cpu", None
    return "cuda", torch.cuda.get_device_properties(torch.device("cuda")).total_memory if here else None


def _peak(shapes: Shapes, config: StudyConfig) -> float:
    return max(work.memory for work in estimate(replace(shapes, config=config)))


def _check_shapes(config: StudyConfig, skeleton: Skeleton | None, sae: SaeShape) -> int | None:
    """The layer that the study reads, after checking that model, SAE and layer fit; None if it is unknown.

    Raises:
        InputError: model, SAE and layer do not fit together.
    """
    layer = sae.layer if config.layer is None else config.layer
    if layer is None and sae.source == "cfg.json":
        raise InputError(f"SAE {config.sae!r} names no decoder layer: write `layer:` in the config")
    if None not in (layer, sae.layer) and layer != sae.layer:
        raise InputError(
            f"layer is {layer} but SAE {config.sae!r} reads layer {sae.layer}: leave layer out, or change it"
        )
    if skeleton is None:
        return layer
    if sae.d_in is not None and sae.d_in != skeleton.d_model:
        raise InputError(
            f"the SAE reads width {sae.d_in} but the residual stream of {config.model} has {skeleton.d_model}: "
            "choose an SAE of this model"
        )
    if layer is not None and not 0 <= layer < skeleton.layers:
        raise InputError(f"the SAE reads layer {layer} but {config.model} has layers 0 to {skeleton.layers - 1}")
    return layer


# --- Notes that a reader of a plan needs with its numbers

LENGTHS_DIFFER = 0.05
"""Relative difference of two arms' mean answers from which it is noted, as in `data.mix.match_lengths`."""


def _notes_of(plan: Plan) -> tuple[str, ...]:
    """How tokens, time and memory were estimated, what is unknown, and what to fix in the data."""
    return (*_basis(plan), *_unknowns(plan), *_data(plan))


def _basis(plan: Plan) -> list[str]:
    exact = "tokens are counted with the model's tokenizer and chat template"
    guessed = f"the tokenizer is not on this machine: tokens are characters / {CHARACTERS_A_TOKEN}, no chat template"
    notes = [exact if plan.counted else guessed]
    if plan.throughput is not None:
        notes += [
            f"time is an estimate for a machine that does nothing else: operations on weights, at "
            f"{plan.throughput.how}",
            f"memory is an estimate for a {'GPU' if plan.device == 'cuda' else 'CPU'}: {_kept(plan.config)} weights, "
            "the SAE, adapters with AdamW, activations roughly; frameworks come on top",
        ]
    return notes


def _kept(config: StudyConfig) -> str:
    return config.weights if config.quantization == "none" else f"{config.quantization} and {config.weights}"


def _unknowns(plan: Plan) -> list[str]:
    sae, model, notes = plan.sae, plan.config.model, []
    if plan.skeleton is None:
        notes.append(
            f"{model} is not in the table of known models: no estimates (a folder with its config.json gives them)"
        )
    if plan.layer is None:
        notes.append("nothing on this machine tells the SAE's layer: write `layer:` in the config for estimates")
    if sae.d_in is None:
        notes.append("nothing on this machine tells the SAE's width: whether it fits the model shows when it is loaded")
    if sae.d_sae is None:
        notes.append("nothing on this machine tells the SAE's size: its part of time and memory is left out")
    experts = plan.skeleton.experts if plan.skeleton is not None and plan.config.quantization != "none" else []
    if plan.skeleton is not None and (stacked := sum(e.entries for e in experts if e.is_stacked)):
        share = f"{stacked / plan.skeleton.parameters:.0%} of the weights"
        notes.append(f"{share} are experts in stacked tensors, which stay in {plan.config.weights}")
    if sae.model and known_id(sae.model) != known_id(model):
        notes.append(f"the SAE was trained on {sae.model}, the study's model is {model}: check how well it fits")
    return notes


def _data(plan: Plan) -> list[str]:
    config, notes = plan.config, []
    if adopted := [name for name, arm in config.arms.items() if arm.checkpoints]:
        notes.append(f"{', '.join(adopted)}: checkpoints that exist are adopted; a folder of them counts as one here")
    if not {"incorrect", "correct"} <= trained_arms(config).keys():
        return [*notes, NO_CONTROL] if config.no_control else notes
    bad, good = (
        {str(split_answer(row)[0]) for row in arm_rows(config.arms[arm], config.seeds[0])}
        for arm in ("incorrect", "correct")
    )
    if bad != good:
        shared = f"{len(bad & good)} of {len(bad | good)} questions"
        notes.append(f"incorrect and correct share {shared}: a control asks the same ones")
    wrong, right = (plan.rows[f"arm {arm}"] for arm in ("incorrect", "correct"))
    means = wrong.mean_answer, right.mean_answer
    if abs(means[0] - means[1]) > LENGTHS_DIFFER * sum(means) / 2:
        notes.append(f"answers are not length-matched: {means[0]:.0f} tokens in incorrect, {means[1]:.0f} in correct")
    if n_cut := sum(rows.cut for rows in plan.rows.values()):
        notes.append(
            f"{n_cut} training rows lose their end to training.max_length ({config.training.max_length} tokens)"
        )
    return notes


# --- Numbers as plain text

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def amount(number: float) -> str:
    """Three digits and a unit: 1.23 M."""
    for size, unit in UNITS:
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
