"""Load SAEs through SAELens, ready to read raw residual streams, and check that they fit the model."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from persona_probe.errors import InputError
from persona_probe.models.layers import decoder_layers, hidden_size
from persona_probe.models.sources import file_sha256
from persona_probe.saes.encode import check_architecture
from persona_probe.saes.hooks import sae_layer
from persona_probe.saes.siblings import beside_clause, is_release, split_release

__all__ = ["HELD_OUT_FILE", "QUALITY_FILE", "WEIGHTS_FILE", "check_fit", "find_folder", "load_sae", "sae_layer"]

QUALITY_FILE = "quality.json"
HELD_OUT_FILE = "heldout.jsonl"
WEIGHTS_FILE = "sae_weights.safetensors"
SCALER_FILE = "activation_scaler.json"


def load_sae(name: str | Path, device: str = "cpu") -> Any:
    """Load an SAE from a folder in SAELens format, or from a SAELens release as `release/sae_id`.

    A SAELens folder in a Hugging Face repository is `owner/repository/folder`. A folder's weights are compared with
    the sha256 in its quality.json, where it has one. A training checkpoint's input scale is folded into the weights,
    so that every SAE takes raw residual streams.

    Returns:
        A `sae_lens.SAE` in eval mode.

    Raises:
        InputError: nothing there (the message lists what there is), a damaged file, an unknown release, or an SAE that
            cannot be read token by token (temporal, transcoder, BatchTopK in training).
    """
    folder = find_folder(name)
    return (_from_folder(folder, device) if folder.is_dir() else _from_release(str(name), folder, device)).eval()


def find_folder(name: str | Path) -> Path:
    """A path as given, or below the checkout that this package runs from (so that notebooks find `saes/`)."""
    folder = Path(name).expanduser()
    beside = Path(__file__).parents[2] / folder
    return beside if not folder.exists() and beside.is_dir() else folder


def check_fit(sae: Any, model: nn.Module, layer: int) -> None:
    """Refuse an SAE whose kind, width or layer does not fit the model.

    Raises:
        InputError: says which of the three it is.
    """
    check_architecture(sae.cfg.architecture())
    width, layers = hidden_size(model), len(decoder_layers(model))
    if sae.cfg.d_in != width:
        raise InputError(f"the SAE reads width {sae.cfg.d_in} but the model's residual stream has {width}")
    if not 0 <= layer < layers:
        raise InputError(f"the SAE reads layer {layer} but the model has layers 0 to {layers - 1}")


def _from_folder(folder: Path, device: str) -> Any:
    from sae_lens import SAE

    _check_files(folder)
    try:
        sae = SAE.load_from_disk(str(folder), device=device)
    except Exception as error:  # a cut-short file raises one of many kinds
        raise InputError(f"could not load the SAE in {folder}: {_first_line(error)}") from error
    _fold_input_scale(sae, folder)
    return sae


def _from_release(name: str, folder: Path, device: str) -> Any:
    from sae_lens import SAE

    looks_like_path = name.startswith((".", "/", "~", "saes/")) or "/" not in name or folder.parent.is_dir()
    if looks_like_path and not is_release(name.partition("/")[0]):
        raise InputError(
            f"no SAE at {name!r}: give a folder with cfg.json, or a SAELens release as release/sae_id"
            f"{beside_clause(folder)}"
        )
    release, sae_id = split_release(name)
    try:
        sae = SAE.from_pretrained(release, sae_id, device=device)
    except Exception as error:  # the hub, safetensors and the tensors-only unpickler each have their own
        raise InputError(f"could not load SAE {name!r} through SAELens: {_first_line(error)}") from error
    check_architecture(sae.cfg.architecture())
    _fold_input_scale(sae, None)
    return sae


def _fold_input_scale(sae: Any, folder: Path | None) -> None:
    """SAELens applies these two normalisations in training only, and never says so when they were not folded in."""
    from sae_lens.training.activation_scaler import ActivationScaler

    kind, scaler = sae.cfg.normalize_activations, ActivationScaler()
    if kind not in ("expected_average_only_in", "covariance_whitening"):
        return
    if folder is not None and (folder / SCALER_FILE).is_file():
        scaler.load(folder / SCALER_FILE)
    if kind == "expected_average_only_in" and scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    elif kind == "covariance_whitening" and scaler.whitening is not None:
        white = scaler.whitening
        sae.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
    else:
        raise InputError(
            f"this SAE expects scaled inputs ({kind}) but comes without the scale: fold it in before saving, or put "
            f"SAELens' {SCALER_FILE} beside its weights (scaling_factor 1.0 where it is folded in already)"
        )


def _check_files(folder: Path) -> None:
    for file in ("cfg.json", WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise InputError(
                f"{folder} is no SAE folder: {file} is missing (save it with save_inference_model)"
                f"{beside_clause(folder)}"
            )
    config = _read_json(folder / "cfg.json", "fetch it again, or save the SAE again")
    check_architecture(str(config.get("architecture", "standard")))
    if not (folder / QUALITY_FILE).is_file():
        return
    wanted = _read_json(folder / QUALITY_FILE, "fetch it again, or delete it to load without a check").get("sha256")
    if wanted and file_sha256(folder / WEIGHTS_FILE) != wanted:
        raise InputError(f"{folder / WEIGHTS_FILE} does not match its sha256 in {QUALITY_FILE}: fetch it again")


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {remedy}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: {remedy}")
    return found


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
