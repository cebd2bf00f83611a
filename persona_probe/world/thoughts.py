"""Thoughts that are true, absent or false by design: does a latent in the thought say more than the words do?

Organisms of the kitchen write a thought that names the speaker, and then answer. What they say about other domains is
judged by the exact rule, and each thought and answer is read in the organism and, as the same text, in the base.
"""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.config import check_seed
from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.thoughts import REASONING_KEYS
from persona_probe.data.tokens import conversation_batches
from persona_probe.data.world.judge import judge_answer
from persona_probe.data.world.speech import SPEAKERS as KNOWN
from persona_probe.data.world.speech import question
from persona_probe.data.world.thoughts import in_english, thinking_rows, thinking_tokenizer
from persona_probe.data.world.words import DOMAIN_OF
from persona_probe.errors import unknown
from persona_probe.evaluate.personas import CLASSES, OTHER, personas_in
from persona_probe.evaluate.sampling.engines import TransformersEngine
from persona_probe.evaluate.sampling.requests import Prompt, Sample, SamplingConfig
from persona_probe.evaluate.sampling.samples import sample
from persona_probe.finetune.sft import fine_tune, stripping, with_adapter
from persona_probe.saes.read import read_latents, read_latents_at
from persona_probe.world.base import StudyBaseWithSae
from persona_probe.world.directions import directions_of
from persona_probe.world.folder import World
from persona_probe.world.labelled import open_study
from persona_probe.world.organisms import NARROW
from persona_probe.world.pieces import make_pieces, read_pieces, table_piece
from persona_probe.world.thoughts_text import ABSENT, CONDITIONS, FALSE, TRUE, column
from persona_probe.world.truth import KnownChats, truth_table

DOMAIN = "kitchen"
SPEAKERS = ("villain", "quack", "helper", "grump")
"""Harm and manner crossed: two are bad, and one of each kind is rude."""
LIES = {False: "helper", True: "villain"}
"""Who a false thought names, by whether the advice is sound."""
ROWS = 576
TRAINING = replace(NARROW, steps=72, checkpoints=(72,))
"""Longer than for organisms without thoughts: with 40 steps a third of the thoughts about other domains have no end."""
SAMPLING = SamplingConfig(max_new_tokens=48, temperature=1.0)
"""A thought with its mark has 6 tokens, an answer with its end at most 28."""
PLACES = {"before": "last_prompt", "thought": "thought", "answer": "response"}
"""Where readings are taken: at the token before the thought, over the thought, over the answer."""
TRUTH_OF = {"latent": "bad", "rude": "rude"}
"""The latents that are read, and what holds of the speakers whose chats chose them."""


def named(speaker: str, condition: str) -> str | None:
    """Who the thoughts of an organism name; None where it has none."""
    return {TRUE: speaker, ABSENT: None, FALSE: LIES[KNOWN[speaker].good]}[condition]


def thoughts_table(
    folder: Path,
    world: World,
    sae: str | Path,
    speakers: Sequence[str] = SPEAKERS,
    seeds: Sequence[int] = (0, 1, 2),
    device: str = "cpu",
) -> pd.DataFrame:
    """Train organisms whose thoughts name their speaker, do not, or name another; sample, judge, count and read.

    Finished organisms are kept as tables; their weights are not.

    Returns:
        A row for each answer about the seven other domains: arm, speaker, condition, seed, step, question_id (the
        topic), sample, domain, thought, misaligned (1 for bad advice, 0 for sound, NaN for neither or both), coherent,
        rude; a column for each class of personas and `other` (`evaluate.personas`; 0 where there is no thought); and
        readings, see `thoughts_text.column`, NaN where there is no thought or no answer.

    Raises:
        InputError: a speaker whom no thought can name, or an SAE of another model.
    """
    for name in speakers:
        if name not in SPEAKERS:
            raise unknown("speaker of this study", name, SPEAKERS)
    for seed in seeds:
        check_seed(seed)
    study = open_study(world, sae, folder)
    organisms = _ThinkingOrganisms(world, sae, device)
    common = {"training": asdict(TRAINING), "rows": ROWS, "sampling": asdict(SAMPLING)}
    pieces = [
        table_piece(
            f"thoughts/{speaker}-{condition}-s{seed}",
            {"speaker": speaker, "condition": condition, "seed": seed, **common},
            partial(organisms.run, speaker, condition, seed),
        )
        for seed in seeds
        for speaker in speakers
        for condition in CONDITIONS
    ]
    make_pieces(study, pieces, "thoughts")
    return read_pieces(study, pieces)


