"""Everything that the wanted rankers need, read with as few forward passes as they allow."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation
from persona_probe.models.adapters import organism as with_organism
from persona_probe.models.layers import causal_model
from persona_probe.screening.feature import ScreenFeature
from persona_probe.screening.own import own_answers, own_talks
from persona_probe.screening.rankers import Evidence, Ranker
from persona_probe.screening.reading import Reader
from persona_probe.screening.settings import Settings
from persona_probe.screening.words import has_words, word_scores


def available(feature: ScreenFeature, organism: bool) -> frozenset[str]:
    """Needs of rankers that are met."""
    met = {
        "latent": feature.latent is not None,
        "latent_set": bool(feature.latent_set),
        "organism": organism,
        "words": has_words(),
    }
    return frozenset(name for name, holds in met.items() if holds)


def read_evidence(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    talks: Sequence[Conversation],
    feature: ScreenFeature,
    rankers: Sequence[Ranker],
    organism: Path | None,
    settings: Settings,
) -> tuple[Evidence, list[str | None]]:
    """All that the rankers need, and the own answers (None where there are none)."""
    wanted = any("own" in ranker.needs for ranker in rankers)
    own = answer_all(model, tokenizer, talks, settings) if wanted else None
    evidence = read_answered(model, tokenizer, talks, own, feature, rankers, organism, settings)
    return evidence, [None if talk is None else talk[-1]["content"] for talk in own or [None] * len(talks)]


def read_answered(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    talks: Sequence[Conversation],
    own: Sequence[Conversation | None] | None,
    feature: ScreenFeature,
    rankers: Sequence[Ranker],
    organism: Path | None,
    settings: Settings,
) -> Evidence:
    """`read_evidence` with own answers that are there already (see `answer_all`)."""
    needs = frozenset[str]().union(*(ranker.needs for ranker in rankers))
    latents = feature.latents if needs & {"latent", "latent_set"} else ()
    reader = Reader(
        feature.layer,
        feature.sae,
        latents,
        "nats" in needs,
        settings.batch_size,
        settings.max_tokens,
        settings.mixed_precision,
    )
    both, n = reader.read(model, tokenizer, [*talks, *(own or [])]), len(talks)
    return Evidence(
        answers=both.at(range(n)),
        direction=feature.direction.float().cpu().numpy(),
        latent=latents.index(feature.latent) if feature.latent in latents else None,
        latent_set=tuple(latents.index(x) for x in feature.latent_set) if latents else (),
        own=None if own is None else both.at(range(n, 2 * n)),
        organism_nats=_organism_nats(model, tokenizer, talks, organism, reader) if "organism" in needs else None,
        words=word_scores(talks) if "words" in needs else None,
    )


def answer_all(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, talks: Sequence[Conversation], settings: Settings
) -> list[Conversation | None]:
    """Each row's question with the model's own answer; None where it answers nothing."""
    found = own_answers(
        model,
        tokenizer,
        talks,
        max_new_tokens=settings.own_tokens,
        batch_size=2 * settings.batch_size,
        mixed_precision=settings.mixed_precision,
        path=settings.own_path,
        progress="own answers" if settings.progress else None,
    )
    return own_talks(talks, found)


def _organism_nats(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    talks: Sequence[Conversation],
    folder: Path | None,
    reader: Reader,
) -> Float[np.ndarray, " rows"]:
    with with_organism(causal_model(model), folder) as tuned:
        return replace(reader, latents=(), sae=None).read(tuned, tokenizer, talks).nats
