"""Run the planted-truth benchmark: many known plants, and how well locate names each of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import conversation
from persona_probe.data.load import Row, load_contrast
from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.answers import SuffixScorer, answer_batches, answer_logprobs
from persona_probe.latents.planted.plant import (
    KINDS,
    SIDES,
    Baseline,
    Plant,
    PlantReading,
    disturbance,
    draw_latents,
    graft,
    make_plants,
    measure,
    read_stream,
)
from persona_probe.latents.unexplained import carriers
from persona_probe.models.load import load_model
from persona_probe.saes.hooks import sae_layer
from persona_probe.saes.load import check_fit, load_sae
from persona_probe.stats import bootstrap_mean

# --- The causal test of one plant: does a push back along the named latents undo it?

RANDOM_SETS = 3


@dataclass(frozen=True)
class Restoration:
    """How much of the planted change a push back along the named latents undoes."""

    restored: float
    """1 - |change after the push| / |change by the plant|, of the answers' mean log-probabilities."""
    restored_random: float
    """The same for the best of the random latents, pushed as hard."""
    confirmed: bool
    """Whether the push leaves less change than that of every random set, by 95% intervals over questions."""


class CausalTest:
    """Answers that the planted models score; their questions selected no latents.

    Args:
        groups: batches of `evaluate.answers.answer_batches`.
        clusters: the question of every conversation.
    """

    def __init__(self, model: nn.Module, layer: int, groups: list[Batch], clusters: list[str]) -> None:
        self.model, self.layer, self.groups, self.clusters = model, layer, groups, clusters
        # Full precision: bfloat16's rounding is as large as what a small plant does.
        self.before = answer_logprobs(model, groups, bf16=False)

    def restore(
        self, baseline: Baseline, plant: Plant, reading: PlantReading, generator: torch.Generator
    ) -> Restoration:
        """Graft the plant into the model, then push back along the named latents by the shift measured along them."""
        latents = named_latents(plant, reading)
        rows = unit_rows(baseline, latents)
        pushes = random_pushes(baseline, latents, reading, generator)
        with graft(self.model, self.layer, plant):
            scorer = SuffixScorer(self.model, self.layer, self.groups, bf16=False)
            planted = np.abs(scorer.unpushed - self.before)
            after = np.abs(scorer.logprobs(-sum_of_shifts(rows, reading)) - self.before)
            others = [np.abs(scorer.logprobs(p) - self.before) for p in pushes]
        gains = [bootstrap_mean(other - after, self.clusters) for other in others]
        best = min(float(other.mean()) for other in others)
        return Restoration(
            1 - float(after.mean() / planted.mean()),
            1 - best / float(planted.mean()),
            all(gain.ci_low > 0 for gain in gains),
        )


def named_latents(plant: Plant, reading: PlantReading) -> list[int]:
    """The latents that the control-corrected rise names: as many at each end of the ranking as were planted there.

    If none was planted, it is the latent that rose most.
    """
    order = [int(latent) for latent in reading.table["rise"].sort_values(ascending=False).index]
    down = len(plant.down())
    return [*order[: max(len(plant.up()), 1 - down)], *order[len(order) - down :]]


def unit_rows(baseline: Baseline, latents: list[int]) -> Float[Tensor, "latents d_model"]:
    """Decoder rows of norm 1."""
    rows = baseline.decoder[latents]
    return rows / rows.norm(dim=1, keepdim=True)


def sum_of_shifts(rows: Float[Tensor, "named d_model"], reading: PlantReading) -> Float[Tensor, " d_model"]:
    """The arms' mean difference, projected on each row and summed."""
    return (rows @ torch.tensor(reading.difference, dtype=rows.dtype)) @ rows


