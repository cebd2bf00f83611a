"""From the hook names in an SAE's metadata to the place in the model that it reads, and the place that it writes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persona_probe.errors import InputError
from persona_probe.models.places import PARTS, RESIDUAL, Place

GIVE_LAYER = "give the layer yourself (layer=, or `layer:` in a study's YAML)"

# --- One table of hook names: TransformerLens' old ones, its bridge's, and Hugging Face's module paths

BLOCK = r"blocks\.(\d+)\."
READ = (
    # TransformerLens | its bridge: place, and the difference between its layer and the number in the name.
    (BLOCK + r"(?:hook_resid_post|hook_out)", RESIDUAL, 0),
    (BLOCK + r"(?:hook_resid_pre|hook_in)", RESIDUAL, -1),
    (BLOCK + r"(?:hook_attn_out|ln1_post\.hook_out)", "attn_out", 0),
    (BLOCK + r"attn\.hook_out", "attn_module", 0),
    (BLOCK + r"attn\.(?:hook_z|o\.hook_in)", "attn_z", 0),
    (BLOCK + r"(?:hook_mlp_out|ln2_post\.hook_out)", "mlp_out", 0),
    (BLOCK + r"mlp\.hook_out", "mlp_module", 0),
    (BLOCK + r"mlp\.hook_in", "mlp_in", 0),
    (BLOCK + r"ln1\.hook_normalized", "ln1_normalized", 0),
    (BLOCK + r"ln2\.hook_normalized", "ln2_normalized", 0),
    # Hugging Face module paths, bare or with SAELens' `.output` and `.input`.
    (r"(?:[\w.]*\.)?(?:layers|h|blocks)\.(\d+)(?:\.output)?", RESIDUAL, 0),
    (r"(?:[\w.]*\.)?(?:layers|h|blocks)\.(\d+)\.input", RESIDUAL, -1),
)
MODULE = r"(?:[\w.]*\.)?(?:layers|h|blocks)\.(\d+)\.((?:(?!hook_)\w+\.)*(?!hook_)\w+)"
"""A module inside a layer, by its Hugging Face path."""
NOT_READ = (
    (r"hook_mlp_in$", "the MLP's input (the name does not say on which side of its norm)"),
    (r"hook_resid_mid$|\.ln2\.hook_in$", "the middle of a layer"),
    (r"embed|wte$|wpe$", "the embeddings"),
    (r"\.hook_attn_in$|attn\.hook_in$|\.ln1\.", "the attention's input"),
    (r"attn", "the attention"),
    (r"\.ln2\.|\.mlp\.", "the MLP"),
)
"""Known names of places that no SAE is read at here."""
TRANSCODER = "transcoder"
NAMES = {
    "attn_out": "the attention",
    "attn_module": "the attention",
    "attn_z": "the attention heads",
    "mlp_out": "the MLP's output",
    "mlp_module": "the MLP's output",
    "mlp_in": "the MLP's input",
    "ln1_normalized": "a normalised stream, before the attention",
    "ln2_normalized": "the MLP's input (a normalised stream)",
    "self_attn.o_proj.input": "the attention heads",
    "post_feedforward_layernorm.output": "the MLP's output",
    "pre_feedforward_layernorm.output": "the MLP's input",
    "mlp.output": "the MLP",
    "mlp.input": "the MLP's input",
}
"""Places in the words of a message; others are named by their path."""


def hook_place(hook: str) -> Place | None:
    """The place that a hook name means; None for an unknown spelling.

    Raises:
        InputError: the hook is known, but no SAE is read there.
    """
    for pattern, part, shift in READ:
        if match := re.fullmatch(pattern, hook):
            layer = int(match[1]) + shift
            if layer < 0:
                raise InputError(f"this SAE reads the embeddings ({hook}): no decoder layer precedes it")
            return Place(layer, part)
    for pattern, what in NOT_READ[:4]:
        if re.search(pattern, hook):
            raise _refusal(what, hook)
    if match := re.fullmatch(MODULE, hook):
        path = match[2]
        return Place(int(match[1]), path if path.endswith((".input", ".output")) else f"{path}.output")
    for pattern, what in NOT_READ:
        if re.search(pattern, hook):
            raise _refusal(what, hook)
    return None


def hook_layer(hook: str) -> int | None:
    """The decoder layer whose output is at `hook`; None for an unknown spelling.

    Raises:
        InputError: the hook is known, but is not the residual stream after a layer.
    """
    place = hook_place(hook)
    if place is not None and not place.is_residual:
        raise _refusal(in_words(place), hook)
    return None if place is None else place.layer


def in_words(place: Place) -> str:
    """What an SAE of this place reads, for a message."""
    return NAMES.get(place.part, PARTS.get(place.part, f"the module side {place.part}"))


def _refusal(what: str, hook: str) -> InputError:
    return InputError(
        f"this SAE reads {what} ({hook}), not a residual stream: take a residual-stream SAE of the same model"
    )


# --- The places of an SAE, from its metadata


def read_place(sae: Any, layer: int | None = None) -> Place:
    """The place that the SAE reads, from `hook_name` and `hf_hook_name` in its metadata.

    Args:
        layer: the decoder layer whose output it reads, for metadata that does not settle it.

    Raises:
        InputError: the metadata names no known place, or two; an SAE of a single attention head; or a layer for an SAE
            that does not read a residual stream.
    """
    metadata = sae.cfg.metadata
    if metadata.hook_head_index is not None:
        raise InputError(
            f"this SAE reads attention head {metadata.hook_head_index} alone (hook_head_index): take an SAE of all "
            "heads, or of the residual stream"
        )
    return _settled([metadata.hook_name, metadata.hf_hook_name], layer)


def write_place(sae: Any, layer: int | None = None) -> Place:
    """The place that the SAE's decoder writes: where it reads, or a transcoder's output.

    Pushes along decoder rows, and ablations, belong there: `steer(model, write_place(sae), row)`.

    Raises:
        InputError: as `read_place`; a transcoder whose metadata names no output.
    """
    if not is_transcoder(sae):
        return read_place(sae, layer)
    metadata = sae.cfg.metadata
    hooks = [metadata.hook_name_out, metadata.hf_hook_name_out]
    if not any(hooks):
        raise InputError("this transcoder's metadata names no output (hook_name_out): its latents cannot be placed")
    return _settled(hooks, layer)


def is_transcoder(sae: Any) -> bool:
    """Whether it reads one place and writes another."""
    return str(sae.cfg.architecture()).endswith(TRANSCODER)


def sae_layer(sae: Any, layer: int | None = None) -> int:
    """The decoder layer whose output the SAE reads, from `hook_name` and `hf_hook_name` in its metadata.

    Understands TransformerLens' `blocks.L.hook_resid_post` and `blocks.L.hook_resid_pre` (the layer below), its
    bridge's `blocks.L.hook_out` and `hook_in`, and Hugging Face's `model.layers.L`, with or without `.output`.

    Args:
        layer: returned as it is, once the metadata does not contradict that the SAE reads a residual stream.

    Raises:
        InputError: the SAE does not read a residual stream, or the metadata does not settle which.
    """
    place = read_place(sae, layer)
    if not place.is_residual:
        metadata = sae.cfg.metadata
        raise _refusal(in_words(place), metadata.hook_name or metadata.hf_hook_name)
    if is_transcoder(sae):
        raise InputError("a transcoder reads one place and writes another: take an SAE of the residual stream")
    return place.layer


def _settled(names: Sequence[str | None], layer: int | None) -> Place:
    """The one place that all names mean; `layer` settles what they leave open."""
    hooks = [name for name in names if name]
    places = _known_places(hooks)
    inside = [place for place in places if not place.is_residual]
    if inside:
        return _inside_a_layer(hooks, places, inside, layer)
    if layer is not None:
        return Place(layer)
    if not hooks:
        raise InputError(f"the SAE's metadata names no hook: {GIVE_LAYER}")
    if not places:
        raise InputError(f"the SAE's hook {hooks[0]!r} is no known residual stream: {GIVE_LAYER}")
    if len(set(places)) > 1:
        raise InputError(f"the SAE's metadata names two layers ({_listed(hooks)}): {GIVE_LAYER}")
    return places[0]


def _known_places(hooks: Sequence[str]) -> list[Place]:
    """The places of all names that are known.

    Raises:
        InputError: a name of a place that is not read. `hook_mlp_in` passes where a Hugging Face path says the side of
            the norm, as in SAELens' metadata of Gemma Scope 2.
    """
    places, problems = [], []
    for hook in hooks:
        try:
            place = hook_place(hook)
        except InputError as error:
            problems.append((hook, error))
        else:
            places += [] if place is None else [place]
    for hook, error in problems:
        if not (hook.endswith("hook_mlp_in") and any("." in place.part for place in places)):
            raise error
    return places


def _inside_a_layer(hooks: Sequence[str], places: list[Place], inside: list[Place], layer: int | None) -> Place:
    if len(inside) < len(places):
        raise InputError(
            f"the SAE's metadata names two places ({_listed(hooks)}), {in_words(inside[0])} and a residual stream: "
            "correct its cfg.json"
        )
    if len({place.layer for place in inside}) > 1:
        raise InputError(f"the SAE's metadata names two layers ({_listed(hooks)}): correct its cfg.json")
    # Of two names the Hugging Face path is the exact one.
    exact = next((place for place in inside if "." in place.part), inside[0])
    if layer is not None:
        raise InputError(
            f"this SAE reads {in_words(exact)} ({hooks[0]}), not a residual stream, and a layer would mean the "
            f"residual stream after layer {layer}: leave the layer out, or take a residual-stream SAE of the same model"
        )
    return exact


def _listed(hooks: Sequence[str]) -> str:
    return " and ".join(repr(h) for h in hooks)


# --- One or several SAEs that are read together


@dataclass(frozen=True, eq=False)
class PlacedSae:
    """An SAE, the place that it reads, and the place that it writes (another one only for a transcoder)."""

    sae: Any
    reads: Place
    writes: Place
    name: str = ""

    @classmethod
    def of(cls, sae: Any, layer: int | None = None, name: str = "") -> "PlacedSae":
        """From the SAE's metadata, see `read_place`."""
        reads = read_place(sae, layer)
        return cls(sae, reads, write_place(sae, layer), name or reads.short)

    @property
    def places(self) -> tuple[Place, ...]:
        """The places to read for this SAE's latents and for its fit."""
        return (self.reads,) if self.reads == self.writes else (self.reads, self.writes)


