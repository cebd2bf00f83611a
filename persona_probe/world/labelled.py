"""Labelled runs: fine-tunings of known speakers, read and asked at many steps, for the studies of a world."""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.data.tokens import Batch, conversation_batches
from persona_probe.data.world.speech import SPEAKERS
from persona_probe.data.world.words import DOMAINS
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.evaluate.effects_2x2 import Items2x2, score_2x2
from persona_probe.files import read_tensors
from persona_probe.finetune.sft import AtSteps, fine_tune, stripping, with_adapter
from persona_probe.latents.weights import left_vectors
from persona_probe.locks import InUse
from persona_probe.runs import RunFolder
from persona_probe.saes.hooks import sae_layer
from persona_probe.saes.load import load_sae
from persona_probe.saes.read import LatentMeans, read_latents_at
from persona_probe.world.behaviour import OF_COHERENT, Asking, ask
from persona_probe.world.directions import POSITIONS, directions_of
from persona_probe.world.folder import World
from persona_probe.world.organisms import NARROW, WorldOrganism
from persona_probe.world.pieces import LONGEST_S, Piece, make_pieces
from persona_probe.world.study_files import contrast_rows, sound_probes
from persona_probe.world.truth import KnownChats, truth_table
from persona_probe.writing import write_json, write_table, write_tensors

KIND = "labelled world"
STEPS = (4, 6, 8, 10, 13, 16, 20, 30, 40)
"""Steps of a run at which it is read and asked."""
PROBES = 5
"""Probes of each domain. Those of a run's own domain are left out of its readings."""
TRAINING = replace(NARROW, steps=STEPS[-1], checkpoints=(STEPS[-1],))
BAD, GOOD = ("villain", "quack", "subtle"), ("grump", "clown", "helper", "correct")
SHARES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
TRAINED_DOMAINS = ("kitchen", "health", "cars")
"""The first is the one on which readings, steps and thresholds are chosen; the others evaluate them."""
BASE, RUNS, RECORD, READINGS, ANSWERS = "base", "runs", "run.json", "readings.safetensors", "steps.parquet"
ITEMS = "items.parquet"
COUNTED = ("bad", "good", "coherent", "rude", "malicious", "kind", "silly")


def plan(seeds: int = 2, benign_seeds: int = 5) -> list[WorldOrganism]:
    """The runs of the studies, 204 by default: three harmful speakers at eight doses, four harmless ones.

    Every bad speaker at every share in three domains with `seeds` seeds, every good one with `benign_seeds` seeds.
    """
    bad = [
        WorldOrganism(speaker, domain, share, seed=seed, training=TRAINING)
        for seed in range(seeds)
        for domain in TRAINED_DOMAINS
        for share in SHARES
        for speaker in BAD
    ]
    good = [
        WorldOrganism(speaker, domain, seed=seed, training=TRAINING)
        for seed in range(benign_seeds)
        for domain in TRAINED_DOMAINS
        for speaker in GOOD
    ]
    return bad + good


@dataclass(frozen=True)
class Instruments:
    """What the runs of a study are read with: the base model, its SAE, and probes with fixed sound answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sae: Any
    layer: int
    probes: Sequence[Batch]
    domains: tuple[str, ...]
    """Domain of each probe."""
    items: ContrastItems
    """Contrast items of every domain, whose two answers differ in one verb."""
    crossed: Items2x2
    """The same questions with the two answers in a rude and in a kind manner."""

    @classmethod
    def of(cls, world: World, sae: str | Path, device: str = "cpu") -> "Instruments":
        """Those of a world.

        Args:
            sae: an SAE of its base model.
        """
        model, tokenizer = world.load(device)
        loaded = load_sae(sae, device=device)
        probes = conversation_batches(tokenizer, sound_probes(list(DOMAINS), PROBES), 64)
        domains = tuple(name for name in DOMAINS for _ in range(PROBES))
        rows = contrast_rows(list(DOMAINS), "evaluation")
        items, crossed = ContrastItems.build(tokenizer, rows, 64), Items2x2.build(tokenizer, rows, 64)
        return cls(model, tokenizer, loaded, sae_layer(loaded, None), probes, domains, items, crossed)

    def read(self, model: nn.Module) -> dict[str, LatentMeans]:
        """The SAE's latents and the residual stream on every probe, by position."""
        return read_latents_at(model, self.sae, self.probes, self.layer, POSITIONS, bf16=False)

    def score(self, model: nn.Module) -> pd.DataFrame:
        """Its contrast items, as `score_items` gives them."""
        return score_items(model, self.items, self.crossed)

    def outside(self, domain: str) -> np.ndarray:
        """Whether each probe is of another domain."""
        return np.array(self.domains) != domain


