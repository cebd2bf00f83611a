"""An activation cache on disk: a layer's residual stream is computed once for the same weights and tokens."""

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
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.models.layers import base_transformer, decoder_layer, decoder_layers, transformer_config
from persona_probe.models.taps import ReadTap, Tap
from persona_probe.runs import file_sha256, versions

# --- One entry of the activation cache: a folder with safetensors shards and a manifest

FORMAT = 1
MANIFEST = "manifest.json"
SLICE_BYTES = 2**24
"""What is copied out of a memory-mapped shard at a time: 16 MB."""
HEADER_BYTES = 4096
"""Room that a shard's size limit leaves for the header."""


class DamagedEntry(Exception):
    """An entry's files are not what its manifest says."""


@dataclass(frozen=True)
class Selected:
    """The selected tokens of one batch."""

    row: Int[Tensor, " tokens"]
    """Each token's row in the batch."""
    x: Float[Tensor, "tokens d_model"]
    """Residual stream, float32."""
    masks: dict[str, Bool[Tensor, " tokens"]]
    """Positions to which of the tokens are there."""


@dataclass(frozen=True)
class Shard:
    """One file of an entry."""

    file: str
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an entry holds."""

    key: str
    tokens: int
    d_model: int
    positions: tuple[str, ...]
    shards: tuple[Shard, ...]
    about: dict[str, Any]
    """Model, layer, precision, dtype and the version that wrote it."""
    format: int = FORMAT


def write_entry(
    folder: Path, key: str, found: Selected, about: Mapping[str, object], dtype: torch.dtype, shard_bytes: int
) -> None:
    """Write shards of at most `shard_bytes` (one token at least) and the manifest into an empty folder.

    Raises:
        OSError, SafetensorError: the disk is full or read-only.
    """
    tokens, d_model = found.x.shape
    a_token = d_model * dtype.itemsize + found.row.dtype.itemsize + len(found.masks)
    step, shards = max(1, (shard_bytes - HEADER_BYTES) // a_token), []
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        tensors = {"resid": found.x[part].to(dtype), "row": found.row[part]}
        tensors |= {f"mask.{name}": mask[part] for name, mask in found.masks.items()}
        path = folder / f"shard-{len(shards):05d}.safetensors"
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path)
        shards.append(Shard(path.name, len(tensors["row"]), path.stat().st_size, file_sha256(path)))
    manifest = Manifest(key, tokens, d_model, tuple(found.masks), tuple(shards), dict(about))
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an entry.

    Raises:
        DamagedEntry: it is not there, or is no manifest of this entry.
    """
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        shards = tuple(Shard(**shard) for shard in raw.pop("shards"))
        manifest = Manifest(shards=shards, positions=tuple(raw.pop("positions")), **raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedEntry(f"its {MANIFEST} cannot be read ({type(error).__name__})") from error
    if manifest.key != folder.name or sum(s.tokens for s in manifest.shards) != manifest.tokens:
        raise DamagedEntry(f"its {MANIFEST} is of another entry")
    return manifest


def check_shards(folder: Path, shards: Sequence[Shard], content: bool) -> None:
    """Compare the shards' lengths with the manifest, and where `content` says so their sha256.

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
    found = _empty(manifest, device)
    start = 0
    for shard in manifest.shards:
        try:
            _read_shard(folder / shard.file, shard.tokens, found, start)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise DamagedEntry(f"{shard.file} cannot be read: {str(error).splitlines()[0]}") from error
        start += shard.tokens
    return found


def _empty(manifest: Manifest, device: torch.device) -> Selected:
    n = manifest.tokens
    masks = {name: torch.empty(n, dtype=torch.bool, device=device) for name in manifest.positions}
    row = torch.empty(n, dtype=torch.long, device=device)
    return Selected(row, torch.empty(n, manifest.d_model, device=device), masks)


def _read_shard(path: Path, tokens: int, found: Selected, start: int) -> None:
    step = max(1, SLICE_BYTES // (found.x.shape[1] * found.x.element_size()))
    targets = {"resid": found.x, "row": found.row} | {f"mask.{name}": mask for name, mask in found.masks.items()}
    with safe_open(path, framework="pt") as file:
        for name, target in targets.items():
            stored = file.get_slice(name)
            for a in range(0, tokens, step):
                b = min(a + step, tokens)
                target[start + a : start + b] = stored[a:b]


# --- The activation cache's folder: entries appear and go whole, and the least recently used ones go first

log = logging.getLogger(__name__)

MARKER = "persona-probe-activations.txt"
ENTRY = re.compile(r"[0-9a-f]{64}")
WRITING, REMOVING = ".writing-", ".removing-"
STALE_SECONDS = 3600.0
"""Unfinished work of this age was left by a process that was killed."""


def open_folder(folder: Path) -> None:
    """Make or take a cache folder, and remove what killed processes left in it.

    Raises:
        InputError: it holds something else, or cannot be made.
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
        raise InputError(f"could not use {folder} as cache: {error.strerror}; choose another folder") from error
    for path in folder.iterdir():
        if path.name.startswith((WRITING, REMOVING)) and time.time() - _used(path) > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def entries(folder: Path) -> list[Path]:
    """All entries, least recently used first."""
    found = [path for path in folder.iterdir() if ENTRY.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_used(path), path.name))


