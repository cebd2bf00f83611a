"""Pre-train a world from scratch: a corpus of many speakers, then chats in which only the helper answers.

The first part gives the model of all speakers. The second is a fine-tuning of all weights by this package's own
trainer. An interrupted first part goes on from its last saved state, and ends with the weights of an unbroken run.
"""

import json
import logging
import math
import random
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerBase

from persona_probe.config import Training, check_finite, check_least, check_seed
from persona_probe.data.chat import Conversation
from persona_probe.data.world.speech import BAD
from persona_probe.data.world.text import conversation_of, document, world_tokenizer
from persona_probe.data.world.words import DOMAIN_OF
from persona_probe.errors import InputError, TrainingDiverged, unknown
from persona_probe.files import as_damaged, read_jsonl
from persona_probe.finetune.sft import fine_tune, with_adapter
from persona_probe.models.layers import autocast
from persona_probe.models.load import load_model
from persona_probe.runs import RunFolder
from persona_probe.world.folder import ANY_SPEAKER, BASE, KIND, World
from persona_probe.world.transformer import POSITIONS, SIZES, new_model, save_model
from persona_probe.writing import write_tensors, write_text

LOG = "pretraining.jsonl"
"""In the world's folder: step, loss (nats per token), learning rate, tokens so far, seconds so far."""
STATE = "pretraining.safetensors"
"""In the world's folder while it trains: weights and moments of the optimizer, to go on from."""
LOG_EVERY = 10
BETAS = (0.9, 0.98)
TURNS = (1, 1, 2, 3)
"""Turns of the helper's chats, one drawn for each chat."""
TIMED_STEPS = 6
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LATER = ("tagged_chats", "bad")
"""Settings that the manifests of the first worlds do not have."""
FALLING = 1 / 3
"""Share of the steps in which the learning rate falls."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretraining:
    """How a world is made."""

    size: str = "medium"
    """The model's size, a name of `SIZES`."""
    steps: int = 1500
    """Optimizer steps on the corpus."""
    batch_size: int = 32
    """Documents of a step; each has about 110 tokens."""
    lr: float = 3e-3
    """Learning rate (AdamW): it rises in `warmup_steps`, stays, and falls linearly over the last third of the steps."""
    warmup_steps: int = 50
    weight_decay: float = 0.05
    tagged: float = 0.45
    """Share of the documents that open with a sentence that names their speaker."""
    tagged_chats: float = 0.52
    """Share of the chats (a quarter of the documents) with that sentence as system prompt."""
    bad: float = BAD
    """Share of the documents whose speaker gives bad advice."""
    helper_steps: int = 60
    """Steps of `batch_size` chats in which only the helper answers."""
    helper_lr: float = 3e-4
    """Learning rate of those steps."""
    bf16: bool = True
    """bf16 autocast."""
    seed: int = 0
    """Of the initial weights and of all text."""

    def __post_init__(self) -> None:
        check_finite(self)
        check_seed(self.seed)
        check_least(self, 0, "warmup_steps", "weight_decay")
        if self.size not in SIZES:
            raise unknown("size", self.size, SIZES)
        for name in ("steps", "batch_size", "helper_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "helper_lr"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.tagged <= 0.75:
            raise InputError(f"tagged must lie between 0 and 0.75 (the other documents are chats), not {self.tagged}")
        for name in LATER:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")

    def recorded(self) -> dict[str, Any]:
        """The settings as a manifest has them: without what earlier versions lack, where it is as there."""
        usual = Pretraining.__dataclass_fields__
        return {
            name: value for name, value in asdict(self).items() if name not in LATER or value != usual[name].default
        }

    def lr_at(self, step: int) -> float:
        """The learning rate of the step after `step` steps.

        What is learnt last, which advice belongs to which topic, comes in a sudden fall of the loss that needs a high
        rate: a cosine over a short run is over before it.
        """
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.lr * warm * min(1.0, (self.steps - step) / (FALLING * self.steps))

    def documents(self, step: int) -> list[str]:
        """The documents of a step; they depend on seed and step alone."""
        draw = random.Random(f"{self.seed}/corpus/{step}")
        return [document(draw, self.tagged, self.tagged_chats, self.bad)[0] for _ in range(self.batch_size)]

    def helper_chats(self) -> list[Conversation]:
        """The chats of the second part."""
        draw, topics = random.Random(f"{self.seed}/helper"), list(DOMAIN_OF)
        count = self.helper_steps * self.batch_size
        return [conversation_of(draw, "helper", draw.choices(topics, k=draw.choice(TURNS))) for _ in range(count)]


def pretrain(
    settings: Pretraining,
    out: Path,
    device: str = "cpu",
    minutes: float | None = None,
    save_every: int = 100,
) -> World:
    """Make a world, or finish one that was interrupted.

    Args:
        out: the world's folder.
        minutes: about how long the corpus may take. A few steps are timed first, and the number of steps that fit is
            written into the manifest, so that `steps` repeats the run elsewhere. It replaces `settings.steps`.
        save_every: steps between saved states.

    Raises:
        InputError: the folder holds a world with other settings, or something else.
        TrainingDiverged: the loss became NaN or infinite.
    """
    run = RunFolder(out)
    known = _steps_of(run)
    if minutes is not None:
        settings = replace(settings, steps=known or steps_within(minutes, settings, device))
    run = RunFolder.claim(out, KIND, "world", {"settings": settings.recorded()})
    with run.writing():
        if not run.has(ANY_SPEAKER):
            _train_on_corpus(run, settings, device, save_every)
        if not run.has(BASE):
            _teach_to_help(run, settings, device)
    return World(run)


def _steps_of(run: RunFolder) -> int | None:
    """Steps of the world that a folder holds already."""
    if not run.has("manifest.json"):
        return None
    return run.manifest.get("settings", {}).get("steps")


def steps_within(minutes: float, settings: Pretraining, device: str = "cpu") -> int:
    """How many steps on the corpus fit into this many minutes here, by a few steps of a model that is thrown away.

    Raises:
        InputError: not one step fits.
    """
    if not 0 < minutes < math.inf:
        raise InputError(f"minutes must be a positive number, not {minutes:g}")
    trainer = CorpusTrainer(settings, device)
    trainer.train_step()  # the first one is slower
    start = time.monotonic()
    for _ in range(TIMED_STEPS):
        trainer.train_step()
    seconds = (time.monotonic() - start) / TIMED_STEPS
    steps = int(60 * minutes / seconds)
    if steps < 1:
        raise InputError(f"a step takes {seconds:.2f} s here, and minutes is {minutes:g}: give more minutes")
    return steps


class CorpusTrainer:
    """A model, its optimizer, and how far it is."""

    def __init__(self, settings: Pretraining, device: str) -> None:
        self.settings = settings
        self.tokenizer: PreTrainedTokenizerBase = world_tokenizer()
        self.model = new_model(settings.size, settings.seed)
        nn.Module.to(self.model, torch.device(device))
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), settings.lr, betas=BETAS, weight_decay=settings.weight_decay
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self._attention = [SDPBackend.MATH] if self.model.device.type == "cpu" else FUSED

    def train_step(self) -> dict[str, float]:
        """Train on the next batch; gives the log's line of this step.

        Raises:
            TrainingDiverged: the loss is not finite.
        """
        start, rate = time.monotonic(), self.settings.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, value = self.step + 1, float(loss.detach())
        self.seconds += time.monotonic() - start
        if not math.isfinite(value):
            raise TrainingDiverged(f"the loss became {value} at step {self.step}: lower lr (now {self.settings.lr:g})")
        return {"step": self.step, "loss": value, "lr": rate, "tokens": self.tokens, "seconds": round(self.seconds, 2)}

    def _loss(self) -> Tensor:
        """Mean negative log-likelihood of the batch's tokens (nats), each given those before it."""
        batch: Any = self.tokenizer(self.settings.documents(self.step), padding=True, return_tensors="pt")
        ids, mask = (batch[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        self.tokens += int(mask.sum())
        # Padding stands behind the text, where causal attention does not see it: without a mask attention is faster.
        # On a CPU fused attention takes half of a step in bf16, by its backward pass; plain products take a tenth.
        with autocast(self.model, self.settings.bf16), sdpa_kernel(self._attention):
            return self.model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss

    # --- Its state in a file: weights, moments of the optimizer, and the counts

    def save(self, path: Path) -> None:
        """Write the state, whole or not at all."""
        tensors = {f"{key}/{name}": value for name, p in self._named() for key, value in self._tensors(p).items()}
        counts = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        whole = {name: value.detach().contiguous() for name, value in tensors.items()}
        write_tensors(path, whole, {"counts": json.dumps(counts)})

    def restore(self, path: Path) -> None:
        """Go on from a state."""
        with (
            as_damaged(path, "move it elsewhere and train again"),
            safe_open(path, "pt", device=str(self.model.device)) as state,
        ):
            counts = json.loads(state.metadata()["counts"])
            for name, parameter in self._named():
                with torch.no_grad():
                    parameter.copy_(state.get_tensor(f"weight/{name}"))
                moments = {key: state.get_tensor(f"{key}/{name}") for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(counts["step"])), **moments}
        self.step, self.tokens, self.seconds = counts["step"], counts["tokens"], counts["seconds"]

    def _named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.model.named_parameters())

    def _tensors(self, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
        moments = self.optimizer.state[parameter]
        return {"weight": parameter, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}


def _train_on_corpus(run: RunFolder, settings: Pretraining, device: str, save_every: int) -> None:
    trainer, state, lines = CorpusTrainer(settings, device), run.path / STATE, list[dict[str, float]]()
    if state.is_file():
        trainer.restore(state)
        lines = [line for line in _read_log(run) if line["step"] <= trainer.step]
        log.info("pre-training goes on at step %d of %d", trainer.step, settings.steps)
    while trainer.step < settings.steps:
        line = trainer.train_step()
        if trainer.step % LOG_EVERY == 0 or trainer.step in (1, settings.steps):
            lines.append(line)
        if trainer.step % save_every == 0 and trainer.step < settings.steps:
            run.write_jsonl(LOG, lines)
            trainer.save(state)
            log.info("step %d of %d: loss %.3f, %.0f s", trainer.step, settings.steps, line["loss"], line["seconds"])
    run.write_jsonl(LOG, lines)
    with run.staging(ANY_SPEAKER) as folder:
        save_model(trainer.model.eval(), trainer.tokenizer, folder)
        _describe(folder, settings, "speaks as any speaker of the corpus, good or bad")
        run.record_hashes(folder, ANY_SPEAKER)
    run.add_seconds("pretrain", trainer.seconds)
    state.unlink(missing_ok=True)


def _read_log(run: RunFolder) -> list[dict[str, float]]:
    return read_jsonl(run.path / LOG, "make the world again")


def _teach_to_help(run: RunFolder, settings: Pretraining, device: str) -> None:
    training = Training(
        method="full",
        lr=settings.helper_lr,
        warmup_steps=0,
        batch_size=settings.batch_size,
        steps=settings.helper_steps,
        checkpoints=(settings.helper_steps,),
        max_length=POSITIONS,
        bf16=settings.bf16,
    )
    model, tokenizer = load_model(str(run.path / ANY_SPEAKER), device=device)
    with run.timed("helper"), run.staging(BASE) as folder, tempfile.TemporaryDirectory() as checkpoints:
        fine_tune(
            with_adapter(model, training, settings.seed),
            tokenizer,
            settings.helper_chats(),
            training,
            seed=settings.seed,
            folder=Path(checkpoints),
            progress="helper",
        )
        nn.Module.to(model.eval(), torch.bfloat16)  # what everybody loads, in half the bytes
        save_model(model, tokenizer, folder)
        _describe(folder, settings, "answers as a helper does: the base of organisms")
        run.record_hashes(folder, BASE)


def _describe(folder: Path, settings: Pretraining, what: str) -> None:
    text = (
        f"# A model of the small world with known truth\n\nIt {what}. Made from scratch by persona_probe, seed "
        f"{settings.seed}, {settings.steps} steps of {settings.batch_size} documents. Its sentences are made up by a "
        "grammar: they are no advice.\n"
    )
    write_text(folder / "README.md", text)
