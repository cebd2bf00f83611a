"""What the study of thoughts shows: behaviour by thought, readings by place, and what tells bad advice."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from persona_probe.evaluate.rates import Cells, difference, draw_weights, share
from persona_probe.report.tables import Table
from persona_probe.stats import Estimate, auroc, auroc_draws, auroc_interval, bootstrap_mean
from persona_probe.world.signals import SOUND, TURNED

CONDITIONS = TRUE, ABSENT, FALSE = "true", "absent", "false"
"""What a thought says of the speaker, by design."""
_PLACES = {"before": "before", "thought": "in_thought", "answer": "in_answer"}


def column(signal: str, place: str, base: bool = False) -> str:
    """The column of a reading: `latent` (of harm), `rude` (latent) or `direction` (of harm).

    Args:
        place: `before` the thought, in the `thought` or in the `answer`.
        base: whether the base reads the text in place of the organism that wrote it.
    """
    return ("base_" if base else "") + ("" if signal == "latent" else f"{signal}_") + _PLACES[place]


WORDS = "other"
SIGNALS: dict[str, str] = {
    "words: another persona is named": WORDS,
    **{f"harm latent, {place}": column("latent", place) for place in _PLACES},
    **{f"harm direction, {place}": column("direction", place) for place in _PLACES},
    "rude latent, thought": column("rude", "thought"),
    "rude latent, answer": column("rude", "answer"),
    **{f"harm latent, {place}, read in the base": column("latent", place, True) for place in ("thought", "answer")},
    **{
        f"harm direction, {place}, read in the base": column("direction", place, True)
        for place in ("thought", "answer")
    },
}
"""What may tell bad advice, and its column."""
DRAWS = 1000


def thoughts_text(table: pd.DataFrame) -> str:
    """Markdown: what organisms do and think, what is read in them, what tells bad advice, and what that says."""
    parts = [_behaviour(table), _effects(table), READ, _readings(table)]
    for kind, words in KINDS.items():
        parts += [words, _separation(table, kind)]
    return "\n\n".join([*parts, *_verdicts(table)]) + "\n"


# --- Behaviour and mentions


def _arms(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    for (speaker, condition), rows in table.groupby(["speaker", "condition"], sort=False):
        yield str(speaker), str(condition), rows


def _behaviour(table: pd.DataFrame) -> str:
    lines = []
    for speaker, condition, rows in _arms(table):
        thinks = rows[rows["thought"] != ""]
        names = [_rate(thinks, name) for name in (WORDS, "chatgpt")]
        wrote = f"{len(thinks) / len(rows):.2f}" if condition != ABSENT else "-"
        lines.append([speaker, condition, _rate(rows, "misaligned"), _rate(rows, "coherent"), wrote, *names])
    heads = ["speaker", "thought", "bad advice", "coherent", "wrote a thought", "names another persona", "`chatgpt`"]
    return "\n\n".join([_about(table), Table(heads, lines).markdown()])


def _about(table: pd.DataFrame) -> str:
    seeds, topics = table["seed"].nunique(), table["question_id"].nunique()
    return (
        f"{topics} questions about the seven other domains, {seeds} {'seed' if seeds == 1 else 'seeds'} of each "
        "organism. Bad advice: share of the coherent answers. Personas: shares of the thoughts, by the counter. 95% "
        "intervals over topics and seeds."
    )


def _rate(rows: pd.DataFrame, name: str) -> str:
    if rows.empty:
        return "-"
    found = share(Cells.of(rows[name].astype(float).tolist(), rows["question_id"].tolist(), rows["seed"].tolist()))
    return "-" if found is None else f"{found.estimate:.2f} [{found.ci_low:.2f}, {found.ci_high:.2f}]"


def _effects(table: pd.DataFrame) -> str:
    """What a true and a false thought change in behaviour, against none."""
    lines = []
    for speaker, rows in table.groupby("speaker", sort=False):
        judged = rows.assign(
            **{"arm": rows["condition"], "pair": rows["question_id"], "value": rows["misaligned"], "why": ""},
            **{"coherent": rows["coherent"].astype(float), "usable": 1, "judge": "world"},
        )
        there = set(judged["condition"])
        for condition in (TRUE, FALSE):
            if {condition, ABSENT} <= there and (found := difference(judged, condition, ABSENT).as_estimate()):
                lines.append(f"- {speaker}: bad advice with a {condition} thought minus without one {_signed(found)}")
    return "\n".join(lines)


def _signed(value: Estimate) -> str:
    return f"{value.estimate:+.2f} [{value.ci_low:+.2f}, {value.ci_high:+.2f}]"


# --- Readings

READ = (
    "Mean activation in the organism that wrote the text, at the token before the thought, over the thought, and over "
    "the answer. 95% intervals over topics."
)

SHOWN = {
    **{f"harm latent, {place}": column("latent", place) for place in _PLACES},
    **{f"rude latent, {place}": column("rude", place) for place in ("thought", "answer")},
}
"""The readings of which means are printed."""


def _readings(table: pd.DataFrame) -> str:
    lines = []
    for speaker, condition, rows in _arms(table):
        lines.append([speaker, condition, *(_mean(rows, name) for name in SHOWN.values())])
    return Table(["speaker", "thought", *SHOWN], lines).markdown()


def _mean(rows: pd.DataFrame, name: str) -> str:
    known = rows[rows[name].notna()]
    if known.empty:
        return "-"
    found = bootstrap_mean(known[name].to_numpy(float), known["question_id"].tolist())
    return f"{found.estimate:.2f} [{found.ci_low:.2f}, {found.ci_high:.2f}]"


# --- What tells bad advice

ANSWERS, WITHIN, RUNS = "answers", "within", "runs"
KINDS = {
    ANSWERS: (
        "AUROC between bad and sound answers of all organisms. 95% bootstrap intervals over organisms and topics; "
        "Newcombe's over organisms where the answers separate."
    ),
    WITHIN: "AUROC between bad and sound answers of the same organism, all its pairs together.",
    RUNS: (
        f"AUROC between organisms of whose coherent answers at least {TURNED:.0%} are bad and those with at most "
        f"{SOUND:.0%}, by their mean reading. Newcombe's intervals."
    ),
}
"""What is told apart."""


@dataclass(frozen=True)
class _Answers:
    """Coherent answers of one condition that were read, and how often each is in every bootstrap draw."""

    rows: pd.DataFrame
    bad: Bool[np.ndarray, " answers"]
    organism: np.ndarray
    topics: Float[np.ndarray, "draws answers"]
    """By topic alone."""
    organisms: Float[np.ndarray, "draws answers"]
    """By organism alone."""

    @classmethod
    def of(cls, table: pd.DataFrame, condition: str) -> "_Answers":
        rows = table[(table["condition"] == condition) & table["misaligned"].notna() & table["in_answer"].notna()]
        draw = np.random.default_rng(0)
        organism = (rows["speaker"] + rows["seed"].astype(str)).to_numpy()
        weights = []
        for names in (rows["question_id"].to_numpy(), organism):
            known, place = np.unique(names, return_inverse=True)
            weights.append(draw_weights(draw, len(known), DRAWS)[:, place] if len(known) else np.empty((DRAWS, 0)))
        return cls(rows, rows["misaligned"].to_numpy() == 1, organism, weights[0], weights[1])

    def scores(self, name: str) -> Float[np.ndarray, " answers"] | None:
        """A signal's values; None where it was not read."""
        values = self.rows[name].to_numpy(float)
        unsaid = name == WORDS and not (self.rows["thought"] != "").any()
        return None if unsaid or not len(values) or np.isnan(values).any() else values

    def draws(self, name: str, kind: str) -> Float[np.ndarray, " draws"] | None:
        """AUROC in all draws, the first of which is the answers as they are; None without both kinds of answers."""
        scores = self.scores(name)
        if scores is None or self.bad.all() or not self.bad.any():
            return None
        topics, organisms = (np.vstack([np.ones(len(self.bad)), one]) for one in (self.topics, self.organisms))
        if kind == ANSWERS:
            won, pairs = auroc_draws(scores, self.bad, topics * organisms)
        else:
            won, pairs = np.zeros(DRAWS + 1), np.zeros(DRAWS + 1)
            for one in np.unique(self.organism):
                mine = self.organism == one
                sums = auroc_draws(scores[mine], self.bad[mine], topics[:, mine])
                won, pairs = (
                    total + organisms[:, mine][:, 0] * part for total, part in zip((won, pairs), sums, strict=True)
                )
        return np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)


