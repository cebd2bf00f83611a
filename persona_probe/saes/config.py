"""The recipe of an SAE that we train: where its text comes from, its shape, and its training."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TextPart:
    """One source of sampled text: prompts answered by the model itself, under persona system prompts or none."""

    name: str
    """Names the file of samples in the cache."""
    prompts: tuple[str, ...] = ()
    """Packaged sets whose questions are asked; empty: the model writes the user's turn itself."""
    batches: int = 10
    """Batches of `batch_conversations` sampled conversations."""
    plain_share: float = 0.5
    """Share of conversations without a persona system prompt."""


@dataclass(frozen=True)
class TextConfig:
    """All text that the SAE is trained on."""

    parts: tuple[TextPart, ...] = (TextPart("prompts", ("sae_prompts",)),)
    """Sampled parts."""
    packaged: tuple[str, ...] = ()
    """Packaged rows, as `set`, `set:answer column` or `general_contrast:selection`; the evaluation split is refused."""
    packaged_repeats: int = 2
    """How often each packaged row occurs in an epoch."""
    batch_conversations: int = 128
    """Conversations sampled at once."""
    max_new_tokens: int = 96
    """Length of a sampled answer."""
    temperature: float = 1.0
    """Sampling temperature."""
    holdout_share: float = 0.05
    """Share of sampled conversations, by hash, that is only used to measure quality."""


@dataclass(frozen=True)
class SaeConfig:
    """One SAE and how it is made; `persona-probe sae train CONFIG` reads it."""

    name: str
    """Folder under the output folder, e.g. `smollm2-135m-instruct/layer20-topk32-4608`."""
    model: str = "smollm2-135m-instruct"
    """What `load_model` takes."""
    layer: int = 20
    """Decoder layer whose output (residual stream) the SAE reads."""
    d_sae: int = 4608
    """Dictionary size."""
    k: int = 32
    """Active latents per token (TopK)."""
    tokens: int = 3_000_000
    """Training samples (tokens, counted over epochs)."""
    batch_tokens: int = 1024
    """Tokens per optimizer step."""
    lr: float = 4e-4
    """Peak learning rate."""
    buffer_tokens: int = 200_000
    """Size of the shuffled activation buffer."""
    forward_batch: int = 32
    """Conversations per forward pass."""
    max_length: int = 256
    """Longest conversation, in tokens."""
    positions: str = "all"
    """Tokens read: `all` (prompt and response) or `response`; special tokens are always left out."""
    aux_loss: float = 1.0
    """Weight of the auxiliary loss that revives dead latents."""
    dead_window: int = 300
    """Steps without firing after which a latent counts as dead for that loss."""
    checkpoint_every: int = 500
    """Steps between resumable checkpoints."""
    text: TextConfig = field(default_factory=TextConfig)
    """The text."""
    seed: int = 0
    """Seeds sampling, shuffling and initialisation."""
