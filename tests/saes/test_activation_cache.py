"""What the cache gives back is what the model would compute, and its folder stays within bounds."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from persona_probe.errors import InputError
from persona_probe.models.activation_cache import MARKER, STALE_SECONDS, ActivationCache, Selected, new_entry, remove
from persona_probe.models.residuals import read_residuals_at
from persona_probe.models.taps import ReadTap
from persona_probe.saes.read import LatentMeans, read_latents, read_latents_at
from tests.factories import D_MODEL, LAYER, make_model, make_sae
from tests.saes.activation_streams import POSITIONS, again, groups, stream

FIELDS = ("mean", "firing", "maximum", "resid", "square")


@pytest.fixture
def cache(tmp_path: Path) -> ActivationCache:
    return ActivationCache(tmp_path / "cache")


def latents(model: nn.Module, cache: ActivationCache | None, bf16: bool = False) -> dict[str, LatentMeans]:
    return read_latents_at(model, make_sae("jumprelu"), groups(), LAYER, POSITIONS, bf16=bf16, cache=cache)


def identical(left: dict[str, LatentMeans], right: dict[str, LatentMeans]) -> bool:
    assert list(left) == list(right) == list(POSITIONS)
    pairs = [(left[name], right[name]) for name in POSITIONS]
    same_fit = [(a.fit.n, a.fit.error, a.fit.norm) == (b.fit.n, b.fit.error, b.fit.norm) for a, b in pairs]
    return all(same_fit) and all(np.array_equal(getattr(a, f), getattr(b, f)) for a, b in pairs for f in FIELDS)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_hit_is_identical_and_runs_no_forward(cache: ActivationCache, bf16: bool) -> None:
    model = make_model()
    plain = latents(model, None, bf16)
    tap = ReadTap(model, 0)
    filled = latents(model, cache, bf16)
    assert tap.fired == len(groups()) == cache.misses == len(cache.keys) == 2
    for opened in (cache, again(cache)):
        found = latents(model, opened, bf16)
        assert opened.hits == 2 and tap.fired == 2
        assert identical(found, plain)
    tap.remove()
    assert identical(filled, plain)


def test_every_sae_and_one_kind_of_position(cache: ActivationCache, tiny_sae: Any) -> None:
    plain = read_latents(make_model(), tiny_sae, groups(), LAYER, "response", bf16=False)
    for _ in range(2):
        found = read_latents(make_model(), tiny_sae, groups(), LAYER, "response", bf16=False, cache=cache)
        assert all(np.array_equal(getattr(found, f), getattr(plain, f)) for f in FIELDS)
    assert (cache.misses, cache.hits) == (2, 2)


def test_conversation_numbers_are_the_readers_own(cache: ActivationCache) -> None:
    seen: list[list[int]] = []
    for shift in (0, 10):
        moved = [replace(b, index=[i + shift for i in b.index]) for b in groups()]
        read_residuals_at(
            make_model(), moved, LAYER, POSITIONS, lambda index, *_: seen.append(index), False, cache=cache
        )
    assert cache.hits == 2
    assert seen[2:] == [[i + 10 for i in index] for index in seen[:2]]


def test_two_writers_of_one_entry(cache: ActivationCache) -> None:
    key = "a" * 64
    with new_entry(cache.folder, key) as first:
        (first / "file").write_text("first")
        with new_entry(cache.folder, key) as second:
            (second / "file").write_text("second")
        assert (cache.folder / key / "file").read_text() == "second"
    assert (cache.folder / key / "file").read_text() == "second"
    assert cache.keys == [key] and len(list(cache.folder.iterdir())) == 2


def test_writers_readers_and_removers_at_once(cache: ActivationCache) -> None:
    row, x = torch.arange(50), torch.randn(50, D_MODEL)
    wanted, key = Selected(row, x, {"all": row >= 0}), "b" * 64

    def work(number: int) -> list[Selected | None]:
        own, found = again(cache), []
        for turn in range(20):
            own.store(key, wanted, {})
            found.append(own.find(key, x.device))
            if (turn + number) % 3 == 0:
                remove(cache.folder / key)
        return found

    with ThreadPoolExecutor(4) as pool:
        found = [one for many in pool.map(work, range(4)) for one in many if one is not None]
    assert found and all(torch.equal(f.x, x) and torch.equal(f.row, row) for f in found)
    assert {path.name for path in cache.folder.iterdir()} <= {MARKER, key}


def test_the_least_recently_used_go_first(cache: ActivationCache) -> None:
    texts = [groups(1), groups(2)[:1], groups(3)[:1]]
    stream(make_model(), cache, groups=texts[0])
    stream(make_model(), cache, groups=texts[1])
    first, second = cache.keys
    stream(make_model(), cache, groups=texts[0])
    assert cache.keys == [second, first]
    limited = again(cache, limit_gib=(cache.size_bytes * 1.9) / 2**30)
    stream(make_model(), limited, groups=texts[2])
    assert first in limited.keys and second not in limited.keys
    assert limited.size_bytes <= limited.limit_bytes


def test_a_batch_beyond_the_limit_is_not_kept(cache: ActivationCache, caplog: pytest.LogCaptureFixture) -> None:
    small = again(cache, limit_gib=1000 / 2**30)
    assert torch.equal(stream(make_model(), small), stream(make_model(), None))
    assert "larger than the limit" in caplog.text and small.keys == []


def test_clear_leaves_an_empty_cache(cache: ActivationCache) -> None:
    stream(make_model(), cache)
    assert cache.size_bytes == sum(f.stat().st_size for f in cache.folder.rglob("*/*")) > 0
    cache.clear()
    assert cache.size_bytes == 0 and [p.name for p in cache.folder.iterdir()] == [MARKER]
    stream(make_model(), cache)
    assert len(cache.keys) == 2 and cache.hits == 0


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, cache: ActivationCache) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    (tmp_path / "hashes" / ("a" * 64)).mkdir(parents=True)
    (cache.folder / "mine.txt").write_text("x")
    for folder, name in (("notes", "mine.txt"), ("hashes", "aaaa"), ("cache", "mine.txt")):
        with pytest.raises(InputError, match=f"holds '{name}.*no activation cache: choose an empty folder"):
            ActivationCache(tmp_path / folder)
    with pytest.raises(InputError, match=r"could not use .*mine.txt as cache"):
        ActivationCache(tmp_path / "notes" / "mine.txt")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "x"


def test_settings_are_checked(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"limit_gib": 0}, {"limit_gib": float("nan")}, {"shard_mib": -1}]
    for changed in wrong:
        with pytest.raises(InputError, match="must be above 0"):
            ActivationCache(tmp_path / "new", **changed)
    with pytest.raises(InputError, match=r"keeps torch.float32 or torch.bfloat16, not torch.float16"):
        ActivationCache(tmp_path / "new", dtype=torch.float16)
    assert not (tmp_path / "new").exists()


def test_what_killed_processes_left_is_swept(cache: ActivationCache) -> None:
    old, new = cache.folder / ".writing-old", cache.folder / ".writing-new"
    for path in (old, new):
        path.mkdir()
        (path / "shard").write_text("half")
    past = old.stat().st_mtime - STALE_SECONDS - 1
    os.utime(old, (past, past))
    opened = again(cache)
    assert new.exists() and not old.exists() and opened.keys == []
