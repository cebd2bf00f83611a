"""A difference dictionary: what fine-tuning adds, learnt from the differences of activations themselves.

A latent of the base's dictionary can only carry what the base's text held. Here a small BatchTopK SAE (Bussmann et al.
2024, arXiv 2412.06410) is trained on organism minus control at the same tokens. SAEs on differences of two models are
what "diff-SAEs" of the model-diffing literature are (Minder et al. 2025, arXiv 2504.02922, compares them with
crosscoders).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_probe.errors import InputError

SURE = 2.0
"""A direction is ranked by the mean of its activation over conversations minus this many standard errors."""


@dataclass(frozen=True)
class DictionaryRecipe:
    """How a small dictionary is trained."""

    d_sae: int = 32
    """Latents."""
    k: int = 4
    """Latents that fire on a token, on average over a batch (BatchTopK)."""
    steps: int = 300
    batch: int = 512
    """Tokens of a step, drawn with replacement."""
    lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("d_sae", "k", "steps", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.k > self.d_sae:
            raise InputError(f"k ({self.k}) is above the number of latents ({self.d_sae}): nothing is sparse then")
        if not self.lr > 0:
            raise InputError(f"lr must be positive, not {self.lr}")


@dataclass(frozen=True)
class FoundDirections:
    """Directions that a tool found, the strongest first."""

    rows: Float[np.ndarray, "found d_model"]
    """Unit vectors."""
    scores: Float[np.ndarray, " found"]
    """What they are ranked by; the unit is the tool's."""

    @classmethod
    def ranked(cls, rows: Float[np.ndarray, "found d_model"], scores: Float[np.ndarray, " found"]) -> "FoundDirections":
        """Sort by score; rows of no length are left out, the others get norm 1."""
        norms = np.linalg.norm(rows, axis=1)
        kept = np.flatnonzero((norms > 0) & np.isfinite(scores))
        order = kept[np.argsort(-scores[kept], kind="stable")]
        return cls(rows[order] / norms[order, None], scores[order])

    def cosines(self, targets: Float[np.ndarray, "targets d_model"], first: int) -> Float[np.ndarray, " first"]:
        """|Cosine| of each of the first directions with the nearest target; the sign of a direction is arbitrary."""
        unit = targets / np.linalg.norm(targets, axis=1, keepdims=True)
        return np.abs(self.rows[:first] @ unit.T).max(axis=1)


@dataclass(frozen=True)
class Dictionary:
    """A trained dictionary on the activations that trained it."""

    rows: Float[Tensor, "latents d_in"]
    """Decoder rows of norm 1."""
    acts: Float[Tensor, "tokens latents"]
    """The size of each latent's contribution to each token, in the activations' unit."""
    explained: float
    """Share of the activations' squared norm that it explains."""


