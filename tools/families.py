"""`make families`: which model families go through which step, on tiny random models of each, and on SmolLM2.

python -m tools.families [NAME ...] [--page docs/families.md]

A cell is green if the step ran and its values are those of the model's own forward, or holds the sentence that refuses.
"""

import argparse
import math
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from persona_probe.cli.options import echo
from persona_probe.config import StudyConfig, from_dict
from persona_probe.data.chat import conversation
from persona_probe.data.tokens import Batch, encode
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import SuffixScorer, answer_batches, answer_logprobs
from persona_probe.evaluate.sampling.decoding import rows_can_join
from persona_probe.evaluate.sampling.engines import TransformersEngine
from persona_probe.evaluate.sampling.requests import Prompt, SamplingConfig, answer_parts, prompt_ids, stop_tokens
from persona_probe.evaluate.sampling.samples import sample
from persona_probe.finetune.sft import _arguments, _dataset
from persona_probe.models.layers import own_forward
from persona_probe.models.logits import logits_of
from persona_probe.models.quiet import quiet_libraries
from persona_probe.models.residuals import read_residuals
from persona_probe.models.taps import AblateTap, ReadTap, SteerTap, project_out
from persona_probe.study.study import Study
from persona_probe.writing import write_text
from tests.factories import changed, config_of, copied_state, same_state, write_data, write_sae
from tests.families import FAMILIES, make_family, own_scores

REAL = "smollm2-135m-instruct"
NAMES = {
    "llama3": "Llama 3",
    "qwen2.5": "Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3.5": "Qwen3.5 (linear attention)",
    "mistral": "Mistral",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "gemma4-text": "Gemma 4, text",
    "gemma4": "Gemma 4, multimodal",
    "phi4": "Phi-4",
    "olmo2": "OLMo 2",
    "pythia": "Pythia (GPT-NeoX)",
    "gpt2": "GPT-2",
    "gpt-oss": "gpt-oss",
    "mixtral": "Mixtral",
    "qwen3-moe": "Qwen3-MoE",
    "lfm2": "LFM2 (convolutions)",
    "falcon-h1": "Falcon-H1 (state space)",
    "r1-distill": "DeepSeek-R1 distill",
    REAL: "SmolLM2-135M-Instruct, the real one",
}
STEPS: dict[str, Callable[["Case"], str]] = {}
MARKS = ("<!-- families: begin -->", "<!-- families: end -->")
CLOSE = 1e-4
TALKS = [conversation(f"What of {n}?", f"Say {n * n} and go" + "!" * (n % 3)) for n in range(4)]


class WrongValueError(Exception):
    """A step ran, but not to the value of the model's own forward."""


@dataclass
class Case:
    """One family's tiny study, as far as it has come."""

    name: str
    folder: Path
    notes: list[str] = field(default_factory=list)

    @cached_property
    def study(self) -> Study:
        """Its model and tokenizer on disk, data, SAE and run folder."""
        write_data(self.folder)
        settings: dict[str, Any] = {"seeds": [0]}
        settings["training"] = {"steps": 2, "checkpoints": [1], "max_length": 1024}
        settings["locate"] = {"minimum_explained_variance": -1e9, "perplexity_bound": 1e9}
        settings["realign"] = {"steps": 1, "readings": [0, 1]}
        if self.name == REAL:
            settings |= {"model": REAL, "sae": "saes/smollm2-135m-instruct/layer20-topk32-4608"}
            settings["locate"] |= {"candidates": 2}
        else:
            model, tokenizer = make_family(self.name)
            model.save_pretrained(self.folder / "model")
            tokenizer.save_pretrained(self.folder / "model")
            write_sae(self.folder / "sae")
            if FAMILIES[self.name].template is None:
                settings["template"] = "none"
        raw = changed(config_of(self.folder), **settings)
        return Study.from_config(from_dict(StudyConfig, raw), self.folder / "run")

    @property
    def model(self) -> Any:
        """The base model."""
        return self.study.context.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, with the study's template."""
        return self.study.context.tokenizer

    @cached_property
    def groups(self) -> list[Batch]:
        """A few answered conversations."""
        return answer_batches(self.tokenizer, TALKS, 4)

    @cached_property
    def direction(self) -> torch.Tensor:
        """A random push, as long as the layer's residuals."""
        with torch.no_grad(), ReadTap(self.model, self.study.context.layer) as tap:
            self.model(input_ids=self.groups[0].ids[:1])
        push = torch.randn(tap.value.shape[-1], generator=torch.Generator().manual_seed(1))
        return push * tap.value.norm(dim=-1).mean() / push.norm()


def step(name: str) -> Callable[[Callable[[Case], str]], Callable[[Case], str]]:
    """Make a function a column of the matrix."""

    def add(function: Callable[[Case], str]) -> Callable[[Case], str]:
        STEPS[name] = function
        return function

    return add