Saes = Any
"""A `sae_lens.SAE`, a list of them, or names to SAEs."""


def placed_saes(saes: Saes, layer: int | None = None) -> list[PlacedSae]:
    """One or several SAEs with their places and distinct names; without names, `L12` or `L12.mlp_out`.

    Args:
        layer: for a single SAE, see `read_place`.

    Raises:
        InputError: no SAE, an SAE that cannot be placed, or a layer given for several SAEs.
    """
    several = isinstance(saes, (Mapping, list, tuple))
    named = list(saes.items()) if isinstance(saes, Mapping) else [("", s) for s in (saes if several else [saes])]
    if not named:
        raise InputError("no SAE given: pass an SAE, a list of SAEs or {'name': SAE}")
    if several and layer is not None and len(named) > 1:
        raise InputError("one layer= cannot hold for several SAEs: their metadata must name their hooks")
    placed: list[PlacedSae] = []
    for name, sae in named:
        one = sae if isinstance(sae, PlacedSae) else PlacedSae.of(sae, layer, str(name))
        taken = [p.name for p in placed]
        if one.name in taken:
            number = next(n for n in range(2, len(named) + 2) if f"{one.name}-{n}" not in taken)
            one = PlacedSae(one.sae, one.reads, one.writes, f"{one.name}-{number}")
        placed.append(one)
    return placed
