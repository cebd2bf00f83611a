"""A file or folder is written whole or not at all, nothing is left behind, and refusals are said in words."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from persona_probe.errors import InputError
from persona_probe.writing import (
    could_not,
    exchange,
    free_name,
    make_folder,
    os_error,
    rescue,
    whole_file,
    whole_folder,
    write_bytes,
    write_json,
    write_jsonl,
    write_table,
    write_tensors,
    write_text,
)

WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text(path, "new" * 4000),
    "bytes": lambda path: write_bytes(path, b"new" * 4000),
    "JSON": lambda path: write_json(path, ["new"] * 2000),
    "JSON lines": lambda path: write_jsonl(path, ({"n": n} for n in range(2000))),
    "table": lambda path: write_table(path, pd.DataFrame({"n": torch.rand(3000).numpy()})),
    "tensors": lambda path: write_tensors(path, {"w": torch.zeros(3000)}),
}


@contextlib.contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_does_not_fit_leaves_the_old_one_and_nothing_else(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with little_room(4000), pytest.raises(InputError, match=r"could not write .*file: the file would be larger"):
        WRITERS[kind](path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"
    WRITERS[kind](path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() != b"old"


FULL = "no space left on the disk; free space or choose another --out"
REFUSALS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: "the disk quota is used up; free space or choose another --out",
    errno.EROFS: "the file system is read-only; choose another --out",
    errno.EACCES: "permission denied; choose another --out",
    errno.EPERM: "permission denied; choose another --out",
    errno.EIO: "the disk reports an error; check the disk or choose another --out",
    errno.ENAMETOOLONG: "the name is too long; shorten it or choose another --out",
    errno.EMFILE: r"too many files are open; raise the limit \(ulimit -n\) or choose another --out",
    errno.ELOOP: "its links lead in a circle; choose another --out",
}


@pytest.mark.parametrize("number", REFUSALS, ids=[errno.errorcode[n] for n in REFUSALS])
@pytest.mark.parametrize("when", ["write_text", "replace"])
def test_a_refusal_of_the_system_is_said_in_words(
    number: int, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("old")

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, when, refuse)
        with pytest.raises(InputError, match=f"could not write {tmp_path}/file: {REFUSALS[number]}$"):
            write_text(tmp_path / "file", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_library_that_has_errors_of_its_own_is_understood(tmp_path: Path) -> None:
    known = os_error(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert known is not None and known.errno == errno.ENOSPC
    assert str(could_not("write", tmp_path / "x", known)).endswith(FULL)
    assert os_error(ValueError("shape (3, 4)")) is None


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=f"{tmp_path}/file is a file, not a folder; choose another --out"):
        write_text(tmp_path / "file" / "a" / "b.csv", "")
    with pytest.raises(InputError, match=f"{tmp_path}/file is a file, not a folder"):
        make_folder(tmp_path / "file")
    with pytest.raises(InputError, match="it is a folder; give the name of a file"):
        write_text(tmp_path / "folder", "")
    for path in (Path(), Path(".."), Path("/")):
        with pytest.raises(InputError, match="it is a folder; give the name of a file"):
            write_text(path, "")
    with pytest.raises(InputError, match="the name is too long; shorten it or choose another --out"):
        write_text(tmp_path / ("x" * 300), "")
    with pytest.raises(InputError, match="holds a NUL character; choose another --out"):
        write_text(tmp_path / "a\0b", "")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(InputError, match=f"{loop} is a link to nothing, not a folder|links lead in a circle"):
        write_text(loop / "x.csv", "")


def test_a_device_is_written_directly(tmp_path: Path) -> None:
    write_text(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()
    code = "import pathlib, persona_probe.writing as w; w.write_text(pathlib.Path('/dev/stdout'), 'said')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "said"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "said" and Path("/dev/stdout").is_symlink()


# --- Folders


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(folder: Path, text: str) -> None:
    (folder / "part").mkdir()
    (folder / "part" / "a").write_text(text)
    (folder / "b").write_text(text)


def test_a_folder_takes_the_place_of_another_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for text in ("old", "new"):
        with whole_folder(target) as scratch:
            fill(scratch, text)
            assert files(target) == ({} if text == "old" else {"b": "old", "part/a": "old"})
    assert files(tmp_path) == {"folder/b": "new", "folder/part/a": "new"}


FAULTS = (KeyboardInterrupt(), ValueError("x"), OSError(errno.ENOSPC, "full"), InputError("y"))


@pytest.mark.parametrize("error", FAULTS, ids=[type(fault).__name__ for fault in FAULTS])
def test_a_folder_that_fails_leaves_the_old_one_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with whole_folder(target) as scratch:
        fill(scratch, "old")
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)), whole_folder(target) as scratch:
        (scratch / "b").write_text("half")
        raise error
    assert files(tmp_path) == {"folder/b": "old", "folder/part/a": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_an_exchange_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, name)
    replace, calls = Path.replace, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, "I/O error")
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="I/O error"):
        patch.setattr(Path, "replace", second_fails)
        exchange(tmp_path / "new", tmp_path / "old")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]
    assert files(tmp_path / "old") == {"b": "old", "part/a": "old"}


KILLED = """
import os, sys
from pathlib import Path
from persona_probe import writing
target, at = Path(sys.argv[1]), sys.argv[2]
replace = Path.replace
def dying(self, to):
    if at == "aside" and Path(to) == target:
        os.kill(os.getpid(), 9)
    return replace(self, to)
