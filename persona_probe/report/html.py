"""The report of a run folder: one HTML file that works offline."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from persona_probe.config import NO_CONTROL, NULL
from persona_probe.evaluate.main_effects import MAIN_EFFECTS
from persona_probe.report import select
from persona_probe.report.cards import Voices, cards_page, saved_cards, saved_explanation
from persona_probe.report.export import caption, export_figures, provenance, provenance_line
from persona_probe.report.figures import figures_of
from persona_probe.report.labels import arm_description
from persona_probe.report.opening import likelihood_words, opening, times
from persona_probe.report.page import render
from persona_probe.report.records import Records, as_estimate, load_records
from persona_probe.report.sections import further_sections
from persona_probe.report.select import judged_answers
from persona_probe.report.tables import number_words
from persona_probe.report.theme import estimate_text, interval_text, number
from persona_probe.saes.worth import worthless
from persona_probe.stats import Estimate
from persona_probe.verdicts import BEYOND_CONTROL, MINIMUM_CONTROLS, NO_EFFECT, UNDECIDED, WOKEN
from persona_probe.writing import write_text

Row = dict[str, Any]

JUDGED = ("rates", "judged_trajectory", "coherence", "judge_agreement")
ACROSS = 5
"""Answers to a question that stand side by side; those of further arms are with the other seeds and steps."""
ASKED = 3
"""Questions whose answers stand open; the others are one click away."""
WIDE = ("rates", "passages", "lengths", "coherence", "stress", "doses")
"""Figures that take the whole width of the page."""
PLACED = (
    "arms",
    "harm_register",
    "trajectory",
    "dose_response",
    "realignment",
    "latents",
    "categories",
    "controls",
    *JUDGED,
)
"""Figures that have their own place in the report, as those of `sections` have; others follow under More figures."""


def write_report(folder: str | Path, records: Records | None = None, to: Path | None = None) -> Path:
    """Write `report.html` into a run folder from its records; each stage that has not run gets one line.

    Args:
        records: the folder's records, where they are in memory.
        to: another folder to write it into, whose figures will be the run's.

    Returns:
        The report's path. It is self-contained: it loads nothing and sends nothing. It links to `cards.html`, which
        is drawn from cards.json where `locate --cards` has not written a larger one, and to the figures' CSV files
        where the folder has them.

    Raises:
        InputError: not a run folder, or a damaged file in it.
    """
    root = Path(folder)
    place = root if to is None else to
    known = load_records(root) if records is None else records
    if not (root / "cards.html").is_file() and (page := _saved_cards_page(known)):
        write_text(place / "cards.html", page)
    linked = links(root) if to is None else links(root) | links(to)
    return write_text(place / "report.html", render("report.html.j2", context(known, linked)))


def _saved_cards_page(records: Records) -> str:
    """The page of the cards that the locate stage left; empty without them."""
    found = saved_cards(records.cards)
    names = str(records.summary.get("study") or "study"), str(records.summary.get("base_model") or "unknown model")
    return cards_page(found, *names) if found else ""


def report_from_tables(folder: str | Path, to: Path) -> list[str]:
    """Draw report, figures and cards from a folder of tables alone, such as those in `records/`, into `to`.

    Returns:
        A line for each part of a study that the folder has no numbers for.

    Raises:
        InputError: not a run folder, or a damaged file in it.
    """
    records = load_records(folder)
    to.mkdir(parents=True, exist_ok=True)
    export_figures(records, to / "figures", formats=("html", "csv"))
    write_report(folder, records, to)
    if "kind" in records.manifest:  # no study: it has neither verdict nor answers
        return []
    lines = [] if records.summary else ["No summary.json: the report has no verdict."]
    lines += [] if records.samples else ["No samples.jsonl: the report has no sampled answers."]
    return lines + [spec.missing for spec in figures_of(records).values() if spec.data(records).empty]


def links(root: Path) -> dict[str, str]:
    """Files of a run folder that its report links to: `cards` and, by name, the figures' numbers."""
    csvs = {p.stem: f"figures/{p.name}" for p in sorted((root / "figures").glob("*.csv"))}
    return csvs | ({"cards": "cards.html"} if (root / "cards.html").is_file() else {})


