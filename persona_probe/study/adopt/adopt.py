"""Adopt: a run folder from checkpoints that exist. They stay where they are, or are copied; nothing is trained."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_probe.config import NO_CONTROL, Arm, Realign, Samples, StudyConfig
from persona_probe.context import Context
from persona_probe.data.load import arm_rows
from persona_probe.errors import InputError
from persona_probe.files import expanded
from persona_probe.finetune.sft import check_rows
from persona_probe.models.adapters import is_adapter
from persona_probe.runs import REFERENCES, RunFolder, file_sha256
from persona_probe.study.adopt.base_fit import check_checkpoints
from persona_probe.study.adopt.checkpoint_places import Checkpoint, find_checkpoints
from persona_probe.study.adopt.known_training import KnownTraining
from persona_probe.units import writes_run
from persona_probe.writing import write_text

log = logging.getLogger(__name__)

RECORD = "adopted.json"
"""In the folder of an adopted organism: what is known of its training."""
COPIED = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json")
COPIED += ("trainer_state.json", "README.md", "chat_template.jinja")
"""Files of a checkpoint that `--copy` takes: no optimizer states."""
HASHED = ("*.safetensors", "adapter_config.json", "config.json")
"""Files that decide what a checkpoint computes."""
CONTROL_NAMES = {"control": "correct"}

Places = str | Path | Sequence[str | Path]
"""A folder or hub id, or a list of them in order of steps."""


def adopted_config(
    base: str,
    arms: Mapping[str, Places | Sequence[Places]],
    sae: str,
    *,
    name: str = "adopted",
    data: Mapping[str, str] | None = None,
    contrast: str | None = None,
    questions: str | None = None,
    realign: Mapping[str, str] | None = None,
    **settings: Any,
) -> StudyConfig:
    """The configuration of a study of checkpoints that exist.

    Args:
        base: as `load_model` takes it.
        arms: `incorrect`, its control (`correct` or `control`), and more: each a place of checkpoints or a list of
            them; for several runs (seeds) of each arm a list of such lists.
        sae: as `load_sae` takes it.
        data: the training rows of arms, where you know them: a packaged set or a file.
        contrast: a file instead of the packaged contrast set.
        questions: questions whose answers are sampled for the report.
        realign: corrective arms and their rows; none are made up.
        settings: other keys of `StudyConfig`.

    Raises:
        InputError: no arm `incorrect`, two controls, or other settings that do not fit.
    """
    known = {CONTROL_NAMES.get(arm, arm): _runs(places) for arm, places in arms.items()}
    if len(known) < len(arms):
        raise InputError("the arms 'control' and 'correct' are two names of one arm: give it once")
    rows = {CONTROL_NAMES.get(arm, arm): spec for arm, spec in (data or {}).items()}
    if unknown_arms := sorted(set(rows) - set(known)):
        raise InputError(f"data of arm {unknown_arms[0]!r}, which has no checkpoints: the arms are {', '.join(known)}")
    counts = {arm: len(runs) for arm, runs in known.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{arm} {n}" for arm, n in counts.items())
        raise InputError(f"every arm needs as many runs (seeds) as the others, not {told}: leave some out")
    if questions is not None:
        settings["samples"] = Samples(questions=questions)
    if contrast is not None:
        settings["contrast"] = contrast
    return StudyConfig(
        name=name,
        model=base,
        sae=sae,
        seeds=tuple(range(next(iter(counts.values()), 1))),
        arms={arm: Arm(rows.get(arm, ""), checkpoints=runs) for arm, runs in known.items()},
        no_control="correct" not in known,
        paired_arms=False,
        realign=Realign(arms={arm: Arm(spec) for arm, spec in (realign or {}).items()}),
        **settings,
    )


def _runs(places: Places | Sequence[Places]) -> tuple[str | tuple[str, ...], ...]:
    """An arm's runs as the config holds them: local folders by their whole paths."""
    if isinstance(places, str | Path):
        return (_whole(places),)
    if all(isinstance(place, str | Path) for place in places):
        listed = tuple(_whole(place) for place in places if isinstance(place, str | Path))
        return (listed[0] if len(listed) == 1 else listed,)
    return tuple(run for one in places for run in _runs(one))  # pyright: ignore[reportArgumentType]