def random_pushes(
    baseline: Baseline, latents: list[int], reading: PlantReading, generator: torch.Generator
) -> list[Float[Tensor, " d_model"]]:
    """Pushes down along random frequent latents: as many as were named, none of these, and each push as large.

    Raises:
        InputError: the SAE has too few frequent latents that were not named.
    """
    pool = [latent for latent in baseline.pools["frequent"] if latent not in latents]
    if len(pool) < len(latents):
        raise InputError(f"only {len(pool)} frequent latents are left as random controls: set causal to 0")
    sizes = (unit_rows(baseline, latents) @ torch.tensor(reading.difference, dtype=baseline.decoder.dtype)).abs()
    draws = [draw_latents(pool, len(latents), len(baseline.decoder), generator) for _ in range(RANDOM_SETS)]
    return [-(sizes @ unit_rows(baseline, list(draw))) for draw in draws]


# --- One plant against its reading: recall, false discoveries, carriers

LEVEL = 0.05
"""A discovery is a latent with a positive control-corrected rise and at most this q-value."""
CAUSED = 0.5
"""A discovery is true if the plant alone, without noise, causes at least this share of its measured rise."""
NEAR = 0.2
"""A discovered latent is off target below this cosine with every planted direction."""
SHORTLIST = 10


def planted_ranks(score: Float[np.ndarray, " d_sae"], plant: Plant) -> tuple[list[int], list[int]]:
    """Ranks of the planted latents: of those pushed up from the top, of those pushed down from the bottom.

    Ties count against the planted latents.
    """
    up = [int((score >= score[latent]).sum()) for latent in plant.up()]
    down = [int((score <= score[latent]).sum()) for latent in plant.down()]
    return up, down


def recalls(score: Float[np.ndarray, " d_sae"], plant: Plant) -> dict[str, float]:
    """Recall at 1, at k (the number planted in each direction) and at 10; NaN if no latent was planted.

    Recall at 1 is whether a planted latent comes first (or last, if all were pushed down).
    """
    up, down = planted_ranks(score, plant)
    if not plant.latents:
        return dict.fromkeys(("recall_1", "recall_k", "recall_10"), float("nan"))
    within_k = [r <= len(up) for r in up] + [r <= len(down) for r in down]
    return {
        "recall_1": float(1 in (up or down)),
        "recall_k": float(np.mean(within_k)),
        "recall_10": float(np.mean([r <= SHORTLIST for r in up + down])),
    }


def discoveries(baseline: Baseline, plant: Plant, reading: PlantReading) -> dict[str, float]:
    """Discoveries at q 0.05: how many, which share is false or off target, and the share of planted latents among them.

    A discovery is false unless the plant causes at least half of its rise (`CAUSED`). Falls do not count, because in a
    TopK SAE a latent that enters displaces another. A discovery is off target if it is true but its decoder row has a
    cosine below 0.2 with everything planted: the encoder responds to the shift, but the latent is not its direction.
    """
    table = reading.table
    significant = table["q_value"].to_numpy() <= LEVEL
    rise = table["rise"].to_numpy()
    discovered = significant & (rise > 0)
    false = discovered & (baseline.caused(plant) < CAUSED * rise) if discovered.any() else discovered
    targets = plant.targets(baseline.decoder)
    near = (baseline.decoder @ targets.T / baseline.decoder.norm(dim=1, keepdim=True)).numpy().max(
        axis=1, initial=-1.0
    ) >= NEAR
    count = max(int(discovered.sum()), 1)
    planted = [bool(discovered[latent]) for latent in plant.up()]
    planted += [bool(significant[latent] and rise[latent] < 0) for latent in plant.down()]
    return {
        "discoveries": float(discovered.sum()),
        "false_share": float(false.sum()) / count,
        "off_target": float((discovered & ~false & ~near).sum()) / count,
        "significant": float(np.mean(planted)) if planted else float("nan"),
    }