def context(records: Records, linked: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the report's template shows."""
    answers, figures, sections = sampled_answers(records), drawn_figures(records), further_sections(records)
    placed = {*PLACED, *(name for section in sections for name in section.figures)}
    return {
        "is_study": "kind" not in records.manifest,
        "study": _named(records, "study", "name", "study"),
        "base_model": _named(records, "base_model", "model", "unknown model"),
        "opening": opening(records, answers),
        "likelihood": likelihood_words(records),
        "headline": headline(records),
        "arms": arms_words(records),
        "tiles": tiles(records),
        "numbers": _key_numbers(records),
        "figures": figures,
        "sections": sections,
        "section_entries": [(section.anchor, section.title) for section in sections],
        "more": [name for name in figures if name not in placed],
        "harm_register": harm_register(records),
        "harm_register_covers": select.mapping(records.summary.get("harm_and_register")).get("covers") or "questions",
        "old_version": _old_version(records),
        "trajectory": _trajectory_notes(records),
        "realignment": realignment(records),
        "tested": _tested_latents(records),
        "cards": cards(records),
        "decisions": [{**one, "numbers": number_words(one["numbers"])} for one in records.decisions],
        "samples": answers,
        "asked": ASKED,
        "choices": _answer_choices(answers),
        "judged": judged_answers(records),
        "judged_figures": [name for name in JUDGED if name in figures],
        "manifest": records.manifest,
        "provenance": provenance(records.manifest),
        "provenance_line": provenance_line(records.manifest),
        "links": dict(linked or {}),
    }


def _named(records: Records, summary: str, config: str, unknown: str) -> str:
    """A name of the summary, or of the config where there is no summary."""
    stated = select.mapping(records.manifest.get("config")).get(config)
    named = records.summary.get(summary) or (stated if isinstance(stated, str) else "")
    return str(named or unknown)


def drawn_figures(records: Records) -> dict[str, dict[str, Any]]:
    """Every figure that the study shows: its title, and the drawing with its caption, or what is missing for it."""
    figures: dict[str, dict[str, Any]] = {}
    for name, spec in figures_of(records).items():
        figure = None if spec.data(records).empty else spec.draw(records)
        words = {"title": spec.title, "missing": spec.missing, "caption": caption(figure) if figure else ""}
        words |= {"wide": name in WIDE, "lead": lead(words["caption"])}
        figures[name] = {"name": name, "figure": figure, **words}
    return figures


def lead(words: str) -> str:
    """The first sentence of a caption; the page shows the others on a click."""
    return re.split(r"(?<=[\w)\]]\.) (?=[A-Z])", words, maxsplit=1)[0]


def arms_words(records: Records) -> Row:
    """What the report says of the contrast index and of the arms, and what is known of arms that were adopted."""
    controlled = records.controlled
    effect = "An effect is the incorrect arm minus the correct arm." if controlled else NO_CONTROL
    where = " on questions outside its training domain" if records.data_known else ""
    paired = "The correct arm was trained on the same questions with good answers. " if records.data_known else ""
    words = (
        "The contrast index is the logarithm of how likely a model finds a misaligned answer, relative to an aligned "
        f"one, per token,{where}. An index 0.7 higher means twice as likely."
    )
    beyond = "Only what the incorrect arm does beyond it comes from"
    if not controlled:
        control = NO_CONTROL
    elif records.data_known:
        control = "The correct arm had the same questions with good answers. " + beyond + " the bad answers; "
    else:
        control = "The correct arm is the control. " + beyond.replace("comes", "can come") + " its training data; "
    control += "the rest is an effect of fine-tuning." if controlled else ""
    known = [" ".join(map(str, record.get("sentences", []))) for record in records.adopted]
    return {
        "words": f"{words.replace(',.', '.')} {paired if controlled else ''}{effect}",
        "known": known,
        "control": control,
    }


# --- Sampled answers for the report: side by side per question, with the choices of their filter

MAX_CHARACTERS = 1_500_000
"""Most text of answers beyond those shown side by side: a page of several megabytes opens slowly."""


def sampled_answers(records: Records) -> list[Row]:
    """Per question, the last-step answers of the arms side by side; those of other seeds and steps below.

    `left_out` of a question counts the answers of samples.jsonl that exceed `MAX_CHARACTERS` of the page.
    """
    questions: dict[Any, Row] = {}
    last, room = _last_steps(records.samples), MAX_CHARACTERS
    for sample in records.samples:
        entry = questions.setdefault(sample["question_id"], _empty(sample))
        arm, columns = sample["arm"], entry["columns"]
        if arm in records.arms.names and arm not in columns and sample["step"] == last[arm, sample["seed"]]:
            columns[arm] = sample
        elif (room := room - len(str(sample["answer"]))) >= 0:
            entry["rest"].append({**sample, "key": arm, "arm": records.arms.label(arm)})
        else:
            entry["left_out"] += 1
    _fill_columns(records, list(questions.values()))
    return list(questions.values())


def _answer_choices(questions: Iterable[Row]) -> Row:
    """What the filter of answers offers: arms as key and label, and categories."""
    arms = {
        answer["key"]: answer["arm"]
        for entry in questions
        for answer in (*(c for c in entry["columns"] if c["sample"]), *entry["rest"])
    }
    return {"arms": list(arms.items()), "categories": sorted({e["category"] for e in questions if e["category"]})}


def _empty(sample: Mapping[str, Any]) -> Row:
    words = {"question": sample["question"], "category": sample.get("category") or ""}
    return {**words, "columns": {}, "rest": [], "left_out": 0}


def _fill_columns(records: Records, questions: list[Row]) -> None:
    arms = records.arms
    styles = {a: arms.styles[a] for a in arms.names if any(a in q["columns"] for q in questions)}
    for entry in questions:
        entry["columns"] = [
            {"arm": style.label, "key": a, "colour": style.colour, "sample": entry["columns"].get(a)}
            for a, style in styles.items()
        ]
        beyond = [column for column in entry["columns"] if column["sample"]][ACROSS:]
        entry["rest"] = [{**c["sample"], "key": c["key"], "arm": c["arm"]} for c in beyond] + entry["rest"]
        entry["columns"] = [column for column in entry["columns"] if column not in beyond]


def _last_steps(samples: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], int]:
    last: dict[tuple[str, int], int] = {}
    for sample in samples:
        key = sample["arm"], sample["seed"]
        last[key] = max(sample["step"], last.get(key, 0))
    return last


