"""What a run folder holds, as tables and dictionaries. Reading it needs no model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pandas as pd

from persona_probe import shipped
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.effects import behaviour_rises
from persona_probe.evaluate.tables import contrast_rows, judged_rows
from persona_probe.files import as_damaged, is_there, read_json, read_jsonl, read_parquet
from persona_probe.report.labels import arm_labels
from persona_probe.report.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, YELLOW
from persona_probe.runs import INCIDENTS, SERVED, RunFolder
from persona_probe.stats import Estimate

# --- A study's arms, with the order and the look that they have in every figure

BASE = "base"


@dataclass(frozen=True)
class ArmStyle:
    """How an arm looks and what it is called."""

    colour: str
    """Hexadecimal."""
    symbol: str
    """A plotly marker."""
    label: str
    """Plain text. For other arms it is the name from the config: escape it."""


INDUCED_STYLES = {
    BASE: ArmStyle(GREY, "circle", "base"),
    "incorrect": ArmStyle(VERMILLION, "square", "incorrect"),
    "correct": ArmStyle(BLUE, "diamond", "correct (control)"),
}
REALIGN_STYLES = {
    "realigned_in": ArmStyle(GREEN, "triangle-up", "re-aligned, same domain"),
    "realigned_out": ArmStyle(PURPLE, "triangle-down", "re-aligned, other domain"),
}
MORE_COLOURS = (ORANGE, SKY, YELLOW)
MORE_SYMBOLS = ("cross", "x", "star", "pentagon", "hexagon", "hourglass", "bowtie")
"""For arms of other names, one after the other: three colours and seven symbols give 21 different looks."""


@dataclass(frozen=True)
class Arms:
    """Names of a study's arms: base first, then the config's, then the re-aligned ones."""

    induced: tuple[str, ...] = ()
    """Arms that the induce stage trains, in the config's order."""
    realigned: tuple[str, ...] = ()
    """Corrective arms, in the config's order."""
    start: str = "incorrect"
    """The arm that the corrective arms start from."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What readers see in place of an arm's id; an arm without a label has that of its style."""

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> Self:
        """The arms of a manifest's config; none if it has no config yet."""
        config = _mapping(manifest.get("config"))
        realign = _mapping(config.get("realign"))
        start = str(realign.get("start") or cls.start)
        induced, realigned = tuple(_mapping(config.get("arms"))), tuple(_mapping(realign.get("arms")))
        return cls(induced, realigned, start, arm_labels(config))

    @property
    def names(self) -> tuple[str, ...]:
        """All arms, in the order in which figures show them."""
        return (BASE, *self.induced, *self.realigned)

    @cached_property
    def styles(self) -> dict[str, ArmStyle]:
        """Colour, symbol and label by arm."""
        known = {name: INDUCED_STYLES[name] for name in (BASE, *self.induced) if name in INDUCED_STYLES}
        known |= {name: REALIGN_STYLES[name] for name in self.realigned if name in REALIGN_STYLES}
        others = [name for name in self.names if name not in known]
        styles = {**known, **{name: _further(i, name) for i, name in enumerate(others)}}
        return {name: replace(style, label=self.labels.get(name, style.label)) for name, style in styles.items()}

    def label(self, arm: str) -> str:
        """What the report calls an arm (plain text)."""
        return self.styles[arm].label if arm in self.styles else arm


def _further(i: int, name: str) -> ArmStyle:
    return ArmStyle(MORE_COLOURS[i % len(MORE_COLOURS)], MORE_SYMBOLS[i % len(MORE_SYMBOLS)], name)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# --- Reading the files of a run folder; an error names the damaged file

AGAIN = "run its stage again"


def _read_table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """A parquet table with at least these columns; an empty one if there is no such file."""
    if not is_there(path):
        return pd.DataFrame(columns=list(columns))
    table = read_parquet(path, columns, "run its stage again with this version")
    for name in columns:
        if name not in TEXTS and not _is_numeric(table[name]):
            raise InputError(f"{path} is damaged (column {name!r} holds what is no number): {AGAIN}")
    return table


def _is_numeric(column: pd.Series) -> bool:
    try:
        pd.to_numeric(column)
    except (ValueError, TypeError):
        return False
    return True


