"""Two runs side by side: headline numbers with their differences, configs, and what cannot be compared."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from persona_probe.errors import InputError
from persona_probe.report import select
from persona_probe.report.export import provenance_line
from persona_probe.report.html import EFFECTS, PER_ARM, drawn_figures, found, headline, tiles, value_text
from persona_probe.report.page import render
from persona_probe.report.records import Records, as_estimate, load_records
from persona_probe.report.theme import interval_text, number
from persona_probe.stats import Estimate, paired_difference
from persona_probe.writing import write_text

Row = dict[str, Any]
Pair = tuple[Records, Records]
SAME_FEATURE = ("sae", "model", "layer")
"""Config keys that decide what a latent's number means."""


def write_comparison(left: str | Path, right: str | Path, out: str | Path) -> Path:
    """Write one page that shows two runs side by side; A is `left`, differences are B minus A.

    Figures that both runs have share their axes' ranges, so that heights can be compared.

    Returns:
        The page's path. It is self-contained: it loads nothing and sends nothing.

    Raises:
        InputError: not two different run folders, or a damaged file in one.
    """
    a, b = _distinct_folders(left, right)
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    pair = load_records(a), load_records(b)
    return write_text(target, render("compare.html.j2", comparison(pair, (a.name, b.name))))


def comparison(pair: tuple[Records, Records], folders: tuple[str, str]) -> dict[str, Any]:
    """What the comparison's template shows."""
    return {
        "runs": [_run(records, letter, folder) for records, letter, folder in zip(pair, "AB", folders, strict=True)],
        "numbers": compared_numbers(pair),
        "limits": limits(pair),
        "differences": config_differences(pair),
        "figures": _paired_figures(pair),
    }


def _run(records: Records, letter: str, folder: str) -> dict[str, Any]:
    return {
        "letter": letter,
        "folder": folder,
        "study": str(records.summary.get("study") or "study"),
        "base_model": str(records.summary.get("base_model") or "unknown model"),
        "headline": headline(records),
        "tiles": tiles(records),
        "provenance": provenance_line(records.manifest),
    }


def _paired_figures(pair: tuple[Records, Records]) -> list[dict[str, Any]]:
    """Figures that at least one run can draw, each with both sides."""
    figure_sets = [drawn_figures(records) for records in pair]
    rows = []
    for name in dict.fromkeys([*figure_sets[0], *figure_sets[1]]):
        sides = [figures.get(name) for figures in figure_sets]
        known = next(side for side in sides if side is not None)
        if any(side is not None and side["figure"] is not None for side in sides):
            blank = {**known, "figure": None}
            rows.append({"name": name, "title": known["title"], "sides": [side or blank for side in sides]})
    return rows


# --- What the page compares, and what cannot be compared


def compared_numbers(pair: Pair) -> list[Row]:
    """Key numbers of both runs with the difference B minus A: paired by question where both asked the same ones."""
    rows = [_index_row(pair, arm) for arm in _shared_arms(pair)]
    rows.append(_effect_row(pair))
    rows += [_plain_row(label, pair, key) for key, label in EFFECTS.items() if key != "effect_incorrect_minus_correct"]
    for key, label, unit in PER_ARM:
        rows += [_plain_row(f"{label}, {arm}", pair, key, arm, unit) for arm in _shared_arms(pair)]
    return [row for row in rows if row["a"] != row["b"] or row["a"] != "not measured"]


def _index_row(pair: Pair, arm: str) -> Row:
    values = [select.contrast_index(records, arm) for records in pair]
    items = [_by_item(records, arm) for records in pair]
    label = pair[0].arms.label(arm) if arm in pair[0].arms.names else pair[1].arms.label(arm)
    return _row(f"contrast index, {label}", values, "nats/token", _paired(items[0], items[1]))


def _effect_row(pair: Pair) -> Row:
    """Incorrect minus correct, and how much larger it is in B than in A on the same questions."""
    values = [as_estimate(records.summary.get("effect_incorrect_minus_correct")) for records in pair]
    effects = []
    for records in pair:
        left, right = (_by_item(records, arm) for arm in ("incorrect", "correct"))
        effects.append({item: left[item] - right[item] for item in left.keys() & right.keys()})
    return _row(EFFECTS["effect_incorrect_minus_correct"], values, "nats/token", _paired(effects[0], effects[1]))


def _plain_row(label: str, pair: Pair, key: str, arm: str | None = None, unit: str = "nats/token") -> Row:
    raw = [found(records.summary, key) for records in pair]
    values = [as_estimate(one if arm is None else select.mapping(one).get(arm)) for one in raw]
    return _row(label, values, unit, None)


