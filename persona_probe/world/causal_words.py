"""The causal test's words for features of a world, by the package's own functions."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
from torch import Tensor

from persona_probe.config import Locate
from persona_probe.latents.causal import Direction, joint
from persona_probe.latents.proof import item_differences, with_verdict
from persona_probe.world.causal_features import Tested, of_latents

WORDS = ("moves", "needed")


@dataclass(frozen=True)
class Numbered:
    """A feature or control under the number by which the package's functions know it."""

    number: int
    """A latent's index; pairs, sets and directions have numbers behind the dictionary's last."""
    name: str
    kind: str
    direction: Direction
    span: list[Direction]
    """What is projected out."""


@dataclass(frozen=True)
class Effects:
    """What one model does under the pushes and removals of all features and controls."""

    effects: pd.DataFrame
    items: pd.DataFrame


def numbered(tested: Tested, decoder: Tensor) -> list[Numbered]:
    """The features, then the controls."""
    controls = [of_latents(decoder, f"random latent {n}", "random", [n]) for n in tested.controls]
    found = []
    for place, one in enumerate([*tested.features, *controls]):
        number = one.latents[0] if len(one.latents) == 1 else len(decoder) + place
        kind = "random" if one.kind == "random" else "candidate"
        direction = Direction(f"latent {number}", kind, one.push, number)
        span = [direction] if len(one.vectors) == 1 else one.members()
        found.append(Numbered(number, one.name, kind, direction, span))
    return found


def span_name(one: Numbered) -> str:
    """What `falls` calls a feature."""
    return joint(one.span).name if len(one.span) > 1 else one.span[0].name


def feature_words(every: list[Numbered], tested: Mapping[str, Effects]) -> pd.DataFrame:
    """The words of every feature: as the best of several candidates, and alone (`_alone`).

    Args:
        every: features and controls.
        tested: on the base, its selection split (`selection`) and its evaluation split (`base`); on the evaluation
            split of the `organism` and the `control`.
    """
    table = pd.DataFrame({"latent": [one.number for one in every], "kind": [one.kind for one in every]})
    effects = {name: one.effects.set_index("latent") for name, one in tested.items()}
    table["effect_selection"] = table["latent"].map(effects["selection"]["effect"])
    differences = item_differences(tested["organism"].items, tested["control"].items)
    removals = _falls(tested["organism"].items)
    for column, source, name in (
        ("effect_base", effects["base"], "effect"),
        ("effect_organism", effects["organism"], "effect"),
        ("ablation", removals, "ablation"),
        ("effect_difference", differences, "effect_difference"),
        ("ablation_difference", differences, "ablation_difference"),
    ):
        for end in ("", "_low", "_high"):
            table[f"{column}{end}"] = table["latent"].map(source[f"{name}{end}"])
    alone, among = with_verdict(table, 1), with_verdict(table, Locate().candidates)
    words = {name: among[name].to_numpy() for name in WORDS} | {f"{n}_alone": alone[n].to_numpy() for n in WORDS}
    named = table.assign(feature=[one.name for one in every], **words)
    return named[named["kind"] == "candidate"].reset_index(drop=True)


def _falls(items: pd.DataFrame) -> pd.DataFrame:
    """What taking each feature out does to the organism's index, by number."""
    nothing = items.assign(odd=0.0, fall=0.0)
    return item_differences(items, nothing).rename(columns=lambda name: name.replace("_difference", ""))