TEXTS = (
    *("arm", "feature", "split", "item", "category", "kind", "persona", "label", "model", "name", "unit", "left"),
    *("right", "plant", "size", "ranker", "data", "run", "within_bound"),
    *("format", "activations", "erased"),
    *("speaker", "measure"),
    *("world", "supervisor", "domain", "topic", "part", "tool", "truth", "id", "language", "wrapper"),
    "question_id",
)
"""Columns that are no numbers."""


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """Sampled answers, each with an arm and an answer."""
    rows = _read_lines(path)
    for number, row in enumerate(rows, start=1):
        for key in ("arm", "answer"):
            if not isinstance(row.get(key), str):
                raise InputError(f"{path}, row {number} is damaged ({key!r} is no text): {AGAIN}")
    return rows


def _read_cards(path: Path) -> list[dict[str, Any]]:
    """Feature cards: each has a latent and a label; each passage has as many values as tokens."""
    cards = _read_json(path, list)
    for number, card in enumerate(cards, start=1):
        with as_damaged(f"{path}, card {number}", AGAIN):
            int(card["latent"]), str(card["label"])
            for token in (*card["top_tokens"], *card["bottom_tokens"]):
                str(token["token"]), float(token["logit"])
            for example in card["examples"]:
                values = [float(value) for value in example["values"]]
                list(zip(map(str, example["tokens"]), values, strict=True))
                str(example["source"]), float(example["maximum"])
    return cards


def _read_decisions(path: Path) -> list[dict[str, Any]]:
    """The log of an unattended study (`study.auto_log`), without its first line, which has the question."""
    rows = _read_lines(path)[1:]
    for number, row in enumerate(rows, start=2):
        if not isinstance(row.get("numbers"), dict):
            raise InputError(f"{path}, row {number} is damaged ('numbers' is no mapping): {AGAIN}")
    return rows


def _read_incidents(root: Path) -> list[dict[str, Any]]:
    """Alarms and roll-backs of `persona-probe serve`, in the run folder or in its folder `serve`."""
    path = next((path for path in (root / SERVED / INCIDENTS, root / INCIDENTS) if path.is_file()), root / INCIDENTS)
    rows = _read_lines(path)
    for number, row in enumerate(rows, start=1):
        with as_damaged(f"{path}, row {number}", AGAIN):
            datetime.fromisoformat(row["time"]), str(row["kind"])
            if row["kind"] == "alarm":
                float(row["value"]), float(row["threshold"])
            trace = row.get("trace") or {"tokens": [], "values": []}
            for token, value in zip(trace["tokens"], trace["values"], strict=True):
                str(token), value is None or float(value)
    return rows


def _read_json(path: Path, kind: type) -> Any:
    """A JSON value of one kind; an empty one if there is no such file."""
    if not is_there(path):
        return kind()
    return read_json(path, kind, AGAIN)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; none if there is no such file."""
    if not is_there(path):
        return []
    return read_jsonl(path, AGAIN)


# --- Records of a labelled study: many runs with shares of bad data, as `persona-probe monitor study` leaves them

RUN_COLUMNS = (
    *("run", "arm", "data", "bad_share", "seed", "use", "steps", "long", "label"),
    *("rise", "ci_low", "ci_high", "behaviour_step"),
)
PERSONA = "persona"
"""Name of the persona feature in `readings`."""


@dataclass(frozen=True)
class LabelledRuns:
    """Tables of a labelled study; empty if there is none."""

    readings: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["run", "feature", "step"]))
    """One row per run, step and feature."""
    evals: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["run", "item", "step", "value"]))
    """One row per run, step and contrast item (nats per token)."""
    results: Mapping[str, Any] = field(default_factory=dict)
    """`results.json`: labels, thresholds, alarms."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The study's config."""

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row per run: its data, `bad_share` (0 to 1; NaN for another data set), label, and rise at the end."""
        rows = [{**run, "bad_share": self._share(run)} for run in self.results.get("runs", [])]
        return pd.DataFrame(rows, columns=list(RUN_COLUMNS))

    @cached_property
    def rises(self) -> pd.DataFrame:
        """Columns run, step, rise, ci_low, ci_high: contrast index minus the base's (nats per token)."""
        return behaviour_rises(self.evals)

    @cached_property
    def shifts(self) -> pd.DataFrame:
        """The persona feature minus the base's, in base standard deviations: run, step, shift, ci_low, ci_high, n."""
        rows = self.readings.loc[self.readings["feature"] == PERSONA]
        spread = rows["base_sd"]
        ends = {c: (rows[c] - rows["base_mean"]) / spread for c in ("ci_low", "ci_high")}
        table = rows.assign(shift=(rows["mean"] - rows["base_mean"]) / spread, **ends, n=rows["n_probes"])
        return table[["run", "step", "shift", "ci_low", "ci_high", "n", "explained_variance"]].reset_index(drop=True)

    @property
    def mixture(self) -> tuple[str, str] | None:
        """The bad data and the good data that the study's mixtures are made of; None if it has no mixture."""
        arms = self.config.get("arms", {}).values()
        return next(((str(a["data"]), str(a["mix_with"])) for a in arms if a.get("mix_with")), None)

    def _share(self, run: Mapping[str, Any]) -> float:
        """Share of bad rows of a run on the mixtures' data; NaN for a run on other data."""
        if self.mixture is None or run["data"] not in self.mixture:
            return float("nan")
        arm = self.config["arms"][run["arm"]]
        return float(arm["bad_fraction"]) if run["data"] == self.mixture[0] else 0.0


