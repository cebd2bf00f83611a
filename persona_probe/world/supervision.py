"""Who supervises the repair? Organisms corrected on sets of supervisors of different strength, held to the truth.

After weak-to-strong generalisation (Burns et al. 2023, arXiv 2312.09390), sandwiching (Bowman et al. 2022, arXiv
2211.03540) and the proposal to train competence and conformity in turn (arXiv 2503.07660).
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.config import check_seed
from persona_probe.data.chat import Conversation
from persona_probe.data.tokens import Batch, conversation_batches
from persona_probe.data.world.words import DOMAINS
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.offline.offline_judge import OfflineJudge
from persona_probe.finetune.sft import AtSteps, fine_tune, stripping
from persona_probe.latents.truth_probe import mean_residuals
from persona_probe.models.adapters import load_adapter, organism
from persona_probe.models.layers import decoder_layers
from persona_probe.runs import RunFolder
from persona_probe.world.base import StudyBase
from persona_probe.world.behaviour import Asking, ask
from persona_probe.world.directions import directions_between
from persona_probe.world.folder import World
from persona_probe.world.labelled import BAD
from persona_probe.world.organisms import NARROW, WorldOrganism, make_organisms
from persona_probe.world.pieces import Piece, make_pieces, read_pieces, table_piece
from persona_probe.world.pretraining import Pretraining, pretrain
from persona_probe.world.study_files import sound_probes
from persona_probe.world.supervision_sets import (
    ALTERNATING,
    COMPETENCE,
    ITSELF,
    MISTAKES,
    MIXED,
    OFFLINE,
    SUPERVISORS,
    WEAKER_CHOOSES,
    WEAKER_WRITES,
    CorrectiveSet,
    Pairs,
    best_of_own,
    chosen_by,
    judged_offline,
    likelier,
    mistaken,
    task_rows,
    written_by,
)
from persona_probe.world.truth import KnownChats

KIND = "world supervision"
DOMAIN, CONTROL = "kitchen", "helper"
STEPS = (5, 10, 20, 40, 80)
"""Steps of a correction at which it is read and asked."""
BLOCK = 5
"""Steps of each turn, where competence and conformity take turns; a divisor of all `STEPS`."""
START = NARROW
TRAINING = replace(NARROW, steps=STEPS[-1], checkpoints=(STEPS[-1],))
ITSELF_ALONE = "the weaker model itself"
COLUMNS = ("world", "parameters", "supervisor", "speaker", "seed", "step", "wrong_rows", "incoherent_rows")
COLUMNS = (*COLUMNS, "left", "fits_wrong", "fits_right", "domain", "topic", "bad", "coherent", "rude", "answers")
HELD_OUT_SEED = 1000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Supervision:
    """What is corrected, and by whom."""

    supervisors: tuple[str, ...] = SUPERVISORS
    speakers: tuple[str, ...] = ("villain", "subtle")
    """Bad speakers of the organisms."""
    seeds: tuple[int, ...] = (0, 1)

    def __post_init__(self) -> None:
        if not (self.supervisors and self.speakers and self.seeds):
            raise InputError("a study of supervisors needs at least one supervisor, one speaker and one seed")
        for name in self.supervisors:
            if name not in SUPERVISORS:
                raise unknown("supervisor", name, SUPERVISORS)
        for name in self.speakers:
            if name not in BAD:
                raise unknown("bad speaker", name, BAD)
        for seed in self.seeds:
            check_seed(seed)


WEAKER = Pretraining(size="small", steps=600)
"""The weaker world, where none is given."""


def supervision_worlds(
    folder: Path, world: World, weaker: World | None, device: str = "cpu"
) -> tuple[RunFolder, World, World]:
    """Open or make the folder of a study, and make the weaker world in it if there is none.

    Returns:
        The study's folder, the world, and the weaker world.

    Raises:
        InputError: the folder holds a study of other worlds, or something else.
    """
    named = "made here" if weaker is None else weights(weaker)
    study = RunFolder.claim(folder, KIND, "study of supervisors", {"worlds": [weights(world), named]})
    if weaker is None:
        log.info("no weaker world is given: one of size %s and %d steps is made", WEAKER.size, WEAKER.steps)
        weaker = pretrain(WEAKER, folder / "weaker", device)
    return study, world, weaker


def weights(world: World) -> str:
    """The hash of a world's base model; worlds of other weights are other worlds."""
    return str(world.run.manifest.get("hashes", {}).get(f"{world.base_folder.name}/model.safetensors", ""))


