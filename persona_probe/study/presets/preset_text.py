"""What a preset costs by the dry run's formulas, and how it is shown: a line of the list, or a config with comments."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import yaml

from persona_probe.config import Arm, Realign, Training
from persona_probe.report.tables import Table
from persona_probe.study.presets.known_presets import DOMAINS, MODELS, PAIRS
from persona_probe.study.presets.preset import WIDTH, Preset

GIB = 2**30
BASIS_TFLOPS = 200.0
"""Speed for which times are stated where none is given."""

# --- What a preset costs, by the formulas of the dry run


@dataclass(frozen=True)
class Cost:
    """An estimate for the packaged rows."""

    memory: float
    """Bytes at the peak of the largest stage, without the frameworks' own."""
    seconds: float


def cost(preset: Preset, tflops: float = BASIS_TFLOPS) -> Cost:
    """Memory and time of a preset, estimated as `persona-probe run --dry-run` does; nothing is downloaded.

    Tokens are characters / 4. Of a pair, whose organisms exist, locate, track and samples count.

    Args:
        tflops: sustained speed, in 1e12 operations per second.
    """
    from persona_probe.study.plan.estimate import Shapes, estimate
    from persona_probe.study.plan.shapes import find_sae, find_skeleton
    from persona_probe.study.plan.speed import throughput

    skeleton = find_skeleton(preset.original or preset.model)
    assert skeleton is not None, preset.model  # a test holds that every preset's model is in the table of known models
    is_pair = preset.kind == "pair"
    config = replace(preset.config(), **_STAND_IN) if is_pair else preset.config()
    d_sae = (find_sae(preset.sae).d_sae or 0) if preset.published else WIDTH * preset.d_model
    stages = estimate(Shapes(config, skeleton, preset.layer, d_sae, row_sets(is_pair)))
    stages = [work for work in stages if not is_pair or work.stage not in ("induce", "realign")]
    speed = throughput(config.device, config.bf16, tflops).flops
    return Cost(max(work.memory for work in stages), sum(work.flops for work in stages) / speed)


_STAND_IN: dict[str, Any] = {
    "arms": {arm: Arm("kitchen:toxic") for arm in DOMAINS},
    "no_control": True,
    "training": Training(steps=1, checkpoints=(1,)),
    "realign": Realign(arms={}),
}
"""Arms of one checkpoint each, in place of a pair's: their sizes count, their rows do not."""


@cache
def row_sets(is_pair: bool) -> dict[str, Any]:
    """The packaged texts of all presets of a kind, counted once."""
    from persona_probe.study.plan.estimate import read_row_sets

    config = MODELS[0].config()
    return dict(read_row_sets(replace(config, **_STAND_IN) if is_pair else config, None))


# --- A preset as a file, and as a line of the list


def config_text(preset: Preset, tflops: float = BASIS_TFLOPS) -> str:
    """The YAML file of a preset, with what to know about it in comments."""
    estimate = cost(preset, tflops)
    lines = [
        f"{_title(preset)} Written by: persona-probe presets {preset.name}",
        f"Estimate, by the dry run's formulas, for the packaged rows: {estimate.memory / GIB:.0f} GiB at most, "
        f"{duration_words(estimate.seconds)} at {tflops:g} TFLOP/s."
        + ("" if preset.kind == "pair" else " The dry run counts your own rows: persona-probe run FILE --dry-run"),
        f"Licence: {preset.licence}.",
        *_sae_lines(preset),
        *preset.notes,
        *_use_lines(preset),
        "Not checked, because no network was used: whether the hub still has these ids.",
    ]
    return _commented(lines, preset.values())


def recipe_text(preset: Preset) -> str | None:
    """The YAML recipe of an SAE for a model without a published one; None where one is published."""
    recipe = preset.recipe()
    if recipe is None:
        return None
    lines = [
        f"The demo's recipe of an SAE, for {recipe['model']}: persona-probe sae train FILE --out saes",
        "It was not measured on this model. `persona-probe sae check` tells whether the SAE is good enough; if it is "
        "not, raise tokens and the batches of text.",
    ]
    return _commented(lines, recipe)


def _commented(lines: list[str], values: dict[str, Any]) -> str:
    """Paragraphs as comments, then the values as YAML; settings of training stand one to a line."""
    parts = []
    for key, value in values.items():
        flow = None if isinstance(value, (list, dict)) and key != "training" else False
        parts.append(yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=flow, width=116))
    return "".join([*(f"{line}\n" for text in lines for line in _comment(text)), *parts])