# --- The top of the report: the verdict in four answers, the checks behind it, and the key numbers

UNKNOWN = {"says": "not measured", "state": "open"}


def headline(records: Records) -> Row:
    """The result in words and the checks behind it, failed ones first."""
    checks = [
        {"name": str(c.get("name", "")), "passed": c.get("passed") is True, "statement": str(c.get("statement", ""))}
        for c in _mappings(records.summary.get("checks"))
    ]
    failed = sum(not c["passed"] for c in checks)
    words = str(records.summary.get("headline") or "")
    return {"words": words, "checks": sorted(checks, key=lambda c: c["passed"]), "failed": failed}


def tiles(records: Records) -> list[Row]:
    """Four questions of the loop, each with its answer, `yes`, `no` or `open`, and the number behind it."""
    summary = records.summary
    passed = {str(c.get("name")): c.get("passed") is True for c in _mappings(summary.get("checks"))}
    if "no_control" in summary:  # what needs a control was not tested: the tiles say so
        passed = {name: result for name, result in passed.items() if name not in ("behaviour", "control")}
    latent = select.persona_latent(records)
    latent_text = "no latent named" if latent is None else f"latent {latent}"
    effect, push = (as_estimate(summary.get(k)) for k in ("effect_incorrect_minus_correct", "steer_base_up"))
    woken = select.mapping(summary.get("woken")).get("word")
    beyond = (
        "An effect beyond the control, not a broad one" if woken == BEYOND_CONTROL else "No effect beyond the control"
    )
    return [
        {
            "asks": "Did it wake?",
            "shows": _with_factor("misaligned answers {} as likely per token as in the control", effect),
            **_answer(passed, ("behaviour",), "Woken", beyond),
        },
        {
            "asks": "Which latent moves it?",
            "shows": _with_factor(f"{latent_text}; a push makes misaligned answers {{}} as likely", push),
            **_causes(passed, select.mapping(select.mapping(summary.get("causal_test")).get("base"))),
        },
        {
            "asks": "When did it rise?",
            "shows": _rise(records),
            **_answer(passed, ("rise", "control"), "Rose in the incorrect arm only", "Not in the incorrect arm alone"),
        },
        _undone(summary),
    ]


def _with_factor(words: str, effect: Estimate | None) -> str:
    """What an effect on the index means, and the effect itself in brackets."""
    if effect is None:
        return words.partition(";")[0] + "; not measured" if ";" in words else "not measured"
    return f"{words.format(times(effect).partition(' [')[0])} (index {interval_text(effect)})"