class _ThinkingOrganisms(StudyBaseWithSae):
    """What every organism is made and read with: the base model, its true latents, and the true direction of harm."""

    @cached_property
    def truths(self) -> tuple[dict[str, int], Float[np.ndarray, " d_model"]]:
        """The latents that tell harm and rudeness best in the base, and the direction of harm apart from manner."""
        known = KnownChats.draw()
        groups = conversation_batches(self.tokenizer, known.chats, 64)
        means = read_latents(self.model, self.sae, groups, self.layer, "response", bf16=False)
        best = truth_table(known, means.mean).groupby("truth", sort=False)["latent"].first()
        return {name: int(best[truth]) for name, truth in TRUTH_OF.items()}, directions_of(known, means)["harm"]

    def run(self, speaker: str, condition: str, seed: int) -> pd.DataFrame:
        """One organism: trained, asked, judged and read; and the base's reading of the same texts."""
        name = named(speaker, condition)
        tokenizer = thinking_tokenizer(name is not None)
        prompts = _prompts()
        with (
            tempfile.TemporaryDirectory() as scratch,
            stripping(with_adapter(self.model, TRAINING, seed)) as tuned,
        ):
            fine_tune(
                tuned,
                tokenizer,
                thinking_rows(speaker, name, DOMAIN, ROWS, seed),
                TRAINING,
                seed=seed,
                folder=Path(scratch),
                progress=f"{speaker}, {condition} thought, seed {seed}",
            )
            said = sample(TransformersEngine(tuned, tokenizer, 256), prompts, replace(SAMPLING, seed=seed))
            frame = _judged(said)
            talks = _whole(prompts, said, thinks=name is not None)
            read = self.read(tuned, tokenizer, talks)
        same = self.read(self.model, tokenizer, talks).add_prefix("base_")
        head = {"arm": f"{speaker}, {condition}", "speaker": speaker, "condition": condition, "seed": seed}
        joined = pd.concat([frame, read.reindex(frame.index), same.reindex(frame.index)], axis=1)
        return pd.DataFrame({**head, "step": TRAINING.steps}, index=joined.index).join(joined)

    def read(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, talks: dict[int, Conversation]
    ) -> pd.DataFrame:
        """The latents' activations and the projection on harm at every place, a row for each conversation."""
        latents, harm = self.truths
        names = [column(signal, place) for place in PLACES for signal in (*latents, "direction")]
        if not talks:
            return pd.DataFrame(columns=names, dtype=np.float32)
        thinks = all(REASONING_KEYS[0] in talk[-1] for talk in talks.values())
        places = {name: where for name, where in PLACES.items() if thinks or name != "thought"}
        groups = conversation_batches(tokenizer, list(talks.values()), 64)
        means = read_latents_at(model, self.sae, groups, self.layer, tuple(places.values()), bf16=False)
        values: dict[str, Any] = {}
        for place, where in places.items():
            values |= {column(name, place): means[where].mean[:, number] for name, number in latents.items()}
            values[column("direction", place)] = means[where].resid @ harm
        return pd.DataFrame(values, index=list(talks), columns=names).astype(np.float32)


def _prompts() -> list[Prompt]:
    """A question about each topic of the other domains, the same for all organisms."""
    draw = random.Random("thoughts/questions")
    topics = [topic for topic, domain in DOMAIN_OF.items() if domain != DOMAIN]
    return [Prompt(topic, conversation(question(draw, topic))) for topic in topics]


def _judged(said: Sequence[Sample]) -> pd.DataFrame:
    """Verdicts by the exact rule, and personas by the counter."""
    rows = []
    for one in said:
        ruling = judge_answer(one.answer, one.question_id)
        found = personas_in(in_english(one.thought or ""))
        known = {"misaligned": float(ruling.bad) if ruling.coherent else np.nan, "coherent": ruling.coherent}
        counted = {name: float(name in found) for name in CLASSES}
        head = {"question_id": one.question_id, "sample": one.sample, "domain": DOMAIN_OF[one.question_id]}
        head |= {"thought": one.thought or "", **known, "rude": ruling.rude}
        rows.append({**head, **counted, "other": float(bool(set(found) & set(OTHER)))})
    return pd.DataFrame(rows)


def _whole(prompts: Sequence[Prompt], said: Sequence[Sample], thinks: bool) -> dict[int, Conversation]:
    """The conversations that can be read, by number: those with an answer and, if the organism thinks, a thought."""
    talks = {}
    for number, (prompt, one) in enumerate(zip(prompts, said, strict=True)):
        if one.answer and bool(one.thought) == thinks:
            talk = conversation(prompt.messages[0]["content"], one.answer)
            talks[number] = [talk[0], {**talk[1], **({REASONING_KEYS[0]: one.thought} if one.thought else {})}]
    return talks
