"""Rivals of the monitor: weight norm, drift of the residual stream, and training loss, as signals of the same runs."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from persona_probe.errors import InputError


@torch.no_grad()
def weight_norm(model: nn.Module) -> float:
    """Frobenius norm of all LoRA updates together: the root of the sum of |scale B A|^2 over adapted layers.

    It is computed from the small products, without the full matrices: |B A|^2 = tr((B^T B)(A A^T)).

    Raises:
        InputError: the model has no LoRA adapter on linear layers.
    """
    adapted = [(m, name) for m in model.modules() if isinstance(m, LoraLayer) for name in m.active_adapters]
    squares = [_square(layer, name) for layer, name in adapted if name in layer.lora_A]
    if not squares:
        raise InputError("the model has no LoRA adapter whose norm could be taken: train with method lora")
    return float(torch.stack(squares).sum().sqrt())


def _square(layer: LoraLayer, name: str) -> Tensor:
    a, b = _weight(layer.lora_A[name]), _weight(layer.lora_B[name])
    return (layer.scaling[name] ** 2 * ((b.T @ b) * (a @ a.T)).sum()).cpu()


def _weight(factor: nn.Module) -> Tensor:
    if not isinstance(factor, nn.Linear):
        raise InputError(f"the weight norm knows adapters of linear layers, not {type(factor).__name__}")
    return factor.weight.double()


def first_component(
    shifts: Float[np.ndarray, "checkpoints d_model"], towards: Float[np.ndarray, " d_model"]
) -> Float[np.ndarray, " d_model"]:
    """Unit first principal component of residual shifts (centred), with the sign of its product with `towards`.

    Raises:
        InputError: fewer than two shifts, or shifts that do not vary.
    """
    centred = shifts - shifts.mean(axis=0) if len(shifts) > 1 else np.zeros((1, 1))
    if not np.abs(centred).max() > 0:
        raise InputError("a principal component needs at least two checkpoints that differ")
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    return axis if float(axis @ towards) >= 0 else -axis


def drift_projections(
    shifts: Mapping[str, Float[np.ndarray, "checkpoints d_model"]], towards: Float[np.ndarray, " d_model"]
) -> dict[str, Float[np.ndarray, " checkpoints"]]:
    """Each run's shifts projected on the first component of the other runs' shifts (leave one run out).

    Args:
        shifts: run to probe-mean residual shifts from the base, in raw units.
        towards: fixes the sign; a direction from other data.

    Raises:
        InputError: fewer than two runs.
    """
    if len(shifts) < 2:
        raise InputError("leaving one run out needs at least two runs")
    return {run: shift @ first_component(_others(shifts, run), towards) for run, shift in shifts.items()}


def _others(shifts: Mapping[str, np.ndarray], left_out: str) -> np.ndarray:
    return np.concatenate([values for run, values in shifts.items() if run != left_out])


def recent_loss(losses: Sequence[float], steps: Sequence[int]) -> list[float]:
    """Mean training loss over the optimizer steps since the previous reading; NaN where there was no step.

    Args:
        losses: of optimizer steps 1, 2, ... (nats per token).
        steps: of the readings, ascending.
    """
    starts = [0, *steps[:-1]]
    parts = [losses[start:stop] for start, stop in zip(starts, steps, strict=True)]
    return [float(np.mean(part)) if len(part) else float("nan") for part in parts]
