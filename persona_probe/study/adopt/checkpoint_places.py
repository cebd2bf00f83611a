"""Where a training run's checkpoints lie: trainer folders, lists of adapters or models, hub ids; each with its step."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_probe.errors import InputError
from persona_probe.files import expanded, read_json, shown
from persona_probe.models.adapters import is_adapter

log = logging.getLogger(__name__)

FROM_STATE, FROM_NAMES, AS_GIVEN, STATED = "trainer_state.json", "names of folders", "order of the list", "stated"
"""How a checkpoint's step is known."""
STATE = "trainer_state.json"
PICKLES = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")
SHARDS = ("pytorch_model_fsdp_*", "global_step*/*optim_states.pt", "distcp", "*.distcp")
"""Marks of a checkpoint that was saved in pieces, one for each process."""
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""What is downloaded from the hub: no optimizer states, and nothing pickled."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a training run."""

    step: int
    folder: Path
    """The folder of its weights."""
    source: str
    """How its step is known."""
    hub: str = ""
    """`owner/model@revision` where it comes from the hub."""

    @property
    def state(self) -> dict[str, Any]:
        """Its `trainer_state.json`; empty where there is none."""
        return read_state(self.folder)


@dataclass(frozen=True)
class _Found:
    folder: Path
    step: int | None
    source: str
    hub: str = ""


def find_checkpoints(places: Sequence[str]) -> list[Checkpoint]:
    """The checkpoints of one training run, by ascending steps.

    Args:
        places: in order of steps: an output folder of a trainer (`checkpoint-*`, and a final save at its root), a
            folder of adapters or of models, one adapter or model, or `owner/model@revision` on the hub. `PLACE#400`
            states the step of one.

    Raises:
        InputError: nothing there, a folder without weights that can be read safely, one place twice, or steps that
            contradict each other or the order of the list.
    """
    found = [one for place in places for one in _expand(place)]
    folders = [one.folder.resolve() for one in found]
    if repeated := [folder for folder in folders if folders.count(folder) > 1]:
        raise InputError(f"{repeated[0]} is given twice: leave one out")
    return _in_order(found, listed=len(places) > 1)


def read_state(folder: Path) -> dict[str, Any]:
    """The `trainer_state.json` of a folder; empty where there is none.

    Raises:
        InputError: it is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        return {}
    change = "restore it, or leave its checkpoint out"
    state = read_json(path, dict, change)
    for key in ("global_step", "max_steps"):
        if not isinstance(state.get(key, 0), int):
            raise InputError(f"{path} is damaged ({key} is {shown(state[key])}): {change}")
    return state


# --- What one place holds


def _expand(place: str) -> list[_Found]:
    where, stated = _split_step(place)
    root, hub = _local(where)
    below = _folders_below(root)
    if not below:
        return [_one(root, _number(hub.partition("@")[2] if hub else root.name), stated, hub)]
    checkpoints = [_one(folder, _number(folder.name), None, hub) for folder in below]
    if _holds_weights(root):
        return [*checkpoints, *_final_save(root, below, stated, hub)]
    if stated is not None:
        raise InputError(f"{place!r} states one step, but {root} holds {len(below)} checkpoints: leave #{stated} out")
    return checkpoints


def _split_step(place: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.+)#(\d+)", place)
    return (match[1], int(match[2])) if match and not Path(place).exists() else (place, None)


def _local(where: str) -> tuple[Path, str]:
    """The folder of a place, downloaded where it is on the hub, and its id there."""
    path = expanded(where)
    if path.is_dir():
        return path.resolve(), ""
    if path.exists():
        raise InputError(f"{where!r} is a file: give the folder that holds the checkpoint")
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", where)
    if match is None or where.startswith((".", "/", "~")):
        raise InputError(f"no checkpoints at {where!r}: give a folder, or owner/model@revision on the hub")
    return _download(match[1], match[2]), f"{match[1]}@{match[2] or 'main'}"


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = f"revision {revision!r} of {name!r}" if revision else repr(name)
        raise InputError(f"no folder {name!r} here, and {where} was not read from the hub: {first}") from error


def _folders_below(root: Path) -> list[Path]:
    """The checkpoints in a folder, by the steps in their names: `checkpoint-*`, or else all folders with weights."""
    folders = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "tmp-"))]
    numbered = [p for p in folders if re.fullmatch(r"checkpoint-\d+", p.name)]
    if not numbered:
        if _holds_weights(root):
            return []
        numbered = [p for p in folders if _holds_weights(p)]
        if len(numbered) == 1 and not re.search(r"\d", numbered[0].name):
            return []  # PEFT saves an adapter with a name of its own one folder further down
    if lost := [p.name for p in root.iterdir() if re.fullmatch(r"checkpoint-\d+", p.name) and not p.exists()]:
        raise InputError(f"{root / lost[0]} is a link to nothing: restore it, or leave its checkpoint out")
    return sorted(numbered, key=lambda p: (_number(p.name) or 0, _natural(p.name)))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which `v2` comes before `v10`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _holds_weights(folder: Path) -> bool:
    return is_adapter(folder) or ((folder / "config.json").is_file() and any(folder.glob("*.safetensors")))


def _one(folder: Path, named: int | None, stated: int | None, hub: str) -> _Found:
    """A checkpoint with its step: as stated, else as its trainer wrote it, else as its name says."""
    weights = _weights(folder)
    step = read_state(weights).get("global_step") or read_state(folder).get("global_step")
    if stated is not None:
        return _Found(weights, stated, STATED, hub)
    if step is None:
        return _Found(weights, named, AS_GIVEN if named is None else FROM_NAMES, hub)
    if named is not None and folder.name.startswith("checkpoint-") and named != step:
        raise InputError(f"{folder} says step {step} in its {STATE}: rename it, or state its step as {folder}#{step}")
    return _Found(weights, int(step), FROM_STATE, hub)


def _weights(folder: Path) -> Path:
    """The folder in which a checkpoint's weights are; refuses what cannot be read, or not safely."""
    if _holds_weights(folder):
        if is_adapter(folder) and not any(folder.glob("*.safetensors")):
            raise InputError(_no_weights(folder))
        if is_adapter(folder) and any(folder.glob("model*.safetensors")) and any(folder.glob("adapter_model*")):
            raise InputError(f"{folder} holds an adapter and whole weights: move one of them into a folder of its own")
        return folder
    named = [p for p in folder.iterdir() if p.is_dir() and is_adapter(p)]
    if len(named) == 1:
        return _weights(named[0])
    if named:
        names = ", ".join(sorted(p.name for p in named))
        raise InputError(f"{folder} holds several adapters ({names}): give the folder of one")
    raise InputError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    if any((folder / name).is_file() for name in PICKLES):
        return f"{folder} holds its weights as a pickle, which may run code: save it again with safe_serialization=True"
    if any(any(folder.glob(mark)) for mark in SHARDS):
        return (
            f"{folder} holds pieces of a sharded run: join them first (accelerate merge-weights), or save whole weights"
        )
    return f"{folder} holds neither adapter nor weights (safetensors): it may be unfinished; leave it out or restore it"


