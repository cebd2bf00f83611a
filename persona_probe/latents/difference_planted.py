"""Do tools that need no latent of the base find what was planted, and do they find it better than simple rankers?"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from persona_probe.data.load import Row
from persona_probe.errors import InputError, unknown
from persona_probe.latents.crosscoder import RANKINGS, RECIPE, crosscoder
from persona_probe.latents.difference import (
    DictionaryRecipe,
    FoundDirections,
    difference_dictionary,
    mean_difference,
)
from persona_probe.latents.planted.plant import KINDS, Baseline, Plant, Stream, make_plants, read_stream
from persona_probe.latents.weights import WeightChange, weight_directions
from persona_probe.report.tables import Table
from persona_probe.saes.hooks import sae_layer
from persona_probe.saes.load import check_fit
from persona_probe.stats import bootstrap_mean

SIMPLE = ("mean difference", "rise", "cosine")
"""What each new tool is held against: no dictionary, and the base's dictionary by two rankers."""
NEW = ("difference dictionary", *(f"crosscoder, {name}" for name in RANKINGS), "weights")
FOUND = 0.7
"""|Cosine| with a planted direction from which it counts as found."""
FIRST = 10
PLANTED = tuple(kind for kind in KINDS if kind != "nothing")


@dataclass(frozen=True)
class BeyondSettings:
    """What is planted, and how the dictionaries are trained."""

    plants: int = 6
    """Random draws of every kind."""
    sizes: tuple[float, ...] = (0.25, 0.5)
    """Residual standard deviations."""
    kinds: tuple[str, ...] = PLANTED
    noise: float = 1.0
    """Norm of the random vector that each conversation gets in each arm, in residual standard deviations."""
    benign: float = 0.25
    """Root mean square output of the random rank-1 LoRA that each arm gets, in the same unit."""
    dictionary: DictionaryRecipe = field(default_factory=DictionaryRecipe)
    crosscoder: DictionaryRecipe = RECIPE
    seed: int = 0

    def __post_init__(self) -> None:
        if self.plants < 2:
            raise InputError(f"plants is {self.plants}: plant at least 2 of each kind, or nothing can be compared")
        if not self.sizes or not all(math.isfinite(size) and size > 0 for size in self.sizes):
            raise InputError(f"sizes {list(self.sizes)} must be positive numbers of residual standard deviations")
        for kind in self.kinds:
            if kind not in PLANTED:
                raise unknown("kind of plant", kind, PLANTED)


@dataclass(frozen=True)
class Arm:
    """One arm's residual stream at the base's tokens, and the changes of `mlp.down_proj` that made part of it."""

    resid: Float[Tensor, "tokens d_model"]
    change: WeightChange


