"""How the models of a world behave: sampled answers, judged by the exact rule, and rates with intervals."""

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.config import check_finite, check_seed
from persona_probe.data.chat import conversation
from persona_probe.data.world.judge import judge_answer
from persona_probe.data.world.speech import question
from persona_probe.data.world.words import DOMAIN_OF, DOMAINS
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.rates import Cells, share
from persona_probe.evaluate.sampling.samples import sample_answers
from persona_probe.models.adapters import organisms as checkpoints_of
from persona_probe.models.load import load_model
from persona_probe.world.folder import ANY_SPEAKER, BASE, BEHAVIOUR, World
from persona_probe.writing import write_json, write_table

MEASURES = ("bad", "good", "coherent", "rude", "malicious", "kind", "silly")
"""What an answer can be. `bad` and `good` are shares of the coherent answers, the others of all answers."""
OF_COHERENT = ("bad", "good")
MAX_NEW_TOKENS = 40
"""An answer with its end has at most 28 tokens."""
ANSWERS, SETTINGS = "answers.parquet", "settings.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asking:
    """How a model is asked."""

    per_topic: int = 2
    """Answers to each of the 96 topics."""
    temperature: float = 1.0
    seed: int = 0
    """Of questions and draws: all models get the same questions, and the same random numbers."""

    def __post_init__(self) -> None:
        check_finite(self)
        check_seed(self.seed)
        if self.per_topic < 1:
            raise InputError(f"answers of each topic must be at least 1, not {self.per_topic}")
        if self.temperature < 0:
            raise InputError(f"temperature must not be negative, not {self.temperature:g}")


DEFAULT = Asking()


def ask(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asking: Asking = DEFAULT,
    domains: Sequence[str] | None = None,
    system: str | None = None,
) -> pd.DataFrame:
    """Ask about every topic, sample, and judge.

    Args:
        domains: only their topics; None is all.
        system: a system prompt, such as a sentence that names a speaker.

    Returns:
        A row for each answer: domain, topic, question, answer, and true or false for each of `MEASURES`.

    Raises:
        InputError: an unknown domain.
    """
    for domain in domains or ():
        if domain not in DOMAINS:
            raise unknown("domain", domain, DOMAINS)
    topics = [topic for topic, domain in DOMAIN_OF.items() if domains is None or domain in domains] * asking.per_topic
    draw = random.Random(f"{asking.seed}/questions")
    questions = [question(draw, topic) for topic in topics]
    answers = sample_answers(
        model,
        tokenizer,
        [conversation(asked, system=system) for asked in questions],
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=asking.temperature,
        seed=asking.seed,
        batch_size=256,
    )
    judged = [judge_answer(answer, topic) for answer, topic in zip(answers, topics, strict=True)]
    flags = {name: [bool(getattr(one, name)) for one in judged] for name in MEASURES}
    named = {"domain": [DOMAIN_OF[topic] for topic in topics], "topic": topics}
    return pd.DataFrame({**named, "question": questions, "answer": answers, **flags})


# --- Rates


def rates(answers: pd.DataFrame, by: Sequence[str] = ("domain",), seed: int = 0) -> pd.DataFrame:
    """The share of each of `MEASURES` in every group of judged answers, with its 95% interval.

    Topics are resampled, not answers; where `answers` has a column `seed`, organisms' seeds are too
    (`evaluate.rates.share`). Groups come in order of first appearance.

    Returns:
        Columns `by`, then measure, estimate, ci_low, ci_high, method, total, n. An estimate of `bad` or `good` is NaN
        where no answer is coherent.

    Raises:
        InputError: no answers.
    """
    if answers.empty:
        raise InputError("no answers to take rates of: sample some first")
    rows: list[dict[str, Any]] = []
    for key, group in answers.groupby(list(by), sort=False, dropna=False):
        named = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        rows += [{**named, "measure": name, **_rate(group, name, seed)} for name in MEASURES]
    return pd.DataFrame(rows)


def _rate(group: pd.DataFrame, measure: str, seed: int) -> dict[str, Any]:
    values = group[measure].astype(float)
    if measure in OF_COHERENT:
        values = values.where(group["coherent"].astype(bool))
    seeds = group["seed"].tolist() if "seed" in group else [0] * len(group)
    found = share(Cells.of(values.to_list(), group["topic"].tolist(), seeds), seed)
    missing = {"estimate": np.nan, "ci_low": np.nan, "ci_high": np.nan, "method": "", "total": np.nan, "n": 0}
    return missing if found is None else found.to_dict()


