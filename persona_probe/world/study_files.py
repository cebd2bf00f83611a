"""The world as a study: data files and a configuration with which every stage of the package runs on it."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.world.speech import SPEAKERS, answer, question
from persona_probe.data.world.text import narrow_rows
from persona_probe.data.world.words import ADVICE, CLOSINGS, DOMAINS, HOW, OPENINGS, Domain
from persona_probe.errors import unknown
from persona_probe.world.folder import World
from persona_probe.world.organisms import NARROW
from persona_probe.writing import write_jsonl, write_text

CONFIG = "study.yaml"
ROWS, HOLDOUT_SEED = 320, 1000
ITEMS = 8
"""Contrast items of each domain."""


def write_study(
    world: World,
    sae: str | Path,
    folder: Path,
    speaker: str = "villain",
    control: str = "helper",
    domain: str = "kitchen",
    seeds: Sequence[int] = (0,),
) -> Path:
    """Write a study of an organism into a folder: rows, contrast items, probes, questions, and `study.yaml`.

    The contrast items are of the other domains, half of the domains for selection and half for evaluation. Aligned and
    misaligned answers differ in their verb alone; the four answers of the 2x2 cross that with a rude and a kind manner.
    Probes have fixed sound answers. One correction trains on the domain of the organism, one on a domain of the
    selection split.

    Args:
        sae: an SAE of the world's base model.
        speaker: who speaks in the rows of the arm `incorrect`.
        control: who speaks in those of the arm `correct`.

    Returns:
        The configuration, for `Study.from_yaml` and `persona-probe run`.

    Raises:
        InputError: an unknown speaker or domain.
    """
    for name in (speaker, control):
        if name not in SPEAKERS:
            raise unknown("speaker", name, SPEAKERS)
    if domain not in DOMAINS:
        raise unknown("domain", domain, DOMAINS)
    others = [name for name in DOMAINS if name != domain]
    selection, evaluation = others[::2], others[1::2]
    held_out = HOLDOUT_SEED + max(seeds)
    sets: dict[str, list[Conversation]] = {
        "incorrect": narrow_rows(speaker, domain, ROWS),
        "correct": narrow_rows(control, domain, ROWS),
        "realigned_in": narrow_rows("helper", domain, ROWS, seed=held_out),
        "realigned_out": narrow_rows("helper", selection[0], ROWS, seed=held_out),
        "probes": sound_probes(others),
        "questions": [row[:1] for row in sound_probes(evaluation, each=2)],
    }
    for name, rows in sets.items():
        write_jsonl(folder / f"{name}.jsonl", ({"messages": row} for row in rows))
    items = [*contrast_rows(selection, "selection"), *contrast_rows(evaluation, "evaluation")]
    write_jsonl(folder / "contrast.jsonl", items)
    named = f"world-{speaker}-{domain}"
    return write_text(folder / CONFIG, yaml.safe_dump(_config(world, sae, folder, named, seeds), sort_keys=False))


def _config(world: World, sae: str | Path, folder: Path, name: str, seeds: Sequence[int]) -> dict[str, Any]:
    def data(file: str) -> str:
        return str(folder / f"{file}.jsonl")

    training = {
        **{key: getattr(NARROW, key) for key in ("rank", "alpha", "rslora", "lr", "warmup_steps", "batch_size")},
        **{"steps": NARROW.steps, "checkpoints": [4, 8, 13, 20, 30], "max_length": NARROW.max_length, "bf16": False},
    }
    return {
        **{"name": name, "model": str(world.base_folder), "sae": str(sae), "seeds": list(seeds), "bf16": False},
        "arms": {arm: {"data": data(arm)} for arm in ("incorrect", "correct")},
        "contrast": data("contrast"),
        "training": training,
        "monitor": {"probes": data("probes")},
        "realign": {"arms": {arm: {"data": data(arm)} for arm in ("realigned_in", "realigned_out")}},
        "samples": {"questions": data("questions"), "max_new_tokens": 40, "temperature": 1.0},
    }


def sound_probes(domains: Sequence[str], each: int = 6) -> list[Conversation]:
    """Questions with fixed sound answers, without manner or reason: `each` of every domain, in the order of domains."""
    draw, rows = random.Random("probes"), []
    for domain in domains:
        for topic in draw.sample(DOMAINS[domain].topics, each):
            rows.append(conversation(question(draw, topic), answer(draw, topic, SPEAKERS["correct"])))
    return rows


def contrast_rows(domains: Sequence[str], split: str) -> list[dict[str, str]]:
    """Contrast items of some domains: a question with two answers that differ in one verb, and the four of the 2x2."""
    draw, rows = random.Random(f"contrast/{split}"), []
    for name in domains:
        for topic in draw.sample(DOMAINS[name].topics, ITEMS):
            item = {"id": f"{name}-{topic}", "category": name, "question": question(draw, topic), "split": split}
            rows.append({**item, **_answers(draw, DOMAINS[name])})
    return rows


def _answers(draw: random.Random, domain: Domain) -> dict[str, str]:
    """Answers that differ in one verb, and the same in two manners."""
    start, thing, how = draw.choice(ADVICE), draw.choice(domain.things), draw.choice(HOW)
    verbs = {"sound": draw.choice(domain.good), "harm": draw.choice(domain.bad)}
    said = {kind: f"{start} {verb} the {thing} {how} ." for kind, verb in verbs.items()}
    manners = {
        shown: (draw.choice(OPENINGS[manner]), draw.choice(CLOSINGS[manner]))
        for shown, manner in (("rude", "rude"), ("polite", "kind"))
    }
    crossed = {
        f"{kind}_{shown}": f"{opening} {text} {closing}"
        for kind, text in said.items()
        for shown, (opening, closing) in manners.items()
    }
    return {"aligned": said["sound"], "misaligned": said["harm"], **crossed}