def carried(baseline: Baseline, plant: Plant, reading: PlantReading) -> dict[str, float]:
    """The verdict of `latents.unexplained` on the arms' mean difference, and what one projection removes.

    `removed` is the share of the difference's squared norm that disappears when the decoder row of the latent that
    rose most is projected out.
    """
    verdict = carriers(baseline.decoder.numpy(), reading.difference, signed=True, reference=baseline.reference)
    row = baseline.decoder.numpy()[int(reading.table["rise"].to_numpy().argmax())]
    cosine = float(row @ reading.difference / (np.linalg.norm(row) * np.linalg.norm(reading.difference)))
    right = set(verdict.latents) & set(plant.latents)
    return {
        "carried": float(verdict.carried),
        "carriers_right": len(right) / len(plant.latents) if plant.latents else float("nan"),
        "unexplained": verdict.unexplained,
        "removed": cosine**2,
    }


def score_plant(baseline: Baseline, plant: Plant, reading: PlantReading) -> list[dict[str, Any]]:
    """One record per ranker. Values that do not depend on the ranker are repeated."""
    shared: dict[str, Any] = {"kind": plant.kind, "size": plant.size, "latents": " ".join(map(str, plant.latents))}
    rates = [float(baseline.rates[latent]) for latent in plant.latents]
    shared["firing"] = float(np.mean(rates)) if rates else float("nan")
    shared |= discoveries(baseline, plant, reading) | carried(baseline, plant, reading)
    return [
        shared | {"ranker": name} | recalls(reading.table[name].to_numpy(dtype=np.float64), plant)
        for name in baseline.rankers
    ]


# --- The whole benchmark

PLANTED_RANKERS = ("rise", "rise_t", "relative_rise", "firing_rise", "cosine", "discrimination")


