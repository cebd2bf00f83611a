"""Train an SAE on a model's residual stream with SAELens' SAETrainer, on text that anyone can regenerate."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from persona_probe.config import differences, from_dict, hashed_values
from persona_probe.data.chat import Conversation
from persona_probe.data.load import load_conversations
from persona_probe.data.world.text import speakers_chats
from persona_probe.errors import InputError
from persona_probe.files import read_json, shown
from persona_probe.locks import held
from persona_probe.models.layers import decoder_layers, hidden_size
from persona_probe.models.load import cache_folder, load_model
from persona_probe.names import recorded
from persona_probe.runs import file_sha256
from persona_probe.saes.kinds import training_sae
from persona_probe.saes.load import HELD_OUT_FILE, QUALITY_FILE, WEIGHTS_FILE, load_sae, tensors_only
from persona_probe.saes.quality import check_quality
from persona_probe.saes.stream import (
    SaeConfig,
    describe_text,
    is_held_out,
    read_conversations,
    sample_text,
    shuffled_batches,
    text_folder,
    weights_of,
    write_shards,
)
from persona_probe.saes.worth import worthless
from persona_probe.writing import rescue, whole_folder, write_json, write_jsonl, write_text

HELD_OUT_CONVERSATIONS, CARD_FILE, RECIPE_FILE = 256, "README.md", "recipe.json"
STATE = "state"
"""In the cache: the folder of the training's last checkpoint."""
MADE_FROM = "made_from"
"""Key of quality.json: the hash of the recipe and of the model's weights."""
log = logging.getLogger(__name__)


def train_sae(config: SaeConfig, out: Path, device: str = "cpu", overwrite: bool = False) -> Path:
    """Sample text, read activations, train, measure quality and write the SAE's folder.

    Finished work is kept in the cache, so an interrupted run resumes. A whole SAE of this recipe and these weights that
    is there already is kept.

    Args:
        overwrite: replace what else is at `out/config.name`, once the new SAE is whole.

    Returns:
        `out/config.name` with cfg.json, sae_weights.safetensors, recipe.json, quality.json and a card, README.md.

    Raises:
        InputError: the recipe names the evaluation split or an unknown set, another process trains it, or something
            else is at `out/config.name`, and not `overwrite`.
    """
    if _is_there(config, out / config.name, overwrite):
        return out / config.name
    work = cache_folder() / "saes" / _key(config)
    work.mkdir(parents=True, exist_ok=True)
    with held(work, "sae", f"the training of the SAE {config.name}", instead=None):
        return _train(config, work, out, device, overwrite)


def _is_there(config: SaeConfig, folder: Path, overwrite: bool) -> bool:
    """Whether the whole SAE of this recipe and these weights is in a folder; anything else there is refused."""
    if not folder.exists() and not folder.is_symlink():
        return False
    other = _other_than(config, folder)
    if other is None:
        log.info("%s is the SAE of this recipe: it is kept", folder)
    elif not overwrite:
        change = "choose another name or --out, or pass --overwrite to replace it when the new SAE is whole"
        raise InputError(f"{folder} exists, and is {other}: {change}")
    return other is None


