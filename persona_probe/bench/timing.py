"""What the benchmarks share: repeated timing, and the bare truncated forward that bounds activation reading."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from persona_probe.models.layers import base_transformer, layer_list_name, transformer_config

REPEATS = 5


def seconds(work: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Wall seconds of each repeat, after one warm-up."""
    work()
    return [once(work) for _ in range(repeats)]


def once(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of several works, one repeat of each in turn, so that a noisy machine disturbs all alike."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {label: [] for label in works}
    for _ in range(repeats):
        for label, work in works.items():
            times[label].append(once(work))
    return times


def ratios(times: Mapping[str, Sequence[float]], label: str, reference: str) -> list[float]:
    """Seconds of one work over those of another, repeat by repeat."""
    return [a / b for a, b in zip(times[label], times[reference], strict=True)]


def spread(values: Sequence[float]) -> str:
    """Median with the range, as text."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def truncated(model: nn.Module, layer: int) -> nn.Module:
    """The bare limit: the transformer cut after `layer`, called without any hook."""
    whole = base_transformer(model)
    view, name = copy.copy(whole), layer_list_name(whole)
    view._modules = dict(whole._modules)
    view._modules[name] = nn.ModuleList(list(getattr(whole, name))[: layer + 1])
    view._modules["norm"] = nn.Identity()
    config = copy.deepcopy(transformer_config(model))
    config.num_hidden_layers = layer + 1
    view.config = config  # pyright: ignore
    return view
