"""Locate for any pair of models, without a study: rank the SAE's latents by what fine-tuning did to them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, as_conversations, user_turns
from persona_probe.data.template import with_template
from persona_probe.data.tokens import Batch, conversation_batches
from persona_probe.errors import InputError
from persona_probe.latents.attribution import gradient_scores_of
from persona_probe.latents.caveats import add_caveats
from persona_probe.latents.rankers import BACKWARD, DEFAULT_RANKERS, POSITIONS, Evidence, check_rankers, score_table
from persona_probe.models.activation_cache import ActivationCache
from persona_probe.models.adapters import base_weights, organism
from persona_probe.models.load import load_model
from persona_probe.saes.hooks import PlacedSae, Saes, placed_saes
from persona_probe.saes.load import check_placed
from persona_probe.saes.quality import require_fit
from persona_probe.saes.read import LatentMeans, read_saes
from persona_probe.saes.worth import worthless

log = logging.getLogger(__name__)

Model = nn.Module | str | Path
"""A transformers or PEFT model, or its folder. A base may also be an id; a tuned folder may hold an adapter."""


def locate(
    base: Model,
    tuned: Model,
    sae: Saes,
    conversations: Sequence[str | Conversation],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    control: Model | None = None,
    null: Model | None = None,
    misaligned: Sequence[bool] | None = None,
    rankers: Sequence[str] = DEFAULT_RANKERS,
    order: str = "cosine",
    layer: int | None = None,
    positions: str | None = None,
    minimum_explained_variance: float = 0.5,
    bf16: bool = False,
    cache: ActivationCache | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank latents by what fine-tuning changed: `tuned` against `control` (or against `base` without one).

    The default order is the decoder row's cosine with the mean change, which finds the most planted latents
    (docs/planted.md). What the ranking does not know is logged as a warning, and stands in `attrs`.

    Args:
        base: the model before fine-tuning. For a PEFT model pass the same object twice; its adapters are switched off.
        tuned: the fine-tuned model, or a folder with an adapter or weights of the base's kind.
        sae: a `sae_lens.SAE` of the base model's residual stream; of what its attention or MLP puts out; a transcoder;
            or several of them, as a list or names to SAEs, which are read from the same forward passes.
        conversations: prompts, or conversations that end with an answer.
        tokenizer: the models' tokenizer; not needed if `base` is a folder or an id.
        chat_template_kwargs: variables of the chat template that the conversations are rendered with.
        control: the organism of a control arm. Without one, an effect may be what any fine-tuning does.
        null: the control's organism trained with another seed (a third fine-tune on the tuned model's own data will not
            do). Every rise then stands beside that of this null pair; without it, seed noise is not measured.
        misaligned: whether each conversation ends with a misaligned answer; `discrimination`, `attribution` and `slope`
            need it.
        rankers: names of `latents.rankers.RANKERS`.
        order: the ranker whose best latent comes first: `cosine`, `rise`, or another name of `rankers`.
        layer: of one SAE whose metadata does not say it.
        positions: None takes `response` if every conversation has an answer, else `prompt`.
        cache: keeps residual streams on disk, so that the same weights and texts are read only once.
        minimum_explained_variance: smallest share of the base's residual variance that the SAE must explain.

    Returns:
        One row per latent, best first: latent, rise with its interval, p_value, q_value, suppressed, cosine, firing
        rates, the rankers' scores and ranks; see `latents.rankers.score_table`. With several SAEs a first column `sae`,
        one SAE after the other. `note` marks latents that rise and cosine place far apart. With `null` also null_rise,
        beyond_null and q_null. `frame.attrs` has `explained_variance`, of the base's tokens at `positions` (with
        several SAEs a dictionary), `warnings`, and what `latents.caveats.add_caveats` says (with several SAEs by name
        under `saes`).

    Raises:
        InputError: no conversations, an unknown ranker or one without its evidence, or an SAE that does not fit.
    """
    names = check_rankers([*rankers, order])
    if null is not None and control is None:
        raise InputError("null= is the control arm trained with another seed: pass control= too")
    if null is not None and null is control:
        raise InputError("null= is the control itself: pass the control arm trained with another seed")
    rows = as_conversations(conversations)
    model, tokenizer = _base(base, tokenizer)
    tokenizer = with_template(tokenizer, chat_template_kwargs=chat_template_kwargs)
    saes = placed_saes(sae, layer)
    for placed in saes:
        check_placed(placed, model)
    groups = conversation_batches(tokenizer, rows)
    main = positions or ("response" if all(c[-1]["role"] == "assistant" for c in rows) else "prompt")
    read_at = list(dict.fromkeys([main, *(POSITIONS[n] for n in names if n in POSITIONS)]))
    reader = _Reader(saes, groups, read_at, bf16, cache)
    with base_weights(model):
        before = reader.read(model)
    for placed, reading in zip(saes, before, strict=True):
        require_fit(reading[main].fit, placed.sae, model, placed.reads, minimum_explained_variance)
    flags = None if misaligned is None else np.asarray(misaligned, dtype=bool)
    with _opened(tuned, model) as organism_model:
        after = reader.read(organism_model)
        gradients = reader.gradients(organism_model, flags) if BACKWARD & set(names) else [{} for _ in saes]
    reference = before
    if control is not None:
        with _opened(control, model) as control_model:
            reference = reader.read(control_model)
    nulls: Sequence[dict[str, LatentMeans] | None] = [None] * len(saes)
    if null is not None:
        with _opened(null, model) as null_model:
            nulls = reader.read(null_model)
    clusters, tables, caveats = [user_turns(c) for c in rows], [], []
    for i, (placed, base_read, tuned_read, other, slopes) in enumerate(
        zip(saes, before, after, reference, gradients, strict=True)
    ):
        decoder = np.asarray(placed.sae.W_dec.detach().float().cpu().numpy())
        evidence = Evidence(
            base_read,
            tuned_read,
            other,
            decoder,
            clusters,
            flags,
            main,
            attribution=slopes.get("attribution"),
            slope=slopes.get("slope"),
            seed=seed,
            null=nulls[i],
        )
        table = score_table(evidence, names, order)
        caveats.append(add_caveats(table, evidence))
        tables.append(table)
    explained = {p.name: float(r[main].fit.explained_variance) for p, r in zip(saes, before, strict=True)}
    return _joined(tables, explained, caveats, several=isinstance(sae, (Mapping, list, tuple)))


