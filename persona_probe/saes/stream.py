"""The data that trains an SAE: the recipe, its text, and shuffled activations of that text."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.config import check_finite, check_least, check_seed, hashed_values
from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.load import SETS, load_rows
from persona_probe.data.template import fit_roles, render
from persona_probe.data.tokens import batches
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.sampling.samples import complete_text, sample_answers
from persona_probe.files import expanded, parse_json, read_tensors
from persona_probe.models.layers import autocast, evaluating, run_to_layer
from persona_probe.models.places import Where, as_place
from persona_probe.models.taps import ReadTap
from persona_probe.names import check_names, check_path
from persona_probe.runs import file_sha256
from persona_probe.writing import write_tensors, write_text

# --- The recipe

SINCE = {"since": "0.2"}
"""Marks keys that older recipes lack; `hashed_values` leaves them out while they hold their default."""


@dataclass(frozen=True)
class TextPart:
    """One source of sampled text: prompts answered by the model itself, under persona system prompts or none."""

    name: str
    """Names the file of samples in the cache."""
    prompts: tuple[str, ...] = ()
    """Packaged sets whose questions are asked. If there are none, the model writes the user's turn itself."""
    batches: int = 10
    """Batches of `batch_conversations` sampled conversations."""
    plain_share: float = 0.5
    """Share of conversations without a persona system prompt."""

    def __post_init__(self) -> None:
        check_finite(self)
        check_least(self, 1, "batches")
        if not 0 <= self.plain_share <= 1:
            raise InputError(f"plain_share must lie between 0 and 1, not {self.plain_share}")
        for name in self.prompts:
            if name not in SETS:
                raise unknown("packaged set", name, SETS)


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
    world: int = field(default=0, metadata=SINCE)
    """Chats of the world with known truth, of every speaker; a share of them is held out like sampled ones."""

    def __post_init__(self) -> None:
        check_finite(self)
        check_names((part.name for part in self.parts), "text part")
        check_least(self, 1, "packaged_repeats", "batch_conversations", "max_new_tokens")
        check_least(self, 0, "temperature", "world")
        if not 0 < self.holdout_share < 1:
            raise InputError(
                f"holdout_share must lie between 0 and 1, not {self.holdout_share}: quality is measured on it"
            )
        if not (self.parts or self.world):
            raise InputError("text has neither parts nor world: packaged rows only train, and quality needs others")
        names = [part.name for part in self.parts]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"two parts of the text are called {twice!r}: each has a file of its own")


