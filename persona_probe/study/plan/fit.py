"""Whether a study fits a GPU, and the mildest change of its settings that makes it fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from persona_probe.config import StudyConfig

GIB = 2**30
CONTEXT, GAPS = GIB, 0.05
"""Kept for CUDA's context and libraries, and the share of a peak that the allocator leaves in gaps."""


def needed(peak: float) -> float:
    """Bytes of a GPU on which a peak fits."""
    return (1 + GAPS) * peak + CONTEXT


Change = tuple[str, Callable[[StudyConfig], StudyConfig]]


def _training(**changes: Any) -> Callable[[StudyConfig], StudyConfig]:
    return lambda config: replace(config, training=replace(config.training, **changes))


def _study(**changes: Any) -> Callable[[StudyConfig], StudyConfig]:
    return lambda config: replace(config, **changes)


SLOWER: tuple[Change, ...] = (
    ("training.gradient_checkpointing: true", _training(gradient_checkpointing=True)),
    ("sae_dtype: bfloat16", _study(sae_dtype="bfloat16")),
)
NARROWER: tuple[Change, ...] = (
    ("weights: bfloat16", _study(weights="bfloat16")),
    *SLOWER,
    ("quantization: 8bit", _study(quantization="8bit")),
    ("quantization: 4bit", _study(quantization="4bit")),
)
"""From the mildest: the later ones change the model that is studied."""
ADAPTERS: Change = ("training.method: lora", _training(method="lora"))


@dataclass(frozen=True)
class Fit:
    """A study's peak against a GPU's memory."""

    peak: float
    """Bytes of the study as it is."""
    limit: float
    """Bytes of the GPU."""
    changes: tuple[str, ...] = ()
    """Settings that make it fit, or that come closest."""
    then: float | None = None
    """Bytes with them."""

    @property
    def fits(self) -> bool:
        """Whether the study fits as it is."""
        return needed(self.peak) <= self.limit

    def text(self) -> str:
        """One line."""
        card = f"a GPU of {self.limit / GIB:g} GiB"
        needs = f"{self.peak / GIB:.1f} GiB at most, {needed(self.peak) / GIB:.1f} with CUDA and gaps"
        if self.fits:
            return f"fits {card}: {needs}"
        if self.then is None:
            return f"does not fit {card}: {needs}; no setting here takes less: {_LAST}"
        with_them = (
            f"with {', '.join(self.changes)} it is {self.then / GIB:.1f} GiB, {needed(self.then) / GIB:.1f} with both"
        )
        if needed(self.then) <= self.limit:
            return f"does not fit {card}: {needs}; {with_them}"
        return f"does not fit {card}: {needs}; even {with_them}: {_LAST}"


_LAST = "take a smaller model, a shorter training.max_length, or device_map: auto over several GPUs"


def fit(config: StudyConfig, limit: float, peak: Callable[[StudyConfig], float]) -> Fit:
    """Whether a study fits, and if not, the mildest of a fixed order of changes after which it does.

    Args:
        limit: bytes of the GPU.
        peak: bytes of a study at its peak.
    """
    now = peak(config)
    if needed(now) <= limit:
        return Fit(now, limit)
    full = config.training.method == "full"
    tried: list[tuple[tuple[Change, ...], float]] = []
    chosen: list[Change] = []
    for change in (*SLOWER, ADAPTERS, *NARROWER) if full else NARROWER:
        if change in chosen or change[1](_apply(config, chosen)) == _apply(config, chosen):
            continue
        chosen.append(change)
        if (then := peak(_apply(config, chosen))) < now:
            tried.append((tuple(chosen), then))
        if needed(then) <= limit:
            rest = _without_spare(config, chosen, limit, peak)
            return Fit(now, limit, _names(rest), peak(_apply(config, rest)))
    if not tried:
        return Fit(now, limit)
    best = min(tried, key=lambda item: item[1])
    return Fit(now, limit, _names(list(best[0])), best[1])


def _apply(config: StudyConfig, changes: list[Change]) -> StudyConfig:
    for _, change in changes:
        config = change(config)
    return config


def _names(changes: list[Change]) -> tuple[str, ...]:
    """Of two values of one key the last is in force."""
    last = {name.partition(":")[0]: name for name, _ in changes}
    return tuple(last.values())


def _without_spare(
    config: StudyConfig, changes: list[Change], limit: float, peak: Callable[[StudyConfig], float]
) -> list[Change]:
    """The changes without those that are not needed; a full fine-tune becomes one of adapters before all others."""
    kept = list(changes)
    for change in changes:
        rest = [other for other in kept if other is not change]
        if change is not ADAPTERS and needed(peak(_apply(config, rest))) <= limit:
            kept = rest
    return kept