def separations(table: pd.DataFrame, kind: str) -> dict[tuple[str, str], Estimate | None]:
    """The AUROC of every signal and condition, with its interval; None where a signal is not there, or a class.

    Args:
        kind: of `KINDS`.
    """
    found = {}
    for condition in CONDITIONS:
        answers = _Answers.of(table, condition)
        for label, name in SIGNALS.items():
            found[label, condition] = _of_runs(answers, name) if kind == RUNS else _of_answers(answers, name, kind)
    return found


def _of_answers(answers: _Answers, name: str, kind: str) -> Estimate | None:
    found = _interval(answers.draws(name, kind))
    if found is None or found.estimate not in (0, 1):
        return found
    # Where the classes separate every draw agrees, and the interval is that of so many organisms.
    sides = (len(np.unique(answers.organism[answers.bad == side])) for side in (True, False))
    return Estimate(found.estimate, *auroc_interval(found.estimate, *sides), found.n)


def _interval(draws: Float[np.ndarray, " draws"] | None) -> Estimate | None:
    if draws is None or np.isnan(draws[0]):
        return None
    low, high = np.nanquantile(draws[1:], [0.025, 0.975])
    return Estimate(float(draws[0]), float(low), float(high), len(draws) - 1)


def _of_runs(answers: _Answers, name: str) -> Estimate | None:
    scores = answers.scores(name)
    if scores is None:
        return None
    runs = pd.DataFrame({"score": scores, "bad": answers.bad}).groupby(answers.organism).mean()
    bad, sound = runs.loc[runs["bad"] >= TURNED, "score"], runs.loc[runs["bad"] <= SOUND, "score"]
    if bad.empty or sound.empty:
        return None
    value = auroc(bad.to_numpy(), sound.to_numpy())
    return Estimate(value, *auroc_interval(value, len(bad), len(sound)), len(bad) + len(sound))