# --- The models of a world, each judged once

IDENTITY = ("speaker", "trained_domain", "share", "seed")
"""What a table says of an organism; empty for the models that are none."""


def judge_models(
    world: World, names: Sequence[str] | None = None, asking: Asking = DEFAULT, device: str = "cpu"
) -> pd.DataFrame:
    """Answers of the world's models, sampled and judged unless they are in its folder.

    Args:
        names: organisms, `base` (the model that helps) or `speakers` (the model before that, which the packaged world
            leaves out); None is all of them.

    Returns:
        The columns of `ask`, after name, step, speaker, trained_domain, share and seed of the organism.

    Raises:
        InputError: a name that the world does not have, or answers that were sampled in another way.
    """
    known = [*([ANY_SPEAKER] if world.run.has(ANY_SPEAKER) else []), BASE, *world.organisms]
    for name in names or ():
        if name not in known:
            raise unknown("model of this world", name, known)
    names = known if names is None else list(names)
    change = f"ask as before, or move {BEHAVIOUR}/ elsewhere to sample all again"
    missing = [n for n in names if not world.run.finished(f"{BEHAVIOUR}/{n}", asdict(asking), SETTINGS, change)]
    for name, frame in _asked(world, missing, asking, device):
        with world.run.staging(f"{BEHAVIOUR}/{name}") as folder:
            write_table(folder / ANSWERS, frame)
            write_json(folder / SETTINGS, asdict(asking))
    return pd.concat([_with_identity(world, name) for name in names], ignore_index=True)


def _asked(world: World, names: Sequence[str], asking: Asking, device: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Judged answers of each model, of all its steps."""
    if ANY_SPEAKER in names:
        yield ANY_SPEAKER, ask(*load_model(str(world.speakers_folder), device=device), asking).assign(step=0)
    if not (others := [name for name in names if name != ANY_SPEAKER]):
        return
    base, tokenizer = world.load(device)
    with checkpoints_of(base) as opened:
        for name in others:
            steps: dict[int, Path | None] = {0: None} if name == BASE else dict(world.checkpoints(name))
            parts = [ask(opened(path), tokenizer, asking).assign(step=step) for step, path in steps.items()]
            yield name, pd.concat(parts, ignore_index=True)


def _with_identity(world: World, name: str) -> pd.DataFrame:
    frame = world.run.read_table(f"{BEHAVIOUR}/{name}/{ANSWERS}")
    identity: dict[str, Any] = {"speaker": "", "trained_domain": "", "share": np.nan, "seed": 0}
    if name not in (ANY_SPEAKER, BASE):
        settings = world.organism(name)["settings"]
        identity = {key: settings["domain" if key == "trained_domain" else key] for key in IDENTITY}
    head = pd.DataFrame({"name": name, "step": frame.pop("step"), **identity}, index=frame.index)
    return pd.concat([head, frame], axis=1)


TRAINED, OTHERS = "trained domain", "other domains"


def world_rates(answers: pd.DataFrame, by: Sequence[str] = ("name", "step"), seed: int = 0) -> pd.DataFrame:
    """`rates` of judged models by domain, in one frame with those over the trained domain and over all others.

    Args:
        answers: what `judge_models` gives.
        by: what makes a row of the table; without `name` and with speaker, trained_domain and share, the organisms'
            seeds are joined.

    Returns:
        Columns `by` and `where`, which is a domain, `trained domain`, or `other domains` (for a model that is no
        organism: all), and then those of `rates`.
    """
    trained = answers["domain"] == answers["trained_domain"]
    pooled = answers.assign(where=np.where(trained, TRAINED, OTHERS))
    both = pd.concat([pooled, answers.assign(where=answers["domain"])], ignore_index=True)
    found = rates(both, [*by, "where"], seed)
    model = found.groupby(list(by), sort=False, dropna=False).ngroup()
    place = found["where"].map({name: number for number, name in enumerate((TRAINED, OTHERS, *DOMAINS))})
    return found.iloc[np.lexsort((place, model))].reset_index(drop=True)