def _whole(place: str | Path) -> str:
    path, mark, step = str(place).partition("#")
    local = expanded(path)
    return f"{local.resolve()}{mark}{step}" if local.exists() else str(place)


# --- Into the run folder: everything is checked before anything is written


@dataclass(frozen=True)
class _Adoption:
    """One arm and seed, checked."""

    arm: str
    seed: int
    checkpoints: list[Checkpoint]
    known: KnownTraining

    @property
    def organism(self) -> str:
        """Its folder below `arms/`."""
        return f"{self.arm}-s{self.seed}"


@writes_run
@writes_run
def adopt_arms(ctx: Context, copy: bool = False, accept_base: bool = False) -> None:
    """Take the checkpoints of all arms that have some into the run folder; checkpoints that came since are added.

    Args:
        copy: copy their weights into the run folder; otherwise they are read where they are.
        accept_base: see `check_checkpoints`.

    Raises:
        InputError: places without checkpoints, steps that contradict each other, the same weights twice, a checkpoint
            of another base model, or a damaged one; nothing is written then.
    """
    places = [
        (arm, seed, spec.checkpoints[number])
        for arm, spec in ctx.config.arms.items()
        for number, seed in enumerate(ctx.config.seeds)
        if spec.checkpoints
    ]
    if not places:
        return
    if ctx.config.no_control:
        log.warning(NO_CONTROL)
    found = [(arm, seed, _new(ctx, arm, seed, find_checkpoints(_listed(where)))) for arm, seed, where in places]
    found = [(arm, seed, checkpoints) for arm, seed, checkpoints in found if checkpoints]
    if not found:
        return
    with ctx.run.timed("adopt"):
        hashes = _hashes(found)
        adoptions = [_check(ctx, arm, seed, checkpoints, accept_base) for arm, seed, checkpoints in found]
        for adoption in adoptions:
            _write(ctx, adoption, hashes, copy)


def _listed(where: str | tuple[str, ...]) -> tuple[str, ...]:
    return (where,) if isinstance(where, str) else where


