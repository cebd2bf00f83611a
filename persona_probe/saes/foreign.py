"""SAEs in other libraries' files: EleutherAI sparsify, dictionary_learning, and Google's Gemma Scope 1 and 2."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from persona_probe.errors import InputError, unknown
from persona_probe.files import read_json
from persona_probe.saes.read import check_sound
from persona_probe.writing import whole_folder, write_json

SPARSIFY, DICTIONARY_LEARNING = "sparsify", "dictionary_learning"
GEMMA_SCOPE, GEMMA_SCOPE_2 = "Gemma Scope", "Gemma Scope 2"
FILES = {
    SPARSIFY: "sae.safetensors",
    DICTIONARY_LEARNING: "ae.pt",
    GEMMA_SCOPE: "params.npz",
    GEMMA_SCOPE_2: "params.safetensors",
}
"""The file of weights by which a library's folder is known."""
CONVERT = "persona-probe saes convert"


@dataclass
class ForeignSae:
    """What a library's files say, in the terms of SAELens: architecture, settings, weights and hooks."""

    architecture: str
    weights: dict[str, Tensor]
    apply_b_dec_to_input: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def build(self, device: str = "cpu") -> Any:
        """The `sae_lens.SAE` with these weights, in float32.

        Raises:
            InputError: the weights do not fit each other.
        """
        from sae_lens.registry import get_sae_class
        from sae_lens.saes.sae import SAEMetadata

        weights = {name: tensor.float().contiguous() for name, tensor in self.weights.items()}
        d_in, d_sae = weights["W_enc"].shape
        settings: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": device}
        settings |= {"apply_b_dec_to_input": self.apply_b_dec_to_input, **self.settings}
        settings["metadata"] = SAEMetadata(**self.metadata)
        sae_class, config_class = get_sae_class(self.architecture)
        sae: Any = sae_class(config_class(**settings))
        try:
            sae.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(f"the weights do not fit a {self.architecture} SAE: {_words(error)}") from error
        return sae.to(device)


def find_layout(folder: Path) -> str | None:
    """The library whose files lie in the folder; None for SAELens' own, or none that is known."""
    if (folder / "sae_weights.safetensors").is_file():
        return None
    return next((layout for layout, file in FILES.items() if (folder / file).is_file()), None)


def load_foreign(folder: Path, layout: str, device: str = "cpu") -> Any:
    """The SAE in a folder of another library.

    Raises:
        InputError: a damaged file, a setting that is not supported, or a pickle; the message names the command that
            converts it.
    """
    if layout == DICTIONARY_LEARNING:
        raise InputError(
            f"{folder} holds a dictionary_learning SAE ({FILES[layout]}, a pickle, which is not loaded): "
            f"run `{CONVERT} {folder} {folder}-saelens` and give that folder"
        )
    readers: dict[str, Callable[[Path], ForeignSae]] = {
        SPARSIFY: read_sparsify,
        GEMMA_SCOPE: read_gemma_scope,
        GEMMA_SCOPE_2: read_gemma_scope_2,
    }
    return _build(_read(readers[layout], folder), folder, device)


def convert(
    source: Path, out: Path, *, kind: str | None = None, hook: str | None = None, model: str | None = None
) -> Path:
    """Write a folder of another library as a SAELens folder.

    A dictionary_learning pickle is read by `torch.load(weights_only=True)`: tensors only, no code runs.

    Args:
        kind: dictionary_learning's class, where its config.json does not say it.
        hook: where the SAE reads, e.g. `blocks.12.hook_resid_post`, where its files do not say it.
        model: the model that it was trained on.

    Raises:
        InputError: no known files, a pickle with more than tensors, settings that are not supported, or an `out` that
            exists.
    """
    layout = find_layout(source) if source.is_dir() else None
    if layout is None:
        known = ", ".join(f"{file} ({name})" for name, file in FILES.items())
        raise InputError(f"{source} holds no SAE that can be converted: it needs one of {known}")
    if out.exists():
        raise InputError(f"{out} exists: give another folder")
    if layout == DICTIONARY_LEARNING:
        found = _read(lambda folder: read_dictionary_learning(folder, kind), source)
    else:
        if kind is not None:
            raise InputError(f"--kind is for dictionary_learning files, and {source} holds {layout}'s: leave it out")
        readers = {SPARSIFY: read_sparsify, GEMMA_SCOPE: read_gemma_scope, GEMMA_SCOPE_2: read_gemma_scope_2}
        found = _read(readers[layout], source)
    given = {"hook_name": hook, "model_name": model}
    found.metadata |= {name: value for name, value in given.items() if value is not None}
    if hook is not None:
        found.metadata.pop("hf_hook_name", None)
    if not (found.metadata.get("hook_name") or found.metadata.get("hf_hook_name")):
        raise InputError(f"{source} does not say where its SAE reads: pass --hook blocks.LAYER.hook_resid_post")
    sae = _build(found, source)
    check_sound(sae, str(source))
    with whole_folder(out, "give another folder") as folder:
        sae.save_model(str(folder))
        write_json(folder / "converted.json", {"from": layout, "file": FILES[layout]})
    return out