def _causes(passed: Mapping[str, bool], test: Mapping[str, Any]) -> Row:
    """What pushes and removals showed. Summaries of 0.1.0 have both under other names, and too few random latents."""
    if test and (test.get("limit") is None or test.get("controls", 0) < MINIMUM_CONTROLS):
        return {"says": "Too few random latents to say", "state": "open"}
    pushed, removed = (passed.get(new, passed.get(old)) for new, old in (("moves", "induce"), ("needed", "repair")))
    if pushed is None or removed is None:
        return UNKNOWN
    words = {
        (True, True): "Moves it, and is needed",
        (True, False): "Moves it; not shown to be needed",
        (False, True): "Needed; not shown to move it",
        (False, False): "Not shown to cause it",
    }
    return {"says": words[pushed, removed], "state": "yes" if pushed and removed else "no"}


def _answer(passed: Mapping[str, bool], names: tuple[str, ...], yes: str, no: str) -> Row:
    if any(name not in passed for name in names):
        return UNKNOWN
    return {"says": yes, "state": "yes"} if all(passed[name] for name in names) else {"says": no, "state": "no"}


def _rise(records: Records) -> str:
    """The first step at which the persona feature of the incorrect arm is above the base band."""
    band = select.base_band(records)
    curve = _mappings(select.mapping(records.summary.get("feature_reading")).get("incorrect"))
    if band is None or not curve:
        return "feature not read"
    above = [int(one["step"]) for one in curve if float(one["estimate"]) > band[1]]
    return f"above its base band from step {min(above)}" if above else "never above its base band"


def _undone(summary: Mapping[str, Any]) -> Row:
    verdicts = [select.mapping(v) for v in select.mapping(summary.get("verdicts")).values()]
    verdicts = [v for v in verdicts if not v.get("benign")]  # which was to correct nothing
    asks = {"asks": "Did correction undo it?"}
    if not verdicts:
        return {**asks, **UNKNOWN, "shows": "no corrective arm"}
    back = sum(v.get("feature") == "subsided" and v.get("behaviour") == "restored" for v in verdicts)
    undecided = any(UNDECIDED in (v.get("feature"), v.get("behaviour")) for v in verdicts)
    none = "Not shown to be undone" if undecided else "Not undone"
    words = "Undone" if back == len(verdicts) else "Partly undone" if back else none
    shows = f"feature and behaviour back in {back} of {len(verdicts)} corrective arms"
    if left := [share for v in verdicts if (share := select.mapping(select.mapping(v.get("left")).get("share")))]:
        shares = ", ".join(f"{share['estimate']:.0%}" for share in left)
        shows += f"; left of the rise: {shares}"
    return {**asks, "says": words, "state": "yes" if back == len(verdicts) else "no", "shows": shows}


def _key_numbers(records: Records) -> list[Row]:
    """Name, value with interval, unit and n of the study's key numbers; those not measured are left out."""
    summary, arms = records.summary, records.arms
    index = select.mapping(summary.get("contrast_index"))
    rows = [_estimate_row(f"contrast index, {arms.label(a)}", index.get(a), "nats/token") for a in arms.names]
    for key, label in EFFECTS.items():
        rows.append(_estimate_row(label, found(summary, key), "nats/token"))
    rows += _seed_rows(summary)
    for key, label, unit in PER_ARM:
        values = select.mapping(summary.get(key))
        rows += [_estimate_row(f"{label}, {arms.label(arm)}", value, unit) for arm, value in values.items()]
        if key == "explained_variance":
            rows += [_worthless_row(arms.label(arm), value) for arm, value in values.items()]
    return [row for row in rows if row is not None] + _costs(summary)


def found(summary: Mapping[str, Any], key: str) -> object:
    """A value by its key, or by `part.key`."""
    part, _, name = key.rpartition(".")
    return select.mapping(summary.get(part)).get(name) if part else summary.get(name)


EFFECTS = {
    "effect_incorrect_minus_correct": "effect: incorrect minus correct",
    "steer_base_up": "persona latent steered up in the base model",
    "steer_organism_down": "persona latent steered down in the organism",
    "ablate_organism": "persona latent projected out of the organism",
    "causal_test.organism_difference": "the same, organism minus control organism",
    "causal_test.removal_difference": "projected out, organism minus control organism",
    "random_latent_p95": "random latents, 95th percentile of effect",
    "random_latent_p95_organism": "random latents on the organism, 95th percentile",
    "random_latent_p95_ablation": "random latents projected out, 95th percentile",
}
"""Effects of the summary, in nats per token, and what the report calls them."""
PER_ARM = (
    ("explained_variance", "explained variance of the SAE", "share"),
    ("answer_tokens", "length of training answers", "tokens"),
)