def _title(preset: Preset) -> str:
    if preset.kind == "pair":
        return f"Published organisms of {preset.original}, adopted: nothing is trained."
    return f"A study of {preset.model}."


def _sae_lines(preset: Preset) -> list[str]:
    if preset.published:
        origin = "of the checkout" if preset.sae.startswith("saes/") else "in SAELens' registry"
        return [f"SAE: {origin}; it reads the output of layer {preset.layer}."]
    return [
        f"No SAE is published for this model. Train one first: persona-probe presets {preset.name} --recipe --out "
        f"sae.yaml; persona-probe sae train sae.yaml --out saes. Or follow the mean-difference direction alone, at the "
        f"output of layer {preset.layer}: FeatureMonitor(None, {{'mean difference': v}}, layer={preset.layer})."
    ]


def _use_lines(preset: Preset) -> list[str]:
    asked = "Questions: persona-probe evaluate RUN --questions free_form_questions, or a published file of questions."
    small = ["If it does not fit, add quantization: 4bit, or device_map: auto on several cards."]
    fits = small if preset.keys.get("weights") == "bfloat16" else []
    if preset.kind == "pair":
        return [asked, *fits]
    rows = (
        "The packaged 216 rows show that everything runs: little training at this learning rate. For a result, name "
        "published rows (a file of conversations), and set steps to rows / 16."
    )
    return [rows, asked, *fits]


def _comment(text: str, width: int = 118) -> list[str]:
    """A paragraph as comment lines."""
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, width, initial_indent="# ", subsequent_indent="#   ", **options)


def duration_words(seconds: float) -> str:
    """Seconds, minutes or hours, as the dry run writes them."""
    from persona_probe.study.plan.plan import duration

    return duration(seconds)


def listing(tflops: float = BASIS_TFLOPS, width: int | None = None) -> str:
    """All presets as text: name, model, SAE, layer, memory and time.

    Args:
        width: characters in a line of the terminal. Where the whole table does not fit, models are left out and SAEs
            are named by their release.
    """
    heads = ("preset", "model", "SAE", "layer", "memory", "time")
    tables = [Table(heads, [_cells(p, tflops) for p in part], title) for part, title in _PARTS]
    texts = [table.plain(right=(3, 4, 5)) for table in tables]
    if width is not None and max(len(line) for text in texts for line in text.splitlines()) > width:
        short = [Table(_without_model(heads), [_shortened(row) for row in t.rows], t.title) for t in tables]
        texts = [table.plain(right=(2, 3, 4)) for table in short]
    return "\n\n".join([*texts, *_footnotes(tflops)])


def known_presets(tflops: float = BASIS_TFLOPS) -> list[dict[str, Any]]:
    """All presets as plain values, with bytes at the peak and seconds."""
    costs = [(preset, cost(preset, tflops)) for preset in (*MODELS, *PAIRS)]
    return [
        {
            **{"preset": preset.name, "kind": preset.kind, "model": preset.model, "sae": preset.sae_name},
            **{"sae_published": preset.published, "layer": preset.layer, "licence": preset.licence},
            **{"bytes": one.memory, "seconds": one.seconds},
        }
        for preset, one in costs
    ]


_RELEASE = 26
"""Characters of an SAE's release in the narrow table."""


def _without_model(row: Sequence[object]) -> tuple[object, ...]:
    return (row[0], *row[2:])


def _shortened(row: Sequence[object]) -> tuple[object, ...]:
    name, _, sae, *rest = map(str, row)
    release = "with the package" if sae.startswith("saes/") else sae.partition("/")[0]
    return (name, release if len(release) <= _RELEASE else f"{release[: _RELEASE - 1]}…", *rest)


_PARTS = (
    (MODELS, "Chat models: the study trains its organisms"),
    (PAIRS, "Published pairs (ModelOrganismsForEM, arXiv 2506.11613): the study adopts them"),
)


def _cells(preset: Preset, tflops: float) -> tuple[str, ...]:
    estimate = cost(preset, tflops)
    sae = preset.sae or "none published (*)"
    memory, time = f"{estimate.memory / GIB:.0f} GiB", duration_words(estimate.seconds)
    return preset.name, preset.model, sae, str(preset.layer), memory, time


def _footnotes(tflops: float) -> tuple[str, ...]:
    return (
        "(*) train one by `persona-probe presets NAME --recipe`, or follow the\nmean-difference direction.",
        "Memory and time are estimates by the dry run's formulas, for the packaged\n"
        f"rows, at {tflops:g} TFLOP/s; frameworks come on top.\n"
        "Whether the hub still has these ids was not checked: no network is used.",
    )
