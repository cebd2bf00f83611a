"""The planted-truth benchmark: many known plants, one table of what locate finds of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import conversation
from persona_probe.data.packaged import Row, load_contrast
from persona_probe.evaluate.answers import answer_batches
from persona_probe.models.load import load_model
from persona_probe.planted.bed import Bed, Found, measure
from persona_probe.planted.causal import CausalBed
from persona_probe.planted.draw import disturbance, make_plants
from persona_probe.planted.measure import scores
from persona_probe.planted.plants import Plant
from persona_probe.planted.settings import Bench
from persona_probe.planted.stream import SIDES, read_stream
from persona_probe.saes.load import check_fit, load_sae, sae_layer

MODEL = "smollm2-135m-instruct"
SAE = "saes/smollm2-135m-instruct/layer20-topk32-4608"


def run_planted(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: Any,
    bench: Bench,
    *,
    selection: Sequence[Row],
    evaluation: Sequence[Row],
    layer: int | None = None,
    mixed_precision: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """Plant, read, rank, and compare with what was planted.

    Args:
        selection: contrast items whose answers are read, by both arms: the pairs that the test is paired by.
        evaluation: contrast items that the causal test scores.

    Returns:
        One row per plant and ranker: plant, kind, size, latents, firing, discoveries, false_share, off_target,
        significant, carried, carriers_right, unexplained, removed, restored, restored_random, confirmed (NaN where not
        tested), ranker, recall_1, recall_k, recall_10. See `planted.measure` and `planted.causal` for their meaning.

    Raises:
        InputError: an SAE that does not fit, an unknown ranker, or a model in which no LoRA can be planted.
    """
    at = sae_layer(sae) if layer is None else layer
    check_fit(sae, model, at)
    stream = read_stream(model, tokenizer, selection, at, mixed_precision=mixed_precision)
    bed = Bed(stream, sae, bench.rankers, bench.seed)
    causal = _causal_bed(model, tokenizer, at, evaluation[: bench.causal_items]) if bench.causal else None
    rows = []
    bar = tqdm(total=bench.count(), desc="planting", unit="plant", disable=not progress)
    for number, (plant, found, repair) in enumerate(_measured(bed, bench, causal)):
        rows += [{"plant": number, **record, **repair} for record in scores(bed, plant, found)]
        bar.update()
    bar.close()
    return pd.DataFrame(rows)


def _measured(bed: Bed, bench: Bench, causal: CausalBed | None) -> Iterator[tuple[Plant, Found, dict[str, float]]]:
    for number, (kind, draw) in enumerate(bench.draws()):
        generator = torch.Generator().manual_seed(1_000_003 * bench.seed + number)
        plants = make_plants(kind, bench.sizes, bed.stream, bed.decoder, bed.pools, generator)
        # One disturbance for all sizes of a plant, and one for its control: sizes differ by nothing else.
        ours, theirs = (disturbance(bed.stream, generator, bench.noise, bench.benign) for _ in range(2))
        correct = bed.read(bed.stream.resid + theirs)
        for plant in plants:
            found = measure(bed, plant, ours, correct)
            tested = causal is not None and draw < bench.causal and plant.size == bench.causal_size
            yield plant, found, _repair(causal, bed, plant, found, generator) if causal and tested else {}


def _repair(causal: CausalBed, bed: Bed, plant: Plant, found: Found, generator: torch.Generator) -> dict[str, float]:
    result = causal.repair(bed, plant, found, generator)
    return {
        "restored": result.restored,
        "restored_random": result.restored_random,
        "confirmed": float(result.confirmed),
    }


def _causal_bed(model: nn.Module, tokenizer: PreTrainedTokenizerBase, layer: int, rows: Sequence[Row]) -> CausalBed:
    talks = [conversation(row["question"], row[side]) for row in rows for side in SIDES]
    return CausalBed(model, layer, answer_batches(tokenizer, talks), [row["id"] for row in rows for _ in SIDES])


def run_embedded(bench: Bench | None = None, device: str = "cpu", progress: bool = True) -> pd.DataFrame:
    """`run_planted` on the embedded model with the SAE that comes with it, on the packaged contrast set."""
    model, tokenizer = load_model(MODEL, device=device)
    return run_planted(
        model,
        tokenizer,
        load_sae(SAE, device=device),
        bench or Bench(),
        selection=load_contrast("selection"),
        evaluation=spread_out(load_contrast("evaluation")),
        progress=progress,
    )


def spread_out(rows: Sequence[Row]) -> list[Row]:
    """The rows with categories in turn, so that the first few cover all of them."""
    seen: dict[str, int] = {}
    turns = []
    for row in rows:
        turns.append(seen.get(row["category"], 0))
        seen[row["category"]] = turns[-1] + 1
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: (turns[i], i))]