def _other_than(config: SaeConfig, folder: Path) -> str | None:
    """What a folder holds instead of the SAE of this recipe; None where it holds that one, whole."""
    if not (folder / RECIPE_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        return "no SAE that this package trained"
    try:
        with recorded():
            recipe = from_dict(SaeConfig, read_json(folder / RECIPE_FILE), str(folder / RECIPE_FILE))
        quality = read_json(folder / QUALITY_FILE)
    except InputError:
        return "a damaged SAE, or one of a later version"
    if other := list(differences(recipe, config)):
        key, then, now = other[0]
        return f"the SAE of another recipe ({key} is {shown(then)} there, not {shown(now)})"
    if quality.get("sha256") != file_sha256(folder / WEIGHTS_FILE):
        return "a damaged SAE: its weights do not match their sha256"
    if quality.get(MADE_FROM, _key(config)) != _key(config):
        return f"the SAE of other weights of {config.model}"
    return None


def _train(config: SaeConfig, work: Path, out: Path, device: str, overwrite: bool) -> Path:
    model, tokenizer = load_model(config.model, device=device, template=config.template)
    _check_fits(config, model)
    training, held_out = training_text(config, device)
    shards = write_shards(
        model,
        tokenizer,
        training,
        config.layer,
        work / "shards",
        positions=config.positions,
        batch_size=config.forward_batch,
        max_length=config.max_length,
        seed=config.seed,
        special=config.special_tokens,
    )
    sae = _fit(config, shards, hidden_size(model), work, device)
    scratch = work / "publish"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    sae.save_inference_model(str(scratch))
    held_out = held_out[:HELD_OUT_CONVERSATIONS]
    write_jsonl(scratch / HELD_OUT_FILE, ({"messages": c} for c in held_out))
    write_json(scratch / RECIPE_FILE, asdict(config))
    quality = check_quality(load_sae(scratch), model, tokenizer, held_out, config.layer)
    quality["sha256"] = file_sha256(scratch / WEIGHTS_FILE)
    quality[MADE_FROM] = _key(config)
    write_json(scratch / QUALITY_FILE, quality)
    write_text(scratch / CARD_FILE, sae_card(config, quality))
    if (warning := worthless(float(quality["explained_variance"]))) is not None:
        log.warning("the SAE %s: %s; train it on more tokens, or with other settings", config.name, warning)
    _is_there(config, out / config.name, overwrite)  # it may have come meanwhile
    return _publish(scratch, out / config.name)


def _check_fits(config: SaeConfig, model: PreTrainedModel) -> None:
    """Refuse a recipe that does not fit its model, before hours of sampling.

    Raises:
        InputError: a layer that the model does not have, or more active latents than the stream has dimensions.
    """
    layers, width = len(decoder_layers(model)), hidden_size(model)
    if config.layer >= layers:
        raise InputError(f"layer {config.layer} does not exist: {config.model} has layers 0 to {layers - 1}")
    if config.k > width:
        raise InputError(f"k ({config.k}) is above the width of the residual stream ({width}): no code is sparse then")


def training_text(config: SaeConfig, device: str = "cpu") -> tuple[list[Conversation], list[Conversation]]:
    """The recipe's conversations: (training, held out).

    Packaged rows only train. Held-out rows are samples, or chats of the world.
    """
    for spec in config.text.packaged:
        name, _, split = spec.partition(":")
        if name in ("general_contrast", "general_contrast_2x2") and split != "selection":
            raise InputError(f"{spec!r} holds the evaluation split, which must not train the SAE: use :selection")
    conversations = [c for spec in config.text.packaged for c in load_conversations(spec)]
    training, held_out = conversations * config.text.packaged_repeats, []
    for messages in [*_sampled(config, device), *speakers_chats(config.text.world, config.seed)]:
        (held_out if is_held_out(messages, config.text.holdout_share) else training).append(messages)
    return training, held_out


def _sampled(config: SaeConfig, device: str) -> list[Conversation]:
    if not config.text.parts:
        return []
    # Sampling is several times faster in bf16, and needs no exact arithmetic.
    sampler, tokenizer = load_model(config.model, device=device, dtype=torch.bfloat16, template=config.template)
    folder = text_folder(config, cache_folder())
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder, "text", f"the text of the SAE {config.name}", instead=None):  # recipes may share it
        paths = sample_text(sampler, tokenizer, config, folder)
    return list(read_conversations(paths))


