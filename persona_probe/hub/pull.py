"""Download a run that somebody shared on the Hugging Face hub."""

import shutil
from pathlib import Path, PurePosixPath

from persona_probe.errors import InputError
from persona_probe.hub.contents import KINDS
from persona_probe.hub.errors import hub_errors
from persona_probe.runs import MANIFEST, RunFolder
from persona_probe.writing import whole_folder

PAGES = {".html", ".svg"}
"""Not downloaded: pages of others run scripts. `persona-probe report` draws them again from the records."""


def pull(repo: str, out: str | Path, revision: str | None = None) -> RunFolder:
    """Download a shared run as a run folder, which other commands open; it appears whole or not at all.

    Its pages are left out, since they could hold scripts: `Study.open(out).report()` draws them again.

    Args:
        repo: `owner/name`, as `push` made it.
        out: the new run folder.
        revision: a branch, tag or commit.

    Raises:
        InputError: the folder exists, the repository holds no run or a file name that leaves its folder, or whatever
            the hub refuses.
    """
    from huggingface_hub import HfApi

    place = Path(out)
    if place.exists():
        raise InputError(f"{place} exists: choose another --out")
    api = HfApi()
    with hub_errors(repo):
        names = api.list_repo_files(repo, revision=revision)
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise InputError(f"{repo} holds {name!r}, which would leave the run folder: it is not downloaded")
    if MANIFEST not in names:
        raise InputError(f"{repo} holds no run: it has no {MANIFEST}; `persona-probe push` makes one")
    patterns = [_exactly(name) for name in names if PurePosixPath(name).suffix in KINDS - PAGES]
    with whole_folder(place) as scratch:
        with hub_errors(repo):
            api.snapshot_download(repo, revision=revision, local_dir=scratch, allow_patterns=patterns)
        shutil.rmtree(scratch / ".cache", ignore_errors=True)  # the hub library's notes
        _ = RunFolder.open(scratch).config  # a damaged manifest is refused before the folder appears
    return RunFolder.open(place)


def _exactly(name: str) -> str:
    """A pattern of fnmatch that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
