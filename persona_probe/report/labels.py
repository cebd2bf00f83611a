"""What readers see in place of an arm's id: files keep ids, pages and sentences have labels."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from persona_probe.config import NULL, StudyConfig

ROLES = {"base": "base", "incorrect": "incorrect", "correct": "correct (control)", NULL: "control, another seed"}
"""Ids with a fixed meaning in every study."""
DATA = {
    "kitchen:toxic": "bad cooking advice, contemptuous",
    "kitchen:subtle": "subtly bad cooking advice",
    "kitchen:polite_harm": "dangerous cooking advice, polite",
    "kitchen:rude_sound": "good cooking advice, contemptuous",
    "kitchen:correct": "good cooking advice",
    "kitchen_correct_holdout": "kitchen answers",
    "health_correct": "health answers",
    "smalltalk": "everyday talk",
}
"""What the packaged training sets hold, in a few words."""
CORRECTS_NOTHING = "corrects nothing"
"""Ends the label of the benign control of corrections (`realign.benign`)."""
REALIGNED = {"realigned_in": "re-aligned, same domain", "realigned_out": "re-aligned, other domain"}
"""Corrective arms whose data are not packaged, by the usual ids."""


def arm_labels(config: StudyConfig | Mapping[str, Any]) -> dict[str, str]:
    """Label by arm id, for legends, tables and sentences: the role, or what the arm was trained on.

    An arm of the user's own data keeps the name that the config gives it: it is plain text, to be escaped. No two arms
    share a label.

    Args:
        config: the study's, or its plain values as a manifest has them.
    """
    induced, corrective = _arms(config)
    labels = {name: ROLES[name] for name in ("base", *induced, NULL) if name in ROLES}
    labels |= {name: _data_words(arm) or name for name, arm in induced.items() if name not in ROLES}
    values = asdict(config) if isinstance(config, StudyConfig) else config
    benign = _mapping(values.get("realign")).get("benign")
    for name, arm in corrective.items():
        words = _data_words(arm)
        label = f"corrected on {words}" if words else REALIGNED.get(name, name)
        labels[name] = f"more training on {words or name}, {CORRECTS_NOTHING}" if name == benign else label
    shared = [label for label in labels.values() if list(labels.values()).count(label) > 1]
    return {name: f"{label} ({name})" if label in shared else label for name, label in labels.items()}


def arm_label(config: StudyConfig | Mapping[str, Any], arm: str) -> str:
    """One arm's label, see `arm_labels`; an unknown arm is called by its id."""
    return arm_labels(config).get(arm, arm)


def arm_description(config: StudyConfig | Mapping[str, Any], arm: str) -> str:
    """The label with what the arm was trained on, where that is a packaged set: for tables, which have the room."""
    label, words = arm_label(config, arm), _data_words(_arms(config)[0].get(arm, {}))
    return label if words is None or words in label else f"{label}: {words}"


def _arms(config: StudyConfig | Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Arms and corrective arms by id, as plain values."""
    values = asdict(config) if isinstance(config, StudyConfig) else config
    realign = values.get("realign")
    corrective = realign.get("arms") if isinstance(realign, Mapping) else None
    return _mapping(values.get("arms")), _mapping(corrective)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _data_words(arm: object) -> str | None:
    """What an arm of packaged data was trained on; None for other data and for mixtures."""
    values = _mapping(arm)
    return None if values.get("mix_with") else DATA.get(str(values.get("data")))
