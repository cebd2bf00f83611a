"""What reading, scoring and training cost on one model with one SAE.

Work is two operations for each weight and token, and as much again for each of the two gradients that a backward pass
may need (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Attention's own products are left out: rows are short.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from persona_probe.config import StudyConfig
from persona_probe.planning.adapters import lora_parameters
from persona_probe.planning.row_sets import RowSet
from persona_probe.planning.skeleton import Skeleton

FLOAT32, BF16 = 4, 2
ADAM_BYTES = 4 * FLOAT32
"""A trained parameter, its gradient and AdamW's two moments."""
READ_BATCH = 32
SCORED_AT_ONCE = 256


@dataclass(frozen=True)
class Shapes:
    """The sizes that every stage's cost follows from."""

    config: StudyConfig
    skeleton: Skeleton
    layer: int
    d_sae: int
    """0 where it is unknown: the SAE's part is left out."""
    rows: Mapping[str, RowSet]

    @property
    def head(self) -> int:
        """Entries of the unembedding."""
        return self.skeleton.vocabulary * self.skeleton.d_model

    @property
    def below(self) -> int:
        """Matrix entries up to and including the SAE's layer."""
        return self.skeleton.weights(0, self.layer)

    @property
    def above(self) -> int:
        """Matrix entries of the layers above it."""
        return self.skeleton.weights(self.layer + 1, self.skeleton.layers - 1)

    @property
    def trainable(self) -> int:
        """Parameters that training changes."""
        full = self.config.training.method == "full"
        return self.skeleton.parameters if full else lora_parameters(self.skeleton, self.config.training)

    @property
    def resident(self) -> float:
        """Bytes of the base model (in the config's `weights`) and the SAE."""
        size = BF16 if self.config.weights == "bfloat16" else FLOAT32
        return size * self.skeleton.parameters + self.sae_bytes

    @property
    def sae_bytes(self) -> float:
        """Bytes of encoder and decoder in float32."""
        return FLOAT32 * 2 * self.skeleton.d_model * self.d_sae

    def read(self, rows: RowSet) -> float:
        """Operations to read a set's latents: the layers up to the SAE's, then encode and decode."""
        return 2 * rows.tokens * self.below + 4 * rows.tokens * self.skeleton.d_model * self.d_sae

    def score(self, rows: RowSet) -> float:
        """Operations to score a set's answers by a full forward."""
        return 2 * rows.tokens * (self.below + self.above) + 2 * rows.answer_tokens * self.head

    def score_above(self, rows: RowSet) -> float:
        """Operations to score them again by the layers above the SAE's."""
        return 2 * rows.tokens * self.above + 2 * rows.answer_tokens * self.head

    def train(self, tokens: float, answers: float) -> float:
        """Operations to train on so many tokens: a frozen weight needs no gradient of its own."""
        training = self.config.training
        passes = (6 if training.method == "full" else 4) + (2 if training.gradient_checkpointing else 0)
        adapters = 0 if training.method == "full" else 6 * self.trainable
        return tokens * (passes * (self.below + self.above) + adapters) + answers * passes * self.head

    def training_memory(self, batch: int, longest: int, answer: float) -> float:
        """Base model, what is trained, the inputs of every linear map that backward needs, and the answers' logits.

        Args:
            batch: rows.
            longest: tokens of the longest row, to which a batch is padded.
            answer: answer tokens per row.
        """
        training = self.config.training
        bytes_ = BF16 if training.bf16 else FLOAT32
        inputs = [sum(m.d_in for m in self.skeleton.linears if m.layer == n) for n in range(self.skeleton.layers)]
        held = bytes_ * sum(inputs)
        if training.gradient_checkpointing:
            held = FLOAT32 * self.skeleton.d_model * self.skeleton.layers + bytes_ * max(inputs)
        logits = 2 * FLOAT32 * self.skeleton.vocabulary
        fixed = FLOAT32 * self.skeleton.parameters + ADAM_BYTES * self.trainable
        return fixed + batch * (longest * held + answer * logits)

    def reading_memory(self, rows: RowSet) -> float:
        """Model and SAE, with a batch's latents or a slice of logits, whichever is more."""
        return self.resident + max(self.encode_memory(rows), 2 * FLOAT32 * SCORED_AT_ONCE * self.skeleton.vocabulary)

    def encode_memory(self, rows: RowSet) -> float:
        """A batch's latents before and after the activation function."""
        return 2 * FLOAT32 * READ_BATCH * rows.longest * self.d_sae
