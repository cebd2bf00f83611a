"""The cost of a reading: by number of probes, by encoded latents, and in comparison with a TransformerLens bridge."""

import copy
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks.speed import in_turn
from persona_probe.data.chat import Conversation
from persona_probe.data.load import evenly_spaced
from persona_probe.data.tokens import Batch, batches
from persona_probe.models.adapters import frozen_in_bf16
from persona_probe.models.layers import autocast, decoder_layers, evaluating, transformer_config
from persona_probe.models.prefix import Rows
from persona_probe.monitor.features import Features, SlicedEncoder
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.passive import PassiveReader
from persona_probe.monitor.reading import FeatureReader
from persona_probe.saes.hooks import sae_layer
from persona_probe.saes.read import encode

# --- Clocks: the seconds in a monitor, the steps of a run, and waits of the host for a GPU

HOOKS = ("enter", "leave", "see")
"""Methods of `PassiveReader` that run inside training forwards."""


def synchronise(device: torch.device) -> None:
    """Wait for a GPU, so that wall seconds are work and not its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Meter:
    """Adds up the seconds of calls; a call within a call counts once."""

    device: torch.device
    seconds: float = 0.0
    _inside: bool = field(default=False, repr=False)

    def around(self, work: Callable[..., Any], wait: bool = False) -> Callable[..., Any]:
        """The same function, metered; `wait`: until a GPU has done what was asked of it."""

        @functools.wraps(work)
        def metered(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return work(*args, **kwargs)
            self._inside, begin = True, time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                if wait:
                    synchronise(self.device)
                self._inside = False
                self.seconds += time.perf_counter() - begin

        return metered


@contextmanager
def metered(monitor: FeatureMonitor, meter: Meter, once: Meter) -> Iterator[None]:
    """Inside this block the monitor's callbacks and passive hooks are on the clock (not what a GPU does for hooks)."""
    methods = {name: getattr(PassiveReader, name) for name in HOOKS}
    for name, method in methods.items():
        setattr(PassiveReader, name, meter.around(method))
    callbacks: Any = monitor
    callbacks.on_step_end = meter.around(monitor.on_step_end, wait=True)
    callbacks.on_train_begin = once.around(monitor.on_train_begin, wait=True)
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(PassiveReader, name, method)
        del callbacks.on_step_end, callbacks.on_train_begin


