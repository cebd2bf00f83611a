"""A model without its weights, on torch's meta device: its shapes, counted exactly and in no time."""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from persona_probe.config import Training
from persona_probe.errors import InputError, unknown
from persona_probe.files import as_damaged, read_json
from persona_probe.models.layers import decoder_layers, hidden_size, output_head, transformer_config
from persona_probe.models.load import ALIASES, resolve_source
from persona_probe.saes.foreign import find_layout
from persona_probe.saes.hooks import hook_layer
from persona_probe.saes.load import WEIGHTS_FILE, find_folder, is_release, split_release
from persona_probe.saes.read import check_architecture

# --- Architecture numbers of models that researchers use, so that a dry run needs no download


@dataclass(frozen=True)
class KnownModel:
    """One architecture, as transformers' configuration classes take it."""

    kind: str
    """transformers' `model_type`."""
    numbers: dict[str, Any]
    """Keyword arguments of that configuration class."""
    parameters: int
    """Parameters in all, tied embeddings counted once; of a multimodal model the vision tower too."""


def _text(layers: int, d_model: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": d_model,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
GEMMA = {"head_dim": 256}
GEMMA_3_VISION = {
    **{"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27},
    **{"image_size": 896, "patch_size": 14, "vision_use_head": False},
}
QWEN_3 = {"head_dim": 128}
GPT_OSS_20B = _text(24, 2880, 2880, 64, 8, 201088) | UNTIED
GPT_OSS_20B |= {"head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128}


def _gemma_3(layers: int, d_model: int, intermediate: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    text = _text(layers, d_model, intermediate, heads, kv_heads, 262208) | {"head_dim": head_dim}
    return {"text_config": text, "vision_config": GEMMA_3_VISION, "mm_tokens_per_image": 256}


GEMMA_3_4B = _gemma_3(34, 2560, 10240, 8, 4, 256)

KNOWN = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": KnownModel("llama", _text(30, 576, 1536, 9, 3, 49152) | TIED, 134_515_008),
    "Qwen/Qwen2.5-0.5B-Instruct": KnownModel("qwen2", _text(24, 896, 4864, 14, 2, 151936) | TIED, 494_032_768),
    "Qwen/Qwen2.5-7B-Instruct": KnownModel("qwen2", _text(28, 3584, 18944, 28, 4, 152064) | UNTIED, 7_615_616_512),
    "Qwen/Qwen2.5-14B-Instruct": KnownModel("qwen2", _text(48, 5120, 13824, 40, 8, 152064) | UNTIED, 14_770_033_664),
    "meta-llama/Llama-3.2-1B-Instruct": KnownModel("llama", _text(16, 2048, 8192, 32, 8, 128256) | TIED, 1_235_814_400),
    "meta-llama/Llama-3.1-8B-Instruct": KnownModel(
        "llama", _text(32, 4096, 14336, 32, 8, 128256) | UNTIED, 8_030_261_248
    ),
    "google/gemma-2-9b-it": KnownModel("gemma2", _text(42, 3584, 14336, 16, 8, 256000) | GEMMA, 9_241_705_984),
    "google/gemma-3-270m-it": KnownModel("gemma3_text", _text(18, 640, 2048, 4, 1, 262144) | GEMMA, 268_098_176),
    "google/gemma-3-1b-it": KnownModel("gemma3_text", _text(26, 1152, 6912, 4, 1, 262144) | GEMMA, 999_885_952),
    "google/gemma-3-4b-it": KnownModel("gemma3", GEMMA_3_4B, 4_300_079_472),
    "google/gemma-3-12b-it": KnownModel("gemma3", _gemma_3(48, 3840, 15360, 16, 8, 256), 12_187_325_040),
    "google/gemma-3-27b-it": KnownModel("gemma3", _gemma_3(62, 5376, 21504, 32, 16, 128), 27_432_406_640),
    "google/gemma-2-2b-it": KnownModel("gemma2", _text(26, 2304, 9216, 8, 4, 256000) | GEMMA, 2_614_341_888),
    "google/gemma-2-27b-it": KnownModel(
        "gemma2", _text(46, 4608, 36864, 32, 16, 256000) | {"head_dim": 128}, 27_227_128_320
    ),
    "meta-llama/Llama-3.2-3B-Instruct": KnownModel("llama", _text(28, 3072, 8192, 24, 8, 128256) | TIED, 3_212_749_824),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": KnownModel(
        "llama", _text(32, 4096, 14336, 32, 8, 128256) | UNTIED, 8_030_261_248
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": KnownModel("qwen2", _text(28, 1536, 8960, 12, 2, 151936) | TIED, 1_543_714_304),
    "Qwen/Qwen2.5-3B-Instruct": KnownModel("qwen2", _text(36, 2048, 11008, 16, 2, 151936) | TIED, 3_085_938_688),
    "Qwen/Qwen2.5-32B-Instruct": KnownModel("qwen2", _text(64, 5120, 27648, 40, 8, 152064) | UNTIED, 32_763_876_352),
    "Qwen/Qwen3-0.6B": KnownModel("qwen3", _text(28, 1024, 3072, 16, 8, 151936) | QWEN_3 | TIED, 596_049_920),
    "Qwen/Qwen3-1.7B": KnownModel("qwen3", _text(28, 2048, 6144, 16, 8, 151936) | QWEN_3 | TIED, 1_720_574_976),
    "Qwen/Qwen3-4B": KnownModel("qwen3", _text(36, 2560, 9728, 32, 8, 151936) | QWEN_3 | TIED, 4_022_468_096),
    "Qwen/Qwen3-8B": KnownModel("qwen3", _text(36, 4096, 12288, 32, 8, 151936) | QWEN_3 | UNTIED, 8_190_735_360),
    "Qwen/Qwen3-14B": KnownModel("qwen3", _text(40, 5120, 17408, 40, 8, 151936) | QWEN_3 | UNTIED, 14_768_307_200),
    "Qwen/Qwen3-32B": KnownModel("qwen3", _text(64, 5120, 25600, 64, 8, 151936) | QWEN_3 | UNTIED, 32_762_123_264),
    "HuggingFaceTB/SmolLM2-360M-Instruct": KnownModel("llama", _text(32, 960, 2560, 15, 5, 49152) | TIED, 361_821_120),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": KnownModel(
        "llama", _text(24, 2048, 8192, 32, 32, 49152) | TIED, 1_711_376_384
    ),
    "allenai/OLMo-2-0425-1B-Instruct": KnownModel(
        "olmo2", _text(16, 2048, 8192, 16, 16, 100352) | UNTIED, 1_484_916_736
    ),
    "allenai/OLMo-2-1124-7B-Instruct": KnownModel(
        "olmo2", _text(32, 4096, 11008, 32, 32, 100352) | UNTIED, 7_298_617_344
    ),
    "allenai/OLMo-2-1124-13B-Instruct": KnownModel(
        "olmo2", _text(40, 5120, 13824, 40, 40, 100352) | UNTIED, 13_716_198_400
    ),
    "openai/gpt-oss-20b": KnownModel("gpt_oss", GPT_OSS_20B, 20_914_757_184),
}
"""By Hugging Face id."""


MIRROR = "unsloth/"
"""An owner of copies of models, which many published adapters name as their base."""


def known_id(name: str) -> str | None:
    """The id in the table for an alias, an id (also a copy's), or an id without its owner; None if there is none."""
    sought = (ALIASES[name].hub_id if name in ALIASES else name).lower()
    if sought.startswith(MIRROR):
        sought = sought.removeprefix(MIRROR).removeprefix("meta-")
    return next((key for key in KNOWN if sought in (key.lower(), key.lower().partition("/")[2])), None)


@dataclass(frozen=True)
class LinearMap:
    """One linear map of a model."""

    name: str
    """As `named_modules` gives it."""
    d_in: int
    d_out: int
    layer: int | None
    """Its decoder layer; None outside them (output head, vision tower)."""

    @property
    def parent(self) -> str:
        """The module that it is in, whose linear maps may share their input."""
        return self.name.rpartition(".")[0]

    @property
    def in_mlp(self) -> bool:
        """Whether it is part of a feed-forward block."""
        return (
            re.search(r"(^|[._])(mlp|feed_forward|ffn|experts?|shared_experts?|block_sparse_moe)[._]", self.name)
            is not None
        )

    @property
    def in_attention(self) -> bool:
        """Whether it is part of an attention block."""
        return any(part in ("self_attn", "attn", "attention", "self_attention") for part in self.name.split("."))

    @property
    def weights(self) -> int:
        """Entries of its matrix."""
        return self.d_in * self.d_out


@dataclass(frozen=True)
class Experts:
    """The experts of one decoder layer."""

    layer: int
    entries: int
    """Of all their matrices."""
    share: float
    """Of them that a token is sent to."""
    chosen: int
    """Number of experts that a token is sent to."""
    inner: int
    """Width inside one expert."""
    is_stacked: bool
    """Whether they are one tensor, which is no linear map: it gets no adapter and is not quantised."""


BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 4.127 / 8}
"""Of one weight; nf4 has a doubly quantised scale for every 64 weights."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")
"""Names in configurations for the number of experts, and for those that a token is sent to."""


@dataclass(frozen=True)
class Skeleton:
    """A model's architecture and where its numbers come from."""

    model: PreTrainedModel
    """On the meta device: shapes without storage."""
    source: str
    """`known models` or `config.json`."""
    precision: str = "bfloat16"
    """Of the weights' file, where the configuration does not say it."""

    @cached_property
    def parameters(self) -> int:
        """Parameters in all, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def stored(self) -> str:
        """Precision of the weights' file, as far as it is known: GGUF files are converted to float32."""
        said = str(getattr(self.model.config, "dtype", None)).removeprefix("torch.")
        return said if self.source == "config.json" and said in BYTES else self.precision

    @cached_property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return hidden_size(self.model)

    @cached_property
    def layers(self) -> int:
        """Decoder layers."""
        return len(decoder_layers(self.model))

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the unembedding."""
        head = output_head(self.model)
        assert isinstance(head.weight, torch.Tensor)
        return head.weight.shape[0]

    @cached_property
    def linears(self) -> list[LinearMap]:
        """Every linear map but the output head."""
        prefix = _name_of(self.model, decoder_layers(self.model)) + "."
        maps = []
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and module is not output_head(self.model):
                layer = int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None
                d_in, d_out = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
                maps.append(LinearMap(name, d_in, d_out, layer))
        return maps

    @cached_property
    def head(self) -> LinearMap:
        """The unembedding; a tied one has no weights of its own."""
        return LinearMap("head", self.d_model, self.vocabulary, None)

    @cached_property
    def experts(self) -> list[Experts]:
        """The experts of every layer that routes tokens to some of them; empty for dense models."""
        numbers, found = transformer_config(self.model), []
        count = next((n for key in _EXPERTS if isinstance(n := getattr(numbers, key, None), int) and n > 1), 0)
        chosen = next((n for key in _CHOSEN if isinstance(n := getattr(numbers, key, None), int)), 1) or 1
        for index, layer in enumerate(decoder_layers(self.model)):
            stacked = [p for p in layer.parameters() if p.dim() == 3 and p.shape[0] == count]
            separate = [
                p
                for name, module in layer.named_modules()
                if isinstance(module, nn.ModuleList) and len(module) == count and "experts" in name
                for p in module.parameters()
                if p.dim() == 2
            ]
            if count and (stacked or separate):
                parts = [*stacked, *separate]
                widths = [n for p in parts for n in p.shape if n not in (count, self.d_model)]
                used, entries = min(chosen, count), sum(p.numel() for p in parts)
                inner = min(widths, default=self.d_model)
                found.append(Experts(index, entries, used / count, used, inner, bool(stacked)))
        return found

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token passes: all, but of the experts only those that it is sent to."""
        return round(self.parameters - sum(e.entries * (1 - e.share) for e in self.experts))

    def weight_bytes(self, dtype: str, quantization: str) -> float:
        """Bytes of all weights; only linear maps are quantised: no embeddings, norms, head or stacked experts."""
        size = BYTES[dtype]
        small = size if quantization == "none" else BYTES[quantization]
        in_maps = sum(m.weights for m in self.linears)
        return small * in_maps + size * (self.parameters - in_maps)

    def weights(self, first: int, last: int) -> int:
        """Matrix entries that a token passes in the decoder layers `first` to `last`, both included."""
        maps = sum(m.weights for m in self.linears if m.layer is not None and first <= m.layer <= last)
        inside = [e for e in self.experts if first <= e.layer <= last]
        # Separate experts are linear maps and counted above, stacked ones are not.
        return round(maps + sum(e.entries * (e.share if e.is_stacked else e.share - 1) for e in inside))

    def describe(self) -> str:
        """One line: class, layers, widths, heads, parameters."""
        numbers = transformer_config(self.model)
        heads, width = getattr(numbers, "num_attention_heads", None), getattr(numbers, "intermediate_size", None)
        inner = f", intermediate {width}" if isinstance(width, int) else ""
        inner += f", {heads} heads" if isinstance(heads, int) else ""
        active = f", {self.active_parameters / 1e9:.2f} B of them for each token" if self.experts else ""
        return (
            f"{type(self.model).__name__}, {self.layers} layers, d_model {self.d_model}{inner}, "
            f"vocabulary {self.vocabulary}, {self.parameters / 1e9:.2f} B parameters{active} (from {self.source})"
        )


def find_skeleton(name: str, revision: str | None = None) -> Skeleton | None:
    """The architecture of what `load_model` takes, without a download; None if its sizes are not known here.

    It looks in the table of known models, in a folder's config.json, and in the hub's cache on this machine.

    Raises:
        InputError: the name is no model, or a folder's config.json describes no causal language model.
    """
    source = resolve_source(name, revision)
    if source.kind == "folder":
        try:
            return _build(AutoConfig.from_pretrained(source.location, trust_remote_code=False), "config.json")
        except Exception as error:  # transformers raises many kinds on values of the wrong type
            raise InputError(f"{name}/config.json describes no causal language model: {_first_line(error)}") from error
    if key := known_id(name):
        built = _build(AutoConfig.for_model(KNOWN[key].kind, **KNOWN[key].numbers), "known models")
        return replace(built, precision="float32") if source.kind == "gguf" else built
    if source.kind == "gguf" and name not in ALIASES:
        return None
    try:
        return _build(
            AutoConfig.from_pretrained(
                source.location, revision=revision, local_files_only=True, trust_remote_code=False
            ),
            "config.json",
        )
    except (OSError, ValueError):  # not in the cache: an unknown model is no error
        return None


def _build(config: object, source: str) -> Skeleton:
    with torch.device("meta"):
        return Skeleton(AutoModelForCausalLM.from_config(config, trust_remote_code=False), source)


def _name_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# --- What is known of an SAE before it is downloaded: SAELens' registry for releases, cfg.json for folders

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
"""Dictionary sizes of releases whose ids do not name them."""
OTHER_SITES = r"(?:^|[-_./])(attn?|attention|hook_z|mlp|transcoders?|clt|embedding|l\d+[am])(?:$|[-_./])"
"""Words in ids and paths of SAEs that read another place; `l5a` and `l5m` are Llama Scope's."""


@dataclass(frozen=True)
class SaeShape:
    """An SAE's shape and place; None if it is not known on this machine."""

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
    if (layout := find_layout(folder)) is not None:
        return SaeShape(name, None, None, None, None, f"{layout}'s files, not read")
    for file in ("cfg.json", WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise InputError(f"{folder} is no SAE folder: {file} is missing (save it with save_inference_model)")
    path = folder / "cfg.json"
    raw = read_json(path, dict, "save the SAE again")
    with as_damaged(path, "save the SAE again"):
        d_in, d_sae = int(raw["d_in"]), int(raw["d_sae"])
        # SAEs saved before SAELens 6 have their metadata at the top level.
        metadata: dict[str, Any] = {**raw, **(raw.get("metadata") or {})}
    check_architecture(str(raw.get("architecture", "standard")))
    hooks = [str(hook) for key in ("hook_name", "hf_hook_name") if (hook := metadata.get(key))]
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
    scope = re.search(r"^qwen-scope-.*-w(\d+)k-", release)  # its names count in units of 1,024
    return SaeShape(
        name=name,
        layer=_layer_in(place),
        d_in=None if key is None else _width_of(key),
        d_sae=RELEASE_WIDTHS.get(release)
        or (WIDTHS.get(width[1]) if width else int(scope[1]) * 1024 if scope else None),
        model=entry.model,
        source="SAELens' registry",
    )


def _layer_in(place: str) -> int | None:
    """The decoder layer that a release's id and path name; None where they name none.

    Raises:
        InputError: the SAE reads the embeddings.
    """
    if match := re.search(r"blocks\.\d+\.hook_resid_(pre|post)", place):
        return hook_layer(match[0])
    match = re.search(r"layer_?(\d+)|layers\.(\d+)|/l(\d+)r_", place)
    return int(match[match.lastindex or 0]) if match else None


def _width_of(key: str) -> int:
    """Residual width of a known model."""
    numbers = KNOWN[key].numbers
    return numbers.get("text_config", numbers)["hidden_size"]


# --- Where LoRA adapters go, and how many parameters they have


def adapted(skeleton: Skeleton, training: Training) -> list[LinearMap]:
    """The linear maps that get a LoRA adapter, as PEFT chooses them.

    Raises:
        InputError: a layer or a module name that the model does not have.
    """
    if training.layers is not None and any(not 0 <= layer < skeleton.layers for layer in training.layers):
        raise InputError(f"training.layers {list(training.layers)}: the model has layers 0 to {skeleton.layers - 1}")
    linears = _named(skeleton, training.target_modules)
    if training.layers is None:
        return linears
    # PEFT reads a module's layer as the first number in its name after a list, wherever that list is.
    numbers = [(m, re.match(r".*?\.[^.]*\.(\d+)\.", m.name)) for m in linears]
    inside = {m.name.rpartition(".")[2] for m in skeleton.linears if m.layer is not None}
    return [m for m, n in numbers if n and int(n[1]) in training.layers and m.name.rpartition(".")[2] in inside]


def lora_parameters(skeleton: Skeleton, training: Training) -> int:
    """Trainable parameters of the adapters: rank x (d_in + d_out) for each adapted map."""
    return sum(training.rank * (m.d_in + m.d_out) for m in adapted(skeleton, training))


def _named(skeleton: Skeleton, targets: str | tuple[str, ...]) -> list[LinearMap]:
    """A string is `all-linear` or a regular expression of whole names; a list holds ends of names."""
    if targets == "all-linear":
        return skeleton.linears
    if isinstance(targets, str):
        matches = [m for m in skeleton.linears if re.fullmatch(targets, m.name)]
        if not matches:
            raise unknown("training.target_modules", targets, ["all-linear", *_ends(skeleton)])
        return matches
    for target in targets:
        if not any(m.name == target or m.name.endswith(f".{target}") for m in skeleton.linears):
            raise unknown("module in training.target_modules", target, _ends(skeleton))
    return [m for m in skeleton.linears if any(m.name == t or m.name.endswith(f".{t}") for t in targets)]


def _ends(skeleton: Skeleton) -> list[str]:
    return sorted({m.name.rpartition(".")[2] for m in skeleton.linears})