def close(left: Any, right: Any, what: str, limit: float = CLOSE) -> float:
    """The largest difference.

    Raises:
        WrongValueError: it is above the limit.
    """
    difference = float(np.abs(np.asarray(left) - np.asarray(right)).max())
    if not difference <= limit:
        raise WrongValueError(f"{what} is off by {difference:.2g}")
    return difference


@step("encode")
def check_encode(case: Case) -> str:
    """Tokens and answer positions are those that TRL trains on."""
    from trl.trainer.sft_trainer import SFTTrainer

    with own_forward(case.model), tempfile.TemporaryDirectory() as scratch:
        training = case.study.config.training
        arguments = _arguments(training, 0, scratch, torch.device("cpu"))
        trainer = SFTTrainer(
            model=case.model,
            args=arguments,
            train_dataset=_dataset(case.tokenizer, TALKS),
            processing_class=case.tokenizer,
        )
        rows: Any = list(trainer.train_dataset)  # pyright: ignore[reportArgumentType]
    for talk, row in zip(TALKS, rows, strict=True):
        ours, ids = encode(case.tokenizer, talk), list(row["input_ids"])
        trained = [n for n, label in enumerate(trainer.data_collator([row])["labels"][0].tolist()) if label != -100]
        if ours.ids != ids[: len(ours.ids)] or not set(range(ours.start, len(ours.ids))) <= set(trained):
            raise WrongValueError("encode puts the answer where TRL does not train")
        if case.tokenizer.decode(ours.ids[ours.start :]).strip() != talk[-1]["content"]:
            raise WrongValueError("the answer's tokens are not the answer")
    return "ok"


@step("fine-tune")
def check_induce(case: Case) -> str:
    """Both arms are trained, and the base is what it was."""
    before, base = copied_state(case.model), own_scores(case.model, case.groups)
    case.study.induce()
    if not same_state(copied_state(case.model), before):
        raise WrongValueError("fine-tuning changed the base")
    for arm in case.study.config.arms:
        with case.study.context.organism(arm, 0) as tuned:
            if not np.abs(own_scores(tuned, case.groups) - base).max() > CLOSE:
                raise WrongValueError(f"fine-tuning changed nothing in {arm}")
    return "ok"


@step("contrast index")
def check_index(case: Case) -> str:
    """Answers of the organism score as in its own forward."""
    groups = case.study.context.evaluation.groups[:1]
    groups = [Batch(g.ids, g.attention, g.prompt, g.response, g.special, list(range(len(g.index)))) for g in groups]
    with case.study.context.organism("incorrect", 0) as tuned:
        close(answer_logprobs(tuned, groups, bf16=False), own_scores(tuned, groups), "the score of an answer")
        if not logits_of(tuned, groups[0].ids[0]).from_hidden:
            return "ok, whole forwards"
    return "ok"


@step("readings")
def check_readings(case: Case) -> str:
    """Residuals at the SAE's layer are those of the whole forward."""
    layer, found = case.study.context.layer, {}

    def visit(index: list[int], row: torch.Tensor, x: torch.Tensor) -> None:
        for place, number in enumerate(index):
            found[number] = x[row == place]

    read_residuals(case.model, case.groups, layer, "response", visit, bf16=False)
    for group in case.groups:
        for row, number in enumerate(group.index):
            real = group.attention[row].bool()
            with torch.no_grad(), ReadTap(case.model, layer) as tap:
                case.model(input_ids=group.ids[row][real][None])
            own = tap.value[0][group.select("response")[row][real]]
            close(found[number] / own.abs().max(), own / own.abs().max(), "a reading")
    return "ok"


@step("steer, ablate")
def check_pushes(case: Case) -> str:
    """Pushed and ablated scores of the suffix scorer equal hooks on the whole model."""
    layer, push = case.study.context.layer, case.direction
    scorer = SuffixScorer(case.model, layer, case.groups, bf16=False)
    pushed, removed = scorer.logprobs(push), scorer.edited(lambda x: project_out(x, (push / push.norm())[None]))
    with SteerTap(case.model, layer, push):
        close(pushed, own_scores(case.model, case.groups), "a pushed score")
    with AblateTap(case.model, layer, push):
        close(removed, own_scores(case.model, case.groups), "an ablated score")
    return "ok" if scorer.exact else "ok, whole forwards"


@step("locate")
def check_locate(case: Case) -> str:
    """Latents are ranked and tested for cause."""
    case.study.locate()
    if not len(case.study.features):
        raise WrongValueError("no latents were ranked")
    return "ok"


@step("track")
def check_track(case: Case) -> str:
    """Every checkpoint is read; an organism's first reading is the base's."""
    means = case.study.track().readings.query("feature == 'persona'").set_index(["arm", "step"])["mean"]
    close(means["incorrect", 0], means["base", 0], "the reading before the first step", 1e-5)
    if not means.map(math.isfinite).all():
        raise WrongValueError("a reading is not finite")
    return "ok"