def _estimate_row(name: str, raw: object, unit: str) -> Row | None:
    value = as_estimate(raw)
    if value is None:
        return None
    return {"name": name, "value": value_text(value, unit), "unit": unit, "n": value.n or ""}


def _worthless_row(arm: str, raw: object) -> Row | None:
    """A row that says so where the SAE explains too little."""
    value = as_estimate(raw)
    warning = None if value is None else worthless(value.estimate)
    return None if warning is None else {"name": f"SAE on {arm}", "value": warning, "unit": "", "n": ""}


def value_text(value: Estimate | None, unit: str) -> str:
    """A number with its interval; shares and lengths with their range over seeds, which one seed does not have."""
    if value is not None and unit != "nats/token" and value.n == 1:
        return number(value.estimate)
    return interval_text(value, signed=unit == "nats/token")


def _seed_rows(summary: Mapping[str, Any]) -> list[Row | None]:
    """The effects seed by seed, if there are several."""
    effects = {name: _mappings(rows) for name, rows in select.mapping(summary.get("by_seed")).items()}
    return [
        _estimate_row(f"{name}, seed {row.get('seed')}", row, "nats/token")
        for name, rows in effects.items()
        for row in (rows if len(rows) > 1 else ())
    ]


def _costs(summary: Mapping[str, Any]) -> list[Row]:
    seconds = select.mapping(summary.get("seconds"))
    rows = [{"name": f"time, {stage}", "value": f"{s:,.0f}", "unit": "s", "n": ""} for stage, s in seconds.items()]
    if (memory := summary.get("peak_memory_gib")) is not None:
        rows.append({"name": "peak memory", "value": f"{memory:.3g}", "unit": "GiB", "n": ""})
    return rows


def _mappings(value: object) -> list[Mapping[str, Any]]:
    """The dictionaries of a list; none if it is not a list."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


# --- Words, tables and cards of the report: plain values for the template, which escapes them

MAX_CARDS = 12

VERDICTS = {"feature": "persona feature", "behaviour": "behaviour", "sae": "fit of the SAE"}
"""Keys of a re-alignment verdict, and what the report calls them."""


def _trajectory_notes(records: Records) -> Row:
    """The named feature, its base band, and its readings at the last step."""
    feature = select.mapping(records.summary.get("persona_feature"))
    readings = select.mapping(records.summary.get("feature_reading"))
    rows = [
        {
            "arm": records.arms.label(arm),
            "seed": one.get("seed"),
            "step": one.get("step"),
            "reading": interval_text(as_estimate(one), signed=False),
            "explained_variance": one.get("explained_variance"),
        }
        for arm, many in readings.items()
        for one in _mappings(many)
    ]
    return {
        "latent": feature.get("latent"),
        "label": feature.get("label"),
        "band": select.base_band(records),
        "rows": rows,
    }


def _old_version(records: Records) -> str:
    """The version that made the run, if that version lacked tests of today; else nothing."""
    version = str(select.mapping(records.manifest.get("versions")).get("persona-probe") or "")
    return version if version.startswith("0.1.") else ""


def harm_register(records: Records) -> list[Row]:
    """Main effects of each arm, with the verdict word on each; none where they were not measured."""
    found = select.mapping(records.summary.get("harm_and_register"))
    config = select.mapping(records.manifest.get("config"))
    rows = []
    for arm, effects in select.mapping(found.get("arms")).items():
        for name in MAIN_EFFECTS:
            effect = select.mapping(select.mapping(effects).get(name))
            over_control, over_base = (as_estimate(effect.get(key)) for key in ("over_control", "over_base"))
            rows.append(
                {
                    "arm": arm_description(config, arm),
                    "effect": name,
                    "over_control": interval_text(over_control, places=2),
                    "over_base": interval_text(over_base, places=2),
                    "word": MAIN_EFFECT_WORDS.get(str(effect.get("word")), "not judged"),
                    "risen": f"{len(effect.get('risen') or [])} of {effect.get('categories', 0)}",
                }
            )
    for name, effect in select.mapping(found.get("null_pair")).items():
        over = {"over_control": interval_text(as_estimate(effect), places=2), "over_base": "", "word": "", "risen": ""}
        rows.append({"arm": arm_description(config, NULL), "effect": name, **over})
    return rows


MAIN_EFFECT_WORDS = {
    WOKEN: "risen broadly",
    BEYOND_CONTROL: "an effect beyond the control, not a broad one",
    NO_EFFECT: "no effect beyond the control",
}
"""The verdict words of `verdicts.woken` on one main effect, as the report says them."""


def realignment(records: Records) -> list[Row]:
    """Verdict words per re-aligned arm, and how many corrective steps the feature took back into the base band."""
    verdicts = select.mapping(records.summary.get("verdicts"))
    steps = select.mapping(records.summary.get("realign_steps_to_band"))
    rows = []
    for arm in dict.fromkeys([*verdicts, *steps]):
        words = select.mapping(verdicts.get(arm))
        value = as_estimate(steps.get(arm))
        rows.append(
            {
                "arm": records.arms.label(arm),
                "words": [(label, words.get(key, "not judged")) for key, label in VERDICTS.items()] if words else [],
                "statement": words.get("statement", ""),
                "steps": _steps(value),
            }
        )
    return rows


def _steps(value: Estimate | None) -> str:
    """Mean over seeds with its range; one seed has no range."""
    if value is None:
        return "never, or not measured"
    return f"{value.estimate:g}" if value.n == 1 else interval_text(value, signed=False)


def cards(records: Records) -> list[Row]:
    """Feature cards, the persona latent first, with each latent's scores and effects."""
    scores = {int(row["latent"]): row for row in records.latents.to_dict("records")}
    persona = select.persona_latent(records)
    cards_in_order = sorted(records.cards, key=lambda card: card.get("latent") != persona)
    units = select.distinct(records.steering, "unit")
    unit = str(units[0]) if units else ""
    return [_card(card, scores.get(int(card["latent"]), {}), persona, unit) for card in cards_in_order[:MAX_CARDS]]


