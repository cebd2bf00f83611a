"""One entry of the activation cache: a folder with safetensors shards and a manifest."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_probe.models.sources import file_sha256

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
