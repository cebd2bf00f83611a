"""Mitigations that change the residual stream: while training, or at inference."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from persona_probe.errors import InputError, unknown
from persona_probe.mitigate.mitigation import Mitigation, MitigationInputs
from persona_probe.models.layers import decoder_layer
from persona_probe.models.taps import EditTap, orthonormal, project_out, resolve_push
from persona_probe.saes.read import check_latents

Edit = Callable[[Tensor], Tensor]
ABLATED = ("latents", "direction")


class TrainingTap(EditTap):
    """Changes a layer's output while the layer is in training mode: readings and evaluation see the plain model.

    The mode decides, not whether gradients are on: reentrant gradient checkpointing runs a forward without them.
    """

    def __init__(self, model: nn.Module, layer: int, edit: Edit) -> None:
        super().__init__(model, layer, edit)
        self.watched = decoder_layer(model, layer)

    def on_output(self, resid: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """Edit it, or hand it on as it is."""
        return self.edit(resid) if self.watched.training else resid


def taken_out(resid: Float[Tensor, "*batch d_model"], basis: Float[Tensor, "rank d_model"], share: float) -> Tensor:
    """`resid` without `share` of its component in the span of an orthonormal basis."""
    without = project_out(resid, basis)
    return without if share == 1 else resid + share * (without - resid)


@dataclass(frozen=True)
class Ablating(Mitigation):
    """Base of the mitigations that project the persona out."""

    unit: ClassVar[str] = "share of the component that is projected out"
    largest: ClassVar[float] = 1.0

    what: str | None = None
    """`latents` (the span of their decoder directions) or `direction`; None takes the latents if there are any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what is not None and self.what not in ABLATED:
            raise unknown(f"setting what of {self.name}:", self.what, ABLATED)

    def check(self, inputs: MitigationInputs) -> None:
        """Also checks the latents against the dictionary."""
        if self._by_latents(inputs):
            if not (inputs.has("sae") and inputs.has("latents")):
                raise InputError(
                    f"{self.name} needs an SAE and its latents: pass MitigationInputs(sae=..., latents=...)"
                )
            check_latents(inputs.sae, list(inputs.latents))
        elif inputs.direction is None:
            raise InputError(
                f"{self.name} needs latents with their SAE, or a direction: pass MitigationInputs(direction=...)"
            )

    def _by_latents(self, inputs: MitigationInputs) -> bool:
        return self.what == "latents" or (self.what is None and inputs.has("sae") and inputs.has("latents"))

    def basis(self, inputs: MitigationInputs) -> Float[Tensor, "rank d_model"]:
        """An orthonormal basis of what is projected out."""
        self.check(inputs)
        if not self._by_latents(inputs):
            assert inputs.direction is not None
            return orthonormal(inputs.direction)
        assert inputs.sae is not None
        return orthonormal(inputs.sae.W_dec.detach()[list(inputs.latents)])

    def _edit(self, inputs: MitigationInputs) -> Edit:
        basis = self.basis(inputs)
        return lambda resid: taken_out(resid, basis, self.strength)


@dataclass(frozen=True)
class ConceptAblation(Ablating):
    """CAFT: training cannot use what is projected out at every one of its forwards; evaluation is left alone."""

    name: ClassVar[str] = "concept_ablation"
    summary: ClassVar[str] = (
        "The persona's directions are projected out of the residual stream at every training forward, not at "
        "evaluation (CAFT: Casademunt et al. 2025, arXiv 2507.16795)."
    )

    def forwards(self, model: nn.Module, inputs: MitigationInputs) -> AbstractContextManager[object]:
        """Project out in training forwards."""
        return TrainingTap(model, inputs.layer, self._edit(inputs)) if self.strength else nullcontext()


@dataclass(frozen=True)
class InferenceAblation(Ablating):
    """Nothing while training; afterwards the persona is projected out of the model's forwards."""

    name: ClassVar[str] = "inference_ablation"
    summary: ClassVar[str] = (
        "Plain training; the persona's directions are projected out of the residual stream when the model is used "
        "(Arditi et al. 2024, arXiv 2406.11717)."
    )

    def at_evaluation(self, model: nn.Module, inputs: MitigationInputs) -> AbstractContextManager[object]:
        """Project out in all forwards."""
        return EditTap(model, inputs.layer, self._edit(inputs)) if self.strength else nullcontext()


@dataclass(frozen=True)
class Steering(Mitigation):
    """Base of the mitigations that add a multiple of the direction at all positions."""

    unit: ClassVar[str] = "x_delta: multiples of the arms' mean activation difference"
    uses: ClassVar[tuple[str, ...]] = ("direction",)
    sign: ClassVar[int] = 1

    def _edit(self, inputs: MitigationInputs) -> Edit:
        self.check(inputs)
        assert inputs.direction is not None
        push = resolve_push(inputs.direction.detach(), self.sign * self.strength, "x_delta").vector
        return lambda resid: resid + push.to(resid.device, resid.dtype)


@dataclass(frozen=True)
class PreventativeSteering(Steering):
    """Towards the persona while training, so that the weights need not go there; evaluation is left alone."""

    name: ClassVar[str] = "preventative_steering"
    summary: ClassVar[str] = (
        "The persona's direction is added while training, so that the weights need not learn it, and left out "
        "afterwards (Chen et al. 2025, persona vectors, arXiv 2507.21509)."
    )

    def forwards(self, model: nn.Module, inputs: MitigationInputs) -> AbstractContextManager[object]:
        """Push in training forwards."""
        return TrainingTap(model, inputs.layer, self._edit(inputs)) if self.strength else nullcontext()


@dataclass(frozen=True)
class InferenceSteering(Steering):
    """Nothing while training; afterwards every forward is pushed away from the persona."""

    name: ClassVar[str] = "inference_steering"
    summary: ClassVar[str] = (
        "Plain training; the persona's direction is subtracted when the model is used "
        "(Chen et al. 2025, persona vectors, arXiv 2507.21509)."
    )
    sign: ClassVar[int] = -1

    def at_evaluation(self, model: nn.Module, inputs: MitigationInputs) -> AbstractContextManager[object]:
        """Push in all forwards."""
        return EditTap(model, inputs.layer, self._edit(inputs)) if self.strength else nullcontext()