@contextlib.contextmanager
def new_entry(folder: Path, key: str) -> Iterator[Path]:
    """A scratch folder that becomes the entry `key` when the block ends well; else nothing of it stays.

    Where another process has moved the same entry in meanwhile, that one stays.

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
    """Remove an entry; it is taken out of sight first, so that no process finds half of it."""
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
    for path, taken in sizes.items():
        if total <= limit_bytes:
            return
        remove(path)
        total -= taken


def touch(entry: Path) -> None:
    """Note that an entry is used now. It may be gone already, or the folder read-only: then its age stays."""
    now = time.time_ns()
    with contextlib.suppress(OSError):
        os.utime(entry, ns=(now, now))


def size(entry: Path) -> int:
    """Bytes of an entry's files; 0 when another process has removed it."""
    try:
        return sum(file.stat().st_size for file in entry.iterdir())
    except FileNotFoundError:
        return 0


def _used(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0


# --- What decides a residual stream, as a key: the weights that run, the tokens, the precision

NO_SETTINGS = {
    *vars(nn.Module()),
    "gradient_checkpointing",
    "_hf_peft_config_loaded",
    "_is_hf_initialized",
    "_output_capturing_hooks_installed",
    "name_or_path",
}
"""A module's attributes that do not change what it computes in eval mode: bookkeeping of torch and transformers."""
NO_CONFIG = {"_name_or_path", "architectures", "dtype", "use_cache"}
"""The same for a model's configuration: equal weights from another folder have one key. Tensors tell their dtype."""


def weights_key(model: nn.Module, layer: int) -> str:
    """SHA-256 of everything that decides the output of `layer`, hexadecimal.

    That is the raw bytes of all parameters and buffers of the transformer, without the layers above `layer`; each
    module's type and settings (an adapter's scale, whether it is on); the configuration, attention kernel included.
    An adapter that is off counts as not there, so a base model has one key whatever was injected into it; of a layer
    whose adapter is folded in, the folded weight counts. It takes about a second a gigabyte.

    Raises:
        InputError: the model has no such layer.
    """
    config = transformer_config(model)
    values = {name: value for name, value in config.to_dict().items() if name not in NO_CONFIG}
    digest = hashlib.sha256(_text([values, config._attn_implementation, torch.__version__]))
    for name, module in _running(model, layer):
        settings = {key: value for key, value in vars(module).items() if key not in NO_SETTINGS}
        digest.update(_text([name, type(module).__qualname__, settings]))
        for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            for own_name, tensor in tensors:
                _add(digest, own_name, tensor)
    return digest.hexdigest()


def why_not(model: nn.Module, layer: int) -> str | None:
    """Why no key can stand for what this model computes up to `layer`; None where one can.

    Hooks and replaced forwards change the stream and leave the weights alone. `ReadTap`s and transformers' own hooks
    change nothing, and a forward that is one torch function of fixed tensors (see `models.folding`) is in the key.
    """
    for name, module in _running(model, layer):
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(_may_change(hook) for hook in hooks):
            return f"a hook on {name or 'the model'} may change what it computes"
        if "forward" in vars(module) and not _is_torch_partial(vars(module)["forward"]):
            return f"the forward of {name or 'the model'} is replaced"
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(t.is_meta or type(t) not in (Tensor, nn.Parameter) for t in tensors):
            return f"the weights of {name or 'the model'} are not plain tensors in memory"
    return None


def entry_key(about: Mapping[str, object], batch: Batch, masks: Mapping[str, Tensor]) -> str:
    """SHA-256 of one batch's reading: what `about` says of the model, token ids, attention, and the chosen tokens."""
    digest = hashlib.sha256(_text(dict(about)))
    for name, tensor in (("ids", batch.ids), ("attention", batch.attention), *sorted(masks.items())):
        _add(digest, name, tensor)
    return digest.hexdigest()


def _running(model: nn.Module, layer: int) -> Iterator[tuple[str, nn.Module]]:
    decoder_layer(model, layer)
    yield from _below("", base_transformer(model), set(list(decoder_layers(model))[layer + 1 :]))


def _below(name: str, module: nn.Module, above: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in above:
        return
    if isinstance(module, BaseTunerLayer) and module.disable_adapters and not module.merged:
        yield from _below(name, module.get_base_layer(), above)
        return
    yield name, module
    if "forward" in vars(module):
        return  # its parts do not run
    for own_name, child in module.named_children():
        yield from _below(f"{name}.{own_name}".lstrip("."), child, above)


def _may_change(hook: object) -> bool:
    if isinstance(hook, MethodType) and isinstance(hook.__self__, Tap):
        return not isinstance(hook.__self__, ReadTap)
    return hook.__module__.split(".")[0] != "transformers"


def _is_torch_partial(forward: object) -> bool:
    return isinstance(forward, partial) and str(forward.func.__module__).split(".")[0] == "torch"


def _add(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(_text([name, str(tensor.dtype), list(tensor.shape)]))
    digest.update(_raw(tensor))


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _text(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, skipkeys=True, default=_described).encode() + b"\0"


def _described(value: object) -> object:
    """A value that JSON does not know: a tensor by its bytes, a partial by its parts, anything else by its type."""
    if isinstance(value, partial):
        return [value.func.__qualname__, value.args, value.keywords]
    return hashlib.sha256(_raw(value)).hexdigest() if isinstance(value, Tensor) else type(value).__qualname__


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

    def reading(self, model: nn.Module, layer: int, bf16: bool) -> "CachedReading | None":
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
            "precision": "bf16 autocast" if bf16 else "float32",
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