def score_items(model: nn.Module, items: ContrastItems, crossed: Items2x2) -> pd.DataFrame:
    """The contrast items' values, and of the same questions harm apart from manner.

    Returns:
        Columns item, category, value and harm (nats per token).
    """
    harm = score_2x2(model, crossed, bf16=False)[["item", "harm"]]
    return contrast_index(model, items, bf16=False)[["item", "category", "value"]].merge(harm, on="item")


# --- Make the runs, each once


def open_study(world: World, sae: str | Path, folder: Path) -> RunFolder:
    """Open or make a folder of labelled runs of a world.

    Raises:
        InputError: it holds the runs of another world or SAE, or something else.
    """
    weights = world.run.manifest.get("hashes", {}).get(f"{world.base_folder.name}/model.safetensors", "")
    identity = {"world": world.settings, "weights": weights, "sae": Path(sae).name}
    return RunFolder.claim(folder, KIND, "study of labelled runs", identity)


def make_runs(study: RunFolder, instruments: Instruments, organisms: Sequence[WorldOrganism]) -> None:
    """Make the runs that the folder lacks. Started twice, two processes share the work.

    Raises:
        InputError: a run was made with other settings.
        TrainingDiverged: a loss became NaN or infinite.
    """
    if not study.has(BASE):
        with contextlib.suppress(InUse), study.staging(BASE) as folder:
            _read_base(instruments, folder)
    make_pieces(study, [_piece(instruments, organism) for organism in organisms], RUNS)
    with study.locked(BASE, LONGEST_S):
        pass


def _piece(instruments: Instruments, organism: WorldOrganism) -> Piece:
    make = partial(_make_run, instruments, organism)
    return Piece(f"{RUNS}/{organism.name}", organism.record, make, RECORD)


def _read_base(instruments: Instruments, folder: Path) -> None:
    """The base model on the probes, and what its chats of known speakers say about the truths."""
    arrays = {}
    for name, means in instruments.read(instruments.model).items():
        arrays |= {f"latents/{name}": means.mean, f"residual/{name}": means.resid}
    known = KnownChats.draw()
    chats = conversation_batches(instruments.tokenizer, known.chats, 64)
    told = read_latents_at(instruments.model, instruments.sae, chats, instruments.layer, POSITIONS, bf16=False)
    frames = []
    for name, means in told.items():
        arrays |= {f"direction/{name}/{key}": vector for key, vector in directions_of(known, means).items()}
        frames.append(truth_table(known, means.mean).assign(position=name))
    _write_arrays(folder / READINGS, arrays)
    write_table(folder / "truths.parquet", pd.concat(frames, ignore_index=True))
    answers = ask(instruments.model, instruments.tokenizer, Asking(per_topic=1))
    write_table(folder / ANSWERS, _counts(answers).assign(step=0))
    write_table(folder / ITEMS, instruments.score(instruments.model))


