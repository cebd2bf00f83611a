"""How truth is planted: known shifts of the residual stream at the hook layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_probe.models.taps import SteerTap
from persona_probe.planted.stream import Stream, down_projection

KINDS = {
    "latent": "(a) one frequent latent",
    "rare latent": "(a) one rare latent",
    "latents": "(b) five latents, random signs",
    "lora": "(c) rank-1 LoRA onto a latent",
    "no latent": "(d) a direction no latent has",
    "nothing": "nothing planted",
}


@dataclass(frozen=True)
class Plant:
    """One known change: `vector` is added to the layer's output, by `reader` if there is one.

    Without a reader the shift is the same at every token. With one it is `vector x (reader . h)`, h being what the
    layer's `mlp.down_proj` reads: a rank-1 LoRA on that matrix.
    """

    kind: str
    size: float
    """Residual standard deviations: of each latent's shift, or of the LoRA's mean shift over answer tokens."""
    latents: tuple[int, ...]
    signs: tuple[int, ...]
    vector: Float[Tensor, " d_model"]
    reader: Float[Tensor, " d_mlp"] | None = None

    def up(self) -> list[int]:
        """Latents that were pushed up."""
        return [latent for latent, sign in zip(self.latents, self.signs, strict=True) if sign > 0]

    def down(self) -> list[int]:
        """Latents that were pushed down."""
        return [latent for latent, sign in zip(self.latents, self.signs, strict=True) if sign < 0]

    def shift(self, stream: Stream) -> Float[Tensor, "tokens d_model"]:
        """What the plant adds to every token."""
        if self.reader is None:
            return self.vector.expand_as(stream.resid)
        return (stream.hidden @ self.reader)[:, None] * self.vector

    def targets(self, decoder: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, "planted d_model"]:
        """Unit directions that were pushed: signed decoder rows, or the shift itself where no latent has it."""
        if self.kind == "nothing":
            return decoder[:0]
        rows = (
            self.vector[None] if not self.latents else decoder[list(self.latents)] * torch.tensor(self.signs)[:, None]
        )
        return rows / rows.norm(dim=1, keepdim=True)


@contextmanager
def graft(model: nn.Module, layer: int, plant: Plant) -> Iterator[None]:
    """The plant in the model itself: a LoRA in its weights, a shift as a hook; all is as before afterwards."""
    if plant.reader is None:
        with SteerTap(model, layer, plant.vector):
            yield
        return
    weight = down_projection(model, layer).weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += torch.outer(plant.vector, plant.reader).to(weight)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)