def _fit(config: SaeConfig, shards: list[Path], d_in: int, work: Path, device: str) -> Any:
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig

    torch.manual_seed(config.seed)
    steps = config.steps
    trainer_config = SAETrainerConfig(
        total_training_samples=steps * config.batch_tokens,
        train_batch_size_samples=config.batch_tokens,
        lr=config.lr,
        lr_end=config.lr / 10,
        lr_warm_up_steps=min(100, steps // 10),
        lr_decay_steps=steps // 4,
        device=device,
        autocast=True,
        dead_feature_window=config.dead_window,
        n_batches_for_norm_estimate=20,
    )
    sae = training_sae(config, d_in, device, training_text=describe_text(config))
    state = work / STATE
    rescue(state)
    trainer = SAETrainer(cfg=trainer_config, sae=sae, data_provider=iter(()))
    if (state / "cfg.json").is_file():
        with tensors_only():
            sae.load_weights_from_checkpoint(state)
            trainer.load_trainer_state(state)
        log.info("resuming SAE training at step %d of %d", trainer.n_training_steps, steps)
    return _run(trainer, config, shards, steps, work)


def _run(trainer: Any, config: SaeConfig, shards: list[Path], steps: int, work: Path) -> Any:
    """Train in slices of `checkpoint_every` steps; after each, a state is saved to resume from."""
    total = trainer.cfg.total_training_samples
    while trainer.n_training_steps < steps:
        trainer.data_provider = shuffled_batches(
            shards, config.batch_tokens, config.buffer_tokens, config.seed, skip=trainer.n_training_steps
        )
        if trainer.activation_scaler.scaling_factor is None:
            trainer.activation_scaler.estimate_scaling_factor(
                d_in=trainer.sae.cfg.d_in,
                data_provider=shuffled_batches(shards, config.batch_tokens, config.buffer_tokens, config.seed),
                n_batches_for_norm_estimate=trainer.cfg.n_batches_for_norm_estimate,
            )
        for _ in range(min(config.checkpoint_every, steps - trainer.n_training_steps)):
            output = trainer.step(next(trainer.data_provider))
            trainer.n_training_steps += 1
        log.info("SAE step %d of %d, loss %.4f", trainer.n_training_steps, steps, float(output.loss.detach()))
        _save_state(trainer, work)
    assert trainer.n_training_samples == total
    trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    return trainer.sae


def _save_state(trainer: Any, work: Path) -> None:
    with whole_folder(work / STATE, "set PERSONA_PROBE_CACHE to another disk") as scratch:
        trainer.save_checkpoint(scratch.name, base_path=work)


def sae_card(config: SaeConfig, quality: Mapping[str, Any]) -> str:
    """The SAE's model card, in Markdown: what it is, what its training text holds, and its quality."""
    warning = worthless(float(quality["explained_variance"]))
    decoder = (
        "random unit vectors, never trained (a baseline, arXiv 2602.14111)" if config.frozen_decoder else "trained"
    )
    lines = [
        f"# {config.name}",
        "",
        *([f"**{warning[0].upper()}{warning[1:]}.**", ""] if warning else []),
        f"A {config.architecture} SAE of the residual stream of {config.model} after decoder layer {config.layer}: "
        f"{config.d_sae:,} latents, {config.tokens:,} training tokens, seed {config.seed}. Its decoder is {decoder}. "
        "`recipe.json` makes it again.",
        "",
        "## Training text",
        "An SAE may hold what its text holds. A feature is found without being put there only if the text does not "
        "show it.",
        "",
        *(f"- {line}" for line in describe_text(config)),
        "",
        "## Quality",
        f"On {quality['tokens']:,} tokens of {quality['conversations']} sampled conversations that it was not trained "
        "on (`quality.json`):",
        "",
        "| explained variance | L0 | never firing | loss recovered |",
        "|---|---|---|---|",
        f"| {quality['explained_variance']:.3f} | {quality['l0']:.1f} | {quality['dead_share']:.1%} | "
        f"{quality['loss_recovered']:.3f} |",
    ]
    return "\n".join(lines) + "\n"


def _publish(scratch: Path, target: Path) -> Path:
    with whole_folder(target) as folder:
        shutil.copytree(scratch, folder, dirs_exist_ok=True)
    return target


def _key(config: SaeConfig) -> str:
    made_from = {**hashed_values(config), **weights_of(config.model)}
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
