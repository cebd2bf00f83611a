"""Where LoRA adapters go, and how many parameters they have."""

import re

from persona_probe.config import Training
from persona_probe.errors import InputError, unknown
from persona_probe.planning.skeleton import Linear, Skeleton


def adapted(skeleton: Skeleton, training: Training) -> list[Linear]:
    """The linear maps that get a LoRA adapter, as PEFT chooses them.

    Raises:
        InputError: a layer or a module name that the model does not have.
    """
    if training.layers is not None and any(not 0 <= layer < skeleton.layers for layer in training.layers):
        raise InputError(f"training.layers {list(training.layers)}: the model has layers 0 to {skeleton.layers - 1}")
    chosen = _named(skeleton, training.target_modules)
    if training.layers is None:
        return chosen
    # PEFT reads a module's layer as the first number in its name after a list, wherever that list is.
    numbers = [(m, re.match(r".*?\.[^.]*\.(\d+)\.", m.name)) for m in chosen]
    inside = {m.name.rpartition(".")[2] for m in skeleton.linears if m.layer is not None}
    return [m for m, n in numbers if n and int(n[1]) in training.layers and m.name.rpartition(".")[2] in inside]


def lora_parameters(skeleton: Skeleton, training: Training) -> int:
    """Trainable parameters of the adapters: rank x (d_in + d_out) for each adapted map."""
    return sum(training.rank * (m.d_in + m.d_out) for m in adapted(skeleton, training))


def _named(skeleton: Skeleton, targets: str | tuple[str, ...]) -> list[Linear]:
    """A string is `all-linear` or a regular expression of whole names; a list holds ends of names."""
    if targets == "all-linear":
        return skeleton.linears
    if isinstance(targets, str):
        chosen = [m for m in skeleton.linears if re.fullmatch(targets, m.name)]
        if not chosen:
            raise unknown("training.target_modules", targets, ["all-linear", *_ends(skeleton)])
        return chosen
    for target in targets:
        if not any(m.name == target or m.name.endswith(f".{target}") for m in skeleton.linears):
            raise unknown("module in training.target_modules", target, _ends(skeleton))
    return [m for m in skeleton.linears if any(m.name == t or m.name.endswith(f".{t}") for t in targets)]


def _ends(skeleton: Skeleton) -> list[str]:
    return sorted({m.name.rpartition(".")[2] for m in skeleton.linears})