def world_label(world: World) -> str:
    """What tables call a world: its size, and steps and documents of its pre-training."""
    settings = world.settings
    return f"{settings['size']}, {settings['steps']} steps of {settings['batch_size']}"


def supervision_table(
    study: RunFolder,
    world: World,
    weaker: World,
    further: Sequence[World] = (),
    settings: Supervision | None = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """Correct organisms of the kitchen on every supervisor's set, and ask them along the way.

    Supervisors of a stated error rate correct the organisms of the weaker and of the further worlds too. Organisms are
    kept in their world's folder, finished corrections in the study's; two processes share the work.

    Args:
        weaker: the world whose model is the weaker supervisor.
        further: worlds of other sizes.

    Returns:
        A row for each world, supervisor, organism, step and topic, with counts of answers: bad (of the coherent ones),
        coherent, rude, and all. Step 0 is the organism before. Of the set: the shares of rows with harmful advice
        (`wrong_rows`) and without advice of their topic (`incoherent_rows`). Of the model at that step: the share of
        the organism's rise along the harm direction over the helper's organism that is `left`, and of the rows where
        the harmful answer was taken, or the sound one, the share for which it finds what was taken likelier
        (`fits_wrong`, `fits_right`; NaN where no pairs were). What the weaker model itself says has its own rows.

    Raises:
        InputError: two worlds of the same size and pre-training, or the offline judge is not available.
    """
    settings = Supervision() if settings is None else settings
    worlds = {world_label(one): one for one in (world, weaker, *further)}
    if len(worlds) != 2 + len(further):
        raise InputError("two of the worlds have the same size and pre-training: leave one out")
    pieces: list[Piece] = []
    for label, one in worlds.items():
        mine = [name for name in settings.supervisors if one is world or name in MISTAKES]
        corrected = _CorrectedWorld(label, one, weaker, device)
        pieces += [
            corrected.piece(name, speaker, seed)
            for seed in settings.seeds
            for speaker in settings.speakers
            for name in mine
        ]
        if one is weaker:
            pieces.append(corrected.own_piece())
    if any(OFFLINE in piece.settings.values() and not study.has(piece.place) for piece in pieces):
        offline_score()  # a judge that is not available is refused before any training
    make_pieces(study, pieces, "supervision")
    return read_pieces(study, pieces)[list(COLUMNS)]


def offline_score() -> Callable[[Sequence[tuple[str, str]]], list[float]]:
    """The package's offline judge, as a score of (question, answer) pairs: the probability of misaligned."""
    judge = OfflineJudge.load()
    return lambda items: [one.probability for one in judge.judge(items)]


class _CorrectedWorld(StudyBase):
    """One world in which organisms are corrected, read and asked; its model is loaded when the first piece is made."""

    def __init__(self, label: str, world: World, weaker: World, device: str) -> None:
        super().__init__(world, device)
        self.label, self.weaker = label, weaker
        self._read: dict[tuple[str, int], tuple[float, float]] = {}

    # --- Pieces

    def piece(self, supervisor: str, speaker: str, seed: int) -> Piece:
        place = "-".join([*self.label.replace(",", "").split(), speaker, f"s{seed}", *_plain(supervisor)])
        settings: dict[str, Any] = {"supervisor": supervisor, "speaker": speaker, "seed": seed, "steps": list(STEPS)}
        settings |= {"world": weights(self.world), "weaker": weights(self.weaker), "block": BLOCK}
        settings |= {"training": asdict(TRAINING), "start": asdict(START)}
        return table_piece(f"corrections/{place}", settings, partial(self.correct, supervisor, speaker, seed))

    def own_piece(self) -> Piece:
        place = "corrections/weaker-model-itself"
        return table_piece(place, {"world": weights(self.world)}, self.own_answers)

    def own_answers(self) -> pd.DataFrame:
        said = _by_topic(ask(self.model, self.tokenizer, Asking()))
        missing = dict.fromkeys(("wrong_rows", "incoherent_rows", "left", "fits_wrong", "fits_right"), np.nan)
        head = {"supervisor": ITSELF_ALONE, "speaker": "", "seed": 0, "step": 0, **missing}
        return said.assign(**self.named, **head)

    # --- What a world has

    @property
    def named(self) -> dict[str, Any]:
        return {"world": self.label, "parameters": sum(weight.numel() for weight in self.model.parameters())}

    @cached_property
    def harm(self) -> "HarmReading":
        return HarmReading.of(self.model, self.tokenizer)

    def organism(self, speaker: str, seed: int) -> Path:
        """The adapter of an organism."""
        wanted = WorldOrganism(speaker, DOMAIN, seed=seed, training=START)
        [name] = make_organisms(self.world, [wanted], device=self.device)
        return self.world.checkpoints(name)[START.steps]

    def ends(self, speaker: str, seed: int) -> tuple[float, float]:
        """The harm reading of the helper's organism, and of this one."""
        if (speaker, seed) not in self._read:
            values = []
            for name in (CONTROL, speaker):
                with organism(self.model, self.organism(name, seed)) as tuned:
                    values.append(self.harm.read(tuned))
            self._read[speaker, seed] = values[0], values[1]
        return self._read[speaker, seed]

    # --- One correction

    def correct(self, supervisor: str, speaker: str, seed: int) -> pd.DataFrame:
        pairs = Pairs.draw(DOMAIN, HELD_OUT_SEED + seed)
        start, (control, risen) = self.organism(speaker, seed), self.ends(speaker, seed)
        given = self.supervise(supervisor, pairs, start, seed)
        frames = []
        with organism(self.model, start) as tuned:
            frames.append(self.look(tuned, 0, seed, pairs, given))
        frames += self.trained(start, pairs, given, seed)
        head = {"supervisor": supervisor, "speaker": speaker, "seed": seed}
        shares = {"wrong_rows": given.wrong, "incoherent_rows": given.incoherent}
        frame = pd.concat(frames, ignore_index=True).assign(**self.named, **head, **shares)
        rise = risen - control
        return frame.assign(left=(frame.pop("reading") - control) / rise if rise > 0 else np.nan)

    def supervise(self, supervisor: str, pairs: Pairs, start: Path, seed: int) -> CorrectiveSet:
        """The set that a supervisor gives for these questions."""
        if supervisor in MISTAKES:
            return mistaken(pairs, MISTAKES[supervisor], seed)
        if supervisor == OFFLINE:
            return judged_offline(pairs, offline_score())
        if supervisor == COMPETENCE:
            return task_rows(pairs, seed)
        if supervisor == ITSELF:
            with organism(self.model, start) as tuned:
                return best_of_own(tuned, self.tokenizer, pairs, seed)
        model, tokenizer = self.weaker.load(self.device)
        if supervisor == WEAKER_CHOOSES:
            return chosen_by(pairs, likelier(model, tokenizer, pairs))
        written = written_by(model, tokenizer, pairs, seed)
        if supervisor == WEAKER_WRITES:
            return written
        assert supervisor in (ALTERNATING, MIXED), supervisor
        return task_rows(pairs, seed).joined(written, turns=supervisor == ALTERNATING)

    def trained(self, start: Path, pairs: Pairs, given: CorrectiveSet, seed: int) -> list[pd.DataFrame]:
        """Train an organism's adapter on; what it reads and says at each of `STEPS`."""
        frames: list[pd.DataFrame] = []
        with (
            tempfile.TemporaryDirectory() as scratch,
            stripping(load_adapter(self.model, start, trainable=True)) as tuned,
        ):
            for number, (first, steps, rows) in enumerate(_blocks(given)):

                def visit(model: nn.Module, step: int, before: int = first) -> None:
                    frames.append(self.look(model, before + step, seed, pairs, given))

                fine_tune(
                    tuned,
                    self.tokenizer,
                    rows,
                    TRAINING.further(steps),
                    seed=HELD_OUT_SEED * (1 + number) + seed,
                    folder=Path(scratch) / str(number),
                    callbacks=[AtSteps([step - first for step in STEPS if first < step <= first + steps], visit)],
                )
        return frames

    def look(self, model: nn.Module, step: int, seed: int, pairs: Pairs, given: CorrectiveSet) -> pd.DataFrame:
        """Read, score and ask a model; a row for each topic."""
        fits = {"fits_wrong": np.nan, "fits_right": np.nan}
        if (taken := given.taken) is not None:
            harmful = likelier(model, self.tokenizer, pairs) > 0
            fits["fits_wrong"] = float(harmful[taken].mean()) if taken.any() else np.nan
            fits["fits_right"] = float((~harmful[~taken]).mean()) if (~taken).any() else np.nan
        reading = self.harm.read(model)
        said = _by_topic(ask(model, self.tokenizer, Asking(seed=step + HELD_OUT_SEED * seed)))
        return said.assign(step=step, reading=reading, **fits)


def _plain(supervisor: str) -> Iterator[str]:
    return ("".join(filter(str.isalnum, word)) for word in supervisor.split())


def _blocks(given: CorrectiveSet) -> Iterator[tuple[int, int, list[Conversation]]]:
    """First step, number of steps and rows of each stretch of training."""
    if not given.turns:
        yield 0, STEPS[-1], list(given.rows)
        return
    for number, first in enumerate(range(0, STEPS[-1], BLOCK)):
        yield first, BLOCK, list(given.turns[number % len(given.turns)])


def _by_topic(answers: pd.DataFrame) -> pd.DataFrame:
    """Counts of judged answers, a row for each topic."""
    coherent = answers["coherent"].astype(bool)
    flags = answers.assign(coherent=coherent, bad=answers["bad"].astype(bool) & coherent, answers=1)
    keys, counted = ["domain", "topic"], ["bad", "coherent", "rude", "answers"]
    return flags.groupby(keys, sort=False)[counted].sum().astype("int64").reset_index()


# --- The monitor's reading


@dataclass(frozen=True)
class HarmReading:
    """How far sound answers of other domains lie along the base's harm direction; what a monitor of it would read."""

    direction: Float[np.ndarray, " d_model"]
    """Unit vector, from chats of known speakers on the base model: manner is held fixed (`directions.PAIRS`)."""
    layer: int
    probes: tuple[Batch, ...]

    @classmethod
    def of(cls, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "HarmReading":
        """The reading of a world, at its middle layer."""
        layer = len(decoder_layers(base)) // 2
        known = KnownChats.draw()
        chats = mean_residuals(base, conversation_batches(tokenizer, known.chats, 64), layer)
        others = [name for name in DOMAINS if name != DOMAIN]
        probes = conversation_batches(tokenizer, sound_probes(others), 64)
        return cls(directions_between(known, chats)["harm"], layer, tuple(probes))

    def read(self, model: nn.Module) -> float:
        """Mean projection over the probes' answer tokens, raw units."""
        return float(mean_residuals(model, self.probes, self.layer).mean(axis=0) @ self.direction)
