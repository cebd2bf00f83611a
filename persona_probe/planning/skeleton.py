"""A model without its weights, on torch's meta device: its shapes, counted exactly and in no time."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from persona_probe.errors import InputError
from persona_probe.models.layers import decoder_layers, hidden_size, output_head, transformer_config
from persona_probe.models.sources import ALIASES, resolve_source
from persona_probe.planning.known_models import KNOWN, known_id


@dataclass(frozen=True)
class Linear:
    """One linear map of a model."""

    name: str
    """As `named_modules` gives it."""
    d_in: int
    d_out: int
    layer: int | None
    """Its decoder layer; None outside them (output head, vision tower)."""

    @property
    def weights(self) -> int:
        """Entries of its matrix."""
        return self.d_in * self.d_out


@dataclass(frozen=True)
class Skeleton:
    """A model's architecture and where its numbers come from."""

    model: PreTrainedModel
    """On the meta device: shapes without storage."""
    source: str
    """`known models` or `config.json`."""

    @cached_property
    def parameters(self) -> int:
        """Parameters in all, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

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
    def linears(self) -> list[Linear]:
        """Every linear map but the output head."""
        prefix = _name_of(self.model, decoder_layers(self.model)) + "."
        found = []
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and module is not output_head(self.model):
                layer = int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None
                d_in, d_out = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
                found.append(Linear(name, d_in, d_out, layer))
        return found

    def weights(self, first: int, last: int) -> int:
        """Matrix entries of the decoder layers `first` to `last`, both included."""
        return sum(m.weights for m in self.linears if m.layer is not None and first <= m.layer <= last)

    def describe(self) -> str:
        """One line: class, layers, widths, heads, parameters."""
        numbers = transformer_config(self.model)
        heads, width = numbers.num_attention_heads, getattr(numbers, "intermediate_size", None)
        inner = f", intermediate {width}" if isinstance(width, int) else ""
        return (
            f"{type(self.model).__name__}, {self.layers} layers, d_model {self.d_model}{inner}, {heads} heads, "
            f"vocabulary {self.vocabulary}, {self.parameters / 1e9:.2f} B parameters (from {self.source})"
        )


def find_skeleton(name: str, revision: str | None = None) -> Skeleton | None:
    """The architecture of what `load_model` takes, without a download; None where its numbers are nowhere here.

    Looked for in the table of known models, in a folder's config.json, and in the hub's cache on this machine.

    Raises:
        InputError: the name is no model, or a folder's config.json describes no causal language model.
    """
    source = resolve_source(name, revision)
    if source.kind == "folder":
        try:
            return _build(AutoConfig.from_pretrained(source.location, trust_remote_code=False), "config.json")
        except (OSError, ValueError) as error:
            raise InputError(f"{name}/config.json describes no causal language model: {_first_line(error)}") from error
    if key := known_id(name):
        return _build(AutoConfig.for_model(KNOWN[key].kind, **KNOWN[key].numbers), "known models")
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


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
