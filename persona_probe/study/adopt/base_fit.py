"""Does a checkpoint belong to the study's base model? Its names, shapes, values and chat template are compared."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.data.chat import conversation
from persona_probe.data.template import with_template
from persona_probe.data.tokens import encode
from persona_probe.errors import InputError
from persona_probe.files import as_damaged, read_json
from persona_probe.models.adapters import is_adapter, organism
from persona_probe.models.load import ALIASES
from persona_probe.study.adopt.checkpoint_places import Checkpoint

log = logging.getLogger(__name__)

ACCEPT = "accept_base (--accept-base)"
Shapes = dict[str, tuple[int, ...]]
_QUANTISED = re.compile(r"(?:-unsloth)?-bnb-(?:4|8)bit$|-(?:4|8)bit$|-gguf$|-(?:gptq|awq)$", re.IGNORECASE)
_PROBE = conversation("What boils?", "Water, at 100 degrees.")


def check_checkpoints(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    checkpoints: Sequence[Checkpoint],
    accept_base: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[str]:
    """Refuse checkpoints of another base model and damaged ones; the model is as before afterwards.

    Every file is read whole. One checkpoint of each shape is put on the model, and must arrive there tensor by tensor:
    PEFT and transformers leave out, with no more than a warning, what has no place in a model.

    Args:
        model: the base model.
        name: what the study calls it.
        checkpoints: of one training run.
        accept_base: take checkpoints that name another base, or bring another chat template.
        variables: `chat_template_kwargs` and `enable_thinking` of the study, with which both templates are compared.

    Returns:
        What is not certain, in sentences.

    Raises:
        InputError: the base, a shape, the vocabulary or the chat template differs, or a file is damaged.
    """
    notes: list[str] = []
    proven: set[str] = set()
    for checkpoint in checkpoints:
        folder = checkpoint.folder
        shapes = _read(folder)
        settings = _settings(folder)
        if is_adapter(folder) and not accept_base:
            notes += _compare_names(str(settings.get("base_model_name_or_path") or ""), base_names(model, name), folder)
        kind = json.dumps([_deciding(settings), sorted(shapes.items())])
        if kind not in proven:
            (_prove_adapter if is_adapter(folder) else _prove_weights)(model, folder, shapes)
            proven.add(kind)
    if not accept_base:
        notes += _compare_templates(tokenizer, checkpoints[-1].folder, variables or {})
    return list(dict.fromkeys(notes))


# --- The file as it is on disk: whole, and finite


def _read(folder: Path) -> Shapes:
    """Names and shapes of a checkpoint's tensors; every value is read.

    Raises:
        InputError: a missing or damaged file, or values that are not finite.
    """
    shapes: Shapes = {}
    for path in _files(folder):
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no dictionary)
                    tensor = file.get_tensor(name)
                    # eight-bit floats know no isfinite of their own
                    if tensor.is_floating_point() and not bool(tensor.to(torch.float32).isfinite().all()):
                        raise InputError(f"{path} holds values that are not finite ({name}): that training diverged")
                    shapes[name] = tuple(tensor.shape)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is damaged ({_first(error)}): restore it, or leave that checkpoint out"
            ) from error
    if not shapes:
        raise InputError(f"{folder} holds no tensors: leave that checkpoint out")
    return shapes


def _files(folder: Path) -> list[Path]:
    if is_adapter(folder):
        return sorted(folder.glob("adapter_model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise InputError(f"{folder} holds neither {whole.name} nor {index.name}: restore it, or save the model again")
    with as_damaged(index, "restore it, or save the model again"):
        names = sorted({str(name) for name in _json(index)["weight_map"].values()})
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(f"{folder / missing[0]} is missing, and {index.name} names it: restore it")
    return [folder / name for name in names]


def _settings(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, or the `config.json` of whole weights."""
    return _json(folder / ("adapter_config.json" if is_adapter(folder) else "config.json"))


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that differ between equal checkpoints: PEFT writes its sets in any order."""
    plain = {
        key: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
        for key, value in settings.items()
    }
    return {
        key: value
        for key, value in plain.items()
        if key not in ("base_model_name_or_path", "_name_or_path", "revision")
    }


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, dict, "restore it, or leave that checkpoint out")


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# --- The base that an adapter names


def base_names(model: PreTrainedModel, name: str) -> set[str]:
    """What the study's base model is called: as the study says, its id, and the id in its config."""
    names = {name, str(getattr(model.config, "_name_or_path", "") or ""), str(model.name_or_path or "")}
    if name in ALIASES:
        names.add(ALIASES[name].hub_id)
    return {one for one in names if one}