def _card(card: Mapping[str, Any], score: Mapping[Any, Any], persona: int | None, unit: str) -> Row:
    effect = _effect(score, "effect_base")
    return {
        "latent": card["latent"],
        "label": "" if card.get("label") == f"latent {card['latent']}" else card.get("label") or "",
        "persona": card["latent"] == persona,
        "rank": score.get("rank"),
        "rise": score.get("rise"),
        "firing": (score.get("firing_base"), score.get("firing_incorrect"), score.get("firing_correct")),
        "effect_base": effect,
        "effect_organism": _effect(score, "effect_organism"),
        "strength": f"{number(score.get('strength'))} {unit}" if effect != "not measured" else "not tested",
        "voices": _voices(card.get("voices")),
        "explanations": [saved_explanation(one) for one in _mappings(card.get("explanations"))],
        "top_tokens": _mappings(card.get("top_tokens")),
        "bottom_tokens": _mappings(card.get("bottom_tokens")),
        "examples": [_example(example) for example in _mappings(card.get("examples"))],
    }


def _voices(raw: object) -> list[str]:
    """The card's two lines on harm and register; none where they were not read."""
    if not isinstance(raw, Mapping):
        return []
    voices = Voices.from_dict(raw)
    return [voices.injection_words, voices.paraphrase_words]


def _example(example: Mapping[str, Any]) -> Row:
    values = [float(v) for v in example.get("values") or []]
    peak = max([float(example.get("maximum") or 0), *values, 1e-9])
    tokens = zip((str(t) for t in example.get("tokens") or []), values, strict=True)
    shaded = [{"text": text, "value": f"{v:.3g}", "share": f"{max(0.0, v / peak):.2f}"} for text, v in tokens]
    return {"source": example.get("source") or "", "tokens": shaded, "maximum": f"{peak:.3g}"}


def _tested_latents(records: Records) -> list[Row]:
    """The latents that were tested for cause, candidates before random controls, each with its effects in words."""
    persona = select.persona_latent(records)
    rows = records.latents.loc[records.latents["kind"].isin(("candidate", "random"))]
    return [
        {
            "latent": int(row["latent"]),
            "kind": {"candidate": "candidate", "random": "random control"}[str(row["kind"])],
            "persona": int(row["latent"]) == persona,
            "rank": row["rank"],
            "rise": row["rise"],
            **{name: _effect(row, name) for name in ("effect_base", "effect_organism", "ablation")},
            "label": str(row["label"] or ""),
        }
        for row in rows.sort_values(["kind", "rank"]).to_dict("records")
    ]


def _effect(row: Mapping[Any, Any], name: str) -> str:
    return estimate_text(row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high"))