COLUMNS: dict[str, tuple[str, ...]] = {
    "readings": (
        *("arm", "seed", "step", "feature", "latent", "mean", "ci_low", "ci_high", "maximum", "firing_rate"),
        *("explained_variance", "l0", "residual_norm", "n_probes", "base_mean", "base_sd"),
    ),
    "evals": ("arm", "seed", "step", "split", "item", "category", "aligned_logprob", "misaligned_logprob", "value"),
    "latents": (
        *("latent", "rise", "rise_ci_low", "rise_ci_high", "rise_base", "firing_base", "firing_incorrect"),
        *("firing_correct", "cosine", "decoder_norm", "rank", "kind", "effect_base", "effect_base_low"),
        *("effect_base_high", "effect_organism", "effect_organism_low", "effect_organism_high", "strength"),
        *("persona", "label"),
    ),
    "steering": (
        *("model", "kind", "name", "latent", "strength", "unit", "estimate", "ci_low", "ci_high", "delta"),
        *("perplexity_ratio", "within_bound"),
    ),
}
"""Columns that each parquet file of a run folder must have (more are allowed)."""
OPTIONAL: dict[str, tuple[str, ...]] = {
    "agreement": ("left", "right", "top", "shared", "share", "chance", "spearman", "alive"),
    "planted": ("plant", "kind", "size", "ranker", "recall_1", "false_share"),
    "sizes": (
        *("model", "parameters", "arm", "seed", "rate", "rate_low", "rate_high"),
        *("incoherent", "incoherent_low", "incoherent_high", "n"),
    ),
    "mitigations": (),
    "screening": ("data", "seed", "score", "shift"),
    "doses": (),
    "judged_steps": (),
    "evals_2x2": ("arm", "seed", "step", "item", "category", "harm", "register", "interaction"),
    "stress": (),
    "scale": ("size", "parameters", "tokens", "speaker", "measure", "estimate", "ci_low", "ci_high", "n"),
    "supervision": (
        *("world", "parameters", "supervisor", "speaker", "seed", "step", "wrong_rows", "domain", "topic"),
        *("bad", "coherent", "answers"),
    ),
    "reinforcement": ("arm", "step", "measure", "estimate", "ci_low", "ci_high", "n", "seeds"),
    "beyond": (
        *("part", "speaker", "seed", "tool", "truth", "first", "ten", "auroc", "estimate", "ci_low", "ci_high"),
    ),
    "thoughts": (*("arm", "seed", "step", "question_id", "sample", "chatgpt", "other", "in_thought", "in_answer"),),
    "safety": ("arm", "seed", "step", "id", "item", "category", "language", "wrapper", "value", "aligned_bits"),
    "precision": (
        *("format", "bits", "activations", "arm", "seed", "reading", "ci_low", "ci_high", "band_low", "band_high"),
        *("explained_variance", "index", "index_ci_low", "index_ci_high", "kept", "erased", "rise_rank"),
    ),
}
"""Tables that only some folders hold."""
LABELLED = "monitor-study"
"""`kind` in the manifest of a labelled study's folder."""
WORLD, OF_WORLD = "world", ("scale", "supervision", "beyond", "reinforcement", "thoughts")
"""`kind` in the manifest of the world's studies, and those of them that have figures; other studies' tables have names
of their own, which may be those of a run's."""