def run_beyond(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: Any,
    rows: Sequence[Row],
    settings: BeyondSettings | None = None,
    *,
    layer: int | None = None,
    bf16: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """Plant changes, let every tool name directions, and compare them with what was planted.

    Both arms have noise and a random LoRA of their own, as in `bench planted`.

    Returns:
        A row for each plant and tool: plant, kind, size, tool, first (|cosine| of its first direction with the nearest
        planted one) and ten (the best of its first ten). `weights` reads only plants that are a change of weights.

    Raises:
        InputError: an SAE that does not fit, or a model in which no LoRA can be planted.
    """
    settings = BeyondSettings() if settings is None else settings
    at = sae_layer(sae, layer)
    check_fit(sae, model, at)
    stream = read_stream(model, tokenizer, rows, at, bf16=bf16)
    baseline = Baseline(stream, sae, ("rise", "cosine"), settings.seed)
    records: list[dict[str, Any]] = []
    total = settings.plants * len(settings.kinds) * len(settings.sizes)
    with tqdm(total=total, desc="planting", unit="plant", disable=not progress) as bar:
        for number, (plant, tuned, control) in enumerate(_arms(baseline, settings)):
            targets = plant.targets(baseline.decoder).double().numpy()
            for tool, found in named_directions(baseline, plant, tuned, control, settings).items():
                near = found.cosines(targets, FIRST)
                head = {"plant": number, "kind": plant.kind, "size": plant.size, "tool": tool}
                records.append({**head, "first": float(near[0]), "ten": float(near.max())})
            bar.update()
    return pd.DataFrame(records)


def _arms(baseline: Baseline, settings: BeyondSettings) -> Iterator[tuple[Plant, Arm, Arm]]:
    draws = [(kind, draw) for kind in settings.kinds for draw in range(settings.plants)]
    for number, (kind, _) in enumerate(draws):
        generator = torch.Generator().manual_seed(1_000_003 * settings.seed + number)
        plants = make_plants(kind, settings.sizes, baseline.stream, baseline.decoder, baseline.pools, generator)
        ours, theirs = (disturbed(baseline.stream, generator, settings) for _ in range(2))
        for plant in plants:
            change = ours.change
            if plant.reader is not None:
                more = WeightChange(plant.vector[:, None], plant.reader[None])
                change = WeightChange(torch.cat([change.up, more.up], 1), torch.cat([change.down, more.down], 0))
            yield plant, Arm(ours.resid + plant.shift(baseline.stream), change), theirs


def disturbed(stream: Stream, generator: torch.Generator, settings: BeyondSettings) -> Arm:
    """The base's stream with one arm's noise and its random LoRA, as `planted.plant.disturbance` draws them."""
    width = stream.resid.shape[1]
    noise = torch.randn(len(stream.clusters), width, generator=generator) * (settings.noise * stream.sd / width**0.5)
    reader = torch.randn(stream.hidden.shape[1], generator=generator)
    output = stream.hidden @ reader
    scale = settings.benign * stream.sd / float(output.square().mean().sqrt())
    vector = torch.randn(width, generator=generator)
    change = WeightChange((vector / vector.norm())[:, None] * scale, reader[None])
    lora = (stream.hidden @ change.down.T) @ change.up.T
    return Arm(stream.resid + noise[stream.conversation] + lora, change)


def named_directions(
    baseline: Baseline, plant: Plant, tuned: Arm, control: Arm, settings: BeyondSettings
) -> dict[str, FoundDirections]:
    """What every tool names in the incorrect arm against the control."""
    conversation = baseline.stream.conversation
    reading = baseline.rank(baseline.read(tuned.resid), baseline.read(control.resid))
    decoder = baseline.decoder.double().numpy()
    found = {"mean difference": mean_difference(tuned.resid, control.resid, conversation)}
    for name in ("rise", "cosine"):
        scores = reading.table[name].to_numpy(dtype=np.float64)
        found[name] = FoundDirections.ranked(decoder, np.nan_to_num(scores, nan=-np.inf))
    found["difference dictionary"] = difference_dictionary(
        tuned.resid, control.resid, conversation, settings.dictionary
    )
    crossed = crosscoder(tuned.resid, control.resid, conversation, settings.crosscoder)
    found |= {f"crosscoder, {name}": one for name, one in crossed.items()}
    if plant.reader is not None:
        found["weights"] = weight_directions({"down_proj": tuned.change}, {"down_proj": control.change})
    return found


# --- The tables


def beyond_text(table: pd.DataFrame) -> str:
    """How near each tool comes by kind and size, and whether it beats the best simple ranker: Markdown.

    Raises:
        InputError: the table has no rows, or is not from `run_beyond`.
    """
    if table.empty or not {"plant", "kind", "size", "tool", "first", "ten"} <= set(table.columns):
        raise InputError("no planted directions to show: give the table that run_beyond returns")
    groups = [
        (kind, float(size), table[(table["kind"] == kind) & (table["size"] == size)])
        for kind in PLANTED
        for size in sorted(table.loc[table["kind"] == kind, "size"].unique())
    ]
    tools = [name for name in (*SIMPLE, *NEW) if name in set(table["tool"])]
    heads = [f"{KINDS[kind]}, {size:g} sd" for kind, size, _ in groups]
    near = [[name, *(_near(group[group["tool"] == name]) for _, _, group in groups)] for name in tools]
    gains = [[name, *(_gain(group, name) for _, _, group in groups)] for name in tools if name in NEW]
    parts = [NEAR, Table(["tool", *heads], near).markdown(), GAIN, Table(["tool", *heads], gains).markdown()]
    return "\n\n".join(parts) + "\n"


NEAR = (
    f"Mean |cosine| of the first direction with the nearest planted one; in brackets of the best of the first {FIRST}, "
    f"and in how many plants the first was found (at least {FOUND:g})."
)
GAIN = (
    "First direction: |cosine| minus that of the simple ranker that is best there on average, with its 95% interval "
    "over plants. **Bold**: above zero."
)


def _near(rows: pd.DataFrame) -> str:
    if rows.empty:
        return "-"
    return f"{rows['first'].mean():.2f} ({rows['ten'].mean():.2f}, {(rows['first'] >= FOUND).sum()} of {len(rows)})"


def _gain(group: pd.DataFrame, tool: str) -> str:
    rows = group.pivot(index="plant", columns="tool", values="first")
    if tool not in rows:
        return "-"
    simple = rows[[name for name in SIMPLE if name in rows]]
    found = bootstrap_mean((rows[tool] - simple[simple.mean().idxmax()]).to_numpy(np.float64), list(rows.index))
    text = f"{found.estimate:+.2f} [{found.ci_low:+.2f}, {found.ci_high:+.2f}]"
    return f"**{text}**" if found.ci_low > 0 else text
