"""What every stress test works with: a corrected organism, what it came from, and training that leaves no trace."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import nn

from persona_probe.config import Training
from persona_probe.context import Context
from persona_probe.data.chat import Conversation
from persona_probe.data.load import arm_rows
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.finetune.sft import AtSteps, fine_tune, stripping, with_adapter
from persona_probe.models.adapters import frozen_in_bf16, merged_copy, organism
from persona_probe.realignment.methods import organism_to_train

ROLES = ("base", "organism", "repaired", "control")
"""The base model, the misaligned organism, the corrected one, and the arm that learned good answers only.

The corrected one is called `repaired` in the files of all releases: stress.parquet, saved adapters, figures.
"""


@dataclass(frozen=True, eq=False)
class CorrectedOrganism:
    """A corrected organism of a study."""

    ctx: Context
    arm: str
    """Its name: a corrective arm of the config, or the name of a correction."""
    seed: int
    checkpoint: Path
    """Folder of its adapter or weights."""
    corrective: tuple[Conversation, ...]
    """The rows it was corrected with."""

    @classmethod
    def of(
        cls,
        ctx: Context,
        arm: str,
        seed: int,
        checkpoint: Path | None = None,
        corrective: Sequence[Conversation] | None = None,
    ) -> "CorrectedOrganism":
        """A corrective arm of the config; any other correction needs its checkpoint and its rows.

        Raises:
            InputError: an unknown arm without both, a seed that was not trained, or no corrective rows.
        """
        arms = ctx.config.realign.arms
        if arm not in arms and (checkpoint is None or corrective is None):
            raise unknown("corrective arm", arm, arms)
        folder = checkpoint or ctx.run.checkpoint(arm, seed, ctx.last_step(arm, seed))
        rows = tuple(arm_rows(arms[arm], seed) if corrective is None else corrective)
        if folder is None or not rows:
            raise InputError(f"{arm}, seed {seed}, is no correction: it has no corrective step or no corrective rows")
        return cls(ctx, arm, seed, folder, rows)

    @property
    def steps(self) -> int:
        """Corrective steps taken: what the checkpoint's name says, else the config's."""
        match = re.fullmatch(r"checkpoint-(\d+)", self.checkpoint.name)
        return int(match[1]) if match else self.ctx.config.realign.steps

    def training(self, steps: int) -> Training:
        """The config's corrective training, for `steps` steps."""
        realign = self.ctx.config.realign
        return self.ctx.config.training.further(steps, realign.batch_size, realign.lr)

    @property
    def inducing(self) -> list[Conversation]:
        """The rows that made the organism."""
        return arm_rows(self.ctx.config.arms[self.ctx.config.realign.start], self.seed)

    @property
    def control_rows(self) -> list[Conversation]:
        """What the control arm learned: good answers of the narrow domain."""
        arm = self.ctx.config.arms.get("correct")
        return [] if arm is None else arm_rows(arm, self.seed)

    def folder(self, role: str) -> Path | None:
        """The checkpoint of a role; None for the base.

        Raises:
            InputError: an unknown role.
        """
        if role not in ROLES:
            raise unknown("role", role, ROLES)
        if role in ("base", "repaired"):
            return None if role == "base" else self.checkpoint
        arm = self.ctx.config.realign.start if role == "organism" else self.ctx.config.control
        if arm == "base":
            return None
        return self.ctx.run.checkpoint(arm, self.seed, self.ctx.last_step(arm, self.seed))

    @contextmanager
    def model(self, role: str) -> Iterator[nn.Module]:
        """One of `ROLES`, ready to be measured while the block lasts."""
        in_bf16 = self.ctx.device == "cpu" and self.ctx.config.bf16
        with organism(self.ctx.model, self.folder(role)) as model, frozen_in_bf16(model, in_bf16):
            yield model

    def score(self, model: nn.Module, items: ContrastItems | None = None) -> pd.DataFrame:
        """Item table on the evaluation split, or on `items`."""
        return contrast_index(model, items or self.ctx.evaluation, bf16=self.ctx.config.bf16)


def continued(corrected: CorrectedOrganism, role: str) -> AbstractContextManager[nn.Module]:
    """A role's own adapter (or weights) made trainable; the base model is as before when the block ends."""
    folder, training = corrected.folder(role), corrected.ctx.config.training
    assert folder is not None
    return stripping(organism_to_train(corrected.ctx.model, folder, "continued", training, corrected.seed))


def relearner(corrected: CorrectedOrganism, role: str, training: Training, seed: int) -> nn.Module:
    """A copy of a role with its adapter merged in, and a fresh one on top (full weights: the copy, trainable).

    The same fresh adapter for every role: training on an adapter that is in use already would be faster by itself.
    """
    return with_adapter(merged_copy(corrected.ctx.model, corrected.folder(role)), training, seed)


def train(
    corrected: CorrectedOrganism,
    model: nn.Module,
    rows: Sequence[Conversation],
    training: Training,
    seed: int,
    name: str,
    visit: AtSteps | None = None,
) -> None:
    """Train `model` in a scratch folder; `visit` reads it on the way."""
    with tempfile.TemporaryDirectory() as scratch:
        fine_tune(
            model,
            corrected.ctx.tokenizer,
            rows,
            training.further(training.steps),
            seed=seed,
            folder=Path(scratch),
            callbacks=[] if visit is None else [visit],
            progress=name,
        )