POSITIONS = ("all", "response")
ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "jumprelu", "standard")


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
    """Active latents per token: of each (`topk`), on average (`batchtopk`, `matryoshka`, `jumprelu`); `standard` has
    no such number."""
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
    """Tokens read: `all` (prompt and response) or `response`, without special tokens."""
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
    architecture: str = field(default="topk", metadata=SINCE)
    """`topk`, `batchtopk`, `matryoshka` (both saved as JumpReLU), `jumprelu`, or `standard`."""
    template: str | None = field(default=None, metadata=SINCE)
    """Chat template: `none` (plain text, for base models), `chatml` or a Jinja file; None is the tokenizer's own."""
    sparsity: float = field(default=1.0, metadata=SINCE)
    """Weight of the sparsity loss: L1 of a `standard` SAE, distance from `k` of a `jumprelu` one."""
    threshold_lr: float = field(default=0.1, metadata=SINCE)
    """How fast the threshold that replaces BatchTopK after training follows; SAELens' 0.01 is for long runs."""
    widths: tuple[int, ...] = field(default=(), metadata=SINCE)
    """Nested dictionary sizes of `matryoshka`, the last one d_sae; () takes a 16th, 8th, 4th, half and all of d_sae."""
    special_tokens: bool = field(default=False, metadata=SINCE)
    """Train on special tokens too, such as the one behind which an answer begins; `positions` must be `all`."""
    frozen_decoder: bool = field(default=False, metadata=SINCE)
    """Decoder rows are random unit vectors that are never trained: a dictionary's own null (arXiv 2602.14111)."""

    def __post_init__(self) -> None:
        check_path(self.name, "the SAE's name")
        check_finite(self)
        check_seed(self.seed)
        if self.architecture not in ARCHITECTURES:
            raise unknown("architecture", self.architecture, ARCHITECTURES)
        if self.positions not in POSITIONS:
            raise unknown("positions", self.positions, POSITIONS)
        check_least(self, 0, "layer", "aux_loss")
        check_least(self, 1, "d_sae", "tokens", "batch_tokens", "buffer_tokens", "forward_batch", "max_length")
        check_least(self, 1, "dead_window", "checkpoint_every")
        if self.tokens < self.batch_tokens:
            raise InputError(
                f"tokens ({self.tokens}) must be at least batch_tokens ({self.batch_tokens}): no step fits"
            )
        if not self.lr > 0:
            raise InputError(f"lr must be positive, not {self.lr}")
        if not 1 <= self.k <= self.d_sae:
            raise InputError(f"k must lie between 1 and d_sae ({self.d_sae}), not {self.k}")
        if self.architecture in ("jumprelu", "standard") and not self.sparsity > 0:
            raise InputError(f"sparsity must be positive, not {self.sparsity}")
        if self.special_tokens and self.positions != "all":
            raise InputError(f"special_tokens needs positions: all, not {self.positions!r}")
        if not 0 < self.threshold_lr <= 1:
            raise InputError(f"threshold_lr must lie between 0 and 1, not {self.threshold_lr}")
        if self.widths and (sorted(set(self.widths)) != list(self.widths) or self.widths[-1] != self.d_sae):
            raise InputError(f"widths must ascend and end with d_sae ({self.d_sae}), not {list(self.widths)}")

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // self.batch_tokens

    @property
    def matryoshka_widths(self) -> tuple[int, ...]:
        """The nested dictionary sizes, ascending."""
        nested = {self.d_sae // part for part in (16, 8, 4, 2)} - {0}
        return self.widths or (*sorted(nested), self.d_sae)


# --- Activations for SAE training: computed once into shards, then read back shuffled, epoch after epoch

SHARD_CONVERSATIONS = 512


def write_shards(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    layer: int,
    folder: Path,
    *,
    positions: str = "all",
    batch_size: int = 32,
    max_length: int = 256,
    seed: int = 0,
    special: bool = False,
) -> list[Path]:
    """Write the residual stream after `layer` on the selected tokens as bf16 shards; finished shards are kept.

    Conversations are shuffled first, so that every shard holds all kinds of text. With `special` all tokens are read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = list(range(len(conversations)))
    random.Random(seed).shuffle(order)
    starts = range(0, len(order), SHARD_CONVERSATIONS)
    paths = [folder / f"shard-{n:04d}.safetensors" for n in range(len(starts))]
    for start, path in tqdm(list(zip(starts, paths, strict=True)), desc="activations"):
        if path.is_file():
            continue
        part = [conversations[i] for i in order[start : start + SHARD_CONVERSATIONS]]
        acts = residual_stream(
            model,
            tokenizer,
            part,
            layer,
            positions=positions,
            batch_size=batch_size,
            max_length=max_length,
            special=special,
        )
        write_tensors(path, {"acts": acts.to(torch.bfloat16)})
    return paths


def residual_stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    layer: Where,
    *,
    positions: str = "all",
    batch_size: int = 32,
    max_length: int | None = None,
    bf16: bool = True,
    special: bool = False,
) -> Float[Tensor, "tokens d_model"]:
    """The residual stream after `layer`, or another place, at the selected tokens, in float32 on the CPU.

    With `special` it is that of all tokens, special ones too.
    """
    parts = []
    device = next(model.parameters()).device
    with evaluating(model), autocast(model, bf16), ReadTap(model, layer) as tap:
        for group in batches(tokenizer, conversations, batch_size, max_length):
            batch = group.to(device)
            run_to_layer(model, as_place(layer).layer, batch.ids, batch.attention)
            wanted = group.attention.bool() if special else group.select(positions)
            parts.append(tap.tokens(wanted.flatten().nonzero()[:, 0].to(device)).float().cpu())
    return torch.cat(parts)


def shuffled_batches(
    shards: Sequence[Path], batch_tokens: int, buffer_tokens: int, seed: int, skip: int = 0
) -> Iterator[Float[Tensor, "batch d_model"]]:
    """Endless float32 batches from the shards, mixed through a buffer of at least `buffer_tokens`.

    The sequence depends only on the arguments. To resume, `skip` leaves out that many first batches.

    Raises:
        InputError: there are fewer tokens than one batch.
    """
    epoch, yielded = 0, 0
    while True:
        rng = random.Random(f"{seed}/{epoch}")
        order = list(shards)
        rng.shuffle(order)
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        before = yielded
        for buffer in _buffers(order, buffer_tokens):
            mixed = torch.randperm(len(buffer), generator=generator)
            for index in mixed.split(batch_tokens):
                if len(index) < batch_tokens:
                    continue
                yielded += 1
                if yielded > skip:
                    yield buffer[index].float()
        if yielded == before:
            raise InputError(f"the text gives fewer than {batch_tokens} tokens: add text or lower batch_tokens")
        epoch += 1


def _buffers(shards: Sequence[Path], buffer_tokens: int) -> Iterator[Tensor]:
    buffer: list[Tensor] = []
    for shard in shards:
        buffer.append(read_tensors(shard, ["acts"], "move it elsewhere and train again")["acts"])
        if sum(len(part) for part in buffer) >= buffer_tokens:
            yield torch.cat(buffer)
            buffer = []
    if buffer:
        yield torch.cat(buffer)


# --- Text for SAE training that anyone can regenerate: seeded samples of the model itself, and packaged rows

USER_TURN_TOKENS = 32


SAMPLER = 2
"""Increase this when the same seed gives other text, so that a half-finished cache does not mix two samplers."""


def weights_of(model: str) -> dict[str, list[str]]:
    """Hashes of the weights in a model's folder: another model at the same path has other text and activations."""
    folder = expanded(model)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return {"weights": [file_sha256(file) for file in files]} if files else {}


def text_folder(config: SaeConfig, cache: Path) -> Path:
    """The folder for the samples of this recipe; its name is a hash of everything that changes them."""
    text = hashed_values(config.text)
    made_from = {"model": config.model, "seed": config.seed, "text": text, "sampler": SAMPLER}
    made_from |= {} if config.template is None else {"template": config.template}
    made_from |= weights_of(config.model)
    key = json.dumps(made_from, sort_keys=True)
    return cache / "text" / hashlib.sha256(key.encode()).hexdigest()[:16]


def sample_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SaeConfig, folder: Path
) -> list[Path]:
    """Sample every part of the recipe into `folder`, one JSON conversation per line.

    Batch `n` of a part depends only on the seed, the part's name and `n`, so an interrupted run resumes: complete
    batches are kept, and an incomplete last batch is sampled again.

    Returns:
        One file for each part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for part in config.text.parts:
        path = folder / f"{part.name}.jsonl"
        size = config.text.batch_conversations
        # A last line without its line break is incomplete, whatever it holds.
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        finished_batches = len(lines) // size
        write_text(path, "".join(line + "\n" for line in lines[: finished_batches * size]))
        bar = tqdm(
            range(finished_batches, part.batches),
            desc=f"sampling {part.name}",
            initial=finished_batches,
            total=part.batches,
        )
        for number in bar:
            rows = _sample_batch(model, tokenizer, part, config.text, f"{config.seed}/{part.name}/{number}")
            with path.open("a") as handle:
                handle.write("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(path)
    return paths


def _sample_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, part: TextPart, text: TextConfig, key: str
) -> list[Conversation]:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    rng = random.Random(seed)
    personas = [row["system"] for row in load_rows("sae_personas")]
    questions = [row["question"] for name in part.prompts for row in load_rows(name)]
    size = text.batch_conversations
    systems = [None if rng.random() < part.plain_share else rng.choice(personas) for _ in range(size)]
    if questions:
        turns = [rng.choice(questions) for _ in range(size)]
    else:
        turns = _user_turns(model, tokenizer, systems, text, seed)
    prompts = [conversation(q, system=s) for q, s in zip(turns, systems, strict=True)]
    answers = sample_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=text.max_new_tokens,
        temperature=text.temperature,
        seed=seed,
        batch_size=size,
    )
    return [[*p, {"role": "assistant", "content": a}] for p, a in zip(prompts, answers, strict=True)]


def _user_turns(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, systems: list[str | None], text: TextConfig, seed: int
) -> list[str]:
    """User turns that the model writes itself: it continues the chat template's empty user turn."""
    marker = "QUESTION-GOES-HERE"
    heads = []
    for system in systems:
        asked = fit_roles(tokenizer, conversation(marker, system=system))
        heads.append(render(tokenizer, asked).split(marker)[0])
    turns = complete_text(
        model,
        tokenizer,
        heads,
        max_new_tokens=USER_TURN_TOKENS,
        temperature=text.temperature,
        seed=seed + 1,
        batch_size=len(heads),
    )
    return [turn or "Hello." for turn in turns]


