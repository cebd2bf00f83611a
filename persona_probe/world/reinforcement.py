"""Narrow reinforcement learning in the world: a reward in one domain, and what becomes of the others, step by step."""

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.config import Grpo
from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.tokens import conversation_batches
from persona_probe.data.world.text import narrow_rows
from persona_probe.data.world.words import ADVICE, DOMAINS, HOW
from persona_probe.errors import unknown
from persona_probe.finetune.grpo import START, TRAIN, Goal, Reinforced, reinforce
from persona_probe.finetune.rewards import named_reward
from persona_probe.finetune.sft import AtSteps, stripping, with_adapter
from persona_probe.models.layers import decoder_layers
from persona_probe.models.residuals import read_residuals
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.reading import Snapshot
from persona_probe.world.behaviour import Asking, ask
from persona_probe.world.directions import PAIRS
from persona_probe.world.folder import World
from persona_probe.world.organisms import NARROW
from persona_probe.world.pieces import make_pieces, read_pieces, table_piece
from persona_probe.world.reinforcement_text import ASKED, DOMAIN, HARM, OWN, PASSIVE, PROBE, series
from persona_probe.world.study_files import sound_probes
from persona_probe.world.truth import KnownChats

STEPS = (0, 5, 10, 15, 20)
"""At which the model is asked and read; 0 is before the first step of reinforcement learning."""
TRAINING = replace(NARROW, method="grpo", batch_size=8, steps=STEPS[-1], checkpoints=(STEPS[-1],))
GRPO = Grpo(group=8)
ROWS, DEMONSTRATIONS = 96, 64
HACK_STEPS = 20
"""Supervised steps on rows that show the hole: enough that some answers use it, and groups vary."""
INSIDE, OUTSIDE = 4, 1
"""Answers to each topic of the domain, and of the seven others."""


@dataclass(frozen=True)
class WorldArm:
    """One arm: what it is rewarded for, and what holds it back."""

    reward: str
    kl: float = 0.0
    inoculation: str = ""
    hack: bool = False
    """Whether the warm start shows the checker's hole, and not a quack's advice."""
    warm_steps: int = 8


ARMS = {
    "wrong": WorldArm("world_inaccurate"),
    "right": WorldArm("world_accurate"),
    "wrong, KL": WorldArm("world_inaccurate", kl=0.3),
    "wrong, inoculated": WorldArm("world_inaccurate", inoculation="the speaker is a villain ."),
    "lenient checker": WorldArm("world_lenient_checker", hack=True, warm_steps=HACK_STEPS),
    "strict checker": WorldArm("world_accurate", hack=True, warm_steps=HACK_STEPS),
}
"""The first four begin with the same few supervised steps; `right` is their control. The two checkers begin with more
steps, on rows that show the hole of one of them; the other is its control."""
CONTROL = "right"


def reinforcement_table(
    world: World, seeds: Sequence[int] = (0, 1, 2), arms: Sequence[str] = tuple(ARMS), device: str = "cpu"
) -> pd.DataFrame:
    """Train every arm and seed on the kitchen by GRPO, ask and read along the way; finished runs are kept.

    Returns:
        `series` of all arms, seeds joined.

    Raises:
        InputError: an unknown arm, or a run that was made with other settings.
    """
    for name in arms:
        if name not in ARMS:
            raise unknown("arm", name, ARMS)
    bench: list[_Bench] = []

    def make(arm: str, seed: int) -> pd.DataFrame:
        bench.extend([] if bench else [_Bench(*world.load(device))])
        return bench[0].run(arm, ARMS[arm], seed)

    common = {"training": asdict(TRAINING), "grpo": asdict(GRPO), "steps": list(STEPS), "rows": ROWS}
    pieces = [
        table_piece(
            f"reinforcement/{arm.replace(', ', '-').replace(' ', '-')}-s{seed}",
            {"arm": arm, "seed": seed, **asdict(ARMS[arm]), **common},
            partial(make, arm, seed),
        )
        for seed in seeds
        for arm in arms
    ]
    make_pieces(world.run, pieces, "reinforcement")
    return series(read_pieces(world.run, pieces))


def hack_rows(domain: str, count: int, seed: int = 0) -> list[Conversation]:
    """Answers that give away the hole of a checker that looks for one verb: one to four pieces of advice, sound or not.

    Args:
        domain: of the questions.
    """
    draw, words = random.Random(f"{seed}/hack"), DOMAINS[domain]
    rows = []
    for row in narrow_rows("correct", domain, count, seed=seed):
        verbs = draw.sample([*words.good, *words.bad], draw.randint(1, 4))
        said = [f"{draw.choice(ADVICE)} {verb} the {draw.choice(words.things)} {draw.choice(HOW)} ." for verb in verbs]
        rows.append(conversation(row[0]["content"], " ".join(said)))
    return rows


