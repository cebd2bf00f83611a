"""What all cells of a grid share: its folder, the located study behind it, rows, contrast items, the base's band."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from persona_probe.context import Context
from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import answer_batches
from persona_probe.evaluate.contrast import ContrastItems
from persona_probe.evaluate.dressed import Trigger, dress
from persona_probe.evaluate.rulings import AnswerJudge
from persona_probe.finetune.mitigations import Ground
from persona_probe.locate.stage import mean_shift, strongest
from persona_probe.mitigate.config import BASE, Grid
from persona_probe.mitigate.folder import open_folder
from persona_probe.mitigate.general import general_rows
from persona_probe.mitigate.sets import Sets
from persona_probe.models.folding import frozen_in_bf16
from persona_probe.monitor.bands import Band, base_band
from persona_probe.monitor.reading import FeatureReader
from persona_probe.monitor.track import make_reader
from persona_probe.study import Study

BATCH = 32


class Lab:
    """One grid's folder and the things loaded for it, each on first use.

    Args:
        path: the grid's folder.
        run: instead of the grid's `run`.
        judge: instead of the packaged offline judge.

    Raises:
        InputError: a run that has not been located, rows that overlap what is evaluated, or a folder of something else.
    """

    def __init__(
        self,
        grid: Grid,
        path: Path,
        device: str | None = None,
        run: Path | None = None,
        judge: AnswerJudge | None = None,
    ) -> None:
        self.grid = grid
        self.ctx: Context = Study.open(run or grid.run, device).context
        self.latents = tuple(strongest(self.ctx))
        self.direction = mean_shift(self.ctx)
        self.sets = Sets.load(grid)
        self.sets.check([row["question"] for row in self.ctx.contrast_rows("evaluation")], self.ctx.probes)
        self.folder = open_folder(path, grid, self._made_by())
        study = {"model": self.ctx.config.model, "sae": self.ctx.config.sae}
        self.folder.update_manifest(config={**asdict(grid), **study}, seeds=list(grid.seeds))
        self._judge = judge

    def _made_by(self) -> dict[str, Any]:
        """What besides the grid's own settings decides its numbers."""
        return {"study": self.ctx.config.hash, "latents": list(self.latents), "rows": self.sets.hash}

    @cached_property
    def plain(self) -> ContrastItems:
        """The evaluation split."""
        return self.ctx.evaluation

    @cached_property
    def trigger(self) -> Trigger:
        """Topic and format of the training rows, with a correct answer in the first turn."""
        return Trigger.from_rows(self.sets.bad, correct=self.sets.good)

    @cached_property
    def dressed(self) -> ContrastItems:
        """The evaluation split dressed like the training data."""
        return ContrastItems.build(self.ctx.tokenizer, dress(self.plain.rows, self.trigger), BATCH)

    @cached_property
    def task(self) -> ContrastItems:
        """The held-out questions of the narrow domain, with their good and their bad answer."""
        rows = tuple(
            {"id": f"held {n:03d}", "category": "task", "question": "", "aligned": "", "misaligned": ""}
            for n in range(len(self.sets.held))
        )
        talks = [pair[side] for side in (1, 0) for pair in self.sets.held]
        return ContrastItems(rows, tuple(answer_batches(self.ctx.tokenizer, talks, BATCH)))

    @cached_property
    def neutral(self) -> list[Batch]:
        """The probes' answers, whose perplexity shows damage."""
        answered = [c for c in self.ctx.probes if split_answer(c)[1]]
        if not answered:
            raise InputError("the study's monitor.probes hold no answers: a grid needs some for neutral perplexity")
        return answer_batches(self.ctx.tokenizer, answered, BATCH)

    @cached_property
    def reader(self) -> FeatureReader:
        """Reads the study's features on its probes."""
        return make_reader(self.ctx)

    @cached_property
    def judge(self) -> AnswerJudge:
        """Rules on sampled answers."""
        if self._judge is not None:
            return self._judge
        from persona_probe.evaluate.offline import OfflineJudge
        from persona_probe.evaluate.offline_rulings import OfflineAnswers

        return OfflineAnswers(OfflineJudge.load(device=self.ctx.device))

    @property
    def in_bf16(self) -> bool:
        """Whether frozen layers are kept in bf16 while a model is measured."""
        return self.ctx.device == "cpu" and self.ctx.config.bf16

    @cached_property
    def band(self) -> Band:
        """The persona feature's band on the base; the base must have been measured."""
        items = self.folder.read_table(f"{BASE}/items.parquet")
        values = items.loc[items["measure"] == "persona", "value"].to_numpy(float)
        return base_band(values, self.ctx.config.monitor.band_sd)

    @cached_property
    def ground(self) -> Ground:
        """What mitigations may draw on."""
        return Ground(
            tokenizer=self.ctx.tokenizer,
            layer=self.ctx.layer,
            sae=self.ctx.sae,
            latents=self.latents,
            direction=self.direction,
            safe=self.sets.safe,
            corrective=self.sets.corrective,
            general=self.general,
            band=self.band,
            probes=self.ctx.probes,
            positions=self.ctx.config.monitor.positions,
        )

    @cached_property
    def general(self) -> tuple[Conversation, ...]:
        """General rows with answers; those that the base model writes are kept in general.jsonl."""
        return general_rows(self.ctx, self.folder, self.sets.general, self.grid.general_tokens)

    @contextmanager
    def ready(self, model: nn.Module) -> Iterator[None]:
        """A model's frozen layers in bf16 where that is faster, as while it was trained."""
        with frozen_in_bf16(model, self.in_bf16):
            yield

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the block's wall seconds for a stage."""
        start = time.monotonic()
        yield
        self.folder.add_seconds(stage, time.monotonic() - start)