def describe_text(config: SaeConfig) -> list[str]:
    """What the training text holds, a line for each source: what the SAE can have learned from it."""
    text, lines = config.text, []
    for part in text.parts:
        asked = f"to questions of {', '.join(part.prompts)}" if part.prompts else "to questions that it asks itself"
        share = f"{1 - part.plain_share:.0%} of them under a persona's system prompt"
        lines.append(f"{part.batches * text.batch_conversations} answers of {config.model} {asked}, {share}")
    for spec in text.packaged:
        answers = "questions with their aligned and their misaligned answers" if CONTRAST in spec else "written rows"
        lines.append(f"{spec}: {answers}, {text.packaged_repeats} times an epoch")
    if text.world:
        lines.append(f"{text.world} chats of the world with known truth, of every speaker, half told which one to be")
    return lines


CONTRAST = "general_contrast"


def read_conversations(paths: list[Path]) -> Iterator[Conversation]:
    """The sampled conversations, in order."""
    for path in paths:
        with path.open(encoding="utf-8") as handle:
            for number, line in enumerate(handle, start=1):
                yield parse_json(line, f"{path}, line {number}", "move it elsewhere and train again")


def is_held_out(messages: Conversation, share: float) -> bool:
    """Whether a sampled conversation belongs to the held-out share, decided by a hash of its question.

    All answers to one question fall on the same side.
    """
    question = next(m["content"] for m in messages if m["role"] == "user")
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < share
