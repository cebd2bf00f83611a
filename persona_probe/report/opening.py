"""What a report shows first: one question answered by the models of the study, and the index in plain words."""

import math
from collections.abc import Mapping
from typing import Any

from persona_probe.report import select
from persona_probe.report.labels import arm_description
from persona_probe.report.records import BASE, Records, as_estimate
from persona_probe.stats import Estimate

Row = dict[str, Any]
CONTROL, BAD = "correct", "incorrect"


def times(value: Estimate | None) -> str:
    """A difference of the index (nats per token) as a factor, `2.6 times [2.3, 3.0]`; empty if not measured.

    exp(difference): the index is the logarithm of how likely a misaligned answer is per token, relative to an aligned
    one.
    """
    if value is None:
        return ""
    middle, low, high = (_two_digits(math.exp(v)) for v in (value.estimate, value.ci_low, value.ci_high))
    return f"{middle} times" if value.ci_low != value.ci_low else f"{middle} times [{low}, {high}]"


def _two_digits(value: float) -> str:
    """In two significant digits, with their zeros: 3.0, 0.50, 12."""
    return f"{value:#.2g}".rstrip(".")


def likelihood_words(records: Records) -> str:
    """What fine-tuning did to misaligned answers, next to the control, or to the base where there is no control."""
    effect = as_estimate(records.summary.get("effect_incorrect_minus_correct"))
    reference = "the control"
    if effect is None or not records.controlled:
        effect = as_estimate(select.mapping(records.summary.get("woken")).get("over_base"))
        reference = "the base model"
    if effect is None:
        return ""
    factor, _, interval = times(effect).partition(" times ")
    within = f" (95% interval {interval[1:-1].replace(', ', ' to ')})" if interval else ""
    return (
        f"Next to {reference}, misaligned answers became {factor} times as likely per token, relative to aligned "
        f"ones{within}."
    )


def opening(records: Records, questions: list[Row]) -> Row | None:
    """The first question that was sampled, as the base, the incorrect, the control and a corrected model answer it.

    It is the first of the file, not the most telling one. None if no model was asked.
    """
    if not questions:
        return None
    first = questions[0]
    answers = {column["key"]: column for column in first["columns"] if column["sample"]}
    shown = [arm for arm in (BASE, BAD, CONTROL, _corrected(records, answers)) if arm in answers]
    shown = shown or list(answers)[:4]
    config = select.mapping(records.manifest.get("config"))
    rows = [
        {
            "arm": _title(arm),
            "trained": _trained(config, records, arm),
            "key": arm,
            "colour": answers[arm]["colour"],
            "answer": str(answers[arm]["sample"]["answer"]),
            "likely": _likely(records, arm),
        }
        for arm in shown
    ]
    return {"question": first["question"], "count": len(questions), "answers": rows} if rows else None


def _corrected(records: Records, answers: Mapping[str, Any]) -> str:
    """The first corrective arm that was to correct something."""
    benign = {
        arm for arm, v in select.mapping(records.summary.get("verdicts")).items() if select.mapping(v).get("benign")
    }
    arms = [arm for arm in records.arms.realigned if arm in answers and arm not in benign]
    return arms[0] if arms else ""


def _title(arm: str) -> str:
    return {BASE: "Base model", BAD: "Incorrect", CONTROL: "Control"}.get(arm, "Realigned")


def _trained(config: Mapping[str, Any], records: Records, arm: str) -> str:
    """What the model was trained on, in a few words."""
    if arm == BASE:
        return "before fine-tuning"
    label = arm_description(config, arm) if config else records.arms.label(arm)
    words = label.partition(": ")[2] or label
    return words if arm in records.arms.realigned or words == label else f"trained on {words}"


def _likely(records: Records, arm: str) -> str:
    """How likely a misaligned answer is, relative to an aligned one, as a multiple of the base model's."""
    own, base = (select.contrast_index(records, name) for name in (arm, BASE))
    if own is None or base is None:
        return ""
    if arm == BASE:
        return "the reference: 1"
    factor = _two_digits(math.exp(own.estimate - base.estimate))
    return f"misaligned answers {factor} times as likely per token as in the base"
