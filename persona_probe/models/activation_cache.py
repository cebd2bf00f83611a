"""Keep residual streams on disk: for the same weights and tokens a layer's output is computed once."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.files import decode_json
from persona_probe.models.identity import add_tensor, as_bytes, weights_key, why_not
from persona_probe.models.layers import base_transformer, transformer_config
from persona_probe.models.places import Where, as_place
from persona_probe.runs import file_sha256, versions
from persona_probe.writing import reason

# --- One entry of the activation cache: a folder with safetensors shards and a manifest

FORMAT = 1
MANIFEST = "manifest.json"
SLICE_BYTES = 2**24
"""Copied out of a memory-mapped shard at a time: 16 MB."""
HEADER_BYTES = 4096
"""Room that a shard's size limit leaves for the header."""


class DamagedEntry(Exception):
    """An entry's files do not match its manifest."""


@dataclass(frozen=True)
class Selected:
    """The selected tokens of one batch."""

    row: Int[Tensor, " tokens"]
    """Each token's row in the batch."""
    x: Float[Tensor, "tokens d_model"]
    """Residual stream, float32."""
    masks: dict[str, Bool[Tensor, " tokens"]]
    """For each kind of positions, which of the tokens are at these positions."""


@dataclass(frozen=True)
class Shard:
    """One file of an entry."""

    file: str
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of an entry."""

    key: str
    tokens: int
    d_model: int
    positions: tuple[str, ...]
    shards: tuple[Shard, ...]
    about: dict[str, Any]
    """Model, layer, precision, dtype and the version that wrote it."""
    format: int = FORMAT


def write_entry(
    folder: Path, key: str, selected: Selected, about: Mapping[str, object], dtype: torch.dtype, shard_bytes: int
) -> None:
    """Write shards of at most `shard_bytes` (one token at least) and the manifest into an empty folder.

    Raises:
        OSError, SafetensorError: the disk is full or read-only.
    """
    tokens, d_model = selected.x.shape
    a_token = d_model * dtype.itemsize + selected.row.dtype.itemsize + len(selected.masks)
    step, shards = max(1, (shard_bytes - HEADER_BYTES) // a_token), []
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        tensors = {"resid": selected.x[part].to(dtype), "row": selected.row[part]}
        tensors |= {f"mask.{name}": mask[part] for name, mask in selected.masks.items()}
        path = folder / f"shard-{len(shards):05d}.safetensors"
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path)
        shards.append(Shard(path.name, len(tensors["row"]), path.stat().st_size, file_sha256(path)))
    manifest = Manifest(key, tokens, d_model, tuple(selected.masks), tuple(shards), dict(about))
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an entry.

    Raises:
        DamagedEntry: it is missing, or is not the manifest of this entry.
    """
    try:
        raw = decode_json((folder / MANIFEST).read_text(encoding="utf-8"))
        shards = tuple(Shard(**shard) for shard in raw.pop("shards"))
        manifest = Manifest(shards=shards, positions=tuple(raw.pop("positions")), **raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedEntry(f"its {MANIFEST} cannot be read ({type(error).__name__})") from error
    if manifest.key != folder.name or sum(s.tokens for s in manifest.shards) != manifest.tokens:
        raise DamagedEntry(f"its {MANIFEST} is of another entry")
    return manifest


def check_shards(folder: Path, shards: Sequence[Shard], content: bool) -> None:
    """Compare the shards' lengths with the manifest, and with `content` also their sha256.

    Raises:
        DamagedEntry: a shard is missing, truncated or changed.
    """
    for shard in shards:
        path = folder / shard.file
        try:
            if path.stat().st_size != shard.bytes:
                raise DamagedEntry(f"{shard.file} is truncated")
            if content and file_sha256(path) != shard.sha256:
                raise DamagedEntry(f"{shard.file} does not match its sha256")
        except OSError as error:  # another process may remove the entry at any time
            raise DamagedEntry(f"{shard.file} cannot be read ({type(error).__name__})") from error


def read_entry(folder: Path, manifest: Manifest, device: torch.device) -> Selected:
    """The entry's tokens on a device: shards are memory-mapped one at a time and copied slice by slice.

    Raises:
        DamagedEntry: a shard is no safetensors file of the manifest's shape.
    """
    selected = _empty(manifest, device)
    start = 0
    for shard in manifest.shards:
        try:
            _read_shard(folder / shard.file, shard.tokens, selected, start)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise DamagedEntry(f"{shard.file} cannot be read: {str(error).splitlines()[0]}") from error
        start += shard.tokens
    return selected


def _empty(manifest: Manifest, device: torch.device) -> Selected:
    n = manifest.tokens
    masks = {name: torch.empty(n, dtype=torch.bool, device=device) for name in manifest.positions}
    row = torch.empty(n, dtype=torch.long, device=device)
    return Selected(row, torch.empty(n, manifest.d_model, device=device), masks)


def _read_shard(path: Path, tokens: int, selected: Selected, start: int) -> None:
    step = max(1, SLICE_BYTES // (selected.x.shape[1] * selected.x.element_size()))
    targets = {"resid": selected.x, "row": selected.row}
    targets |= {f"mask.{name}": mask for name, mask in selected.masks.items()}
    with safe_open(path, framework="pt") as file:
        for name, target in targets.items():
            stored = file.get_slice(name)
            for a in range(0, tokens, step):
                b = min(a + step, tokens)
                target[start + a : start + b] = stored[a:b]


# --- The folder of entries: they appear and disappear whole, the least recently used ones first

log = logging.getLogger(__name__)

MARKER = "persona-probe-activations.txt"
ENTRY = re.compile(r"[0-9a-f]{64}")
WRITING, REMOVING = ".writing-", ".removing-"
STALE_SECONDS = 3600.0
"""Unfinished work of this age belongs to a process that was killed."""


def open_folder(folder: Path) -> None:
    """Make a cache folder or take an existing one, and remove what killed processes left in it.

    Raises:
        InputError: the folder holds something else, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
        foreign = [n for n in names if n != MARKER and not ENTRY.fullmatch(n) and not n.startswith((WRITING, REMOVING))]
        if foreign or (names and MARKER not in names):
            raise InputError(f"{folder} holds {(foreign or names)[0]!r}, no activation cache: choose an empty folder")
        if not names:
            (folder / MARKER).write_text("An activation cache of persona_probe: it may be deleted whole.\n")
    except OSError as error:
        raise InputError(f"could not use {folder} as cache: {reason(error)}; choose another folder") from error
    for path in folder.iterdir():
        if path.name.startswith((WRITING, REMOVING)) and time.time() - _used(path) > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def entries(folder: Path) -> list[Path]:
    """All entries, least recently used first."""
    paths = [path for path in folder.iterdir() if ENTRY.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (_used(path), path.name))


@contextlib.contextmanager
def new_entry(folder: Path, key: str) -> Iterator[Path]:
    """A scratch folder that becomes the entry `key` if the block succeeds; otherwise it is removed.

    If another process has stored the same entry meanwhile, that one stays.

    Raises:
        OSError: the disk is full or read-only.
    """
    scratch, target = folder / f"{WRITING}{uuid.uuid4().hex}", folder / key
    try:
        scratch.mkdir()
        yield scratch
        touch(scratch)
        with contextlib.suppress(OSError):
            scratch.rename(target)
        if not target.is_dir():
            raise OSError(f"could not move {scratch.name} to {key}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove(entry: Path) -> None:
    """Remove an entry. It is renamed first, so that no process finds half of it."""
    aside = entry.with_name(f"{REMOVING}{uuid.uuid4().hex}")
    try:
        entry.rename(aside)
    except FileNotFoundError:
        return  # another process was first
    except OSError as error:
        log.warning("activation cache: could not remove %s: %s", entry, error)
    shutil.rmtree(aside, ignore_errors=True)


def make_room(folder: Path, limit_bytes: int) -> None:
    """Remove the least recently used entries until the rest is within the limit."""
    sizes = {path: size(path) for path in entries(folder)}
    total = sum(sizes.values())
    for path, bytes_ in sizes.items():
        if total <= limit_bytes:
            return
        remove(path)
        total -= bytes_


def touch(entry: Path) -> None:
    """Mark an entry as used now. If it is gone or the folder is read-only, nothing happens."""
    now = time.time_ns()
    with contextlib.suppress(OSError):
        os.utime(entry, ns=(now, now))


def size(entry: Path) -> int:
    """Bytes of an entry's files; 0 if another process has removed it."""
    try:
        return sum(file.stat().st_size for file in entry.iterdir())
    except FileNotFoundError:
        return 0


def _used(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0


# --- The cache: readings found again by their content


class ActivationCache:
    """Residual streams on disk, found again by their content; pass it to the functions of `saes.read` as `cache`.

    An entry holds the selected tokens of one batch. Its key is the sha256 of the weights that run (with adapters, see
    `identity.weights_key`), layer, positions, token ids, attention, precision and kind of device. If any of them
    changes, the stream is computed again. A model whose hooks or replaced forwards may change the stream is read
    without the cache, with a warning.

    Every reading checks the lengths of the shards. Their sha256 is checked the first time that this object reads an
    entry, because that takes about a second per gigabyte. A damaged entry is computed again, with a warning. Entries
    are written to a scratch folder and renamed, so several processes may share the cache. Beyond the limit the least
    recently used entries are removed.

    Args:
        folder: a folder for nothing else; it is made if missing.
        limit_gib: size on disk, in GiB.
        dtype: `torch.float32` gives bit-identical results. `torch.bfloat16` takes half the space and rounds to 8 bits
            of mantissa, both in the readings that fill the cache and in those that use it.
        shard_mib: the largest shard, in MiB.

    Raises:
        InputError: the folder holds something else or cannot be made, a limit is not positive, or the dtype is another.
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

    def reading(self, model: nn.Module, where: Where, bf16: bool) -> "CachedReading | None":
        """The cache for one model at one place, whose weights are hashed now. None if no key identifies the model.

        Raises:
            InputError: the model has no such layer.
        """
        place = as_place(where)
        layer = place.layer
        reason = why_not(model, layer)
        if reason is not None:
            log.warning("activation cache not used: %s", reason)
            return None
        about = {
            "format": FORMAT,
            "weights": weights_key(model, layer),
            "layer": layer,
            "precision": "bf16 autocast" if bf16 else "float32",
            "dtype": str(self.dtype),
            "device": next(model.parameters()).device.type,
        }
        if not place.is_residual:
            about["place"] = place.part
        name = transformer_config(model).name_or_path or type(base_transformer(model)).__name__
        notes = {"model": name, "created_by": f"persona-probe {versions().get('persona-probe', 'unknown')}"}
        return CachedReading(self, about, notes)

    def find(self, key: str, device: torch.device) -> Selected | None:
        """An entry's tokens; None if there is no entry, or a damaged one, which is removed with a warning."""
        folder = self.folder / key
        if not folder.is_dir():
            return None
        try:
            manifest = read_manifest(folder)
            check_shards(folder, manifest.shards, content=key not in self._verified)
            selected = read_entry(folder, manifest, device)
        except DamagedEntry as damage:
            log.warning("activation cache: entry %s is computed again: %s", key[:12], damage)
            self._verified.discard(key)
            remove(folder)
            return None
        self._verified.add(key)
        touch(folder)
        return selected

    def store(self, key: str, selected: Selected, about: Mapping[str, object]) -> None:
        """Write an entry, whole or not at all, then make room. If the disk is full, only the entry is lost."""
        if selected.x.numel() * self.dtype.itemsize > self.limit_bytes:
            log.warning("activation cache: a batch is larger than the limit and is not kept: raise limit_gib")
            return
        try:
            with new_entry(self.folder, key) as scratch:
                write_entry(scratch, key, selected, about, self.dtype, self.shard_bytes)
            make_room(self.folder, self.limit_bytes)
        except (OSError, SafetensorError) as error:
            log.warning("activation cache: could not keep a batch in %s: %s", self.folder, error)


@dataclass(frozen=True)
class CachedReading:
    """The cache for one model at one layer."""

    cache: ActivationCache
    about: Mapping[str, object]
    """The part of the entries' keys that the batch does not decide."""
    notes: Mapping[str, object]
    """Further notes for their manifests."""

    def selected(
        self, batch: Batch, masks: Mapping[str, Tensor], compute: Callable[[], Selected], device: torch.device
    ) -> Selected:
        """A batch's tokens on `device`, from the cache, else from `compute`; these are then stored.

        Args:
            masks: the selected tokens (batch, pos) at each kind of positions.
        """
        key = entry_key(self.about, batch, masks)
        stored = self.cache.find(key, device)
        if stored is not None:
            self.cache.hits += 1
            return replace(stored, masks={name: stored.masks[name] for name in masks})
        self.cache.misses += 1
        computed = compute()
        rounded = replace(computed, x=computed.x.to(self.cache.dtype).float())
        self.cache.store(key, rounded, {**self.about, **self.notes})
        return rounded


def entry_key(about: Mapping[str, object], batch: Batch, masks: Mapping[str, Tensor]) -> str:
    """SHA-256 of one batch's reading: the model in `about`, token ids, attention, and the selected tokens."""
    digest = hashlib.sha256(as_bytes(dict(about)))
    for name, tensor in (("ids", batch.ids), ("attention", batch.attention), *sorted(masks.items())):
        add_tensor(digest, name, tensor)
    return digest.hexdigest()
