"""An activation cache on disk: a layer's residual stream is computed once for the same weights and tokens."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.models.layers import base_transformer, transformer_config
from persona_probe.provenance import versions
from persona_probe.saes.activation_entry import (
    FORMAT,
    DamagedEntry,
    Selected,
    check_shards,
    read_entry,
    read_manifest,
    write_entry,
)
from persona_probe.saes.activation_folder import entries, make_room, new_entry, open_folder, remove, size, touch
from persona_probe.saes.activation_key import entry_key, weights_key, why_not

log = logging.getLogger(__name__)


class ActivationCache:
    """Residual streams on disk, found again by their content; give it to the functions of `saes.read` as `cache`.

    An entry holds one batch's selected tokens. Its key is the sha256 of the weights that run (adapters included, see
    `activation_key.weights_key`), layer, positions, token ids, attention, precision and kind of device: change any and
    the stream is computed anew. A model whose hooks or replaced forwards may change the stream is read without the
    cache, with a warning.

    Shards' lengths are checked at every reading; their sha256 the first time that this object reads an entry, since it
    takes about a second a gigabyte. A damaged entry is computed anew, with a warning. Entries are written aside and
    renamed, so several processes may share the folder. The least recently used entries go when the limit is passed.

    Args:
        folder: its own folder; made where it does not exist.
        limit_gib: size on disk, in GiB.
        dtype: `torch.float32` gives results that are identical bit for bit. `torch.bfloat16` takes half the space and
            rounds to 8 bits of mantissa, in the readings that fill the cache as in those that use it.
        shard_mib: the largest shard, in MiB.

    Raises:
        InputError: the folder holds something else or cannot be made; a limit that is not positive; another dtype.
    """

    def __init__(
        self, folder: Path, limit_gib: float = 8.0, dtype: torch.dtype = torch.float32, shard_mib: float = 256.0
    ) -> None:
        if not limit_gib > 0 or not shard_mib > 0:
            raise InputError(f"limit_gib {limit_gib} and shard_mib {shard_mib} must be above 0")
        if dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"an activation cache keeps torch.float32 or torch.bfloat16, not {dtype}")
        self.folder, self.dtype = Path(folder), dtype
        self.limit_bytes, self.shard_bytes = int(limit_gib * 2**30), int(shard_mib * 2**20)
        self.hits = self.misses = 0
        self._verified: set[str] = set()
        open_folder(self.folder)

    @property
    def keys(self) -> list[str]:
        """Keys of all entries, least recently used first."""
        return [path.name for path in entries(self.folder)]

    @property
    def size_bytes(self) -> int:
        """Size of all entries on disk."""
        return sum(size(path) for path in entries(self.folder))

    def clear(self) -> None:
        """Remove all entries; the folder stays."""
        for path in entries(self.folder):
            remove(path)

    def reading(self, model: nn.Module, layer: int, mixed_precision: bool) -> "CachedReading | None":
        """The cache for one model at one layer; its weights are hashed now. None where it cannot stand for the model.

        Raises:
            InputError: the model has no such layer.
        """
        reason = why_not(model, layer)
        if reason is not None:
            log.warning("activation cache not used: %s", reason)
            return None
        about = {
            "format": FORMAT,
            "weights": weights_key(model, layer),
            "layer": layer,
            "precision": "bf16 autocast" if mixed_precision else "float32",
            "dtype": str(self.dtype),
            "device": next(model.parameters()).device.type,
        }
        name = transformer_config(model).name_or_path or type(base_transformer(model)).__name__
        notes = {"model": name, "created_by": f"persona-probe {versions().get('persona-probe', 'unknown')}"}
        return CachedReading(self, about, notes)

    def find(self, key: str, device: torch.device) -> Selected | None:
        """An entry's tokens, or None where there is none (or a damaged one, which is removed with a warning)."""
        folder = self.folder / key
        if not folder.is_dir():
            return None
        try:
            manifest = read_manifest(folder)
            check_shards(folder, manifest.shards, content=key not in self._verified)
            found = read_entry(folder, manifest, device)
        except DamagedEntry as damage:
            log.warning("activation cache: entry %s is computed anew: %s", key[:12], damage)
            self._verified.discard(key)
            remove(folder)
            return None
        self._verified.add(key)
        touch(folder)
        return found

    def store(self, key: str, found: Selected, about: Mapping[str, object]) -> None:
        """Write an entry whole or not at all, then make room. A full disk costs the entry, not the reading."""
        if found.x.numel() * self.dtype.itemsize > self.limit_bytes:
            log.warning("activation cache: a batch is larger than the limit and is not kept: raise limit_gib")
            return
        try:
            with new_entry(self.folder, key) as scratch:
                write_entry(scratch, key, found, about, self.dtype, self.shard_bytes)
            make_room(self.folder, self.limit_bytes)
        except (OSError, SafetensorError) as error:
            log.warning("activation cache: could not keep a batch in %s: %s", self.folder, error)


@dataclass(frozen=True)
class CachedReading:
    """The cache for one model at one layer."""

    cache: ActivationCache
    about: Mapping[str, object]
    """What the entries' keys hold beside the batch."""
    notes: Mapping[str, object]
    """What their manifests say as well."""

    def selected(self, batch: Batch, masks: Mapping[str, Tensor], compute: Callable[[], Selected]) -> Selected:
        """A batch's tokens from the cache, else from `compute`, and then kept.

        Args:
            masks: positions to the tokens chosen there, (batch, pos).
        """
        key = entry_key(self.about, batch, masks)
        found = self.cache.find(key, batch.ids.device)
        if found is not None:
            self.cache.hits += 1
            return replace(found, masks={name: found.masks[name] for name in masks})
        self.cache.misses += 1
        computed = compute()
        found = replace(computed, x=computed.x.to(self.cache.dtype).float())
        self.cache.store(key, found, {**self.about, **self.notes})
        return found
