"""How a study, its latents, its verdict and a card show themselves: HTML in a notebook, a table in a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

from persona_probe.plain_tables import html_table, text_table

if TYPE_CHECKING:
    from persona_probe.locate.feature_card import FeatureCard
    from persona_probe.study import Study

COLUMNS = ("latent", "rank", "rise", "cosine", "effect_base", "effect_organism", "ablation", "causal", "label")
"""Columns of a feature table; an effect stands with its interval."""
STAGES = {
    "induce": "arms",
    "locate": "latents.parquet",
    "track": "readings.parquet",
    "realign": "parts",
    "evaluate": "samples.jsonl",
    "report": "report.html",
}
"""Stages of a run and what each leaves; realign leaves files of its own among the parts."""


@dataclass(frozen=True, repr=False)
class FeatureTable:
    """The latents worth looking at, one row each: a notebook shows HTML, a terminal a table."""

    frame: pd.DataFrame
    """Rows of `study.features`, with all their columns."""

    @classmethod
    def of(cls, features: pd.DataFrame, count: int = 10) -> "FeatureTable":
        """The persona latent, then those tested for cause by effect, then the best by rank; `count` rows in all."""
        order = ["persona", "effect_base", "rank"]
        rows = features.sort_values(order, ascending=[False, False, True], na_position="last")
        return cls(rows.loc[rows["kind"] != "random"].head(count))

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        columns = [name for name in COLUMNS if name in self.frame]
        rows = self.frame.to_dict("records")
        return [c.replace("_", " ") for c in columns], [[_value(row, c) for c in columns] for row in rows]

    def _repr_html_(self) -> str:
        heads, rows = self._cells()
        return html_table(heads, rows, "Latents; effects in nats per token with 95% intervals")

    def __repr__(self) -> str:
        heads, rows = self._cells()
        return text_table(heads, rows, f"{len(rows)} latents; effects in nats per token with 95% intervals")


@dataclass(frozen=True, repr=False)
class StudyVerdict:
    """What a study found: headline, checks and the verdict of each corrective arm."""

    headline: str
    checks: tuple[tuple[str, bool, str], ...]
    """Name, whether it passed, and its statement."""
    arms: Mapping[str, str]
    """Statement by corrective arm."""

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> "StudyVerdict":
        """From a study's summary."""
        checks = tuple((c["name"], c["passed"], c["statement"]) for c in summary["checks"])
        return cls(summary["headline"], checks, {arm: v["statement"] for arm, v in summary["verdicts"].items()})

    def _cells(self) -> list[list[str]]:
        checks = [["passed" if passed else "FAILED", name, statement] for name, passed, statement in self.checks]
        return checks + [["verdict", arm, statement] for arm, statement in self.arms.items()]

    def _repr_html_(self) -> str:
        words = Markup("<p><strong>{}</strong></p>\n").format(self.headline)
        return words + html_table(("", "what", "statement"), self._cells())

    def __repr__(self) -> str:
        return f"{self.headline}\n{text_table(('', 'what', 'statement'), self._cells())}"


def study_cells(study: "Study") -> tuple[str, list[list[str]]]:
    """A study's title, and what its display lists: model, SAE, arms, stages, and the headline where there is one."""
    config, run = study.config, study.run_folder
    done = {name: run.has(place) for name, place in STAGES.items()}
    done["realign"] = any((run.path / "parts").glob("realign-*"))
    rows = [
        ["base model", config.model],
        ["SAE", config.sae],
        ["arms", ", ".join([*config.arms, *config.realign.arms])],
        ["seeds", ", ".join(map(str, config.seeds))],
        ["stages", ", ".join(f"{name} {'done' if ready else 'to do'}" for name, ready in done.items())],
        ["folder", str(run.path)],
    ]
    if run.has("summary.json"):
        rows.append(["result", str(run.read_json("summary.json").get("headline", ""))])
    return f"Study {config.name}", rows


def study_html(study: "Study") -> str:
    """A study as HTML; all text is escaped."""
    title, rows = study_cells(study)
    return html_table((), rows, title)


def study_text(study: "Study") -> str:
    """A study as a table of text."""
    title, rows = study_cells(study)
    return text_table(("", ""), rows, title)


def card_text(card: "FeatureCard") -> str:
    """A card as a table of text: scores, effects, tokens and where it fires most."""
    found = card.findings
    rows = [[f"ranker {s.ranker}", f"{_number(s.value)}, rank {s.rank} of {card.n_latents}"] for s in found.scores]
    rows += [
        [f"effect, {e.name}", _interval(e.estimate, e.ci_low, e.ci_high)]
        for e in found.effects
        if e.estimate is not None
    ]
    rows += [["promotes", ", ".join(t.token.strip() for t in card.top_tokens)]]
    rows += [["suppresses", ", ".join(t.token.strip() for t in card.bottom_tokens)]]
    rows += [[f"fires at {_number(e.maximum)}", _around(e.tokens, e.peak)] for e in card.examples[:3]]
    return text_table(("", ""), rows, f"Latent {card.latent}: {card.name}")


def _value(row: Mapping[Any, Any], column: str) -> str:
    value = row[column]
    if f"{column}_low" in row:
        return _interval(value, row[f"{column}_low"], row[f"{column}_high"])
    return str(value) if isinstance(value, (str, bool, int)) else _number(value)


def _interval(value: Any, low: Any, high: Any) -> str:
    from persona_probe.report.theme import interval_text
    from persona_probe.stats import Estimate

    nan = float("nan")
    if value is None or value != value:
        return "not tested"
    return interval_text(Estimate(value, nan if low is None else low, nan if high is None else high, 0))


def _number(value: Any) -> str:
    return "–" if value is None or value != value else f"{value:.3g}"


def _around(tokens: Sequence[str], peak: int) -> str:
    """The words that lead to a token, and it in brackets."""
    before = " ".join("".join(tokens[max(0, peak - 12) : peak]).split())
    return f"{before} [{tokens[peak].strip()}]"
