"""Load SAEs through SAELens, map their hook to a decoder layer, and check that they fit the model."""

import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from persona_probe.errors import InputError
from persona_probe.models.layers import decoder_layers, hidden_size
from persona_probe.models.sources import file_sha256

QUALITY_FILE = "quality.json"
HELD_OUT_FILE = "heldout.jsonl"
WEIGHTS_FILE = "sae_weights.safetensors"


def load_sae(name: str | Path, device: str = "cpu") -> Any:
    """Load an SAE from a folder in SAELens format, or from a SAELens release as `release/sae_id`.

    A folder's weights are compared with the sha256 in its quality.json, where it has one.

    Returns:
        A `sae_lens.SAE` in eval mode.

    Raises:
        InputError: nothing there, a damaged file, or an unknown release.
    """
    from sae_lens import SAE

    folder = find_folder(name)
    if folder.is_dir():
        _check_files(folder)
        try:
            return SAE.load_from_disk(str(folder), device=device).eval()
        except Exception as error:  # a cut-short file raises one of many kinds
            raise InputError(f"could not load the SAE in {folder}: {str(error).splitlines()[0]}") from error
    release, _, sae_id = str(name).partition("/")
    if not sae_id or str(name).startswith((".", "/", "saes/")):
        raise InputError(
            f"no SAE at {str(name)!r}: give a folder with cfg.json, or a SAELens release as release/sae_id"
        )
    try:
        return SAE.from_pretrained(release, sae_id, device=device).eval()
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"could not load SAE {str(name)!r} through SAELens: {str(error).splitlines()[0]}") from error


def find_folder(name: str | Path) -> Path:
    """A path as given, or below the checkout that this package runs from (so that notebooks find `saes/`)."""
    folder = Path(name).expanduser()
    beside = Path(__file__).parents[2] / folder
    return beside if not folder.exists() and beside.is_dir() else folder


def _check_files(folder: Path) -> None:
    for file in ("cfg.json", WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise InputError(f"{folder} is no SAE folder: {file} is missing (save it with save_inference_model)")
    quality = folder / QUALITY_FILE
    if not quality.is_file():
        return
    try:
        wanted = json.loads(quality.read_text(encoding="utf-8")).get("sha256")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{quality} is damaged: fetch it again, or delete it to load without a check") from error
    if wanted and file_sha256(folder / WEIGHTS_FILE) != wanted:
        raise InputError(f"{folder / WEIGHTS_FILE} does not match its sha256 in {QUALITY_FILE}: fetch it again")


def sae_layer(sae: Any) -> int:
    """The decoder layer whose output the SAE reads, from its hook name.

    Understands TransformerLens' `blocks.L.hook_resid_post`, `blocks.L.hook_resid_pre` (the layer below) and Hugging
    Face's `model.layers.L`.

    Raises:
        InputError: the metadata names no residual-stream hook.
    """
    metadata = sae.cfg.metadata
    for hook in (metadata.hook_name, metadata.hf_hook_name):
        match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", hook or "")
        if match:
            layer = int(match[1]) - (match[2] == "pre")
            if layer < 0:
                raise InputError(
                    "this SAE reads the embeddings (blocks.0.hook_resid_pre): no decoder layer precedes it"
                )
            return layer
        match = re.search(r"layers\.(\d+)(\.output)?$", hook or "")
        if match:
            return int(match[1])
    raise InputError(f"the SAE's hook {metadata.hook_name!r} is not a residual stream: pass layer= yourself")


def check_fit(sae: Any, model: nn.Module, layer: int) -> None:
    """Refuse an SAE whose width or layer does not fit the model.

    Raises:
        InputError: says which of the two it is.
    """
    width, layers = hidden_size(model), len(decoder_layers(model))
    if sae.cfg.d_in != width:
        raise InputError(f"the SAE reads width {sae.cfg.d_in} but the model's residual stream has {width}")
    if not 0 <= layer < layers:
        raise InputError(f"the SAE reads layer {layer} but the model has layers 0 to {layers - 1}")