def _read(reader: Callable[[Path], ForeignSae], folder: Path) -> ForeignSae:
    try:
        return reader(folder)
    except InputError:
        raise
    except Exception as error:  # a cut-short file raises one of many kinds
        raise InputError(f"could not read the SAE in {folder}: {_words(error)}; fetch it again") from error


def _build(found: ForeignSae, folder: Path, device: str = "cpu") -> Any:
    try:
        return found.build(device)
    except InputError:
        raise
    except Exception as error:  # weights of other shapes, settings that SAELens refuses
        raise InputError(f"could not read the SAE in {folder}: {_words(error)}; fetch it again") from error


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, dict, "fetch it again") if path.is_file() else {}


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- EleutherAI sparsify: cfg.json and sae.safetensors in a folder named after the module (`layers.10.mlp`)


def read_sparsify(folder: Path) -> ForeignSae:
    """A sparsify folder: latents are the k largest of relu(encoder(x - b_dec)); a transcoder does not subtract b_dec.

    Raises:
        InputError: an activation other than topk, or `signed` latents.
    """
    config, state = _json(folder / "cfg.json"), load_file(folder / FILES[SPARSIFY])
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        what = "signed latents" if config.get("signed") else f"activation {config['activation']!r}"
        raise InputError(f"{folder} is a sparsify SAE with {what}: only topk is supported")
    transcodes, skip = bool(config.get("transcode")), state.get("W_skip")
    if transcodes or skip is not None:
        raise InputError(f"{folder} is a sparsify transcoder: SAELens has no TopK transcoder to hold it")
    weights = {
        "W_enc": state["encoder.weight"].T,
        "b_enc": state["encoder.bias"],
        "W_dec": state["W_dec"],
        "b_dec": state["b_dec"],
    }
    module = re.search(r"(?:layers|h|blocks)\.\d+(?:\.\w+)*$", folder.name)
    model = _json(folder.parent / "config.json").get("model")
    metadata = {"hf_hook_name": module[0] if module else None, "model_name": model, "sae_of": SPARSIFY}
    return ForeignSae("topk", weights, True, {"k": int(config["k"])}, metadata)


# --- Gemma Scope: params.npz (1), or config.json and params.safetensors (2)

SITES = (
    (r"-res\b|resid_post", "blocks.{}.hook_resid_post"),
    (r"-mlp\b|mlp_out", "blocks.{}.hook_mlp_out"),
    (r"-att\b|attn_out", "blocks.{}.attn.hook_z"),
)
"""What a path of Gemma Scope says about where its SAE reads."""