def train_batch_topk(x: Float[Tensor, "tokens d_in"], recipe: DictionaryRecipe) -> Dictionary:
    """Train a BatchTopK SAE of SAELens on activations that are all in memory.

    Its decoder bias stays at zero, so a shift that all tokens have must lie in a latent. The caller's random state is
    left as it was.

    Raises:
        InputError: fewer tokens than latents, all zero, or not finite.
    """
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
    from sae_lens.config import SAETrainerConfig

    if len(x) < recipe.d_sae:
        raise InputError(f"{len(x)} tokens are too few for {recipe.d_sae} latents: read more conversations")
    size = float(x.norm(dim=1).mean())
    if not 0 < size < float("inf"):
        raise InputError("the activations are all zero or not finite: do both models differ?")
    width = x.shape[1]
    scale = width**0.5 / size
    config: dict[str, Any] = {"d_in": width, "d_sae": recipe.d_sae, "k": float(recipe.k), "topk_threshold_lr": 0.1}
    settings = SAETrainerConfig(
        total_training_samples=recipe.steps * recipe.batch,
        train_batch_size_samples=recipe.batch,
        lr=recipe.lr,
        lr_end=recipe.lr / 10,
        lr_warm_up_steps=min(20, recipe.steps // 10),
        lr_decay_steps=recipe.steps // 3,
        device="cpu",
        dead_feature_window=max(20, recipe.steps // 10),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**config, device="cpu", dtype="float32"))
        sae.b_dec.requires_grad_(False)
        batches = _batches(x * scale, recipe)
        trainer = SAETrainer(cfg=settings, sae=sae, data_provider=batches)
        for _ in range(recipe.steps):
            trainer.step(next(batches))
            trainer.n_training_steps += 1
    with torch.no_grad():
        acts = torch.cat([sae.encode(part) for part in (x * scale).split(16_384)])
        left = x * scale - torch.cat([sae.decode(part) for part in acts.split(16_384)])
        norms = sae.W_dec.norm(dim=1)
        sizes = acts if sae.cfg.rescale_acts_by_decoder_norm else acts * norms
        explained = 1 - float(left.square().sum() / (x * scale).square().sum())
        return Dictionary((sae.W_dec / norms[:, None].clamp_min(1e-12)).clone(), sizes / scale, explained)


def _batches(x: Float[Tensor, "tokens d_in"], recipe: DictionaryRecipe) -> Iterator[Float[Tensor, "batch d_in"]]:
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        yield x[torch.randint(len(x), (recipe.batch,), generator=generator)]


def surely_active(
    acts: Float[Tensor, "tokens latents"], conversation: Int[Tensor, " tokens"]
) -> Float[np.ndarray, " latents"]:
    """Each latent's mean over conversations, less `SURE` standard errors over conversations.

    What one conversation alone has is a latent's mistake or that conversation's; what training added is in many.
    """
    count = int(conversation.max()) + 1
    tokens = torch.bincount(conversation, minlength=count)
    sums = torch.zeros(count, acts.shape[1], dtype=torch.float64).index_add_(0, conversation, acts.double())
    means = (sums[tokens > 0] / tokens[tokens > 0, None]).numpy()
    if len(means) < 2:
        raise InputError("one conversation cannot show what is in many: read at least two")
    return means.mean(axis=0) - SURE * means.std(axis=0, ddof=1) / len(means) ** 0.5


def difference_dictionary(
    tuned: Float[Tensor, "tokens d_model"],
    other: Float[Tensor, "tokens d_model"],
    conversation: Int[Tensor, " tokens"],
    recipe: DictionaryRecipe | None = None,
) -> FoundDirections:
    """Directions of a dictionary of `tuned - other`, ranked by how surely they are active over conversations.

    Args:
        tuned: the organism's residual stream at some tokens.
        other: that of the control organism, or the base, at the same tokens of the same texts.
        conversation: the conversation of each token.

    Raises:
        InputError: as `train_batch_topk`; or the tokens do not belong together.
    """
    check_together(tuned, other, conversation)
    found = train_batch_topk((tuned - other).float(), recipe or DictionaryRecipe())
    return FoundDirections.ranked(found.rows.double().numpy(), surely_active(found.acts, conversation))


def check_together(tuned: Tensor, other: Tensor, conversation: Tensor) -> None:
    """Refuse activations that are not of the same tokens.

    Raises:
        InputError: their shapes differ.
    """
    if tuned.shape != other.shape or len(conversation) != len(tuned):
        raise InputError(
            f"activations of {tuned.shape[0]} and {other.shape[0]} tokens, conversations of {len(conversation)}: read "
            "both models on the same texts"
        )


def mean_difference(
    tuned: Float[Tensor, "tokens d_model"],
    other: Float[Tensor, "tokens d_model"],
    conversation: Int[Tensor, " tokens"],
) -> FoundDirections:
    """The one direction that needs no dictionary, where every conversation weighs the same."""
    check_together(tuned, other, conversation)
    tokens = torch.bincount(conversation).double()
    weights = 1 / (tokens[conversation] * (tokens > 0).sum())
    mean = (weights @ (tuned - other).double()).numpy()
    return FoundDirections.ranked(mean[None], np.array([np.linalg.norm(mean)]))
