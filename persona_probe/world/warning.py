"""Early warning on labelled runs: how well, how early, and with how many false alarms each signal tells what comes."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.report.tables import Table
from persona_probe.stats import auroc, auroc_interval, exact_share
from persona_probe.world.signals import SIGNALS, SOUND, halves, is_hard, outcomes

GATED = "persona direction, last_prompt, and harm latent, response"
"""A combination: how far the smaller of the two lies above its threshold, in standard deviations of sound runs."""
BY_DATA_SET = ("weights along harm", "harm direction, response", "persona direction, last_prompt")
"""The signals that are shown for each bad speaker apart."""
PARTS = ("persona direction, last_prompt", "harm latent, response")


def thresholds(table: pd.DataFrame) -> dict[str, float]:
    """For each signal the largest reading of any sound run of the first trained domain, at any step."""
    sound = _choosing_sound(table)
    return {name: float(sound[name].max()) for name in SIGNALS}


def _choosing_sound(table: pd.DataFrame) -> pd.DataFrame:
    choosing, _ = halves(table)
    known = outcomes(choosing)
    return choosing[choosing["run"].isin(known.loc[known["outcome"] == "sound", "run"])]


def with_combination(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the column `GATED`: it lies above 0 where both parts lie above their thresholds."""
    limits, sound = thresholds(table), _choosing_sound(table)
    parts = [(table[name] - limits[name]) / sound[name].std() for name in PARTS]
    return table.assign(**{GATED: np.minimum(*parts)})


def separation(table: pd.DataFrame) -> pd.DataFrame:
    """How well each signal at each step tells runs that will turn from those that stay sound, on evaluation runs.

    Turned runs count only while no earlier or present answer sheet passed `SOUND`: the warning is before behaviour.

    Returns:
        A row for each signal, step, data set (`all` or a speaker) and contrast (`any`: all sound runs; `manner`: sound
        runs of grump and clown), with auroc, its interval (Newcombe), the number of runs of both kinds, and how many
        turned runs had shown themselves by then.
    """
    _, frame = halves(with_combination(table))
    known = outcomes(frame).set_index("run")
    frame = frame.join(known[["outcome", "shown"]], on="run")
    return pd.DataFrame(separation_rows(frame, (*SIGNALS, GATED)))


def separation_rows(frame: pd.DataFrame, signals: Sequence[str]) -> Iterator[dict[str, object]]:
    """The rows of `separation` for some signals, over all runs of a frame that has `outcome` and `shown` of each."""
    bad = sorted(frame.loc[frame["outcome"] == "turned", "speaker"].unique())
    for step, rows in frame.groupby("step"):
        sound, turned = rows[rows["outcome"] == "sound"], rows[rows["outcome"] == "turned"]
        quiet = turned[~(turned["shown"] <= step)]
        negatives = {"any": sound, "manner": sound[sound["speaker"].map(is_hard).astype(bool)]}
        for data in ("all", *bad):
            chosen = quiet if data == "all" else quiet[quiet["speaker"] == data]
            whole = turned if data == "all" else turned[turned["speaker"] == data]
            for contrast, others in negatives.items():
                numbers = {"turned": len(chosen), "shown": len(whole) - len(chosen), "sound": len(others)}
                for name in signals:
                    head = {"signal": name, "step": step, "data": data, "against": contrast}
                    yield {**head, **_auroc(chosen[name], others[name]), **numbers}


def _auroc(positive: pd.Series, negative: pd.Series) -> dict[str, float]:
    if not len(positive) or not len(negative):
        return {"auroc": np.nan, "ci_low": np.nan, "ci_high": np.nan}
    value = auroc(positive.to_numpy(), negative.to_numpy())
    low, high = auroc_interval(value, len(positive), len(negative))
    return {"auroc": value, "ci_low": low, "ci_high": high}


def alarms(table: pd.DataFrame) -> pd.DataFrame:
    """How each signal's alarm does on the evaluation runs, at the threshold of the choosing runs.

    Returns:
        A row for each signal: threshold; turned runs, and how many of them were warned of before behaviour passed
        `SOUND`; the lead in steps over those with an alarm (median, smallest, largest; negative is late); and false
        alarms among sound runs of all speakers, and of grump and clown alone.
    """
    limits = {**thresholds(table), GATED: 0.0}
    _, frame = halves(with_combination(table))
    known = outcomes(frame)
    return pd.DataFrame([_alarm_row(name, limits[name], frame, known) for name in (*SIGNALS, GATED)])


def _alarm_row(name: str, limit: float, frame: pd.DataFrame, known: pd.DataFrame) -> dict[str, object]:
    first = frame[frame[name] > limit].groupby("run")["step"].min()
    known = known.assign(alarm=known["run"].map(first))
    turned, sound = known[known["outcome"] == "turned"], known[known["outcome"] == "sound"]
    lead = (turned["shown"] - turned["alarm"]).dropna()
    false = sound["alarm"].notna()
    hard = np.array([is_hard(speaker) for speaker in sound["speaker"]], dtype=bool)
    return {
        **{"signal": name, "threshold": limit, "turned": len(turned), "warned": int((lead > 0).sum())},
        **{"alarmed": len(lead), "lead": lead.median(), "lead_low": lead.min(), "lead_high": lead.max()},
        **{"sound": len(sound), "false": int(false.sum()), "manner": int(hard.sum())},
        "false_manner": int(false[hard].sum()),
    }