def _joined(
    tables: Sequence[pd.DataFrame], explained: Mapping[str, float], caveats: Sequence[list[str]], several: bool
) -> pd.DataFrame:
    """The tables one after the other, with each SAE's explained variance; what is not known is warned of."""
    warnings = []
    for (name, value), doubts in zip(explained.items(), caveats, strict=True):
        worth = worthless(value)
        for warning in [*([] if worth is None else [worth]), *doubts]:
            warnings.append(f"SAE {name}: {warning}" if several else warning)
            log.warning("%s", warnings[-1])
    if not several:
        (table,) = tables
        table.attrs |= {"explained_variance": next(iter(explained.values())), "warnings": warnings}
        return table
    for name, table in zip(explained, tables, strict=True):
        table.insert(0, "sae", name)
    by_sae = {name: dict(table.attrs) for name, table in zip(explained, tables, strict=True)}
    for table in tables:
        table.attrs = {}
    joined = pd.concat(tables, ignore_index=True)
    joined.attrs = {"saes": by_sae, "explained_variance": dict(explained), "warnings": warnings}
    return joined


@dataclass(frozen=True)
class _Reader:
    """Takes the same measurements of several models, all SAEs at once."""

    saes: Sequence[PlacedSae]
    groups: Sequence[Batch]
    positions: Sequence[str]
    bf16: bool
    cache: ActivationCache | None

    def read(self, model: nn.Module) -> list[dict[str, LatentMeans]]:
        return read_saes(model, self.saes, self.groups, self.positions, bf16=self.bf16, cache=self.cache)

    def gradients(self, model: nn.Module, flags: np.ndarray | None) -> list[dict[str, np.ndarray]]:
        if flags is None:
            raise InputError(
                "rankers 'attribution' and 'slope' need to know which answers are misaligned: pass misaligned="
            )
        scores = gradient_scores_of(model, self.saes, self.groups, flags, bf16=self.bf16)
        return [{"attribution": score.attribution, "slope": score.slope} for score in scores]


def _base(base: Model, tokenizer: PreTrainedTokenizerBase | None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    if isinstance(base, nn.Module):
        if tokenizer is None:
            raise InputError("locate needs the models' tokenizer: pass tokenizer=")
        return base, tokenizer
    model, its_tokenizer = load_model(str(base))
    return model, tokenizer or its_tokenizer


@contextmanager
def _opened(model: Model, base: nn.Module) -> Iterator[nn.Module]:
    """The model itself, or the one in a folder; an adapter is put on the base and taken off again."""
    if isinstance(model, nn.Module):
        yield model
        return
    if not isinstance(base, PreTrainedModel):
        raise InputError("a folder of an adapter or of weights needs a plain transformers model as base")
    with organism(base, Path(model)) as opened:
        yield opened