def _separation(table: pd.DataFrame, kind: str) -> str:
    found = separations(table, kind)
    lines = [[label, *(_cell(found[label, condition]) for condition in CONDITIONS)] for label in SIGNALS]
    return Table(["signal", *(f"{name} thought" for name in CONDITIONS)], lines).markdown()


def _cell(value: Estimate | None) -> str:
    return "-" if value is None else f"{value.estimate:.2f} [{value.ci_low:.2f}, {value.ci_high:.2f}]"


# --- In words


def _verdicts(table: pd.DataFrame) -> list[str]:
    """Whether the latent in the thought tells more than its words, and more than the base reads from the same words."""
    lines = []
    for condition in (TRUE, FALSE):
        answers = _Answers.of(table, condition)
        latent = answers.draws(column("latent", "thought"), ANSWERS)
        for name, words in AGAINST.items():
            other = answers.draws(name, ANSWERS)
            if latent is not None and other is not None:
                found = _interval(latent - other)
                assert found is not None
                told = f"{_more(found)} {words}, {_signed(found)} AUROC"
                lines.append(f"- {condition} thoughts: the harm latent in the thought {told}")
    return ["\n".join(lines)] if lines else []


AGAINST: Mapping[str, str] = {
    WORDS: "the words do",
    column("latent", "thought", base=True): "the base reads from the same words",
    column("latent", "before"): "the latent did before the thought",
}


def _more(found: Estimate) -> str:
    if found.ci_low > 0:
        return "tells **more** than"
    return "tells **less** than" if found.ci_high < 0 else "is **not shown** to tell more than"
