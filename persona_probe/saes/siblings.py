"""Which SAEs there are beside one that was asked for: ids of a SAELens release, or folders on disk."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from persona_probe.errors import InputError, near_matches

SHOWN = 12


def release_ids(release: str) -> list[str]:
    """The ids of all SAEs of a SAELens release.

    Raises:
        InputError: SAELens knows no such release; the message lists near matches.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release not in directory:
        raise InputError(f"found no SAE release {release!r} through SAELens: {near_matches(release, directory)}")
    return list(directory[release].saes_map)


def split_release(name: str) -> tuple[str, str]:
    """`release/sae_id`, or `owner/repository/folder` on the Hugging Face hub, as (release, sae_id).

    Raises:
        InputError: an unknown release, or a release without that SAE; the message lists what there is.
    """
    release, _, sae_id = name.partition("/")
    parts = name.split("/")
    if len(parts) > 2 and not is_release(release):
        return "/".join(parts[:2]), "/".join(parts[2:])
    ids = release_ids(release)
    if sae_id not in ids:
        what = f"has no SAE {sae_id!r}" if sae_id else f"needs an SAE's id ({release}/ID)"
        raise InputError(f"release {release!r} {what}; {_layers(ids)}{near_matches(sae_id, ids)}")
    return release, sae_id


def folders_beside(folder: Path) -> list[str]:
    """SAE folders inside `folder`, or else beside it, as `path (hook)`."""
    for place in (folder, folder.parent):
        if place.is_dir():
            found = sorted(path.parent for path in place.glob("*/cfg.json"))
            if found:
                return [f"{path} ({_hook(path / 'cfg.json')})" for path in found]
    return []


def beside_clause(folder: Path) -> str:
    """What SAE folders there are instead, as the end of an error message; empty where there are none."""
    found = folders_beside(folder)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"; there are {', '.join(found[:SHOWN])}{more}" if found else ""


def is_release(name: str) -> bool:
    """Whether SAELens knows a release of this name."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return name in get_pretrained_saes_directory()


def _layers(ids: Sequence[str]) -> str:
    matches = [re.search(r"(?:layer_?|layers\.|blocks\.|\bl)(\d+)", sae_id) for sae_id in ids]
    layers = sorted({int(match[1]) for match in matches if match})
    return f"it has layers {', '.join(map(str, layers))}; " if layers else ""


def _hook(cfg: Path) -> str:
    try:
        found = json.loads(cfg.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return "damaged cfg.json"
    places = [place for place in (found.get("metadata"), found) if isinstance(place, dict)]
    names = [place.get(key) for place in places for key in ("hook_name", "hf_hook_name", "hook_point")]
    return next((str(name) for name in names if name), "no hook named")
