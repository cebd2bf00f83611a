"""Entries on disk: small shards, read slice by slice, whole or not there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor

from persona_probe.models import activation_cache as activation_entry
from persona_probe.models.activation_cache import MARKER, ActivationCache
from persona_probe.runs import file_sha256
from tests.factories import D_MODEL, LAYER, make_model
from tests.saes.activation_streams import POSITIONS, again, groups, stream

SMALL_SHARD = (4096 + 2000) / 2**20


@pytest.fixture
def cache(tmp_path: Path) -> ActivationCache:
    return ActivationCache(tmp_path / "cache")


def shards(cache: ActivationCache) -> list[Path]:
    return sorted(cache.folder.rglob("*.safetensors"))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def edit(file: Path) -> None:
    manifest = json.loads(file.with_name("manifest.json").read_text())
    file.with_name("manifest.json").write_text(json.dumps(manifest | {"key": "0" * 64}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "is truncated"),
    "missing": (Path.unlink, "safetensors cannot be read (FileNotFoundError)"),
    "flipped": (flip, "does not match its sha256"),
    "no manifest": (lambda file: file.with_name("manifest.json").unlink(), "cannot be read (FileNotFoundError)"),
    "half manifest": (lambda file: file.with_name("manifest.json").write_text("{"), "cannot be read (NotJson)"),
    "other manifest": (edit, "is of another entry"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_computed_anew(cache: ActivationCache, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    harm, message = DAMAGE[kind]
    plain = stream(make_model(), cache)
    harm(shards(cache)[0])
    opened = again(cache)
    assert torch.equal(stream(make_model(), opened), plain)
    assert message in caplog.text and (opened.misses, opened.hits) == (1, 1)
    assert torch.equal(stream(make_model(), again(cache)), plain)
    assert len(caplog.records) == 1 and len(cache.keys) == 2


def test_a_length_is_checked_at_every_reading(cache: ActivationCache) -> None:
    plain = stream(make_model(), cache)
    stream(make_model(), cache)
    truncate(shards(cache)[0])
    assert torch.equal(stream(make_model(), cache), plain)
    assert (cache.misses, cache.hits) == (3, 3)


@pytest.mark.parametrize("moment", ["file_sha256", "safe_open"])
def test_an_entry_that_another_process_removes_meanwhile_is_computed_anew(
    cache: ActivationCache, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, own = stream(make_model(), cache), vars(activation_entry)[moment]

    def too_late(path: Path, **settings: Any) -> Any:
        path.unlink(missing_ok=True)
        return own(path, **settings)

    opened = again(cache)
    with monkeypatch.context() as patch:
        patch.setattr(activation_entry, moment, too_late)
        # Writing hashes as well, and is not what is tried here.
        patch.setattr(opened, "store", lambda *_: None)
        assert torch.equal(stream(make_model(), opened), plain)
    assert (opened.misses, opened.hits, opened.keys) == (2, 0, [])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(
    cache: ActivationCache,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    small, written = again(cache, shard_mib=SMALL_SHARD), []

    def failing(tensors: dict[str, Tensor], path: Path) -> None:
        if written:
            raise error("no space left")
        written.append(path)
        path.write_bytes(b"half")

    monkeypatch.setattr(activation_entry, "save_file", failing)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            stream(make_model(), small)
    else:
        assert torch.equal(stream(make_model(), small), stream(make_model(), None))
        assert "could not keep a batch" in caplog.text
    assert written and [p.name for p in cache.folder.iterdir()] == [MARKER]


class Spy:
    """A shard as `safe_open` gives it, which counts what is read."""

    open_now = most_open = largest = opened = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._file = safetensors.safe_open(*args, **kwargs)

    def __enter__(self) -> "Spy":
        self._file.__enter__()
        Spy.opened += 1
        Spy.open_now += 1
        Spy.most_open = max(Spy.most_open, Spy.open_now)
        return self

    def __exit__(self, *args: Any) -> None:
        Spy.open_now -= 1
        self._file.__exit__(*args)

    def get_slice(self, name: str) -> "SpySlice":
        return SpySlice(self._file.get_slice(name))


class SpySlice:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getitem__(self, part: slice) -> Tensor:
        Spy.largest = max(Spy.largest, part.stop - part.start)
        return self._inner[part]


def test_shards_are_small_and_read_slice_by_slice(cache: ActivationCache, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = stream(make_model(), None)
    small = again(cache, shard_mib=SMALL_SHARD)
    stream(make_model(), small)
    files = shards(small)
    assert len(files) > 10 and max(f.stat().st_size for f in files) <= small.shard_bytes
    monkeypatch.setattr(activation_entry, "safe_open", Spy)
    monkeypatch.setattr(activation_entry, "SLICE_BYTES", 5 * 4 * D_MODEL)
    assert torch.equal(stream(make_model(), small), plain)
    # The spy has no get_tensor: a whole tensor cannot be read through it.
    assert (Spy.opened, Spy.most_open, Spy.largest) == (len(files), 1, 5)


def test_bfloat16_halves_the_space_and_rounds_alike(cache: ActivationCache, tmp_path: Path) -> None:
    half = ActivationCache(tmp_path / "half", dtype=torch.bfloat16)
    plain = stream(make_model(), cache)
    filled, found = stream(make_model(), half), stream(make_model(), half)
    assert half.hits == 2 and torch.equal(filled, found) and torch.equal(found, plain.bfloat16().float())
    assert plain.numel() * 2 <= half.size_bytes < 0.75 * cache.size_bytes
    stream(make_model(), again(half))
    assert len(half.keys) == 4


def test_the_manifest_says_what_is_there(cache: ActivationCache) -> None:
    stream(make_model(), cache, groups=groups()[:1])
    file = shards(cache)[0]
    manifest = json.loads(file.with_name("manifest.json").read_text())
    tokens = sum(int(groups()[0].select(p).sum()) for p in POSITIONS)
    assert manifest["format"] == 1 and manifest["key"] == cache.keys[0] == file.parent.name
    assert (manifest["tokens"], manifest["d_model"], manifest["positions"]) == (tokens, D_MODEL, list(POSITIONS))
    size, digest = file.stat().st_size, file_sha256(file)
    assert manifest["shards"] == [{"file": file.name, "tokens": tokens, "bytes": size, "sha256": digest}]
    about = manifest["about"]
    assert (about["model"], about["layer"], about["precision"]) == ("LlamaModel", LAYER, "float32")
    assert about["created_by"].startswith("persona-probe ")