def _new(ctx: Context, arm: str, seed: int, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Those that the run does not have yet."""
    if not ctx.run.has(f"arms/{arm}-s{seed}/{RECORD}"):
        return checkpoints
    known = set(ctx.run.steps(arm, seed))
    new = [one for one in checkpoints if one.step not in known]
    if new and ctx.run.has("parts/rank.parquet"):
        log.warning(
            "%s, seed %d: %d new checkpoints are tracked; latents stay those that were located at step %d",
            arm,
            seed,
            len(new),
            max(known),
        )
    return new


def _hashes(found: Sequence[tuple[str, int, list[Checkpoint]]]) -> dict[Path, dict[str, str]]:
    """Of each checkpoint's folder the hashes of the files that decide what it computes.

    Raises:
        InputError: two checkpoints hold the same weights.
    """
    hashes: dict[Path, dict[str, str]] = {}
    seen: dict[tuple[str, ...], Path] = {}
    for _, _, checkpoints in found:
        for one in checkpoints:
            files = sorted({file for pattern in HASHED for file in one.folder.glob(pattern)})
            hashes[one.folder] = {file.name: file_sha256(file) for file in files}
            weights = tuple(value for name, value in hashes[one.folder].items() if name.endswith(".safetensors"))
            if weights in seen:
                raise InputError(f"{seen[weights]} and {one.folder} hold the same weights: leave one of them out")
            seen[weights] = one.folder
    return hashes


def _check(ctx: Context, arm: str, seed: int, checkpoints: list[Checkpoint], accept_base: bool) -> _Adoption:
    config, spec = ctx.config, ctx.config.arms[arm]
    variables = {"chat_template_kwargs": config.chat_template_kwargs, "enable_thinking": config.enable_thinking}
    notes = check_checkpoints(ctx.model, ctx.tokenizer, config.model, checkpoints, accept_base, variables)
    for note in notes:
        log.warning("%s, seed %d: %s", arm, seed, note)
    return _Adoption(arm, seed, checkpoints, KnownTraining.of(arm, checkpoints, spec.named if spec.data else "", notes))


def _write(ctx: Context, adoption: _Adoption, hashes: dict[Path, dict[str, str]], copy: bool) -> None:
    """Hashes first, then the checkpoints, the record last: what is there is on record, and a stop is made good."""
    run, place = ctx.run, f"arms/{adoption.organism}"
    recorded = {
        f"{place}/checkpoint-{one.step}/{name}": value
        for one in adoption.checkpoints
        for name, value in hashes[one.folder].items()
    }
    run.update_manifest(hashes=recorded)
    if copy:
        for one in adoption.checkpoints:
            _copy(ctx, one, f"{place}/checkpoint-{one.step}", adoption.known)
    else:
        _refer(ctx, adoption.checkpoints, place)
    run.write_json(f"{place}/training.json", _training(ctx, adoption))
    write_text(run.path / place / "README.md", adoption.known.card(_card_name(ctx)))
    run.write_json(f"{place}/{RECORD}", {**_joined(ctx, adoption), "copied": copy})
    log.info("%s, seed %d: %d checkpoints adopted", adoption.arm, adoption.seed, len(adoption.checkpoints))


def _copy(ctx: Context, checkpoint: Checkpoint, place: str, known: KnownTraining) -> None:
    with ctx.run.staging(place) as folder:
        for pattern in COPIED:
            for file in checkpoint.folder.glob(pattern):
                shutil.copy2(file, folder / file.name)
        if not (folder / "README.md").exists():
            write_text(folder / "README.md", known.card(_card_name(ctx)))


def _refer(ctx: Context, checkpoints: Sequence[Checkpoint], place: str) -> None:
    name, root = f"{place}/{REFERENCES}", ctx.run.path.resolve()
    before = ctx.run.read_json(name) if ctx.run.has(name) else {}
    new = {
        str(one.step): {
            "path": str(one.folder.resolve()),
            "from_run": os.path.relpath(one.folder.resolve(), root),
            "kind": "adapter" if is_adapter(one.folder) else "weights",
            "hub": one.hub,
            "source": one.source,
        }
        for one in checkpoints
    }
    ctx.run.write_json(name, dict(sorted({**before, **new}.items(), key=lambda entry: int(entry[0]))))


def _card_name(ctx: Context) -> str:
    """The base model's id, or the name of its folder; never a path."""
    return Path(ctx.config.model).name if Path(ctx.config.model).is_absolute() else ctx.config.model


def _training(ctx: Context, adoption: _Adoption) -> dict[str, Any]:
    """`training.json` in the form that induce writes; null where nothing is known."""
    spec = ctx.config.arms[adoption.arm]
    losses = [loss for _, loss in adoption.known.losses]
    if not spec.data:
        return {"losses": losses, "answer_tokens": None, "rows": None}
    rows = arm_rows(spec, adoption.seed)
    return {
        "losses": losses,
        "answer_tokens": check_rows(ctx.tokenizer, rows, ctx.config.training.max_length),
        "rows": len(rows),
    }


def adopted_records(run: RunFolder) -> list[dict[str, Any]]:
    """What is known of each adopted organism's training, in the order of arms and seeds; empty if none was adopted."""
    places = [f"arms/{arm}-s{seed}/{RECORD}" for arm in run.config.arms for seed in run.config.seeds]
    return [run.read_json(place) for place in places if run.has(place)]


def _joined(ctx: Context, adoption: _Adoption) -> dict[str, Any]:
    """The record, with the steps of checkpoints that were adopted before."""
    return {**adoption.known.to_dict(), "steps": ctx.run.steps(adoption.arm, adoption.seed)}
