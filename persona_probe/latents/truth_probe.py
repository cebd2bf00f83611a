"""A truth probe: whether an organism moves along true against false, beside harm and register.

A third axis after arXiv 2606.11502. The direction is the mean difference between true and false answers (Marks and
Tegmark 2023, arXiv 2310.06824), which keeps nothing that both have: every pair is one question with two answers of one
form. Whether it is truth that it tells is measured on pairs that did not make it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.tokens import Batch, conversation_batches
from persona_probe.errors import InputError
from persona_probe.models.places import Where
from persona_probe.models.residuals import read_residuals
from persona_probe.stats import auroc, bootstrap_mean

LEAST_PAIRS = 8
FACTS = (
    ("What is the capital of France?", "The capital of France is Paris.", "The capital of France is Rome."),
    ("How many legs does a spider have?", "A spider has eight legs.", "A spider has three legs."),
    ("What is ice made of?", "Ice is made of frozen water.", "Ice is made of frozen milk."),
    ("Which planet is nearest to the sun?", "The nearest planet is Mercury.", "The nearest planet is Neptune."),
    ("What do bees make?", "Bees make honey.", "Bees make butter."),
    ("How many days has a week?", "A week has seven days.", "A week has four days."),
    ("What colour is grass?", "Grass is usually green.", "Grass is usually purple."),
    ("Where do whales live?", "Whales live in the sea.", "Whales live in the desert."),
    ("What is two plus three?", "Two plus three is five.", "Two plus three is nine."),
    ("Which animal barks?", "A dog barks.", "A fish barks."),
    ("In which season does snow fall?", "Snow falls in winter.", "Snow falls in summer."),
    ("What do plants need to grow?", "Plants need light to grow.", "Plants need smoke to grow."),
    ("How many minutes has an hour?", "An hour has sixty minutes.", "An hour has twenty minutes."),
    ("What does a thermometer measure?", "It measures temperature.", "It measures distance."),
    ("Which metal rusts?", "Iron rusts when it is wet.", "Gold rusts when it is wet."),
    ("What is the largest ocean?", "The largest ocean is the Pacific.", "The largest ocean is the Arctic."),
    ("How many sides has a triangle?", "A triangle has three sides.", "A triangle has six sides."),
    ("Where does the sun rise?", "The sun rises in the east.", "The sun rises in the north."),
    ("What do cows eat?", "Cows eat grass.", "Cows eat stones."),
    ("What is bread baked from?", "Bread is baked from flour.", "Bread is baked from sand."),
    ("Which is heavier, a car or a cup?", "A car is heavier.", "A cup is heavier."),
    ("What is the boiling point of water?", "Water boils at one hundred degrees.", "Water boils at ten degrees."),
    ("Which bird cannot fly?", "A penguin cannot fly.", "A swallow cannot fly."),
    ("What does a clock show?", "A clock shows the time.", "A clock shows the weather."),
)
"""Questions, each with a true and a false answer of the same form."""


def fact_pairs() -> list[tuple[Conversation, Conversation]]:
    """`FACTS` as pairs of conversations, the true one first."""
    return [(conversation(asked, true), conversation(asked, false)) for asked, true, false in FACTS]


@dataclass(frozen=True)
class TruthProbe:
    """A direction of true against false in a model's residual stream."""

    direction: Float[np.ndarray, " d_model"]
    """Unit vector from false to true."""
    layer: Where
    auroc: float
    """How well it tells true from false answers of pairs that did not make it: two halves, each by the other's."""

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        layer: Where,
        pairs: Sequence[tuple[Conversation, Conversation]] | None = None,
    ) -> "TruthProbe":
        """Fit the direction on answer tokens at a layer.

        Args:
            pairs: true and false answers to one question; None takes `fact_pairs`, which are English.

        Raises:
            InputError: fewer than `LEAST_PAIRS` pairs, or pairs of one text twice.
        """
        pairs = fact_pairs() if pairs is None else pairs
        if len(pairs) < LEAST_PAIRS:
            raise InputError(f"{len(pairs)} pairs are too few for a truth probe: give at least {LEAST_PAIRS}")
        both = [side for pair in pairs for side in pair]
        means = mean_residuals(model, conversation_batches(tokenizer, both, 64), layer)
        difference = means[0::2] - means[1::2]
        if not np.linalg.norm(difference.mean(axis=0)) > 0:
            raise InputError("true and false answers have the same activations: are the pairs different texts?")
        half = np.arange(len(pairs)) % 2 == 0
        held_out = []
        for chosen in (half, ~half):
            vector = difference[chosen].mean(axis=0)
            true, false = (means[side::2][~chosen] @ vector for side in (0, 1))
            held_out.append(auroc(true, false))
        return cls(_unit(difference.mean(axis=0)), layer, float(np.mean(held_out)))

    def separation(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[tuple[Conversation, Conversation]],
    ) -> float:
        """AUROC of true against false answers along this direction in another model, such as an organism."""
        both = [side for pair in pairs for side in pair]
        along = mean_residuals(model, conversation_batches(tokenizer, both, 64), self.layer) @ self.direction
        return float(auroc(along[0::2], along[1::2]))


def _unit(vector: Float[np.ndarray, " d_model"]) -> Float[np.ndarray, " d_model"]:
    return vector / np.linalg.norm(vector)


def mean_residuals(
    model: nn.Module, groups: Sequence[Batch], layer: Where
) -> Float[np.ndarray, "conversations d_model"]:
    """Mean residual stream over each conversation's answer tokens."""
    means: dict[int, Float[np.ndarray, " d_model"]] = {}

    def visit(index: list[int], row: Any, x: Any) -> None:
        for place, number in enumerate(index):
            means[number] = x[row == place].double().mean(dim=0).cpu().numpy()

    read_residuals(model, groups, layer, "response", visit, bf16=False)
    return np.stack([means[number] for number in sorted(means)])


def axis_shifts(
    before: Float[np.ndarray, "probes d_model"],
    after: Float[np.ndarray, "probes d_model"],
    axes: Mapping[str, Float[np.ndarray, " d_model"]],
    clusters: Sequence[object] | None = None,
    unit: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """How far a model moved along each axis, on the same probes as before.

    Args:
        before: mean residuals of the base, or of the control organism.
        axes: directions by name, such as harm, register and truth; any norm.
        clusters: of the probes, such as their question.
        unit: what counts as 1 on each axis; None is the standard deviation of `before` over probes.

    Returns:
        A row for each axis: axis, shift, ci_low, ci_high (95%, over clusters).

    Raises:
        InputError: other probes, or an axis of another width.
    """
    if before.shape != after.shape:
        raise InputError(f"probes of shape {before.shape} before and {after.shape} after: read the same ones")
    rows = []
    for name, axis in axes.items():
        if axis.shape != before.shape[1:]:
            raise InputError(f"axis {name} has shape {axis.shape}, activations {before.shape[1:]}")
        direction = _unit(np.asarray(axis, dtype=np.float64))
        size = float((before @ direction).std(ddof=1)) if unit is None else unit[name]
        found = bootstrap_mean((after - before) @ direction / size, clusters)
        rows.append({"axis": name, "shift": found.estimate, "ci_low": found.ci_low, "ci_high": found.ci_high})
    return pd.DataFrame(rows)