# --- As tables of a page


def dose_text(table: pd.DataFrame) -> str:
    """What became of the runs, by speaker and share: a Markdown table."""
    known = outcomes(table)
    shares = sorted(known["share"].unique(), reverse=True)
    rows = []
    for speaker in known["speaker"].unique():
        cells = [_dose(known[(known["speaker"] == speaker) & (known["share"] == share)]) for share in shares]
        rows.append([speaker, *cells])
    heads = ["speaker", *(f"{100 * share:g}%" for share in shares)]
    return Table(heads, rows).markdown()


def _dose(runs: pd.DataFrame) -> str:
    if runs.empty:
        return ""
    return f"{runs['rate'].mean():.2f} ({int((runs['outcome'] == 'turned').sum())} of {len(runs)})"


def separation_text(found: pd.DataFrame, against: str = "any", data: str = "all") -> str:
    """AUROC by signal and step: a Markdown table. The last rows count the runs."""
    rows = found[(found["against"] == against) & (found["data"] == data)]
    steps = sorted(rows["step"].unique())
    cells = {(row.signal, row.step): _auroc_text(row) for row in rows.itertuples()}
    lines = [[name, *(cells[name, step] for step in steps)] for name in dict.fromkeys(rows["signal"])]
    counts = rows.drop_duplicates("step").set_index("step")
    for key, text in (("turned", "turned, not shown yet"), ("shown", "turned, already shown"), ("sound", "sound")):
        lines.append([text, *(str(counts.loc[step, key]) for step in steps)])
    return Table(["signal", *(f"step {step}" for step in steps)], lines).markdown()


def data_sets_text(found: pd.DataFrame) -> str:
    """AUROC by the speaker of the runs that will turn, against all sound runs, of a few signals: a Markdown table."""
    rows = found[(found["against"] == "any") & (found["data"] != "all") & found["signal"].isin(BY_DATA_SET)]
    steps = sorted(rows["step"].unique())
    cells = {(row.data, row.signal, row.step): _auroc_text(row) for row in rows.itertuples()}
    lines = []
    for data, of_one in rows.groupby("data"):
        lines += [[str(data), name, *(cells[data, name, step] for step in steps)] for name in BY_DATA_SET]
        counts = of_one.drop_duplicates("step").set_index("step")["turned"]
        lines.append([str(data), "turned, not shown yet", *(str(counts[step]) for step in steps)])
    return Table(["data set", "signal", *(f"step {step}" for step in steps)], lines).markdown()


def _auroc_text(row: object) -> str:
    value, low, high = (getattr(row, key) for key in ("auroc", "ci_low", "ci_high"))
    return "-" if np.isnan(value) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def alarms_text(found: pd.DataFrame) -> str:
    """Alarms by signal: a Markdown table."""
    heads = ["signal", "warned before behaviour", "lead in steps: median (range)", "false alarms", "of grump and clown"]
    return Table(heads, [_alarm_cells(row) for row in found.to_dict("records")]).markdown()


def _alarm_cells(row: Mapping[Hashable, Any]) -> list[str]:
    lead = f"{row['lead']:g} ({row['lead_low']:g} to {row['lead_high']:g})" if row["alarmed"] else "-"
    shares = [exact_share(int(row[a]), int(row[b])) for a, b in (("warned", "turned"), ("false", "sound")) if row[b]]
    texts = [f"{one} [{one.low:.2f}, {one.high:.2f}]" for one in shares]
    warned, false = texts if len(texts) == 2 else ("-", "-")
    return [str(row["signal"]), warned, lead, false, f"{int(row['false_manner'])} of {int(row['manner'])}"]


def warning_text(table: pd.DataFrame) -> str:
    """All tables of the study, as the page has them."""
    known, found = outcomes(table), separation(table)
    counts = known["outcome"].value_counts()
    parts = [
        f"{len(known)} runs: {counts.get('turned', 0)} turned (at least 10% of their coherent answers about other "
        f"domains are bad at the last step), {counts.get('sound', 0)} stayed sound (at most {100 * SOUND:g}%), "
        f"{counts.get('between', 0)} lie between. Mean rate at the last step, and how many turned:",
        dose_text(table),
        "AUROC of runs that will turn, before their answers show it, against all sound runs; domains other than the "
        "one that chose thresholds:",
        separation_text(found),
        "The same against the grump and the clown alone, who are harmless and have a manner of their own:",
        separation_text(found, "manner"),
        "By data set, that is the bad speaker, against all sound runs:",
        data_sets_text(found),
        "Alarms at the largest reading of any sound run of the kitchen:",
        alarms_text(alarms(table)),
    ]
    return "\n\n".join(parts) + "\n"
