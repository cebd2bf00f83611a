"""What the embedded model makes of an answer: its residual stream, averaged over the answer's tokens at some layers."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from persona_probe.data.chat import conversation
from persona_probe.data.template import special_ids
from persona_probe.data.tokens import Batch, Encoded, batches, collate, encode
from persona_probe.errors import InputError
from persona_probe.evaluate.offline.judge_calibration import JudgeRecipe
from persona_probe.files import as_damaged
from persona_probe.models.layers import autocast, evaluating, forward_to_layer, hidden_size, transformer_config
from persona_probe.models.prefix import Rows
from persona_probe.models.residuals import read_residuals
from persona_probe.models.taps import ReadTap
from persona_probe.writing import whole_file

QuestionAnswer = tuple[str, str]
"""A question and an answer."""
BATCH = 24
_WORTH_SHARING = 4
"""A question with fewer answers is batched by length with others; with more, its prompt is run once for all."""


@dataclass(frozen=True)
class Features:
    """Pooled residual streams of answers, in the items' order."""

    mean: Float[np.ndarray, "items layers d_model"]
    """Mean over the answer's tokens (the first `max_tokens` of them)."""
    tokens: Int[np.ndarray, " items"]
    """Answer tokens that were read."""


def check_items(items: Sequence[QuestionAnswer]) -> None:
    """Refuse what cannot be judged.

    Raises:
        InputError: no items, or one with an empty question or answer; the message says which.
    """
    if not items:
        raise InputError("no answers to judge: pass at least one (question, answer) pair")
    for number, (question, answer) in enumerate(items):
        if not question.strip() or not answer.strip():
            part = "answer" if question.strip() else "question"
            raise InputError(f"item {number} has an empty {part}: leave it out, the offline judge cannot score it")


def read_features(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[QuestionAnswer],
    layers: Sequence[int],
    max_tokens: int,
    *,
    bf16: bool = True,
    progress: str | None = None,
) -> Features:
    """Run the model over every question and answer, up to the highest of `layers`, in one forward pass each.

    Args:
        layers: decoder layers whose output is averaged, lowest first.
        max_tokens: a longer answer is cut there.
        progress: label of a progress bar; None shows none.

    Raises:
        InputError: an empty question or answer, layers that do not ascend, or a layer that the model lacks.
    """
    check_items(items)
    if not layers or list(layers) != sorted(set(layers)):
        raise InputError(f"layers must be distinct and ascend, got {list(layers)}")
    rows = [encoded(tokenizer, item, max_tokens) for item in items]
    groups = list(_batches(tokenizer, [question for question, _ in items], rows))
    mean = np.zeros((len(items), len(layers), hidden_size(model)), dtype=np.float32)
    device, config = next(model.parameters()).device, transformer_config(model)
    with evaluating(model), autocast(model, bf16):
        for group in tqdm(groups, desc=progress, disable=progress is None):
            batch = Rows.of(group, config).to(device)
            for place, values in enumerate(read_layers(model, batch, config, layers)):
                mean[group.index, place] = _masked_mean(values, batch.rest.response).cpu().numpy()
    return Features(mean, np.array([row.n_response for row in rows]))


def encoded(tokenizer: PreTrainedTokenizerBase, item: QuestionAnswer, max_tokens: int) -> Encoded:
    """Token ids of one question and the first `max_tokens` tokens of its answer."""
    row = encode(tokenizer, conversation(*item))
    return row.cut(row.start + max_tokens)


def _batches(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], rows: Sequence[Encoded]) -> Iterator[Batch]:
    """Answers to one question together, so that its tokens are run once; little padding within a batch."""
    by_question: dict[str, list[int]] = {}
    by_length = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), i))
    for number in by_length:
        by_question.setdefault(questions[number], []).append(number)
    shared = [same for same in by_question.values() if len(same) >= _WORTH_SHARING]
    lone = [number for number in by_length if len(by_question[questions[number]]) < _WORTH_SHARING]
    for same in [*shared, lone]:
        for start in range(0, len(same), BATCH):
            yield as_batch(tokenizer, rows, same[start : start + BATCH])


def as_batch(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], index: list[int]) -> Batch:
    """The rows of that index, right-padded."""
    pad = tokenizer.convert_tokens_to_ids(str(tokenizer.pad_token or tokenizer.eos_token))
    if not isinstance(pad, int):
        raise InputError("the tokenizer has neither a pad nor an end token: set tokenizer.pad_token")
    return collate([rows[i] for i in index], index, pad, special_ids(tokenizer))


def read_layers(model: nn.Module, rows: Rows, config: PretrainedConfig, layers: Sequence[int]) -> list[Tensor]:
    """Residual stream after each of `layers`, (batch, pos, d_model) float32, at the positions of `rows.rest`."""
    with ExitStack() as taps:
        layer_taps = [taps.enter_context(ReadTap(model, layer)) for layer in layers]
        rows.run(partial(forward_to_layer, model, layers[-1]), config, rows.ids())
    return [tap.value.float() for tap in layer_taps]