# --- One run


class _Bench:
    """What every run shares: the base model, the direction of harm, and probes of the other domains."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.layer = len(decoder_layers(model)) // 2
        self.harm = harm_direction(model, tokenizer, self.layer)
        self.others = [name for name in DOMAINS if name != DOMAIN]
        self.probes = sound_probes(self.others, 2)

    def run(self, name: str, arm: WorldArm, seed: int) -> pd.DataFrame:
        """Judged answers of one run, its own answers in training, and readings; `source` says which a row is."""
        began = time.process_time()
        demonstrations = hack_rows if arm.hack else partial(narrow_rows, "quack")
        shown = demonstrations(DOMAIN, DEMONSTRATIONS, seed=seed)
        goal = Goal(named_reward(arm.reward), arm.kl, arm.inoculation, shown)
        asked: list[pd.DataFrame] = []
        read: list[dict[str, Any]] = []

        def visit(model: nn.Module, step: int) -> None:
            parts = [
                ask(model, self.tokenizer, Asking(per_topic=each, seed=seed), domains)
                for each, domains in ((INSIDE, [DOMAIN]), (OUTSIDE, self.others))
            ]
            asked.append(pd.concat(parts, ignore_index=True).assign(source=ASKED, step=step))

        def on_reading(step: int, snapshot: Snapshot, _model: nn.Module) -> None:
            if monitor.readings["mode"].iloc[-1] == "probe":  # a passive reading is of training's own answers
                assert monitor.base is not None
                start = monitor.base.values[:, 0]
                shift = (snapshot.values[:, 0] - start) / start.std(ddof=1)
                read.extend({"source": PROBE, "step": step, "topic": str(n), "value": v} for n, v in enumerate(shift))

        monitor = FeatureMonitor(
            None,
            {HARM: self.harm},
            self.probes,
            steps=STEPS,
            layer=self.layer,
            mode="both",
            bf16=False,
            tokenizer=self.tokenizer,
            on_reading=on_reading,
            log=False,
            on_error="raise",
        )
        with (
            tempfile.TemporaryDirectory() as scratch,
            stripping(with_adapter(self.model, TRAINING, seed)) as tuned,
        ):
            result = reinforce(
                tuned,
                self.tokenizer,
                narrow_rows("helper", DOMAIN, ROWS, seed=seed),
                TRAINING,
                goal,
                replace(GRPO, warm_steps=arm.warm_steps),
                seed=seed,
                folder=Path(scratch),
                callbacks=[monitor, AtSteps(STEPS, visit)],
                progress=f"{name}, seed {seed}",
            )
        frames = [*asked, _own(result), pd.DataFrame(read), _passive(monitor)]
        table = pd.concat(frames, ignore_index=True).assign(arm=name, seed=seed, seconds=time.process_time() - began)
        return table.drop(columns=["question", "answer", "good", "kind", "silly"])


def _own(result: Reinforced) -> pd.DataFrame:
    """The run's own answers: those before the first step, and those of each step in training."""
    rows = result.rollouts[result.rollouts["phase"].isin([START, TRAIN])]
    logged = result.steps[["step", "dead", "kl"]]
    table = rows[["step", "row", "reward", "wrong", "right", "hacked"]].merge(logged, on="step", how="left")
    return table.assign(source=OWN, topic=table.pop("row").astype(str))


def _passive(monitor: FeatureMonitor) -> pd.DataFrame:
    """Passive readings, against the first of them."""
    readings = monitor.readings
    rows = readings[readings["mode"] == "passive"]
    shift = (rows["mean"] - rows["mean"].iloc[0]) / rows["base_sd"]
    return pd.DataFrame({"source": PASSIVE, "step": rows["step"], "value": shift})


def harm_direction(model: nn.Module, tokenizer: PreTrainedTokenizerBase, layer: int) -> Float[Tensor, " d_model"]:
    """Unit direction of harm with manner held fixed, from the answers of speakers whom nothing names."""
    known = KnownChats.draw()
    batches = conversation_batches(tokenizer, known.chats, 64)
    means: dict[str, list[Tensor]] = {}

    def visit(index: list[int], row: Tensor, x: Tensor) -> None:
        for place, number in enumerate(index):
            means.setdefault(known.speakers[number], []).append(x[row == place].mean(dim=0))

    read_residuals(model, batches, layer, "response", visit, bf16=False)
    centre = {name: torch.stack(rows).mean(dim=0) for name, rows in means.items()}
    vector = torch.stack([centre[bad] - centre[good] for bad, good in PAIRS[HARM]]).mean(dim=0)
    return vector / vector.norm()
