"""What is measured: reading, sweep, attribution, training under a monitor, sampling; each next to the naive way."""

import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from benchmarks.gpu.shapes import GpuCase
from benchmarks.locate import full_forward
from benchmarks.monitor import added_syncs, fit
from benchmarks.monitor_costs import Clock, SyncCounter, synchronise
from benchmarks.sampling import generate_copies
from benchmarks.speed import in_turn, ratios
from persona_probe.config import Training
from persona_probe.data.chat import conversation
from persona_probe.data.load import evenly_spaced
from persona_probe.data.tokens import Batch, answer_prompt, batches, conversation_batches
from persona_probe.evaluate.answers import SuffixScorer
from persona_probe.evaluate.contrast import ContrastItems
from persona_probe.evaluate.sampling.engines import TransformersEngine
from persona_probe.evaluate.sampling.requests import Prompt, SamplingConfig, stop_tokens
from persona_probe.evaluate.sampling.samples import sample
from persona_probe.latents.attribution import gradient_scores
from persona_probe.models.layers import autocast, decoder_layer, evaluating
from persona_probe.models.places import output_value
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.reading import FeatureReader
from persona_probe.monitor.settings import EVERY
from persona_probe.saes.read import encode, read_latents

Numbers = dict[str, float | None]
LATENT = 5

# --- Waits of the host, and memory


@contextmanager
def waits(device: torch.device) -> Iterator[list[int]]:
    """How often the host waits for a GPU inside the block: one number in the list afterwards, none on a CPU."""
    count: list[int] = []
    if device.type != "cuda":
        yield count
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield count
        finally:
            torch.cuda.set_sync_debug_mode("default")
            count.append(sum("synchronizing CUDA operation" in str(w.message) for w in seen))


def waits_of(device: torch.device, work: Callable[[], object]) -> float | None:
    """Waits of one call; None on a CPU, where there are none."""
    with waits(device) as count:
        work()
    return float(count[0]) if count else None