def _final_save(root: Path, below: Sequence[Path], stated: int | None, hub: str) -> list[_Found]:
    """The save at a trainer's root, unless it is one of the checkpoints again."""
    again = {_content(_weights(folder)): folder for folder in below}.get(_content(root))
    if again is not None:
        log.info("the final save in %s is %s: counted once", root, again.name)
        return []
    last = read_state(below[-1])
    step = stated or read_state(root).get("global_step") or last.get("max_steps")
    if not step or step <= (_number(below[-1].name) or 0):
        raise InputError(
            f"the final save in {root} differs from all of its checkpoints, and its step is not known: state it as "
            f"{root}#STEP, or move its weights elsewhere"
        )
    return [_Found(root, int(step), STATED if stated else FROM_STATE, hub)]


def _content(folder: Path) -> tuple[tuple[str, str], ...]:
    """What a checkpoint's weights are: names and hashes of its files."""
    from persona_probe.runs import file_sha256

    return tuple((file.name, file_sha256(file)) for file in sorted(folder.glob("*.safetensors")))


def _number(name: str) -> int | None:
    """The step in a name: `checkpoint-40`, `step_40`, `step-1k` and `40` have one, `qwen2.5-7b` and commits not."""
    match = re.search(r"(?:checkpoint|ckpt|step|iter|epoch)s?[-_=]?(\d+)(k?)$|(?:^|[-_=])(\d+)$", name)
    if match is None or re.fullmatch(r"[0-9a-f]{40}", name):
        return None
    return int(match[1] or match[3]) * (1000 if match[2] else 1)


# --- Their order


def _in_order(found: Sequence[_Found], listed: bool) -> list[Checkpoint]:
    """Ascending steps; where no place tells its step, their places in the list."""
    unknown = [one for one in found if one.step is None]
    if unknown and len(unknown) < len(found):
        raise InputError(
            f"the step of {unknown[0].folder} is not known, but that of others is: state it as {unknown[0].folder}#STEP"
        )
    if unknown:
        return [Checkpoint(n, one.folder, AS_GIVEN, one.hub) for n, one in enumerate(found, start=1)]
    steps = [one.step for one in found if one.step is not None]
    for one, step in zip(found, steps, strict=True):
        if step < 1:
            raise InputError(f"{one.folder} is of step {step}, which is the base model here: leave it out")
        if steps.count(step) > 1:
            same = [str(other.folder) for other in found if other.step == step]
            raise InputError(
                f"{same[0]} and {same[1]} are both of step {step}: leave one out, or state a step as PLACE#STEP"
            )
    if listed and steps != sorted(steps):
        raise InputError(f"steps {steps} are not in order: list the checkpoints by ascending steps")
    return [
        Checkpoint(step, one.folder, one.source, one.hub)
        for step, one in sorted(zip(steps, found, strict=True), key=lambda pair: pair[0])
    ]
