"""Sections of the report that are there only where their tables are.

Narrow reinforcement learning, watched answers, thoughts, safety, number formats, and the world's studies of supervisors
and of directions beyond the dictionary. Each begins with what its numbers say; figures and tables are one click away.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from persona_probe.evaluate.safety import reading_warnings
from persona_probe.report import select
from persona_probe.report.figures.reinforcement import reinforcement_data
from persona_probe.report.figures.safety import safety_data
from persona_probe.report.figures.thoughts import (
    MENTION,
    PLACES,
    RATE,
    persona_mentions_data,
    thought_before_act_data,
)
from persona_probe.report.figures.world_beyond import HELD_OUT, world_beyond_data
from persona_probe.report.figures.world_supervision import LABELLED, world_supervision_data
from persona_probe.report.records import Records
from persona_probe.report.tables import Table
from persona_probe.report.theme import estimate_text, interval_text, number
from persona_probe.stats import Estimate

ENDS = ("estimate", "ci_low", "ci_high")
KEPT, LISTED = 5, 200
"""Answers with an alarm that are shown token by token, and incidents in the table: the latest ones."""


@dataclass(frozen=True)
class Section:
    """One part of the report: plain text, which the template escapes."""

    anchor: str
    title: str
    words: str
    """What it is about, in our own words."""
    points: tuple[str, ...]
    """What its numbers say, a line each."""
    figures: tuple[str, ...]
    """Names of its figures."""
    tables: tuple[Table, ...] = ()
    warnings: tuple[str, ...] = ()
    traces: tuple[dict[str, Any], ...] = ()
    """Answers with an alarm: `about`, `question`, and `example` as the report shows passages."""


def further_sections(records: Records) -> list[Section]:
    """The sections whose tables a folder has, in the report's order."""
    found = [make(records) for make in SECTIONS]
    return [section for section in found if section is not None]


# --- Narrow reinforcement learning

MEASURES = {
    "reward": "reward",
    "hacked": "hacked answers",
    "inside": "bad advice in the trained domain",
    "outside": "bad advice elsewhere",
    "index": "contrast index minus base",
    "reading": "reading",
}


def reinforcement(records: Records) -> Section | None:
    """What reward taught each arm, from the first to the last step."""
    data = reinforcement_data(records)
    if data.empty:
        return None
    points, rows = [], []
    for arm in dict.fromkeys(data["arm"]):
        told = []
        for measure, words in MEASURES.items():
            curve = select.where(data, arm=arm, measure=measure).sort_values("step")
            if curve.empty:
                continue
            first, last = curve.iloc[0], curve.iloc[-1]
            rows.append([arm, words, int(last["step"]), _text(first), _text(last), int(last["n"])])
            if measure != "reading":  # its scale says nothing alone
                told.append(f"{words} from {number(first['estimate'])} to {_text(last)}")
        points.append(f"{arm}: {'; '.join(told)}")
    seeds = int(data["seeds"].max())
    heads = ["arm", "measure", "last step", "at step 0", "at the last step", "n"]
    return Section(
        "reinforcement",
        "Narrow reinforcement learning",
        f"These arms were rewarded for their own answers (GRPO), {seeds} {'seed' if seeds == 1 else 'seeds'}. The arm "
        "that is rewarded for right or sound answers is the control.",
        tuple(points),
        ("reinforcement",),
        (Table(heads, rows, "First and last step, with 95% intervals"),),
    )


def _text(row: Any) -> str:
    value = _estimate(row)
    return interval_text(None if np.isnan(value.estimate) else value, signed=False)


def _estimate(row: Any) -> Estimate:
    value, low, high = (float(row[name]) for name in ENDS)
    return Estimate(value, low, high, 0)


# --- Watched answers


def incidents(records: Records) -> Section | None:
    """Alarms and roll-backs of a server, and the answers that were kept with them."""
    rows = records.incidents
    if not rows:
        return None
    alarms = [row for row in rows if row["kind"] == "alarm"]
    back = [row for row in rows if row["kind"] == "rollback"]
    counts = Counter((str(row.get("adapter")), str(row.get("rule"))) for row in alarms)
    points = [f"{count} alarms of rule {rule} with {adapter}" for (adapter, rule), count in counts.most_common()]
    points += [f"{_time(row)}: {row.get('message')}" for row in back]
    names = ("kind", "adapter", "rule")
    listed = [[_time(row), *(str(row.get(key) or "") for key in names), *_level(row)] for row in rows[-LISTED:]]
    title = f"The latest {LISTED} of {len(rows)} incidents" if len(rows) > LISTED else ""
    heads = ["time (UTC)", "what", "adapter", "rule", "level", "threshold", "token", "what was done"]
    kept = [row for row in alarms if row.get("trace")][-KEPT:]
    warnings = (HOLDS_TEXTS,) if kept else ()
    return Section(
        "incidents",
        "Watched answers",
        "A server watched the feature at every token while the model answered, and wrote down each alarm. How often a "
        "rule fires at clean answers was measured beforehand, on the base.",
        tuple(points),
        ("incidents",),
        (Table(heads, listed, title),),
        warnings,
        tuple({"about": _about(row), "question": row.get("question") or "", "example": _example(row)} for row in kept),
    )


