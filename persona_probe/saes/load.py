"""Load SAEs through SAELens, ready to read raw residual streams, and check that they fit the model."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from persona_probe.errors import InputError, near_matches
from persona_probe.models.layers import decoder_layers, hidden_size
from persona_probe.runs import file_sha256
from persona_probe.saes.read import check_architecture

# --- Load an SAE from a folder or a release, and check that it fits a model

QUALITY_FILE = "quality.json"
HELD_OUT_FILE = "heldout.jsonl"
WEIGHTS_FILE = "sae_weights.safetensors"
SCALER_FILE = "activation_scaler.json"


def load_sae(name: str | Path, device: str = "cpu") -> Any:
    """Load an SAE from a folder in SAELens format, or from a SAELens release as `release/sae_id`.

    A SAELens folder in a Hugging Face repository is `owner/repository/folder`. If a folder
    has a quality.json, its weights must match the sha256 there. A training checkpoint's input scale is folded into the
    weights, so that every SAE takes raw residual streams.

    Returns:
        A `sae_lens.SAE` in eval mode.

    Raises:
        InputError: no SAE of that name (the message lists others), a damaged file, an unknown release, or an SAE that
            cannot be read token by token (temporal, transcoder, BatchTopK in training).
    """
    folder = find_folder(name)
    return (_from_folder(folder, device) if folder.is_dir() else _from_release(str(name), folder, device)).eval()


def find_folder(name: str | Path) -> Path:
    """The path itself, or the same path below this package's checkout (so that notebooks find `saes/`)."""
    folder = Path(name).expanduser()
    in_checkout = Path(__file__).parents[2] / folder
    return in_checkout if not folder.exists() and in_checkout.is_dir() else folder


def check_fit(sae: Any, model: nn.Module, layer: int) -> None:
    """Refuse an SAE whose kind, width or layer does not fit the model.

    Raises:
        InputError: the message says which of the three does not fit.
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
    check_architecture(str(config.get("architecture", "standard")))
    if not (folder / QUALITY_FILE).is_file():
        return
    expected = _read_json(folder / QUALITY_FILE, "fetch it again, or delete it to load without a check").get("sha256")
    if expected and file_sha256(folder / WEIGHTS_FILE) != expected:
        raise InputError(f"{folder / WEIGHTS_FILE} does not match its sha256 in {QUALITY_FILE}: fetch it again")


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {remedy}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: {remedy}")
    return content


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# --- From the hook names in an SAE's metadata to the decoder layer whose output it reads

GIVE_LAYER = "give the layer yourself (layer=, or `layer:` in a study's YAML)"
RESIDUAL = (
    # TransformerLens, and its bridge's names for the same places.
    (r"blocks\.(\d+)\.(?:hook_resid_post|hook_out)", 0),
    (r"blocks\.(\d+)\.(?:hook_resid_pre|hook_in)", -1),
    # Hugging Face module paths, bare or with SAELens' `.output` and `.input`.
    (r"(?:[\w.]*\.)?(?:layers|h|blocks)\.(\d+)(?:\.output)?", 0),
    (r"(?:[\w.]*\.)?(?:layers|h|blocks)\.(\d+)\.input", -1),
)
ELSEWHERE = (
    (r"hook_z$|o_proj\.input$", "the attention heads"),
    (r"attn", "the attention"),
    (r"hook_mlp_out$|post_feedforward_layernorm", "the MLP's output"),
    (r"hook_mlp_in$|pre_feedforward_layernorm|\.ln2\.", "the MLP's input"),
    (r"\.mlp(\.|$)", "the MLP"),
    (r"hook_resid_mid$", "the middle of a layer"),
    (r"embed", "the embeddings"),
)


def sae_layer(sae: Any) -> int:
    """The decoder layer whose output the SAE reads, from `hook_name` and `hf_hook_name` in its metadata.

    Understands TransformerLens' `blocks.L.hook_resid_post` and `blocks.L.hook_resid_pre` (the layer below), its
    bridge's `blocks.L.hook_out` and `hook_in`, and Hugging Face's `model.layers.L`, with or without `.output`.

    Raises:
        InputError: the metadata names no residual stream after a layer, or two different layers.
    """
    metadata = sae.cfg.metadata
    hooks = [h for h in (metadata.hook_name, metadata.hf_hook_name) if h]
    if not hooks:
        raise InputError(f"the SAE's metadata names no hook: {GIVE_LAYER}")
    layers = {layer for hook in hooks if (layer := hook_layer(hook)) is not None}
    if not layers:
        raise InputError(f"the SAE's hook {hooks[0]!r} is no known residual stream: {GIVE_LAYER}")
    if len(layers) > 1:
        hook_names = " and ".join(repr(h) for h in hooks)
        raise InputError(f"the SAE's metadata names two layers ({hook_names}): {GIVE_LAYER}")
    return layers.pop()


def hook_layer(hook: str) -> int | None:
    """The decoder layer whose output is at `hook`; None for an unknown spelling.

    Raises:
        InputError: the hook is known, but is not the residual stream after a layer.
    """
    for pattern, shift in RESIDUAL:
        if match := re.fullmatch(pattern, hook):
            layer = int(match[1]) + shift
            if layer < 0:
                raise InputError(f"this SAE reads the embeddings ({hook}): no decoder layer precedes it")
            return layer
    for pattern, what in ELSEWHERE:
        if re.search(pattern, hook):
            raise InputError(
                f"this SAE reads {what} ({hook}), not a residual stream: take a residual-stream SAE of the same model"
            )
    return None


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
        content = json.loads(cfg.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        return "damaged cfg.json"
    places = [place for place in (content.get("metadata"), content) if isinstance(place, dict)]
    names = [place.get(key) for place in places for key in ("hook_name", "hf_hook_name", "hook_point")]
    return next((str(name) for name in names if name), "no hook named")