def timed(case: GpuCase, works: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each work by repeat, in turn; a GPU has done what was asked of it at the end of each."""

    def finished(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            synchronise(case.device)

        return run

    return in_turn({name: finished(work) for name, work in works.items()}, case.amount.repeats)


def compared(
    case: GpuCase, name: str, units: int, ours: Callable[[], object], naive: Callable[[], object], naive_units: int
) -> Numbers:
    """Units a second of both ways, and how many times as fast ours is."""
    times = timed(case, {"ours": ours, "naive": naive})
    faster = statistics.median(ratios(times, "naive", "ours")) * units / naive_units
    return {
        f"{name}/s": units / statistics.median(times["ours"]),
        f"{name}/s, naive": naive_units / statistics.median(times["naive"]),
        "times as fast": faster,
        "waits of the host": waits_of(case.device, ours),
    }


# --- Reading latents


def reading(case: GpuCase) -> Numbers:
    """Means of all latents over answer tokens."""
    groups = items(case).groups
    tokens = sum(int(group.attention.sum()) for group in groups)
    layer = case.shape.layer

    def ours() -> object:
        return read_latents(case.model, case.sae, groups, layer, "response")

    return compared(case, "tokens", tokens, ours, lambda: naive_latents(case, groups), tokens)


def items(case: GpuCase) -> ContrastItems:
    """The contrast items, tokenised."""
    return ContrastItems.build(case.tokenizer, case.contrast, case.amount.batch)


def naive_latents(case: GpuCase, groups: Sequence[Batch]) -> Tensor:
    """The usual way: a hook, the whole model with its logits, all tokens encoded at all latents, then the mean."""
    seen: list[Tensor] = []
    handle = decoder_layer(case.model, case.shape.layer).register_forward_hook(
        lambda _module, _inputs, output: seen.append(output_value(output))
    )
    means = []
    try:
        with evaluating(case.model), autocast(case.model):
            for group in (g.to(case.device) for g in groups):
                case.model(input_ids=group.ids, attention_mask=group.attention, use_cache=False)
                with autocast(case.model, False):
                    acts = encode(case.sae, seen.pop().flatten(0, 1)).reshape(*group.ids.shape, -1)
                mask = group.select("response")
                means += [(acts[row] * mask[row][:, None]).sum(dim=0) / mask[row].sum() for row in range(len(mask))]
                means = [mean.cpu() for mean in means]
    finally:
        handle.remove()
    return torch.stack(means)


# --- Pushes along latents


def sweep(case: GpuCase) -> Numbers:
    """Both answers of every item under pushes along decoder rows."""
    groups, amount = items(case).groups, case.amount
    pushes = 20 * case.sae.W_dec[: amount.pushes].detach().float()
    scorer = SuffixScorer(case.model, case.shape.layer, groups)
    on_device = [group.to(case.device) for group in groups]

    def naive() -> None:
        for push in pushes[: amount.naive_pushes]:
            full_forward(case.model, case.shape.layer, on_device, push, True)

    found = compared(case, "pushes", amount.pushes, lambda: scorer.logprobs_many(pushes), naive, amount.naive_pushes)
    expected = full_forward(case.model, case.shape.layer, on_device, pushes[0], True)
    found["largest difference, nats"] = float(abs(scorer.logprobs_many(pushes[:1])[0] - expected).max())
    return found


# --- Attribution


def attribution(case: GpuCase) -> Numbers:
    """Scores of all latents from one backward pass a batch, against one conversation at a time."""
    groups, answers = items(case).groups, 2 * len(case.contrast)
    flags = torch.arange(answers).numpy() >= len(case.contrast)  # aligned answers come first
    layer, few = case.shape.layer, min(4, answers)

    def ours() -> object:
        return gradient_scores(case.model, case.sae, groups, flags, layer)

    def naive() -> None:
        batch = groups[0]
        for row in range(min(few, len(batch.ids))):
            naive_attribution(case, batch.rows(slice(row, row + 1)).to(case.device))

    return compared(case, "answers", answers, ours, naive, min(few, len(groups[0].ids)))


def naive_attribution(case: GpuCase, row: Batch) -> Tensor:
    """One conversation: gradient at the layer through the whole model, times every latent's activation and row."""
    kept: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        kept.append(output_value(output))

    handle = decoder_layer(case.model, case.shape.layer).register_forward_hook(keep)
    try:
        with torch.enable_grad(), autocast(case.model):
            logits = case.model(input_ids=row.ids, attention_mask=row.attention, use_cache=False).logits
        answer = row.response[:, 1:]
        loss = cross_entropy(logits[:, :-1][answer].float(), row.ids[:, 1:][answer])
        gradient = torch.autograd.grad(loss, kept[0])[0]
    finally:
        handle.remove()
    acts = encode(case.sae, kept[0].detach().flatten(0, 1))
    along = gradient.flatten(0, 1).float() @ case.sae.W_dec.detach().float().T
    return (acts * along).sum(dim=0).cpu()


# --- Training with and without a monitor


class NaiveMonitor(TrainerCallback):
    """The usual way of watching: a hook, the whole model, the whole dictionary, a number fetched for each probe."""

    def __init__(self, case: GpuCase, groups: Sequence[Batch]) -> None:
        self.case, self.groups, self.values = case, groups, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read at the monitor's cadence."""
        if state.global_step % self.case.amount.every == 0:
            self.values += [float(mean[LATENT]) for mean in naive_latents(self.case, self.groups)]


def training(case: GpuCase) -> Numbers:
    """Tokens a second of LoRA fine-tuning: alone, with probe and passive readings, and with the naive monitor."""
    amount = case.amount
    settings = Training(steps=amount.steps, checkpoints=(), batch_size=min(8, len(case.training)))
    tokens = sum(int(g.attention.sum()) for g in conversation_batches(case.tokenizer, case.training))
    tokens = tokens / len(case.training) * settings.batch_size * amount.steps
    probes = evenly_spaced(case.probes, amount.probes)
    groups = list(batches(case.tokenizer, probes, amount.batch))

    def watching(mode: str) -> list[TrainerCallback]:
        if mode == "naive":
            return [NaiveMonitor(case, groups)]
        settings: dict[str, Any] = {"probes": probes, "every": amount.every, "on_error": "raise"}
        return [] if mode == "alone" else [FeatureMonitor(case.sae, {"persona": LATENT}, mode=mode, **settings)]

    modes, seconds, counts = ("alone", "probe", "passive", "naive"), dict[str, list[float]](), dict[str, list[int]]()
    fit(case.model, case.tokenizer, case.training, replace(settings, steps=1), [])  # warm-up
    for _ in range(min(2, amount.repeats)):
        for mode in modes:
            clock = Clock(case.device)
            fit(case.model, case.tokenizer, case.training, settings, [*watching(mode), clock])
            seconds.setdefault(mode, []).append(clock.ended - clock.begun)
    found: Numbers = {f"tokens/s, {mode}": tokens / statistics.median(seconds[mode]) for mode in modes}
    for mode in modes[1:]:
        ratio = statistics.median(ratios(seconds, mode, "alone"))
        found |= {
            f"time with {mode}": ratio,
            f"share at every {EVERY} steps, {mode}": (ratio - 1) * amount.every / EVERY,
        }
    if case.device.type == "cuda":
        for mode in modes[:3]:
            counter = SyncCounter()
            fit(case.model, case.tokenizer, case.training, settings, [*watching(mode), counter])
            counts[mode] = counter.counts
        for mode in modes[1:3]:
            at, between = added_syncs(counts[mode], counts["alone"], amount.every)
            found[f"waits that {mode} adds to a read step"] = float(max(at, default=0))
            found[f"waits that {mode} adds to another step"] = float(max(between, default=0))
    return found


def monitor_reading(case: GpuCase) -> Numbers:
    """One reading of the probes."""
    probes = evenly_spaced(case.probes, case.amount.probes)
    groups = list(batches(case.tokenizer, probes, case.amount.batch))
    reader = FeatureReader(case.sae, {"persona": LATENT}, groups, case.shape.layer)
    ours, naive = (lambda: reader.read(case.model)), (lambda: naive_latents(case, groups))
    return compared(case, "readings", 1, ours, naive, 1)


# --- Sampling through transformers


def sampling(case: GpuCase) -> Numbers:
    """Several answers to each prompt."""
    amount = case.amount
    questions = [conversation(str(row["question"])) for row in case.contrast[: amount.prompts]]
    prompts = [Prompt(f"p{number}", question) for number, question in enumerate(questions)]
    config = SamplingConfig(n=amount.samples, max_new_tokens=amount.new_tokens)
    engine = TransformersEngine(case.model, case.tokenizer, 64)
    stop, made = sorted(stop_tokens(case.model, case.tokenizer)), {"ours": 0, "naive": 0}

    def ours() -> None:
        with autocast(case.model):
            made["ours"] = sum(int(answer.n_tokens or 0) for answer in sample(engine, prompts, config))

    def naive() -> None:
        with autocast(case.model):
            made["naive"] = generate_copies(case.model, case.tokenizer, prompts, config, 64, stop)

    times = timed(case, {"ours": ours, "naive": naive})
    rates = {name: made[name] / statistics.median(seconds) for name, seconds in times.items()}
    longest = max(len(answer_prompt(case.tokenizer, question)) for question in questions)
    return {
        "tokens/s": rates["ours"],
        "tokens/s, naive": rates["naive"],
        "times as fast": rates["ours"] / rates["naive"],
        "longest prompt, tokens": float(longest),
    }


PARTS: dict[str, Callable[[GpuCase], Numbers]] = {
    "reading": reading,
    "sweep": sweep,
    "attribution": attribution,
    "monitor": monitor_reading,
    "training": training,
    "sampling": sampling,
}


def seconds_of_demo(device: str, folder: Path | None = None) -> Numbers:
    """The whole demo on a device, in a folder of its own."""
    from persona_probe.cli.options import DEMO, find_config
    from persona_probe.config import StudyConfig, load_config
    from persona_probe.study.study import Study

    with tempfile.TemporaryDirectory() as scratch:
        config = replace(load_config(find_config(DEMO), StudyConfig), device=device)
        study = Study.from_config(config, (folder or Path(scratch)) / "demo")
        study.run()
        return {stage: float(seconds) for stage, seconds in study.summary["seconds"].items()}