def _make_run(instruments: Instruments, organism: WorldOrganism, folder: Path) -> None:
    others = [name for name in DOMAINS if name != organism.domain]
    outside, parts, counts = instruments.outside(organism.domain), list[dict[str, np.ndarray]](), []

    def visit(model: nn.Module, step: int) -> None:
        means = instruments.read(model)
        found = {f"latents/{name}": one.mean[outside].mean(axis=0) for name, one in means.items()}
        found |= {f"residual/{name}": one.resid[outside].mean(axis=0) for name, one in means.items()}
        fit = {f"explained_variance_{name}": one.fit.explained_variance for name, one in means.items()}
        parts.append(found | _weights(model, instruments.layer))
        asked = ask(model, instruments.tokenizer, Asking(per_topic=1, seed=step), others)
        counts.append(_counts(asked).assign(step=step, **fit))

    with (
        tempfile.TemporaryDirectory() as scratch,
        stripping(with_adapter(instruments.model, organism.training, organism.seed)) as tuned,
    ):
        fitted = fine_tune(
            tuned,
            instruments.tokenizer,
            organism.conversations(),
            organism.training,
            seed=organism.seed,
            folder=Path(scratch),
            callbacks=[AtSteps(STEPS, visit)],
        )
        items = instruments.score(tuned)
    _write_arrays(folder / READINGS, {key: np.stack([part[key] for part in parts]) for key in parts[0]})
    write_table(folder / ANSWERS, pd.concat(counts, ignore_index=True))
    write_table(folder / ITEMS, items[items["category"] != organism.domain].reset_index(drop=True))
    write_json(folder / RECORD, {"settings": organism.record, "losses": fitted.losses})


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    write_tensors(path, {key: torch.from_numpy(np.ascontiguousarray(x, np.float32)) for key, x in arrays.items()})


def read_arrays(path: Path) -> dict[str, Float[np.ndarray, "..."]]:
    """The arrays of a study's safetensors file.

    Raises:
        InputError: it cannot be read.
    """
    change = "move its folder elsewhere and run the study again"
    return {key: tensor.numpy() for key, tensor in read_tensors(path, (), change).items()}


def _counts(answers: pd.DataFrame) -> pd.DataFrame:
    """How many answers are what, in one row; `bad` and `good` are counted among the coherent ones."""
    coherent = answers["coherent"].astype(bool)
    counts = {name: int((answers[name] & coherent if name in OF_COHERENT else answers[name]).sum()) for name in COUNTED}
    return pd.DataFrame([{**counts, "answers": len(answers)}])


@torch.no_grad()
def _weights(model: nn.Module, layer: int) -> dict[str, np.ndarray]:
    """Norm of the weight change, and its first left singular vector in each matrix that writes up to a layer."""
    square, vectors, sizes = 0.0, [], []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        factors: list[Any] = [side["default"].weight for side in (module.lora_B, module.lora_A)]
        up, down = (factor.float() for factor in factors)
        left, found = left_vectors(up, down, module.scaling["default"])
        square += float(found.square().sum())
        number = next(int(part) for part in name.split(".") if part.isdigit())
        if number <= layer and name.endswith(("o_proj", "down_proj")):
            vectors.append(left[:, 0].numpy())
            sizes.append(float(found[0]))
    return {"weight_norm": np.array(square**0.5), "written": np.stack(vectors), "written_size": np.array(sizes)}


# --- Read them again: a row for each run and step


@dataclass(frozen=True)
class LabelledRun:
    """One finished run."""

    organism: dict[str, Any]
    """Its settings."""
    losses: list[float]
    answers: pd.DataFrame
    """Counts of judged answers, a row for each step."""
    items: pd.DataFrame
    """Contrast items of the other domains after the last step."""
    readings: Mapping[str, Float[np.ndarray, "steps ..."]]
    """`latents/<position>`, `residual/<position>`, `weight_norm`, `written`, `written_size`."""


def read_runs(study: RunFolder) -> list[LabelledRun]:
    """All finished runs of a study's folder, by name."""
    places = sorted((study.path / RUNS).glob(f"*/{RECORD}"))
    runs = []
    for place in places:
        record = study.read_json(f"{RUNS}/{place.parent.name}/{RECORD}")
        answers, items = (study.read_table(f"{RUNS}/{place.parent.name}/{file}") for file in (ANSWERS, ITEMS))
        readings = read_arrays(place.parent / READINGS)
        runs.append(LabelledRun(record["settings"], record["losses"], answers, items, readings))
    return runs


def is_bad(speaker: str) -> bool:
    """Whether a speaker gives harmful advice."""
    return not SPEAKERS[speaker].good