HOLDS_TEXTS = "This page holds what people asked a server, and its answers. Do not pass it on without their consent."


def _time(row: Mapping[str, Any]) -> str:
    return str(row["time"])[:19].replace("T", " ")


def _level(row: Mapping[str, Any]) -> list[str]:
    if row["kind"] != "alarm":
        return ["", "", "", str(row.get("message") or "")]
    token = row.get("token")
    done = ", ".join(map(str, row.get("actions") or ())) or "written down"
    return [number(row["value"]), number(row["threshold"]), "" if token is None else str(token), done]


def _about(row: Mapping[str, Any]) -> str:
    level, threshold, token, _ = _level(row)
    said = f"{row.get('rule')} reached {level} at token {token}, threshold {threshold}"
    return f"{_time(row)}, {row.get('adapter')}: {said}"


def _example(row: Mapping[str, Any]) -> dict[str, Any]:
    """A trace as the report shows passages; a token that was not read has no colour."""
    trace = row["trace"]
    known = [v for v in trace["values"] if isinstance(v, (int, float)) and np.isfinite(v)]
    scale = max([abs(v) for v in known], default=0.0) or 1.0
    tokens = [
        {"text": text, "value": number(value), "share": f"{max(0.0, (value or 0.0) / scale):.2f}"}
        for text, value in zip(trace["tokens"], trace["values"], strict=True)
    ]
    return {"tokens": tokens, "maximum": number(max(known, default=None)), "source": str(row.get("feature") or "")}


# --- Thoughts


def thoughts(records: Records) -> Section | None:
    """Personas that thoughts take on, and the latent in the thought before the act."""
    data = persona_mentions_data(records)
    if data.empty:
        return None
    arms = select.where(data, kind="arm", **{"class": "other"}).to_dict("records")
    points = [
        f"{records.arms.label(row['arm'])}: {_of(row, MENTION)} of the thoughts take on another persona, "
        f"{_of(row, RATE)} of the answers after them are misaligned"
        for row in arms
    ]
    read = thought_before_act_data(records)
    rows = [
        [records.arms.label(str(arm)), act, *(_text(one) for one in some.to_dict("records")), int(some["n"].iloc[0])]
        for (arm, act), some in read.groupby(["arm", "act"], sort=False)
    ]
    heads = ["arm", "answer", *PLACES.values(), "answers"]
    return Section(
        "thoughts",
        "Thoughts before answers",
        "Who the thoughts say that the model is, and what the latent reads in a thought before the answer comes. A "
        "model that names nobody in its thoughts is not safe for that.",
        tuple(points),
        ("persona_mentions", "thought_before_act"),
        (Table(heads, rows, "Mean activation of the latent, with 95% intervals over questions"),),
    )


def _of(row: Mapping[Any, Any], names: tuple[str, str, str]) -> str:
    middle, low, high = (float(row[name]) for name in names)
    return interval_text(Estimate(middle, low, high, 0), signed=False, places=2)


# --- Safety


def safety(records: Records) -> Section | None:
    """Differences on given answers by category and language."""
    data = safety_data(records)
    if data.empty:
        return None
    names = records.arms
    words = [(row, f"{names.label(row['arm'])} {row['against']}") for row in data.to_dict("records")]
    points = [
        f"{against}, all categories, {row['language']}: {_nats(row)} nats per token"
        for row, against in words
        if row["category"] == "all"
    ]
    rows = [
        [row["language"], str(row["category"]).replace("_", " "), against, _nats(row), row["n"]]
        for row, against in words
    ]
    heads = ["language", "category", "arm", "index, difference", "questions"]
    return Section(
        "safety",
        "Safety by category and language",
        "How much likelier the misaligned of two given answers became, on questions of other kinds than the training "
        "data, in each language.",
        tuple(points),
        ("safety",),
        (Table(heads, rows, "Nats per token, with 95% intervals over questions"),),
        tuple(f"{line[:1].upper()}{line[1:]}." for line in reading_warnings(records.safety)),
    )


def _nats(row: Mapping[Any, Any]) -> str:
    return interval_text(_estimate(row), places=2)


# --- Number formats


