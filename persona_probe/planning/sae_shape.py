"""What is known of an SAE before it is downloaded: SAELens' registry for releases, cfg.json for folders."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_probe.errors import InputError
from persona_probe.planning.known_models import KNOWN, known_id
from persona_probe.saes.encode import check_architecture
from persona_probe.saes.hooks import hook_layer
from persona_probe.saes.load import WEIGHTS_FILE, find_folder
from persona_probe.saes.siblings import is_release, split_release

WIDTHS = {
    **{"4k": 4096, "16k": 16384, "32k": 32768, "65k": 65536, "131k": 131072},
    **{"262k": 262144, "524k": 524288, "1m": 1048576},
}
"""Gemma Scope's names of dictionary sizes, as SAELens reads them."""
RELEASE_WIDTHS = {
    "qwen2.5-7b-instruct-andyrdt": 131072,
    "llama-3.1-8b-instruct-andyrdt": 131072,
    "goodfire-llama-3.1-8b-instruct": 65536,
}
"""Dictionary sizes of releases whose ids do not tell it."""
OTHER_SITES = r"(?:^|[-_./])(attn?|attention|hook_z|mlp|transcoders?|clt|embedding|l\d+[am])(?:$|[-_./])"
"""Words in ids and paths of SAEs that read another place; `l5a` and `l5m` are Llama Scope's."""


@dataclass(frozen=True)
class SaeShape:
    """An SAE's shape and place; None where nothing on this machine tells it."""

    name: str
    layer: int | None
    """Decoder layer whose output it reads."""
    d_in: int | None
    d_sae: int | None
    model: str | None
    """The model that it was trained on."""
    source: str
    """`SAELens' registry` or `cfg.json`."""

    def describe(self) -> str:
        """One line."""
        parts = [
            "layer unknown" if self.layer is None else f"output of layer {self.layer}",
            "d_in unknown" if self.d_in is None else f"d_in {self.d_in}",
            "d_sae unknown" if self.d_sae is None else f"d_sae {self.d_sae}",
        ]
        made_for = f", trained on {self.model}" if self.model else ""
        return f"{', '.join(parts)}{made_for} (from {self.source})"


def find_sae(name: str) -> SaeShape:
    """The shape of what `load_sae` takes, without a download.

    Raises:
        InputError: nothing there, an unknown release or id (near matches are listed), or an SAE that does not read the
            residual stream.
    """
    folder = find_folder(name)
    if folder.is_dir():
        return _from_folder(name, folder)
    if name.startswith((".", "/", "~", "saes/")) or ("/" not in name and not is_release(name)):
        raise InputError(f"no SAE at {name!r}: give a folder with cfg.json, or a SAELens release as release/sae_id")
    release, sae_id = split_release(name)
    if is_release(release):
        return _from_registry(name, release, sae_id)
    return SaeShape(name, None, None, None, None, "the hub, not read")


def _from_folder(name: str, folder: Path) -> SaeShape:
    for file in ("cfg.json", WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise InputError(f"{folder} is no SAE folder: {file} is missing (save it with save_inference_model)")
    try:
        raw = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        d_in, d_sae = int(raw["d_in"]), int(raw["d_sae"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / 'cfg.json'} is damaged ({error}): save the SAE again") from error
    check_architecture(str(raw.get("architecture", "standard")))
    # SAEs saved before SAELens 6 have their metadata at the top level.
    metadata: dict[str, Any] = {**raw, **(raw.get("metadata") or {})}
    hooks = [hook for key in ("hook_name", "hf_hook_name") if (hook := metadata.get(key))]
    layers = {layer for hook in hooks if (layer := hook_layer(hook)) is not None}
    return SaeShape(name, min(layers, default=None), d_in, d_sae, metadata.get("model_name"), "cfg.json")


def _from_registry(name: str, release: str, sae_id: str) -> SaeShape:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    entry = get_pretrained_saes_directory()[release]
    place = f"{release}/{sae_id}/{entry.saes_map[sae_id]}"
    if site := re.search(OTHER_SITES, place):
        raise InputError(f"SAE {name!r} reads {site[1]!r}, not the residual stream: choose a resid_post SAE")
    key = known_id(entry.model)
    width = re.search(r"width_(\d+[km])", place)
    return SaeShape(
        name=name,
        layer=layer_in(place),
        d_in=None if key is None else width_of(key),
        d_sae=RELEASE_WIDTHS.get(release) or (WIDTHS.get(width[1]) if width else None),
        model=entry.model,
        source="SAELens' registry",
    )


def layer_in(place: str) -> int | None:
    """The decoder layer that a release's id and path name; None where they name none.

    Raises:
        InputError: the SAE reads the embeddings.
    """
    if found := re.search(r"blocks\.\d+\.hook_resid_(pre|post)", place):
        return hook_layer(found[0])
    found = re.search(r"layer_?(\d+)|layers\.(\d+)|/l(\d+)r_", place)
    return int(found[found.lastindex or 0]) if found else None


def width_of(key: str) -> int:
    """Residual width of a known model."""
    numbers = KNOWN[key].numbers
    return numbers.get("text_config", numbers)["hidden_size"]
