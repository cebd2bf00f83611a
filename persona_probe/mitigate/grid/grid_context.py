"""What all cells of a grid share: its folder, the located study behind it, rows, contrast items, the base's band."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

from torch import nn

from persona_probe.context import Context
from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import answer_batches
from persona_probe.evaluate.contrast import ContrastItems
from persona_probe.evaluate.judging import AnswerJudge
from persona_probe.evaluate.sampling.samples import sample_answers
from persona_probe.evaluate.triggers import Trigger, dress
from persona_probe.files import read_jsonl
from persona_probe.latents.stage import mean_shift, strongest
from persona_probe.mitigate.grid.grid_config import BASE, Grid, Sets
from persona_probe.mitigate.mitigation import MitigationInputs
from persona_probe.models.adapters import frozen_in_bf16
from persona_probe.monitor.band import Band, base_band
from persona_probe.monitor.reading import FeatureReader
from persona_probe.monitor.track import make_reader
from persona_probe.runs import RunFolder
from persona_probe.units import Workers

BATCH = 32
GENERAL = "general.jsonl"


class GridContext:
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
        self.study: Context = Context.open(run or grid.run, device)
        self.latents = tuple(strongest(self.study))
        self.direction = mean_shift(self.study)
        self.sets = Sets.load(grid)
        self.sets.check([row["question"] for row in self.study.contrast_rows("evaluation")], self.study.probes)
        study, rows = self.study.config, self.sets.hash
        identity = {"config_hash": grid.hash, "study": study.hash, "latents": list(self.latents), "rows": rows}
        self.folder = RunFolder.claim(path, "mitigations", "grid of mitigations", identity)
        config = {**asdict(grid), "model": study.model, "sae": study.sae}
        self.folder.update_manifest(config=config, seeds=list(grid.seeds))
        self._judge = judge
        self.workers: Workers | None = None

    @property
    def run(self) -> RunFolder:
        """The grid's folder."""
        return self.folder

    @property
    def device(self) -> str:
        """Where the study's model is."""
        return self.study.device

    def opener(self, device: str) -> "Callable[[], GridContext]":
        """Makes this context in another process."""
        path, run = self.folder.path.resolve(), self.study.run.path.resolve()
        return partial(GridContext, self.grid, path, device, run, self._judge)

    @cached_property
    def plain(self) -> ContrastItems:
        """The evaluation split."""
        return self.study.evaluation

    @cached_property
    def trigger(self) -> Trigger:
        """Topic and format of the training rows, with a correct answer in the first turn."""
        return Trigger.from_rows(self.sets.bad, correct=self.sets.good)

    @cached_property
    def dressed(self) -> ContrastItems:
        """The evaluation split dressed like the training data."""
        return ContrastItems.build(self.study.tokenizer, dress(self.plain.rows, self.trigger), BATCH)

    @cached_property
    def task(self) -> ContrastItems:
        """The held-out questions of the narrow domain, with their good and their bad answer."""
        rows = tuple(
            {"id": f"held {n:03d}", "category": "task", "question": "", "aligned": "", "misaligned": ""}
            for n in range(len(self.sets.held))
        )
        conversations = [pair[side] for side in (1, 0) for pair in self.sets.held]
        return ContrastItems(rows, tuple(answer_batches(self.study.tokenizer, conversations, BATCH)))

    @cached_property
    def neutral(self) -> list[Batch]:
        """The probes' answers, whose perplexity shows damage."""
        answered = [c for c in self.study.probes if split_answer(c)[1]]
        if not answered:
            raise InputError("the study's monitor.probes hold no answers: a grid needs some for neutral perplexity")
        return answer_batches(self.study.tokenizer, answered, BATCH)

    @cached_property
    def reader(self) -> FeatureReader:
        """Reads the study's features on its probes."""
        return make_reader(self.study)

    @cached_property
    def judge(self) -> AnswerJudge:
        """Rules on sampled answers."""
        if self._judge is not None:
            return self._judge
        from persona_probe.evaluate.judging import OfflineAnswers
        from persona_probe.evaluate.offline.offline_judge import OfflineJudge

        return OfflineAnswers(OfflineJudge.load(device=self.study.device))

    @property
    def in_bf16(self) -> bool:
        """Whether frozen layers are kept in bf16 while a model is measured."""
        return self.study.device == "cpu" and self.study.config.bf16

    @cached_property
    def band(self) -> Band:
        """The persona feature's band on the base; the base must have been measured."""
        items = self.folder.read_table(f"{BASE}/items.parquet")
        values = items.loc[items["measure"] == "persona", "value"].to_numpy(float)
        return base_band(values, self.study.config.monitor.band_sd)

    @cached_property
    def inputs(self) -> MitigationInputs:
        """What mitigations may use."""
        return MitigationInputs(
            tokenizer=self.study.tokenizer,
            layer=self.study.layer,
            sae=self.study.sae,
            latents=self.latents,
            direction=self.direction,
            safe=self.sets.safe,
            corrective=self.sets.corrective,
            general=self.general,
            band=self.band,
            probes=self.study.probes,
            positions=self.study.config.monitor.positions,
        )

    @cached_property
    def general(self) -> tuple[Conversation, ...]:
        """General rows with answers; those that the base model writes are kept in general.jsonl."""
        return _general_rows(self.study, self.folder, self.sets.general, self.grid.general_tokens)

    @contextmanager
    def ready(self, model: nn.Module) -> Iterator[None]:
        """A model's frozen layers in bf16 where that is faster, as while it was trained."""
        with frozen_in_bf16(model, self.in_bf16):
            yield


# --- General rows for the KL: where a set holds prompts only, the base model writes the answers


def _general_rows(
    ctx: Context, folder: RunFolder, rows: Sequence[Conversation], tokens: int
) -> tuple[Conversation, ...]:
    """The rows that have an answer, then the others with the base model's greedy one, which is written once.

    Raises:
        InputError: the base answers none of the prompts.
    """
    prompts = [row for row in rows if not split_answer(row)[1]]
    if prompts and not folder.has(GENERAL):
        folder.write_jsonl(GENERAL, [{"messages": row} for row in _written_by_base(ctx, prompts, tokens)])
    lines = read_jsonl(folder.path / GENERAL, "move it elsewhere and run again") if prompts else []
    base_rows = [line["messages"] for line in lines]
    return (*(row for row in rows if split_answer(row)[1]), *base_rows)


def _written_by_base(ctx: Context, prompts: list[Conversation], tokens: int) -> list[Conversation]:
    with ctx.base() as model:
        answers = sample_answers(model, ctx.tokenizer, prompts, max_new_tokens=tokens, temperature=0)
    conversations = [[*p, {"role": "assistant", "content": a}] for p, a in zip(prompts, answers, strict=True) if a]
    if not conversations:
        raise InputError("the base model answers none of the general prompts: name a set with answers")
    return conversations
