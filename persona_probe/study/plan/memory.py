"""Bytes that a study's stages keep at their peak, from the shapes of model, SAE and batches."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from persona_probe.config import StudyConfig
from persona_probe.models.layers import decoder_layers, transformer_config
from persona_probe.saes.read import ENCODED_AT_ONCE
from persona_probe.study.plan.shapes import BYTES, LinearMap, Skeleton, adapted, lora_parameters

FLOAT32, BF16 = 4, 2
ADAM = 4 * FLOAT32
"""A trained parameter, its gradient and AdamW's two moments."""
READ_AT_ONCE, SCORED_AT_ONCE = 32, 32
"""Conversations in a batch of readings and of scores."""
PUSHED_AT_ONCE = {"cpu": 4800, "cuda": 2048}
"""Tokens of one forward through the upper layers, as in `evaluate.answers`, or one batch if that is more. A GPU takes
more, as many as it has room for."""
CHUNK_TOKENS = 1024
"""Answer tokens whose logits TRL's fused loss holds at once on a GPU."""


class RowLengths(Protocol):
    """What is asked of a set of texts."""

    @property
    def rows(self) -> int: ...  # noqa: D102
    @property
    def longest(self) -> int: ...  # noqa: D102
    @property
    def mean_answer(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class Memory:
    """Peaks of one study. Frameworks, and on a GPU their context, come on top."""

    config: StudyConfig
    skeleton: Skeleton
    d_sae: int
    device: str
    """`cpu` or `cuda`."""

    # --- What is there all the time

    @cached_property
    def weights(self) -> float:
        """The base model."""
        return self.skeleton.weight_bytes(self.config.weights, self.config.quantization)

    @cached_property
    def sae(self) -> float:
        """Encoder and decoder."""
        return BYTES[self.config.sae_dtype or "float32"] * 2 * self.skeleton.d_model * self.d_sae

    @cached_property
    def resident(self) -> float:
        """Base model and SAE, which is loaded before the first stage."""
        return self.weights + self.sae

    @cached_property
    def copies(self) -> float:
        """Of frozen weights in bf16: autocast keeps them while a model is read, the graph while it is trained."""
        if not self.config.bf16 or self.config.weights == "bfloat16":
            return 0
        return BF16 * (self._narrowed + self.skeleton.head.weights)

    @cached_property
    def _narrowed(self) -> int:
        """Matrix entries that are cast before they are multiplied with; bitsandbytes' products keep no copy."""
        if self.config.quantization == "none":
            return sum(m.weights for m in self.skeleton.linears) + self._stacked
        return self._stacked

    @cached_property
    def _stacked(self) -> int:
        return sum(e.entries for e in self.skeleton.experts if e.is_stacked)

    @cached_property
    def unpacked(self) -> float:
        """The largest quantised layer while it is multiplied with."""
        if self.config.quantization == "none":
            return 0
        size = BYTES[self.config.weights] + (BF16 if self.config.weights == "float32" else 0)
        return size * max(m.weights for m in self.skeleton.linears)

    @cached_property
    def loading(self) -> float:
        """While weights are cast or quantised, their file lies next to them; on a GPU, in the host's memory."""
        if self.device != "cpu":
            return self.weights
        is_read_as_it_is = self.config.quantization == "none" and self.config.weights == self.skeleton.stored
        return self.weights + (0 if is_read_as_it_is else BYTES[self.skeleton.stored] * self.skeleton.parameters)

    # --- Stages

    def training(self, batch: int, longest: int, answer: float) -> float:
        """Base model, what is trained, and what the backward pass needs of a batch.

        Args:
            batch: rows.
            longest: tokens of the longest row, to which a batch is padded.
            answer: answer tokens per row.
        """
        training, full = self.config.training, self.config.training.method == "full"
        trainable = self.skeleton.parameters if full else lora_parameters(self.skeleton, training)
        frozen = self.weights - (BYTES["float32"] * trainable if full else 0)
        fixed = frozen + self.sae + ADAM * trainable + self.unpacked
        if training.bf16 and full:
            fixed += BF16 * trainable  # autocast keeps its copies of trained weights until the step ends
        elif training.bf16 and (self.device == "cpu" or not training.gradient_checkpointing):
            fixed += self.copies
        elif training.bf16:  # one layer at a time
            fixed += self.copies / self.skeleton.layers
        return fixed + batch * (longest * self._kept(longest) + answer * self._logits(batch * answer))

    def reading(self, rows: RowLengths) -> float:
        """Reading latents at an organism: model, SAE, a batch's forward pass and its latents."""
        tokens = READ_AT_ONCE * rows.longest
        return self.resident + self._organism + self.copies + max(tokens * self._forward, self._latents(rows))

    def scoring(self, rows: RowLengths) -> float:
        """Scoring answers: model and a batch's forward pass."""
        return self.resident + self._organism + self.copies + SCORED_AT_ONCE * rows.longest * self._forward

    def locating(self, selection: RowLengths, evaluation: RowLengths, rankers: int, backward: bool) -> float:
        """Reading with its tables, or pushing: as many changes as fit in one forward pass of the upper layers."""
        # mean and firing rate of every latent and conversation, of three models; on a GPU they are in the host's memory
        tables = 3 * 2 * FLOAT32 * selection.rows * self.d_sae if self.device == "cpu" else 0
        batch = SCORED_AT_ONCE * max(selection.longest, evaluation.longest)
        captured = FLOAT32 * self.skeleton.d_model * batch * -(-max(selection.rows, evaluation.rows) // SCORED_AT_ONCE)
        pushed = max(batch, PUSHED_AT_ONCE[self.device]) * self._forward
        base = self.resident + self._organism + self.copies
        graph = READ_AT_ONCE * selection.longest * self._kept(selection.longest) if backward else 0
        return max(self.reading(selection) + tables, base + tables + captured + pushed, base + tables + graph)

    def sampling(self, questions: RowLengths, new: int) -> float:
        """Keys and values of all questions at once, next to the model."""
        a_token = 2 * BF16 * sum(layer.keys for layer in self._layers)
        cache = a_token * questions.rows * (questions.longest + new)
        return self.resident + self._organism + self.copies + cache

    # --- Parts of them

    @cached_property
    def _organism(self) -> float:
        if self.config.training.method == "full":
            return self.weights  # full weights are a second model
        return FLOAT32 * lora_parameters(self.skeleton, self.config.training)

    @cached_property
    def _layers(self) -> list["_Layer"]:
        adapters = [] if self.config.training.method == "full" else adapted(self.skeleton, self.config.training)
        return [_Layer.of(self.skeleton, n, {m.name for m in adapters}) for n in range(self.skeleton.layers)]

    def _kept(self, longest: int) -> float:
        """Bytes of one token of all layers that the backward pass needs."""
        each = [self._layer(layer, longest) for layer in self._layers]
        if not self.config.training.gradient_checkpointing:
            return sum(each)
        return self._stream * self.skeleton.d_model * len(each) + max(each)

    def _layer(self, layer: "_Layer", longest: int) -> float:
        training = self.config.training
        full, size = training.method == "full", BF16 if training.bf16 else FLOAT32
        inputs = layer.inputs if full else layer.adapted
        if not training.bf16:
            inputs = layer.shared_inputs  # without a cast, maps of one input keep one tensor
        kept = size * (inputs + (0 if full else training.rank * layer.maps))
        kept += FLOAT32 * layer.norms * (2 if full else 1) + size * (layer.between + layer.routed)
        if layer.heads and self._eager:
            kept += layer.heads * longest * (FLOAT32 + size) + size * 3 * layer.queries
        elif layer.heads:
            kept += size * 2 * (layer.queries + layer.keys)
        return kept

    @cached_property
    def _stream(self) -> int:
        return FLOAT32 if self.config.weights == "float32" else BF16

    @cached_property
    def _eager(self) -> bool:
        """Whether attention keeps its whole matrix, as the CPU's trainer does unless it recomputes."""
        if self.config.attn_implementation == "eager":
            return True
        return self.device == "cpu" and not self.config.training.gradient_checkpointing

    def _logits(self, answers: float) -> float:
        """Bytes of logits for each answer token: in bf16, their float32 log-softmax and its gradient."""
        whole = self.skeleton.vocabulary * (2 * FLOAT32 + (BF16 if self.config.training.bf16 else 0))
        if self.device == "cpu":
            return whole
        return whole * min(1.0, CHUNK_TOKENS / max(answers, 1))

    @cached_property
    def _forward(self) -> float:
        """Bytes of one token in a forward pass without gradients: the stream, and the widest layer."""
        size = BF16 if self.config.bf16 else FLOAT32
        widest = max(
            size * max(layer.between + layer.routed, 3 * (layer.queries + layer.keys)) for layer in self._layers
        )
        return 4 * FLOAT32 * self.skeleton.d_model + widest

    def _latents(self, rows: RowLengths) -> float:
        """Of the tokens that are encoded at once: before and after the activation function, and sums over them."""
        at_once = min(READ_AT_ONCE * rows.longest, ENCODED_AT_ONCE // max(1, self.d_sae))
        return 4 * FLOAT32 * at_once * self.d_sae


@dataclass(frozen=True)
class _Layer:
    """Widths of one decoder layer, in values for each token."""

    inputs: int
    """Of all its linear maps."""
    adapted: int
    """Of those with an adapter."""
    shared_inputs: int
    """Inputs that several maps share counted once."""
    maps: int
    """Maps with an adapter."""
    between: int
    """Between the maps of a feed-forward block or a mixer: what the activation function and the product keep."""
    norms: int
    """Inputs of its norms."""
    routed: int
    """Inside the experts that a token is sent to."""
    heads: int
    """0 in a layer without attention."""
    queries: int
    """Width of all heads' queries."""
    keys: int
    """Width of all heads' keys."""

    @classmethod
    def of(cls, skeleton: Skeleton, number: int, adapters: set[str]) -> "_Layer":
        """From the skeleton's linear maps, norms and experts in that layer."""
        maps = [m for m in skeleton.linears if m.layer == number]
        numbers = transformer_config(skeleton.model)
        attention = [m for m in maps if m.in_attention]
        heads = (getattr(numbers, "num_attention_heads", None) or 1) if attention else 0
        queries = (
            max((m.d_in for m in attention if m.d_out == skeleton.d_model), default=skeleton.d_model) if heads else 0
        )
        keys = queries * (getattr(numbers, "num_key_value_heads", None) or heads) // heads if heads else 0
        blocks: dict[str, set[int]] = {}
        for m in maps:
            blocks.setdefault(m.parent, set()).add(m.d_in)
        routed = sum(e.chosen * (skeleton.d_model + 7 * e.inner) for e in skeleton.experts if e.layer == number)
        return cls(
            inputs=sum(m.d_in for m in maps),
            adapted=sum(m.d_in for m in maps if m.name in adapters),
            shared_inputs=sum(map(sum, blocks.values())),
            maps=sum(m.name in adapters for m in maps),
            between=_feed_forward(maps, skeleton) + _mixer(maps, skeleton),
            norms=_norms(skeleton, number, queries, keys),
            routed=routed,
            heads=heads,
            queries=queries,
            keys=keys,
        )


def _feed_forward(maps: list[LinearMap], skeleton: Skeleton) -> int:
    """Outputs of the maps into the block, and of the activation function where they are multiplied."""
    inside = [m for m in maps if m.in_mlp]
    down = max((m.d_in for m in inside), default=0)
    up = sum(m.d_out for m in inside if m.d_out != skeleton.d_model)
    if up >= 2 * down:
        return up + down
    numbers = transformer_config(skeleton.model)
    is_written_out = "new" in str(getattr(numbers, "activation_function", "") or getattr(numbers, "hidden_act", ""))
    return up + 3 * down * is_written_out  # GPT-2's GELU is four operations in Python


CHUNK = 64
"""Tokens that a gated delta rule takes at once."""


def _mixer(maps: list[LinearMap], skeleton: Skeleton) -> int:
    """Of convolutions, state-space layers and linear attention, roughly: three tensors of each width."""
    inside = [m for m in maps if not m.in_mlp and not m.in_attention and m.d_out != skeleton.d_model]
    delta_rule = any("linear_attn" in m.name for m in inside)
    heads = getattr(transformer_config(skeleton.model), "linear_num_value_heads", None) or 0
    return 3 * sum(m.d_out for m in inside) + 10 * heads * CHUNK * delta_rule


def _norms(skeleton: Skeleton, number: int, queries: int, keys: int) -> int:
    total = 0
    for name, module in decoder_layers(skeleton.model)[number].named_modules():
        if "norm" in type(module).__name__.lower():
            size = max((p.numel() for p in module.parameters(recurse=False)), default=0)
            of_heads = {"q_norm": queries, "q_layernorm": queries, "k_norm": keys, "k_layernorm": keys}
            total += of_heads.get(name.rpartition(".")[2], size)
    return total