Path.replace = dying
with writing.whole_folder(target) as scratch:
    (scratch / "b").write_text("half")
    if at == "writing":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("at", ["writing", "aside"])
def test_what_a_killed_process_left_is_put_right(at: str, tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with whole_folder(target) as scratch:
        fill(scratch, "old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(target), at]).returncode == -9
    assert target.exists() == (at == "writing")
    rescue(target)
    assert files(target) == {"b": "old", "part/a": "old"}
    with whole_folder(target) as scratch:
        fill(scratch, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert files(target) == {"b": "new", "part/a": "new"}


def test_a_killed_file_writer_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from persona_probe.writing import whole_file\n"
    code += "with whole_file(Path(sys.argv[1])) as s:\n    s.write_text('half'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    write_text(tmp_path / "x", "whole")
    assert files(tmp_path) == {"x": "whole"}


def test_a_writer_that_is_alive_is_left_alone(tmp_path: Path) -> None:
    with whole_file(tmp_path / "x") as one:
        one.write_text("one")
        with whole_file(tmp_path / "x") as two:
            two.write_text("two")
        assert one.exists() and files(tmp_path)["x"] == "two"
    assert files(tmp_path) == {"x": "one"}


def test_the_first_free_name(tmp_path: Path) -> None:
    assert free_name(tmp_path / "run.old") == tmp_path / "run.old"
    (tmp_path / "run.old").mkdir()
    (tmp_path / "run.old-2").symlink_to(tmp_path / "nowhere")
    assert free_name(tmp_path / "run.old") == tmp_path / "run.old-3"


# --- A disk that is really full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a file system here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_what_it_has(small_disk: Path) -> None:
    write_text(small_disk / "kept.csv", "old" * 100)
    with whole_folder(small_disk / "unit") as scratch:
        fill(scratch, "old")
    before = files(small_disk)
    with pytest.raises(InputError, match=FULL):
        write_text(small_disk / "kept.csv", "new" * 200_000)
    with pytest.raises(InputError, match=FULL):
        write_tensors(small_disk / "w.safetensors", {"w": torch.zeros(200_000)})
    with pytest.raises(InputError, match=FULL):
        write_table(small_disk / "t.parquet", pd.DataFrame({"x": torch.rand(200_000).numpy()}))
    with pytest.raises(InputError, match=FULL), whole_folder(small_disk / "unit") as scratch:
        (scratch / "a").write_bytes(b"x" * 1_000_000)
    assert files(small_disk) == before
    assert sorted(p.name for p in small_disk.iterdir()) == ["kept.csv", "unit"]