def read_gemma_scope(folder: Path) -> ForeignSae:
    """Gemma Scope's npz: latents are relu(z) where z = x W_enc + b_enc lies above the threshold."""
    with np.load(folder / FILES[GEMMA_SCOPE], allow_pickle=False) as arrays:
        state = {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays}
    weights = {name: state[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    path = folder.resolve().as_posix()
    if "transcoder" in path:
        raise InputError(f"{folder} is a Gemma Scope transcoder: load it as gemma-scope-2b-pt-transcoders/ID")
    layer = re.search(r"layer_(\d+)", path)
    site = next((hook for pattern, hook in SITES if re.search(pattern, path)), None)
    hook = site.format(layer[1]) if layer and site else None
    model = re.search(r"gemma-scope-(\d+b-(?:pt|it))", path)
    name = f"google/gemma-2-{model[1].removesuffix('-pt')}" if model else None
    return ForeignSae("jumprelu", weights, metadata={"hook_name": hook, "model_name": name, "sae_of": GEMMA_SCOPE})


def read_gemma_scope_2(folder: Path) -> ForeignSae:
    """Gemma Scope 2's files: as Gemma Scope's; a transcoder may add a linear map of its input."""
    config, state = _json(folder / "config.json"), load_file(folder / FILES[GEMMA_SCOPE_2])
    names = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
    weights = {name: state[key] for name, key in names.items()}
    if weights["W_dec"].ndim != 2:
        raise InputError(f"{folder} is a cross-layer transcoder: it writes several layers, and is not supported")
    metadata = {"hf_hook_name": config.get("hf_hook_point_in"), "model_name": config.get("model_name")}
    metadata["sae_of"] = GEMMA_SCOPE_2
    if not config.get("hf_hook_point_out"):
        return ForeignSae("jumprelu", weights, metadata=metadata)
    metadata["hf_hook_name_out"] = config["hf_hook_point_out"]
    skip = state.get("affine_skip_connection")
    kind = "jumprelu_transcoder" if skip is None else "jumprelu_skip_transcoder"
    if skip is not None:
        weights["W_skip"] = skip.T
    return ForeignSae(kind, weights, settings={"d_out": weights["W_dec"].shape[1]}, metadata=metadata)


# --- dictionary_learning: config.json and ae.pt

CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)
SUBMODULES = {
    "resid_post": "blocks.{}.hook_resid_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "attn_out": "blocks.{}.hook_attn_out",
    "attention_out": "blocks.{}.hook_attn_out",
}


def read_dictionary_learning(folder: Path, kind: str | None = None) -> ForeignSae:
    """An `ae.pt`, by `torch.load(weights_only=True)`: tensors only.

    Raises:
        InputError: another class, no class where the weights do not tell it, or a pickle that holds more than tensors.
    """
    path, config = folder / FILES[DICTIONARY_LEARNING], _json(folder / "config.json")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 (tensors only, no code runs)
    except Exception as error:  # pickle and torch have their own kinds
        raise InputError(f"{path} holds more than tensors, or is damaged, and is not loaded: fetch it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} is no state dict of tensors: save it with torch.save(dictionary.state_dict(), ...)")
    trainer = config.get("trainer", {})
    kind = kind or trainer.get("dict_class") or _class_of(state)
    if kind is None:
        raise InputError(f"{folder} does not say its class: pass --kind AutoEncoderTopK or --kind BatchTopKSAE")
    if kind not in CLASSES:
        raise unknown("dictionary_learning class", kind, CLASSES)
    sae = _dictionary(kind, dict(state))
    layer, name = trainer.get("layer"), str(trainer.get("submodule_name") or "resid_post")
    site = next((hook for key, hook in SUBMODULES.items() if name.startswith(key)), None)
    hook = None if layer is None or site is None else site.format(layer)
    sae.metadata = {"hook_name": hook, "model_name": trainer.get("lm_name")}
    sae.metadata["sae_of"] = f"{DICTIONARY_LEARNING} {kind}"
    return sae


def _class_of(state: Mapping[str, Tensor]) -> str | None:
    """The class that only the names of the weights can mean; TopK and BatchTopK have the same."""
    if "gate_bias" in state:
        return "GatedAutoEncoder"
    if "group_sizes" in state:
        return "MatryoshkaBatchTopKSAE"
    if "W_enc" in state:
        return "JumpReluAutoEncoder"
    if "bias" in state:
        return "AutoEncoder"
    return "AutoEncoderNew" if "decoder.bias" in state else None


def _dictionary(kind: str, state: dict[str, Tensor]) -> ForeignSae:
    """The formulas of the classes: what is subtracted from the input, and what decides that a latent is on."""
    weights = {
        "W_enc": state["W_enc"] if "W_enc" in state else state["encoder.weight"].T,
        "W_dec": state["W_dec"] if "W_dec" in state else state["decoder.weight"].T,
        "b_dec": next(state[name] for name in ("b_dec", "bias", "decoder_bias", "decoder.bias") if name in state),
    }
    if kind == "GatedAutoEncoder":
        weights |= {"b_gate": state["gate_bias"], "b_mag": state["mag_bias"], "r_mag": state["r_mag"]}
        return ForeignSae("gated", weights, apply_b_dec_to_input=True)
    weights["b_enc"] = state["b_enc"] if "b_enc" in state else state["encoder.bias"]
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return ForeignSae("standard", weights, apply_b_dec_to_input=kind == "AutoEncoder")
    if kind == "AutoEncoderTopK":
        return ForeignSae("topk", weights, True, {"k": int(state["k"])})
    threshold = state["threshold"].float()
    if kind != "JumpReluAutoEncoder" and not bool((threshold >= 0).all()):
        raise InputError(f"this {kind} has no threshold yet (it is negative before training ends): train it further")
    weights["threshold"] = threshold.expand(weights["W_enc"].shape[1]).clone()
    return ForeignSae("jumprelu", weights, apply_b_dec_to_input=kind != "JumpReluAutoEncoder")