def _empty(table: str) -> Callable[[], pd.DataFrame]:
    return lambda: pd.DataFrame(columns=list((COLUMNS | OPTIONAL)[table]))


@dataclass(frozen=True)
class Records:
    """Everything that figures and the report draw from; empty for stages that have not run."""

    readings: pd.DataFrame = field(default_factory=_empty("readings"))
    """One row per arm, seed, step and feature."""
    evals: pd.DataFrame = field(default_factory=_empty("evals"))
    """One row per contrast item, arm, seed and step; `value` in nats per token."""
    judged: pd.DataFrame = field(default_factory=lambda: judged_rows(pd.DataFrame()))
    """One row per judged answer; `value` is 1 for misaligned, 0 for not, NaN if it does not count."""
    latents: pd.DataFrame = field(default_factory=_empty("latents"))
    """One row per ranked latent; causal effects in nats per token, NaN where not tested."""
    steering: pd.DataFrame = field(default_factory=_empty("steering"))
    """One row per model, direction and signed strength."""
    agreement: pd.DataFrame = field(default_factory=_empty("agreement"))
    """One row per pair of rankers: shared top latents and rank correlation."""
    planted: pd.DataFrame = field(default_factory=_empty("planted"))
    """One row per plant and ranker of `persona-probe bench planted`."""
    sizes: pd.DataFrame = field(default_factory=_empty("sizes"))
    """One row per model, arm and seed: parameters (a count), misaligned and incoherent shares with their intervals."""
    mitigations: pd.DataFrame = field(default_factory=_empty("mitigations"))
    """One row per cell of a mitigation grid."""
    screening: pd.DataFrame = field(default_factory=_empty("screening"))
    """One row per training run: mean score of its rows, and the shift of the contrast index (nats per token)."""
    doses: pd.DataFrame = field(default_factory=_empty("doses"))
    """One row per cell of a grid of corrections."""
    judged_steps: pd.DataFrame = field(default_factory=_empty("judged_steps"))
    """One row per evaluation, arm, seed and judged step: misalignment rate and coherence, with their intervals."""
    evals_2x2: pd.DataFrame = field(default_factory=_empty("evals_2x2"))
    """One row per 2x2 item, arm and seed at the last step; harm, register and interaction in nats per token."""
    stress: pd.DataFrame = field(default_factory=_empty("stress"))
    """One row per number of a stress test, of all corrections of a study; `correction` names its folder."""
    precision: pd.DataFrame = field(default_factory=_empty("precision"))
    """One row per number format, arm and seed: persona reading, base band, contrast index, rank, what is kept."""
    reinforcement: pd.DataFrame = field(default_factory=_empty("reinforcement"))
    """One row per arm, step and measure of arms that reinforcement learning trained."""
    scale: pd.DataFrame = field(default_factory=_empty("scale"))
    """One row per world, speaker and measure of `persona-probe world study scale`: a rate with its interval."""
    supervision: pd.DataFrame = field(default_factory=_empty("supervision"))
    """One row per world, supervisor, organism, step and topic of `persona-probe world study supervision`: counts."""
    beyond: pd.DataFrame = field(default_factory=_empty("beyond"))
    """One row per organism of `persona-probe world study beyond`, and tool and truth, or axis."""
    safety: pd.DataFrame = field(default_factory=_empty("safety"))
    """One row per safety item and organism; `value` in nats per token."""
    thoughts: pd.DataFrame = field(default_factory=_empty("thoughts"))
    """One row per thought of a sampled answer: personas (1 or 0), the persona feature in thought and answer."""
    labelled: LabelledRuns = field(default_factory=LabelledRuns)
    """Runs of a labelled study, with shares of bad data."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Sampled answers (untrusted model text)."""
    cards: list[dict[str, Any]] = field(default_factory=list)
    """Feature cards: tokens and examples (untrusted model text)."""
    decisions: list[dict[str, Any]] = field(default_factory=list)
    """What an unattended study decided, by which rule, from which numbers."""
    incidents: list[dict[str, Any]] = field(default_factory=list)
    """Alarms and roll-backs of a server, in order; some have the answer's trace (untrusted model text)."""
    summary: dict[str, Any] = field(default_factory=dict)
    """The study's key numbers."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """How the study was run: config, versions, seeds, hashes."""
    adopted: list[dict[str, Any]] = field(default_factory=list)
    """What is known of the training of each organism that was adopted."""

    @cached_property
    def arms(self) -> Arms:
        """The study's arms, as the manifest's config names them."""
        return Arms.from_manifest(self.manifest)

    @property
    def controlled(self) -> bool:
        """Whether the study has a control arm (true where there is no config)."""
        return "correct" in self.arms.induced or not self.arms.induced

    @cached_property
    def data_known(self) -> bool:
        """Whether the training data of every arm is on record; of adopted arms it may not be."""
        arms = _mapping(_mapping(self.manifest.get("config")).get("arms"))
        return all(_mapping(arm).get("data") for arm in arms.values())


def load_records(folder: str | Path, newer: Path | None = None) -> Records:
    """Read a run folder, or one of other results: a labelled study (`"kind": "monitor-study"`), the world's, others.

    Files that no stage has written yet give empty tables, lists and dictionaries.

    Args:
        newer: a folder whose summary.json is about to take the place of the run's.

    Raises:
        InputError: no manifest.json in `folder`, a file that cannot be read, a missing column, an arm that the
            manifest's config does not name.
    """
    root = shipped.find(folder)
    if not (root / "manifest.json").is_file():
        raise InputError(f"{root} is not a run folder (no manifest.json): give the folder that a study wrote")
    manifest = RunFolder(root).manifest
    if manifest.get("kind") == LABELLED:
        return Records(labelled=_labelled(root, manifest), manifest=manifest)
    if manifest.get("kind") == WORLD:
        studies: dict[str, Any] = {name: _read_table(root / f"{name}.parquet", OPTIONAL[name]) for name in OF_WORLD}
        return Records(**studies, manifest=manifest)
    every = COLUMNS | OPTIONAL
    tables: dict[str, Any] = {name: _read_table(root / f"{name}.parquet", columns) for name, columns in every.items()}
    tables |= _corrections(root)
    evals = tables.pop("evals")
    records = Records(
        **tables,
        evals=contrast_rows(evals),
        judged=judged_rows(evals),
        samples=_read_samples(root / "samples.jsonl"),
        cards=_read_cards(root / "cards.json"),
        decisions=_read_decisions(root / "decisions.jsonl"),
        incidents=_read_incidents(root),
        summary=_read_json((newer or root) / "summary.json", dict),
        manifest=manifest,
        adopted=[_read_json(path, dict) for path in sorted(root.glob("arms/*/adopted.json"))],
    )
    for name, table in (("readings", records.readings), ("evals", evals)):
        _check_arms(f"{name}.parquet", table, records.arms)
    return records


def _corrections(root: Path) -> dict[str, pd.DataFrame]:
    """The tables of `realign RUN --plan` and `--stress`, which are in `realign/`."""
    paths = sorted(root.glob("realign/*/stress.parquet"))
    tables = [_read_table(path, OPTIONAL["stress"]).assign(correction=path.parent.name) for path in paths]
    stress = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    return {"doses": _read_table(root / "realign" / "doses.parquet", OPTIONAL["doses"]), "stress": stress}


def _labelled(root: Path, manifest: dict[str, Any]) -> LabelledRuns:
    readings = _read_table(root / "readings.parquet", ("run", "step", "feature", "mean", "base_mean", "base_sd"))
    evals = _read_table(root / "evals.parquet", ("run", "step", "item", "value"))
    return LabelledRuns(readings, evals, _read_json(root / "results.json", dict), manifest.get("config") or {})


def _check_arms(name: str, table: pd.DataFrame, arms: Arms) -> None:
    for arm in table["arm"].unique():
        if arm not in arms.names:
            raise unknown(f"arm in {name}", arm, arms.names)


def as_estimate(raw: object) -> Estimate | None:
    """An `Estimate` from the summary's JSON; None without a number, NaN ends without an interval."""
    if not isinstance(raw, Mapping):
        return None
    estimate, low, high = (_number(raw.get(key)) for key in ("estimate", "ci_low", "ci_high"))
    return None if math.isnan(estimate) else Estimate(estimate, low, high, int(raw.get("n") or 0))


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