class Clock(TrainerCallback):
    """Times the steps of a run; comes after the monitor among the callbacks, and waits for a GPU at every step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.begun, self.ended = device, 0.0, 0.0
        self.processor: list[float] = []
        """Processor seconds of each step, all threads together."""
        self._before = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock at the first step."""
        if state.global_step == 0:
            synchronise(self.device)
            self.begun = time.perf_counter()
        self._before = time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock at the latest step."""
        synchronise(self.device)
        self.ended = time.perf_counter()
        self.processor.append(time.process_time() - self._before)


class Wait(TrainerCallback):
    """Comes before the monitor, so that a GPU's training work is not counted as the monitor's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wait."""
        synchronise(self.device)


class Switch(TrainerCallback):
    """Comes before the monitor and switches it off at every other pair of steps, so that its cost shows within one run.

    Args:
        swapped: begin with a pair of steps without it.
    """

    def __init__(self, monitor: FeatureMonitor, swapped: bool) -> None:
        self.monitor, self.swapped = monitor, swapped
        callbacks: Any = monitor
        callbacks.on_step_end = partial(self._when_on, monitor.on_step_end)

    def on(self, step: int) -> bool:
        """Whether the monitor is on at a step."""
        return (step // 2 % 2 == 0) != self.swapped

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the passive hooks on or take them off."""
        run = self.monitor._run
        passive = None if run is None else run.passive
        if passive is not None and self.on(state.global_step + 1) != passive.attached:
            if passive.attached:
                passive.detach()
            else:
                passive.attach(kwargs["model"])

    def _when_on(self, call: Callable[..., None], args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        if self.on(state.global_step):
            call(args, state, *rest, **kwargs)


class SyncCounter(TrainerCallback):
    """Counts, step by step, how often the host waited for the GPU; comes after the monitor among the callbacks."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self._stack = ExitStack()
        self._seen: list[Any] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let CUDA warn of every synchronising call."""
        self._seen = self._stack.enter_context(warnings.catch_warnings(record=True)) or []
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the warnings."""
        torch.cuda.set_sync_debug_mode("default")
        self.counts.append(sum("synchronizing CUDA operation" in str(w.message) for w in self._seen))
        self._stack.close()


def probe_seconds(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: Any,
    features: Features,
    probes: Sequence[Conversation],
    counts: Sequence[int],
    repeats: int,
) -> dict[int, list[float]]:
    """Seconds of a reading, by its number of probes."""
    readers = {n: _reader(tokenizer, sae, features, evenly_spaced(probes, n)) for n in counts}
    with frozen_in_bf16(model, _on_cpu(model)):  # as in training
        times = in_turn({str(n): lambda r=r: r.read(model) for n, r in readers.items()}, repeats)
    return {n: times[str(n)] for n in counts}


def _on_cpu(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cpu"


def _reader(
    tokenizer: PreTrainedTokenizerBase, sae: Any, features: Features, probes: Sequence[Conversation]
) -> FeatureReader:
    groups = list(batches(tokenizer, probes, batch_size=32))
    return FeatureReader(sae, features, groups, sae_layer(sae), "response")


def least_every(reading: float, step: float, aim: float) -> int:
    """Fewest steps between readings at which they stay within `aim` of the training time."""
    return max(1, math.ceil(reading / (aim * step)))


def most_probes(seconds: Mapping[int, float], step: float, every: int, aim: float) -> int | None:
    """Most probes (of the counts measured) that stay within `aim` at a cadence; None where the fewest do not."""
    fitting = [count for count, cost in seconds.items() if cost <= aim * every * step]
    return max(fitting, default=None)


def random_sae(width: int, latents: int, device: torch.device) -> Any:
    """A random JumpReLU SAE in float32."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    torch.manual_seed(0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=width, d_sae=latents, device=str(device), dtype="float32"))
    with torch.no_grad():
        sae.W_enc.normal_(std=width**-0.5)
        sae.threshold.uniform_(0.5, 1.5)
    return sae.eval()


def encoders(sae: Any, x: Float[Tensor, "tokens d_model"], counts: Sequence[int]) -> dict[str, Callable[[], Tensor]]:
    """Full encoding, and encoding of the first latents only, by their number; each waits for a GPU."""
    sliced = {str(count): SlicedEncoder(sae, list(range(count))) for count in counts}
    ways: dict[str, Callable[[Tensor], Tensor]] = {"all": partial(encode, sae), **sliced}

    def waiting(way: Callable[[Tensor], Tensor]) -> Tensor:
        acts = way(x)
        synchronise(x.device)
        return acts

    return {label: partial(waiting, way) for label, way in ways.items()}


BRIDGED = {
    "bridge, all activations, float32": (False, True),
    "bridge, one name, float32": (False, False),
    "bridge, one name, bf16": (True, False),
}
"""Ways of `run_with_cache`, the plain call first: bf16 autocast, and whether everything is cached."""


def bridge_reading(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path,
    name: str,
    sae: Any,
    latent: int,
    groups: Sequence[Batch],
    bf16: bool,
    whole: bool = False,
) -> Float[Tensor, " probes"]:
    """A latent on each probe by TransformerLens: a merged copy, its bridge, `run_with_cache`, encode, average.

    Args:
        whole: cache every activation, as the call does that names none.
    """
    from persona_probe.models.load import make_bridge

    bridge, hook = make_bridge(base, tokenizer, checkpoint, name), sae.cfg.metadata.hook_name
    means = torch.zeros(sum(len(g.index) for g in groups))
    with evaluating(bridge), autocast(base, bf16):
        for group in groups:
            g = group.to(base.device)
            names = None if whole else [hook]
            cache = bridge.run_with_cache(g.ids, names_filter=names, attention_mask=g.attention, prepend_bos=False)[1]
            with torch.autocast(base.device.type, enabled=False):
                acts = encode(sae, cache[hook].float().flatten(0, 1))[:, latent].reshape(g.ids.shape)
            selected = g.select("response")
            means[g.index] = ((acts * selected).sum(dim=1) / selected.sum(dim=1)).cpu()
    return means


def products_below(base: PreTrainedModel, layer: int, groups: Sequence[Batch]) -> Callable[[], None]:
    """The matrix products of a reading in bf16 and nothing else: the layers up to `layer`, for the tokens that run."""
    inside = [module for one in decoder_layers(base)[: layer + 1] for module in one.modules()]
    weights = [module.weight.detach().to(torch.bfloat16) for module in inside if isinstance(module, nn.Linear)]
    rows = [Rows.of(group, transformer_config(base)) for group in groups]
    tokens = sum(one.rest.ids.numel() + one.shared for one in rows)
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], device=w.device).to(torch.bfloat16) for w in weights}

    def products() -> None:
        with torch.no_grad():
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)
        synchronise(base.device)

    return products


def against_bridge(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path,
    name: str,
    sae: Any,
    latent: int,
    probes: Sequence[Conversation],
    repeats: int,
) -> tuple[dict[str, list[float]], float]:
    """Seconds of one reading, ours, by the bridge and of its products alone, and the largest difference of values."""
    from persona_probe.models.adapters import load_adapter

    tuned = load_adapter(copy.deepcopy(base), checkpoint)
    groups = list(batches(tokenizer, probes, batch_size=16))
    reader = _reader(tokenizer, sae, {"latent": latent}, probes)
    values: dict[str, Tensor] = {}

    def ours() -> None:
        values["ours"] = torch.from_numpy(reader.read(tuned).values[:, 0]).float()

    def bridged(label: str, bf16: bool, whole: bool) -> None:
        values[label] = bridge_reading(base, tokenizer, checkpoint, name, sae, latent, groups, bf16, whole)

    with frozen_in_bf16(tuned, _on_cpu(tuned)):  # as in training
        works: dict[str, Callable[[], None]] = {"ours": ours}
        for label, (bf16, whole) in BRIDGED.items():
            works[label] = partial(bridged, label, bf16, whole)
        works["products"] = products_below(base, sae_layer(sae), reader.groups)
        times = in_turn(works, repeats)
    return times, float((values["ours"] - values["bridge, one name, bf16"]).abs().max())
