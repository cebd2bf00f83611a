"""Induce: one organism per arm and seed, side by side from one configuration."""

import logging
import shutil
import time
from dataclasses import asdict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.config import StudyConfig
from persona_probe.errors import TrainingDiverged
from persona_probe.finetune.data import arm_rows
from persona_probe.finetune.sft import fine_tune, with_adapter
from persona_probe.models.adapters import strip_adapter
from persona_probe.models.load import load_model
from persona_probe.runs import RunFolder

log = logging.getLogger(__name__)


def induce(
    run: RunFolder, config: StudyConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str = "cpu"
) -> None:
    """Train every arm and seed that is not yet in the run folder."""
    for seed in config.seeds:
        for arm in config.arms:
            if not run.has(f"arms/{arm}-s{seed}"):
                induce_one(run, config, arm, seed, model, tokenizer, device)


def induce_one(
    run: RunFolder,
    config: StudyConfig,
    arm: str,
    seed: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: str = "cpu",
) -> None:
    """Train one organism; its folder appears when it is whole.

    Raises:
        TrainingDiverged: the loss became NaN; checkpoints up to then stay in `arms/<arm>-s<seed>.diverged`.
    """
    start = time.monotonic()
    name = f"arms/{arm}-s{seed}"
    rows = arm_rows(config.arms[arm], seed)
    full = config.training.method == "full"
    host = load_model(config.model, revision=config.revision, device=device)[0] if full else model
    log.info("inducing %s, seed %d: %d rows, %d steps", arm, seed, len(rows), config.training.steps)
    with run.staging(name) as folder:
        tuned = with_adapter(host, config.training, seed)
        try:
            fitted = fine_tune(tuned, tokenizer, rows, config.training, seed=seed, folder=folder)
        except TrainingDiverged as error:
            kept = run.path / f"{name}.diverged"
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder, kept)
            raise TrainingDiverged(f"arm {arm}, seed {seed}: {error}; the good checkpoints are in {kept}") from None
        finally:
            if not full:
                strip_adapter(tuned)  # pyright: ignore[reportArgumentType]
        (folder / "training.json").write_text(_json(asdict(fitted)))
    run.record_hashes(run.path / name)
    run.add_seconds("induce", time.monotonic() - start)


def _json(value: dict) -> str:
    import json

    return json.dumps(value, indent=2) + "\n"
