"""Load SAEs through SAELens, ready to read raw residual streams, and check that they fit the model."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from persona_probe import shipped
from persona_probe.config import SAE_DTYPES
from persona_probe.data.world import packaged
from persona_probe.errors import InputError, near_matches, unknown
from persona_probe.files import expanded, read_json
from persona_probe.models.layers import decoder_layers
from persona_probe.models.places import Where, as_place, find_site
from persona_probe.runs import file_sha256
from persona_probe.saes.foreign import find_layout, load_foreign
from persona_probe.saes.hooks import PlacedSae, is_transcoder, sae_layer
from persona_probe.saes.read import check_architecture, check_readable, check_sound

# --- Load an SAE from a folder or a release, and check that it fits a model

QUALITY_FILE = "quality.json"
HELD_OUT_FILE = "heldout.jsonl"
WEIGHTS_FILE = "sae_weights.safetensors"
SCALER_FILE = "activation_scaler.json"


def load_sae(name: str | Path, device: str = "cpu", dtype: str | None = None) -> Any:
    """Load an SAE from a folder, or from a SAELens release as `release/sae_id`; `persona-world` is the packaged one.

    The folder may be SAELens', EleutherAI sparsify's or Gemma Scope's. One of dictionary_learning (`ae.pt`) is refused
    with the command that converts it: a pickle is never loaded here.

    A SAELens folder in a Hugging Face repository is `owner/repository/folder`. If a folder
    has a quality.json, its weights must match the sha256 there. A training checkpoint's input scale is folded into the
    weights, so that every SAE takes raw residual streams.

    Args:
        dtype: `float32`, or `bfloat16`: half the memory, latents are computed in bf16; None is the SAE's own.

    Returns:
        A `sae_lens.SAE` in eval mode.

    Raises:
        InputError: no SAE of that name (the message lists others), a damaged file, an unknown release, or an SAE that
            cannot be read token by token (temporal, BatchTopK in training).
    """
    folder = find_folder(name)
    if dtype not in (None, *SAE_DTYPES):
        raise unknown("dtype of an SAE", str(dtype), SAE_DTYPES)
    sae = _from_folder(folder, device) if folder.is_dir() else _from_release(str(name), folder, device)
    check_sound(sae, str(name))
    # Every place is read as (tokens, width), the heads already joined.
    sae.turn_off_forward_pass_hook_z_reshaping()
    return (sae if dtype is None else sae.to(getattr(torch, dtype))).eval()


@contextmanager
def tensors_only() -> Iterator[None]:
    """A block in which SAELens' `torch.load` reads tensors and plain values alone, whatever the environment says.

    Some releases hold PyTorch files (`.pt`), and so does the state of a training under way. Code in them does not run.
    """
    ours = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": None}
    before = {name: os.environ.get(name) for name in ours}
    _set_environment(ours)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def find_folder(name: str | Path) -> Path:
    """The path itself, or that of an SAE that ships (`saes/...`), whatever the working folder is.

    `persona-world` is the folder of the packaged world's SAE.
    """
    if str(name) == packaged.NAME:
        packaged.check()
        return packaged.SAE
    return shipped.find(expanded(name))


def check_fit(sae: Any, model: nn.Module, layer: Where) -> None:
    """Refuse an SAE whose kind, width, layer or place does not fit the model.

    Args:
        layer: the decoder layer whose output the SAE gets, or the `Place` that it reads.

    Raises:
        InputError: the message says which of them does not fit. An SAE of another place never fits a layer's output.
    """
    place = as_place(layer)
    if place.is_residual:
        check_architecture(sae.cfg.architecture())
        sae_layer(sae, place.layer)
    else:
        check_readable(sae.cfg.architecture())
    layers = len(decoder_layers(model))
    if not 0 <= place.layer < layers:
        raise InputError(f"the SAE reads layer {place.layer} but the model has layers 0 to {layers - 1}")
    width = find_site(model, place).width
    if sae.cfg.d_in != width:
        what = "the model's residual stream" if place.is_residual else str(place)
        raise InputError(f"the SAE reads width {sae.cfg.d_in} but {what} has {width}")


def check_placed(placed: PlacedSae, model: nn.Module) -> None:
    """`check_fit` for an SAE of any place; a transcoder's output must fit too.

    Raises:
        InputError: as `check_fit`.
    """
    check_fit(placed.sae, model, placed.reads)
    if not is_transcoder(placed.sae):
        return
    width = find_site(model, placed.writes).width
    if placed.sae.cfg.d_out != width:
        raise InputError(f"the transcoder writes width {placed.sae.cfg.d_out} but {placed.writes} has {width}")


def _from_folder(folder: Path, device: str) -> Any:
    from sae_lens import SAE

    if (layout := find_layout(folder)) is not None:
        return load_foreign(folder, layout, device)
    _check_files(folder)
    try:
        with tensors_only():
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
        with tensors_only():
            sae = SAE.from_pretrained(release, sae_id, device=device)
    except Exception as error:  # the hub, safetensors and the tensors-only unpickler each have their own
        raise InputError(f"could not load SAE {name!r} through SAELens: {_first_line(error)}") from error
    check_readable(sae.cfg.architecture())
    _fold_input_scale(sae, None)
    return sae


def _fold_input_scale(sae: Any, folder: Path | None) -> None:
    """Fold the input scale into the weights: SAELens applies these two normalisations only in training, silently."""
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
            f"SAELens' {SCALER_FILE} next to its weights (scaling_factor 1.0 if it is folded in already)"
        )


def _check_files(folder: Path) -> None:
    for file in ("cfg.json", WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise InputError(
                f"{folder} is no SAE folder: {file} is missing (save it with save_inference_model)"
                f"{beside_clause(folder)}"
            )
    config = _read_json(folder / "cfg.json", "fetch it again, or save the SAE again")
    check_readable(str(config.get("architecture", "standard")))
    if not (folder / QUALITY_FILE).is_file():
        return
    quality = _read_json(folder / QUALITY_FILE, "fetch it again, or move it elsewhere to load without a check")
    expected = quality.get("sha256")
    if expected and file_sha256(folder / WEIGHTS_FILE) != expected:
        raise InputError(f"{folder / WEIGHTS_FILE} does not match its sha256 in {QUALITY_FILE}: fetch it again")


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    return read_json(path, dict, remedy)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# --- Other SAEs to suggest in an error message: ids of a SAELens release, or folders on disk

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
        InputError: an unknown release, or a release without that SAE; the message lists its SAEs.
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
    """SAE folders inside `folder`, or else next to it, as `path (hook)`."""
    for place in (folder, folder.parent):
        if place.is_dir():
            folders = sorted(path.parent for path in place.glob("*/cfg.json"))
            if folders:
                return [f"{path} ({_hook(path / 'cfg.json')})" for path in folders]
    return []


def beside_clause(folder: Path) -> str:
    """The SAE folders nearby, as the end of an error message; empty if there are none."""
    folders = folders_beside(folder)
    more = f" and {len(folders) - SHOWN} more" if len(folders) > SHOWN else ""
    return f"; there are {', '.join(folders[:SHOWN])}{more}" if folders else ""


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
        content = read_json(cfg)
    except InputError:
        return "damaged cfg.json"
    places = [place for place in (content.get("metadata"), content) if isinstance(place, dict)]
    names = [place.get(key) for place in places for key in ("hook_name", "hf_hook_name", "hook_point")]
    return next((str(name) for name in names if name), "no hook named")