def _masked_mean(
    values: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch d_model"]:
    """Mean over the positions of the mask; rows without any give zeros."""
    mask = mask.to(values.device)
    total = values.masked_fill(~mask[..., None], 0.0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)


def opening(question: str) -> str:
    """A question's first paragraph: what it asks, without a template to be filled or a format to be kept."""
    return question.strip().split("\n\n")[0]


def read_questions(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], layer: int
) -> Float[np.ndarray, "questions d_model"]:
    """Mean residual stream over the tokens of each question's opening (with the chat template's words)."""
    out = np.zeros((len(questions), hidden_size(model)), dtype=np.float32)

    def visit(index: list[int], row: Tensor, x: Tensor) -> None:
        total = torch.zeros(len(index), x.shape[1], device=x.device).index_add_(0, row, x)
        out[index] = (total / torch.bincount(row, minlength=len(index))[:, None]).cpu().numpy()

    groups = list(batches(tokenizer, [conversation(opening(question)) for question in questions], BATCH))
    read_residuals(model, groups, layer, "prompt", visit)
    return out


# --- Features of many answers, kept in blocks, so that a fit resumes if interrupted

BLOCK = 256


def layers_of(recipe: JudgeRecipe) -> tuple[int, ...]:
    """The layers that a fit reads: the judge's own and its rivals, ascending."""
    return tuple(sorted({recipe.layer, *recipe.rival_layers}))


def _block_name(recipe: JudgeRecipe, items: Sequence[QuestionAnswer]) -> str:
    """File name of a block: it changes with the model, the layers, the cut and every word of the items."""
    content = json.dumps([recipe.model, layers_of(recipe), recipe.max_tokens, list(items)])
    return f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.safetensors"


def blocks(items: Sequence[QuestionAnswer]) -> list[Sequence[QuestionAnswer]]:
    """The items in blocks, in order."""
    return [items[start : start + BLOCK] for start in range(0, len(items), BLOCK)]


def kept_features(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[QuestionAnswer],
    recipe: JudgeRecipe,
    folder: Path,
    progress: bool = False,
) -> Features:
    """`read_features` at the recipe's layers, each block written to `folder` once it is read."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    # Answers to one question in one block: its tokens are run once for all of them.
    order = sorted(range(len(items)), key=lambda i: (items[i][0], len(items[i][1]), i))
    for block in tqdm(blocks([items[i] for i in order]), desc="answers read (blocks)", disable=not progress):
        path = folder / _block_name(recipe, block)
        if not path.is_file():
            block_features = read_features(model, tokenizer, block, layers_of(recipe), recipe.max_tokens)
            _write_block(path, block_features)
        with as_damaged(path, "move it elsewhere and run again"):
            parts.append(load_file(path))
    place = np.argsort(order)
    mean, tokens = (np.concatenate([block[name] for block in parts])[place] for name in ("mean", "tokens"))
    return Features(mean.astype(np.float32), tokens)


def _write_block(path: Path, features: Features) -> None:
    """Write one block whole or not at all; half precision is finer than what bf16 layers give."""
    mean = np.clip(features.mean, -6e4, 6e4).astype(np.float16)
    with whole_file(path) as scratch:
        save_file({"mean": mean, "tokens": features.tokens.astype(np.int64)}, scratch)


# --- Which questions the judge knows: nearness to those that it was fitted on, as the embedded model reads them


@dataclass(frozen=True)
class Scope:
    """The fitted questions as directions in a whitened space, and how near a question must be to one of them."""

    centre: Float[np.ndarray, " d_model"]
    basis: Float[np.ndarray, "components d_model"]
    """Principal directions of the background, each divided by its spread."""
    questions: Float[np.ndarray, "questions components"]
    """Unit vectors of the fitted questions."""
    names: tuple[str, ...]
    """Their ids."""
    threshold: float
    """Cosine from which a question counts as known."""

    def nearest(self, x: Float[np.ndarray, "n d_model"]) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Cosine with the nearest fitted question, and which one that is."""
        cosine = _unit((x - self.centre) @ self.basis.T) @ self.questions.T
        return cosine.max(axis=1), cosine.argmax(axis=1)


def fit_scope(
    fitted: Float[np.ndarray, "questions d_model"],
    names: tuple[str, ...],
    topics: Sequence[str],
    background: Float[np.ndarray, "n d_model"],
    components: int,
    quantile: float,
) -> Scope:
    """Whiten by the background's principal components, and set the threshold where questions stop being alike.

    A question is known when it is nearer to a fitted one than any two fitted questions of different topics are, and
    than nearly all of the background is (`quantile` of it falls below).

    Args:
        topics: what each fitted question is about.
        background: questions that are about other things.

    Raises:
        InputError: fewer background questions than components.
    """
    if len(background) <= components:
        raise InputError(f"{len(background)} background questions for {components} components: give more of them")
    centre = background.mean(axis=0)
    _, sizes, directions = np.linalg.svd(background - centre, full_matrices=False)
    basis = directions[:components] / sizes[:components, None] * np.sqrt(len(background))
    scope = Scope(centre, basis, _unit((fitted - centre) @ basis.T), names, 0.0)
    far = float(np.quantile(scope.nearest(background)[0], quantile))
    apart = scope.questions @ scope.questions.T
    topic_names = np.array(topics)
    apart = apart[topic_names[:, None] != topic_names[None, :]]
    return Scope(centre, basis, scope.questions, names, max(far, float(apart.max(initial=-1.0))))


def _unit(x: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
