"""An activation cache on disk: a layer's residual stream is computed once for the same weights and tokens."""

import contextlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.models.layers import transformer_config
from persona_probe.provenance import versions
from persona_probe.saes.activation_entry import (
    FORMAT,
    MANIFEST,
    DamagedEntry,
    Selected,
    check_shards,
    read_entry,
    read_manifest,
    write_entry,
)
from persona_probe.saes.activation_key import entry_key, weights_key, why_not

log = logging.getLogger(__name__)

MARKER = "persona-probe-activations.txt"
ENTRY = re.compile(r"[0-9a-f]{64}")
SCRATCH = (".writing-", ".removing-")
STALE_SECONDS = 3600.0
"""Unfinished work of this age was left by a process that was killed."""


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
        _open_folder(self.folder)

    @property
    def keys(self) -> list[str]:
        """Keys of all entries, least recently used first."""
        return [path.name for _, path in sorted((_used(p), p) for p in self._entries())]

    @property
    def size_bytes(self) -> int:
        """Size of all entries on disk."""
        return sum(_size(path) for path in self._entries())

    def clear(self) -> None:
        """Remove all entries; the folder stays."""
        for path in self._entries():
            self._remove(path)

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
        name = transformer_config(model).name_or_path or type(model).__name__
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
            self._remove(folder)
            return None
        self._verified.add(key)
        _touch(folder)
        return found

    def store(self, key: str, found: Selected, about: Mapping[str, object]) -> None:
        """Write an entry whole or not at all, then make room. A full disk costs the entry, not the reading."""
        scratch = self.folder / f"{SCRATCH[0]}{uuid.uuid4().hex}"
        try:
            scratch.mkdir()
            write_entry(scratch, key, found, about, self.dtype, self.shard_bytes)
            _touch(scratch)
            if _size(scratch) > self.limit_bytes:
                log.warning("activation cache: a batch is larger than limit_gib and is not kept; raise limit_gib")
            elif not (self.folder / key).exists():
                scratch.rename(self.folder / key)
        except (OSError, SafetensorError) as error:
            # Another process may have moved the same entry in since we looked; then nothing is lost.
            if not (self.folder / key / MANIFEST).is_file():
                log.warning("activation cache: could not write to %s: %s", self.folder, error)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._make_room()

    def _make_room(self) -> None:
        sizes = {path: _size(path) for path in self._entries()}
        total = sum(sizes.values())
        for path in sorted(sizes, key=_used):
            if total <= self.limit_bytes:
                return
            self._remove(path)
            total -= sizes[path]

    def _remove(self, path: Path) -> None:
        """Take an entry out of sight first: no process finds it half removed."""
        self._verified.discard(path.name)
        aside = self.folder / f"{SCRATCH[1]}{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):  # another process was first
            path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _entries(self) -> Iterator[Path]:
        return (path for path in self.folder.iterdir() if ENTRY.fullmatch(path.name))


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


def _open_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        foreign = sorted(n for n in names if n != MARKER and not ENTRY.fullmatch(n) and not n.startswith(SCRATCH))
        if foreign or (names and MARKER not in names):
            other = (foreign or sorted(names))[0]
            raise InputError(f"{folder} holds {other!r}, no activation cache: choose an empty folder")
        (folder / MARKER).write_text("An activation cache of persona_probe: it may be deleted whole.\n")
    except OSError as error:
        raise InputError(f"could not use {folder} as cache: {error.strerror}; choose another folder") from error
    _sweep(folder)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left."""
    for path in folder.iterdir():
        if path.name.startswith(SCRATCH) and time.time() - _used(path) > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _touch(folder: Path) -> None:
    """Note that an entry was used now. It may be gone already, or the folder read-only."""
    with contextlib.suppress(OSError):
        os.utime(folder, ns=(time.time_ns(), time.time_ns()))


def _used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime_ns / 1e9
    except FileNotFoundError:
        return 0.0


def _size(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return 0