@step("realign")
def check_realign(case: Case) -> str:
    """A correction begins where the organism ended."""
    means = case.study.realign().readings.query("feature == 'persona'").set_index(["arm", "step"])["mean"]
    scale = max(1.0, float(means.abs().max()))
    close(means["realigned_in", 0] / scale, means["incorrect", 2] / scale, "the correction's first reading", 1e-4)
    return "ok"


@step("sample")
def check_samples(case: Case) -> str:
    """Greedy answers are transformers' own, and the study's samples are written."""
    prompts = [Prompt(f"q{n}", conversation("Why? " * n + "So.")) for n in (1, 4)]
    settings = SamplingConfig(temperature=0, max_new_tokens=6)
    answers = sample(TransformersEngine(case.model, case.tokenizer), prompts, settings)
    stop = stop_tokens(case.model, case.tokenizer)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt_ids(case.tokenizer, prompt)])
        config = GenerationConfig(
            do_sample=False, max_new_tokens=6, eos_token_id=sorted(stop), pad_token_id=min(stop, default=0)
        )
        made = case.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        made = made[0, ids.shape[1] :].tolist()
        made = made[: next((n for n, token in enumerate(made) if token in stop), len(made))]
        if answer.answer != answer_parts(case.tokenizer, made).answer:
            raise WrongValueError("a greedy answer differs from transformers' own")
    case.study.evaluate()
    return "ok" if rows_can_join(case.model, ids[0].tolist()) else "ok, by `generate`"


@step("report")
def check_report(case: Case) -> str:
    """The report is written."""
    if not case.study.report().is_file():
        raise WrongValueError("there is no report")
    return "ok"


@dataclass(frozen=True)
class Row:
    """One family's cells."""

    name: str
    cells: dict[str, str]
    red: tuple[str, ...]
    """Cells that are neither green nor a refusal."""


def measure(name: str, folder: Path, verbose: bool = False) -> Row:
    """Take one family through all steps; what a failed step leaves is tried by the next ones too."""
    case, cells, red = Case(name, folder), {}, []
    if name != REAL and (missing := FAMILIES[name].missing):
        return Row(name, dict.fromkeys(STEPS, missing), ())
    for column, function in STEPS.items():
        try:
            cells[column] = function(case)
        except InputError as error:
            cells[column] = str(error)
        except Exception as error:
            red.append(column)
            cells[column] = f"RED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if verbose:
                traceback.print_exc()
    return Row(name, cells, tuple(red))


def rows_of(names: Sequence[str], verbose: bool) -> Iterator[Row]:
    """Families one after the other, each in a folder of its own."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            row = measure(name, Path(folder), verbose)
            refused = [f"{column}: {cell}" for column, cell in row.cells.items() if not cell.startswith("ok")]
            echo(f"{NAMES[name]}: {time.perf_counter() - begin:.0f} s" + "".join(f"\n    {line}" for line in refused))
            yield row


def table(rows: Sequence[Row]) -> str:
    """As Markdown; what is not plainly green has a number, and its sentence below the table."""
    notes: list[str] = []

    def shown(cell: str) -> str:
        if cell == "ok":
            return "✓"
        note = cell.removeprefix("ok, ")
        if note not in notes:
            notes.append(note)
        return f"{'✓ ' if cell.startswith('ok') else ''}({notes.index(note) + 1})"

    lines = [f"| family | {' | '.join(STEPS)} |", "|---" * (len(STEPS) + 1) + "|"]
    for row in rows:
        lines.append(f"| {NAMES[row.name]} | " + " | ".join(shown(row.cells[column]) for column in STEPS) + " |")
    return "\n".join([*lines, "", *(f"{n + 1}. {_explained(note)}" for n, note in enumerate(notes))]) + "\n"


def _explained(note: str) -> str:
    known = {
        "whole forwards": "The layers above the SAE's do not run alone; every push takes whole forward passes. Values "
        "are the same, `locate` takes longer.",
        "by `generate`": "The model keeps another state than keys and values: answers come from its own `generate`, "
        "in batches of equal length, with the same draws.",
    }
    return known.get(note, note)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the matrix; with a page, write it there. The exit code is 1 if a cell is red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="families (default: all)")
    parser.add_argument("--page", type=Path, help="a Markdown page whose table is replaced")
    parser.add_argument("--verbose", action="store_true", help="tracebacks of red cells")
    options = parser.parse_args(argv)
    quiet_libraries()
    os.environ["BROWSER_PATH"] = "/nowhere"  # images would be drawn by a browser, which takes long
    rows = list(rows_of(options.names or list(NAMES), options.verbose))
    text = table(rows)
    sys.stdout.write(text)
    if options.page:
        page = options.page.read_text("utf-8")
        pattern = re.compile(f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}", re.DOTALL)
        write_text(options.page, pattern.sub(lambda _: f"{MARKS[0]}\n{text}{MARKS[1]}", page))
    return int(any(row.red for row in rows))


if __name__ == "__main__":
    sys.exit(main())