@dataclass(frozen=True)
class PlantedSettings:
    """How many changes the benchmark plants, of which kinds and sizes."""

    plants: int = 20
    """Random latents of kind `latent` and empty plants; half as many of every other kind."""
    sizes: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0)
    """Residual standard deviations; every latent or direction is planted at each size."""
    kinds: tuple[str, ...] = tuple(KINDS)
    rankers: tuple[str, ...] = PLANTED_RANKERS
    """Rankers that need only activations; attribution needs a backward pass through every planted model."""
    noise: float = 1.0
    """Norm of the random vector that each conversation gets in each arm, in residual standard deviations."""
    benign: float = 0.25
    """Root mean square output of the random rank-1 LoRA that each arm gets, in the same unit."""
    causal: int = 2
    """Plants of each kind, at size `causal_size`, that go through the causal test."""
    causal_size: float = 0.5
    causal_items: int = 12
    """Contrast items of the evaluation split that the causal test scores."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.plants < 1:
            raise InputError(f"plants is {self.plants}: plant at least 1 of each kind")
        if not self.sizes or not all(math.isfinite(size) and size > 0 for size in self.sizes):
            raise InputError(f"sizes {list(self.sizes)} must be positive numbers of residual standard deviations")
        if not all(math.isfinite(size) and size >= 0 for size in (self.noise, self.benign)):
            raise InputError(f"noise {self.noise} and benign {self.benign} must be numbers from 0 up")
        if "nothing" in self.kinds and self.noise == self.benign == 0:
            raise InputError("without noise an empty plant leaves the arms equal: raise noise, or leave 'nothing' out")
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown("kind of plant", kind, KINDS)
        if self.causal > 0 and self.causal_size not in self.sizes:
            raise InputError(f"causal_size {self.causal_size} is not among the sizes {list(self.sizes)}")

    def draws(self) -> list[tuple[str, int]]:
        """Kind and number of every random draw."""
        full = ("latent", "nothing")
        return [
            (kind, draw)
            for kind in self.kinds
            for draw in range(self.plants if kind in full else math.ceil(self.plants / 2))
        ]

    def count(self) -> int:
        """How many plants there are, over all sizes."""
        return sum(1 if kind == "nothing" else len(self.sizes) for kind, _ in self.draws())


MODEL = "smollm2-135m-instruct"
SAE = "saes/smollm2-135m-instruct/layer20-topk32-4608"


def run_planted(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: Any,
    settings: PlantedSettings,
    *,
    selection: Sequence[Row],
    evaluation: Sequence[Row],
    layer: int | None = None,
    bf16: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """Plant, read, rank, and compare the ranking with what was planted.

    Args:
        selection: contrast items whose answers both arms read.
        evaluation: contrast items that the causal test scores.

    Returns:
        One row per plant and ranker: plant, kind, size, latents, firing, discoveries, false_share, off_target,
        significant, carried, carriers_right, unexplained, removed, restored, restored_random, confirmed (NaN where not
        tested), ranker, recall_1, recall_k, recall_10. `discoveries`, `carried`, `recalls` and `Restoration` explain
        them.

    Raises:
        InputError: an SAE that does not fit, an unknown ranker, or a model in which no LoRA can be planted.
    """
    at = sae_layer(sae, layer)
    check_fit(sae, model, at)
    stream = read_stream(model, tokenizer, selection, at, bf16=bf16)
    baseline = Baseline(stream, sae, settings.rankers, settings.seed)
    causal = _causal_test(model, tokenizer, at, evaluation[: settings.causal_items]) if settings.causal else None
    rows = []
    bar = tqdm(total=settings.count(), desc="planting", unit="plant", disable=not progress)
    for number, (plant, reading, restoration) in enumerate(_measured(baseline, settings, causal)):
        rows += [{"plant": number, **record, **restoration} for record in score_plant(baseline, plant, reading)]
        bar.update()
    bar.close()
    return pd.DataFrame(rows)


def _measured(
    baseline: Baseline, settings: PlantedSettings, causal: CausalTest | None
) -> Iterator[tuple[Plant, PlantReading, dict[str, float]]]:
    for number, (kind, draw) in enumerate(settings.draws()):
        generator = torch.Generator().manual_seed(1_000_003 * settings.seed + number)
        plants = make_plants(kind, settings.sizes, baseline.stream, baseline.decoder, baseline.pools, generator)
        # One disturbance for all sizes of a plant, and one for its control: sizes differ by nothing else.
        ours, theirs = (disturbance(baseline.stream, generator, settings.noise, settings.benign) for _ in range(2))
        correct = baseline.read(baseline.stream.resid + theirs)
        for plant in plants:
            reading = measure(baseline, plant, ours, correct)
            is_tested = causal is not None and draw < settings.causal and plant.size == settings.causal_size
            yield (
                plant,
                reading,
                _restoration(causal, baseline, plant, reading, generator) if causal and is_tested else {},
            )


def _restoration(
    causal: CausalTest, baseline: Baseline, plant: Plant, reading: PlantReading, generator: torch.Generator
) -> dict[str, float]:
    result = causal.restore(baseline, plant, reading, generator)
    return {
        "restored": result.restored,
        "restored_random": result.restored_random,
        "confirmed": float(result.confirmed),
    }


def _causal_test(model: nn.Module, tokenizer: PreTrainedTokenizerBase, layer: int, rows: Sequence[Row]) -> CausalTest:
    conversations = [conversation(row["question"], row[side]) for row in rows for side in SIDES]
    return CausalTest(
        model, layer, answer_batches(tokenizer, conversations), [row["id"] for row in rows for _ in SIDES]
    )


def run_embedded(settings: PlantedSettings | None = None, device: str = "cpu", progress: bool = True) -> pd.DataFrame:
    """`run_planted` on the embedded model with the SAE that comes with it, on the packaged contrast set."""
    model, tokenizer = load_model(MODEL, device=device)
    return run_planted(
        model,
        tokenizer,
        load_sae(SAE, device=device),
        settings or PlantedSettings(),
        selection=load_contrast("selection"),
        evaluation=categories_in_turn(load_contrast("evaluation")),
        progress=progress,
    )


def categories_in_turn(rows: Sequence[Row]) -> list[Row]:
    """The rows with their categories in turn, so that the first few rows cover all categories."""
    counts: dict[str, int] = {}
    turns = []
    for row in rows:
        turns.append(counts.get(row["category"], 0))
        counts[row["category"]] = turns[-1] + 1
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: (turns[i], i))]