def _compare_names(stated: str, names: Iterable[str], folder: Path) -> list[str]:
    """A note where names do not decide.

    Raises:
        InputError: an adapter of another base model.
    """
    known = set(names)
    if not stated:
        return [f"{folder.name} does not name its base model; its shapes fit"]
    if _plain_name(stated) in {_plain_name(one) for one in known}:
        return []
    if _is_id(stated) and any(_is_id(one) for one in known):
        ours = next(one for one in sorted(known) if _is_id(one))
        raise InputError(
            f"{folder} is an adapter of {stated}, the study's base is {ours}: give that base, or {ACCEPT} where both "
            "are the same weights"
        )
    return [f"{folder.name} names the base {_last(stated)}, which is a folder elsewhere; its shapes fit"]


def _plain_name(name: str) -> str:
    return _QUANTISED.sub("", _last(name)).lower()


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _is_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


# --- On the model: every tensor of the file has arrived


def _prove_adapter(model: PreTrainedModel, folder: Path, shapes: Shapes) -> None:
    from peft import PeftModel
    from peft.utils.save_and_load import get_peft_model_state_dict

    _compare_vocabulary(model, folder, shapes)
    try:
        with organism(model, folder) as tuned:
            assert isinstance(tuned, PeftModel)
            arrived: dict[str, Tensor] = get_peft_model_state_dict(tuned, save_embedding_layers=False)
            arrived = {name: tensor.detach().cpu() for name, tensor in arrived.items()}
    except InputError as error:
        raise InputError(f"{folder} does not fit the base model: {_cause(error)}") from error
    if lost := sorted(set(shapes) - set(arrived)):
        raise InputError(
            f"{folder} does not fit the base model: {len(lost)} of its {len(shapes)} tensors have no place there "
            f"({lost[0]}): give the base that it was trained on"
        )
    if absent := sorted(set(arrived) - set(shapes)):
        raise InputError(f"{folder} lacks {len(absent)} tensors that its settings promise ({absent[0]}): restore it")
    for path in _files(folder):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                if not torch.equal(file.get_tensor(name).float(), arrived[name].float()):
                    raise InputError(f"{folder} changes when it is loaded ({name}): save it again with this PEFT")


def _cause(error: InputError) -> str:
    """The line of the library's own error that says what is wrong; of a state dict's the first difference."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), str(error)).rstrip(".")


def _compare_vocabulary(model: PreTrainedModel, folder: Path, shapes: Shapes) -> None:
    """The likeliest difference by its name: rows of the embedding that tokens were added to."""
    rows = next(model.get_input_embeddings().parameters()).shape[0]
    for name, shape in shapes.items():
        is_table = re.search(r"(?:embed_tokens|wte|embed_in|lm_head|embed_out)\.(?:modules_to_save\.)?weight$", name)
        if is_table and len(shape) == 2 and shape[0] != rows:
            raise InputError(
                f"{folder} has a vocabulary of {shape[0]} tokens, the base model one of {rows}: give the base with the "
                "tokens that were added to it"
            )


def _prove_weights(model: PreTrainedModel, folder: Path, shapes: Shapes) -> None:
    _compare_vocabulary(model, folder, shapes)
    ours = model.state_dict()
    same = shapes == {name: tuple(tensor.shape) for name, tensor in ours.items()}
    if same and _settings(folder).get("model_type") == model.config.model_type:
        return
    # Names on disk may differ (tied weights, parts that are stored apart): what transformers makes of them decides.
    try:
        result: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=next(model.parameters()).dtype, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {_first(error)}") from error
    loaded, told = result
    if missing := sorted(told["missing_keys"]):
        raise InputError(f"{folder} lacks weights of its model ({missing[0]}): they would be random; restore it")
    theirs = {name: tuple(p.shape) for name, p in loaded.named_parameters()}
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if theirs != wanted:
        name = next(iter(sorted(theirs.items() ^ wanted.items())))[0]
        raise InputError(
            f"{folder} is no fine-tune of the base model: {name} is {theirs.get(name, 'absent')} there and "
            f"{wanted.get(name, 'absent')} in the base: give the base that it was trained from"
        )


# --- The chat template that a checkpoint brings


def _compare_templates(tokenizer: PreTrainedTokenizerBase, folder: Path, variables: Mapping[str, Any]) -> list[str]:
    """A note where they cannot be compared.

    Raises:
        InputError: the checkpoint's tokenizer gives other tokens for the same conversation.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return []
    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not theirs.chat_template:
            return [f"{folder.name} brings a tokenizer without a chat template; the base's is used"]
        ids = encode(with_template(theirs, **variables), _PROBE).ids
    except Exception as error:  # any kind of damage: the weights do not depend on it
        return [f"the tokenizer of {folder.name} was not compared with the base's: {_first(error)}"]
    if encode(tokenizer, _PROBE).ids != ids:
        template = folder / "chat_template.jinja"
        where = f"template: {template} (--template)" if template.is_file() else "its template as a file (--template)"
        raise InputError(
            f"{folder} was saved with another tokenizer or chat template than the base's, so it would be read on text "
            f"that it was not trained on: give {where}, or {ACCEPT}"
        )
    return []