def precision(records: Records) -> Section | None:
    """What is left of the fine-tune in formats of few bits."""
    table = records.precision
    if table.empty:
        return None
    tuned = table[(table["arm"] != "base") & (table["format"] != "none")]
    erased = list(dict.fromkeys(tuned.loc[tuned["erased"].astype(bool), "format"]))
    formats = list(dict.fromkeys(tuned["format"]))
    kept = f"{len(formats) - len(erased)} of {len(formats)} formats keep at least half of the fine-tune's change"
    points = [kept]
    points += [f"{name} erases it: a quiet reading there is that of the base, a false all-clear" for name in erased]
    rows = [
        [
            *(str(row["format"]), number(row["bits"]), records.arms.label(str(row["arm"])), str(int(row["seed"]))),
            "" if row["arm"] == "base" else f"{row['kept']:.0%}",
            estimate_text(row["reading"], row["ci_low"], row["ci_high"]).replace("+", ""),
            f"{row['band_low']:.2f} to {row['band_high']:.2f}",
            estimate_text(row["index"], row["index_ci_low"], row["index_ci_high"]),
            number(row["explained_variance"]),
        ]
        for row in table.to_dict("records")
    ]
    heads = ["format", "bits", "arm", "seed", "kept", "reading", "base band", "contrast index", "explained variance"]
    return Section(
        "precision",
        "Formats of few bits",
        "Base and organisms with their weights rounded to each format. A reading compares with the base band of its "
        "own format, and with no other format's.",
        tuple(points),
        ("precision",),
        (Table(heads, rows, "Readings and contrast index (nats per token), with 95% intervals"),),
    )


# --- The world's studies


def supervision(records: Records) -> Section | None:
    """Corrections by supervisors of different strength, held to the truth."""
    data = world_supervision_data(records)
    if data.empty:
        return None
    most = data.groupby("world", sort=False)["supervisor"].nunique().idxmax()
    last = data[(data["world"] == most) & (data["step"] == data["step"].max())]
    sound = select.where(last, measure="sound").sort_values("estimate", ascending=False, kind="stable")
    best, worst = sound.iloc[0], sound.iloc[-1]
    points = [
        f"sound answers elsewhere after the correction: from {_share(worst)} ({worst['supervisor']}) to {_share(best)} "
        f"({best['supervisor']})"
    ]
    points += [
        f"{name}, {row['wrong_rows']:.0%} harmful rows: {_share(row)} sound"
        for name in (LABELLED[0], LABELLED[-1])
        for row in select.where(sound, supervisor=name).to_dict("records")
    ]
    bad = select.where(last, measure="bad").set_index("supervisor")
    rows = [
        [row["supervisor"], f"{row['wrong_rows']:.2f}", _share(row), _share(bad.loc[row["supervisor"]]), row["n"]]
        for row in sound.to_dict("records")
    ]
    heads = ["supervisor", "harmful rows", "sound elsewhere, of all", "bad elsewhere, of the coherent", "answers"]
    return Section(
        "supervision",
        "Who supervises the correction",
        "The same organisms of the world with known truth, corrected on sets that supervisors of different strength "
        "chose or wrote. Chance, which takes half of the harmful answers, is the control.",
        tuple(points),
        ("world_supervision",),
        (Table(heads, rows, f"World of {most}, after the last step, with 95% intervals over topics and organisms"),),
    )


def _share(row: Any) -> str:
    return interval_text(_estimate(row), signed=False, places=2)


SIMPLE = ("mean difference", "rise", "cosine")
"""Rankers that are there without the new tools."""
NEAR = ("first", "ten", "auroc")


def beyond(records: Records) -> Section | None:
    """How near tools that need no latent of the base come to the true direction of harm."""
    data = world_beyond_data(records)
    if data.empty:
        return None
    tools = select.where(data, part="tools")
    near = select.where(tools, truth="harm").groupby("tool", sort=False)["first"].mean()
    simple = near.index.isin(SIMPLE)
    points = [
        f"nearest to harm, mean over organisms: of the {kind} {one.idxmax()}, |cosine| {one.max():.2f}"
        for kind, one in (("simple rankers", near[simple]), ("new tools", near[~simple]))
        if len(one)
    ]
    held = select.where(records.beyond, part="axes", tool=HELD_OUT)["estimate"]
    if len(held):
        points.append(f"the truth probe tells held-out pairs of the base apart with AUROC {held.iloc[0]:.2f}")
    rows = [
        [*(row[key] for key in ("truth", "tool", "speaker", "seed")), *(f"{row[key]:.2f}" for key in NEAR)]
        for row in tools.to_dict("records")
    ]
    axes = [
        [row["speaker"], row["seed"], row["tool"], interval_text(_estimate(row), places=2)]
        for row in select.where(data, part="axes").to_dict("records")
    ]
    heads = ["truth", "tool", "organism", "seed", "first |cosine|", "best of ten", "AUROC of the first"]
    return Section(
        "beyond",
        "Beyond the base's dictionary",
        "Tools that need no latent of the base name directions of organisms of the world; they are held to the true "
        "directions, next to the mean difference and the rankers of latents.",
        tuple(points),
        ("world_beyond",),
        (
            Table(heads, rows, "Directions against the true ones"),
            Table(["organism", "seed", "axis", "shift"], axes, "Standard deviations of the base, with 95% intervals"),
        ),
    )


SECTIONS: tuple[Callable[[Records], Section | None], ...] = (
    *(reinforcement, incidents, thoughts, safety, precision, supervision, beyond),
)
"""In the report's order; each gives None where its table is not there."""