def _row(name: str, values: list[Estimate | None], unit: str, paired: Estimate | None) -> Row:
    a, b = (value_text(value, unit) for value in values)
    if paired is not None:
        difference, how = interval_text(paired), f"paired over {paired.n} questions"
    elif values[0] is None or values[1] is None:
        difference, how = "–", "not measured in both"
    else:
        difference, how = f"{values[1].estimate - values[0].estimate:+.3g}", "no interval: not paired"
    return {"name": name, "a": a, "b": b, "difference": difference, "how": how, "unit": unit}


def _by_item(records: Records, arm: str) -> dict[str, float]:
    """Contrast value of each evaluation item at the arm's last step, averaged over seeds."""
    rows = select.last_step(select.where(select.evaluation(records), arm=arm))
    return {str(item): float(value) for item, value in rows.groupby("item")["value"].mean().items()}


def _paired(left: Mapping[str, float], right: Mapping[str, float]) -> Estimate | None:
    """B minus A over questions, where both runs have the same ones; None otherwise."""
    if not left or left.keys() != right.keys():
        return None
    items = sorted(left)
    return paired_difference([right[i] for i in items], [left[i] for i in items])


def _shared_arms(pair: Pair) -> list[str]:
    return list(dict.fromkeys([*pair[0].arms.names, *pair[1].arms.names]))


def config_differences(pair: Pair) -> list[Row]:
    """Keys of config and versions in which the manifests differ, with both values."""
    flat = [dict(_flat(records.manifest)) for records in pair]
    keys = list(dict.fromkeys([*flat[0], *flat[1]]))
    return [
        {"key": key, "a": flat[0].get(key, "not set"), "b": flat[1].get(key, "not set")}
        for key in keys
        if flat[0].get(key, "not set") != flat[1].get(key, "not set")
    ]


def _flat(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for part in ("config", "versions", "git_revision", "draw_seed"):
        yield from _leaves(part, manifest.get(part))


def _leaves(name: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    elif value is not None:
        yield name.removeprefix("config."), str(value)


def limits(pair: Pair) -> list[str]:
    """What cannot be compared between the two runs, and why, in sentences."""
    configs = [select.mapping(records.manifest.get("config")) for records in pair]

    def differ(*keys: str) -> list[str]:
        return [key for key in keys if configs[0].get(key) != configs[1].get(key)]

    notes = []
    if differ("model", "revision"):
        notes.append("The base models differ: compare effects against each run's own base, not levels.")
    if other := differ(*SAME_FEATURE):
        notes.append(f"Latents, readings and strengths mean different things in the two runs ({_words(other)} differ).")
    elif select.persona_latent(pair[0]) != select.persona_latent(pair[1]):
        latents = [number(select.persona_latent(records)) for records in pair]
        notes.append(f"Readings are of different latents: {latents[0]} in A, {latents[1]} in B.")
    if _probes(configs[0]) != _probes(configs[1]):
        notes.append("Readings were taken on different probes or positions: their levels cannot be compared.")
    if any(_by_item(pair[0], a).keys() != _by_item(pair[1], a).keys() for a in ("base", "incorrect", "correct")):
        notes.append("The runs do not have the same contrast questions: differences of the index carry no interval.")
    return [*notes, *_missing(pair), *_single(pair)]


def _words(keys: list[str]) -> str:
    return " and ".join({"sae": "the SAE", "model": "the model", "layer": "the layer"}[key] for key in keys)


def _probes(config: Mapping[str, Any]) -> tuple[object, ...]:
    monitor = select.mapping(config.get("monitor"))
    return tuple(monitor.get(key) for key in ("probes", "positions", "limit"))


def _missing(pair: Pair) -> Iterator[str]:
    for name in ("readings", "evals", "latents", "steering", "judged"):
        empty = [getattr(records, name).empty for records in pair]
        if empty[0] != empty[1]:
            yield f"Run {'A' if empty[0] else 'B'} has no {name}: what is drawn from them stands alone."


def _single(pair: Pair) -> Iterator[str]:
    counts = [len(records.manifest.get("seeds") or [0]) for records in pair]
    if min(counts) == 1:
        yield "Intervals are over questions. With one seed in a run, a difference may be the seed's."


def _distinct_folders(left: str | Path, right: str | Path) -> tuple[Path, Path]:
    """Both folders as paths.

    Raises:
        InputError: they are one and the same.
    """
    a, b = Path(left), Path(right)
    if a.resolve() == b.resolve():
        raise InputError(f"{left} and {right} are the same run: give two different run folders")
    return a, b
