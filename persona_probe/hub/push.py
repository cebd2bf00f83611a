"""Upload a run to the Hugging Face hub."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from persona_probe.errors import InputError
from persona_probe.hub.contents import Contents, contents
from persona_probe.hub.errors import hub_errors
from persona_probe.writing import whole_folder


@dataclass(frozen=True)
class Pushed:
    """A run that is on the hub."""

    url: str
    """Of the commit."""
    private: bool
    contents: Contents


def push(
    run: str | Path,
    repo: str,
    *,
    parts: Sequence[str] = (),
    steps: str = "last",
    public: bool = False,
    revision: str | None = None,
) -> Pushed:
    """Upload a run's adapters, SAEs, records, report and latents to a model repository, in one commit.

    The repository is made, private, if there is none. The access token is the one that `hf auth login` or HF_TOKEN
    gives; HF_ENDPOINT names another hub. Files that the repository has and the run does not are left alone.

    Args:
        repo: `owner/name`.
        parts: some of `PARTS`; empty takes all.
        steps: `last` or `all` checkpoints of each organism.
        public: make the repository public, or accept one that is.
        revision: a branch that exists; None takes the main one.

    Raises:
        InputError: nothing to share, a file with an access token, a public repository without `public`, or whatever
            the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    shared, api = contents(run, parts, steps, repo), HfApi()
    with hub_errors(repo):
        try:
            private = bool(api.repo_info(repo).private)
        except RepositoryNotFoundError:
            private = not public
            api.create_repo(repo, private=private, exist_ok=True)
        if not private and not public:
            raise InputError(f"{repo} is public, and organisms are misaligned on purpose: add --public to upload to it")
        operations = [
            CommitOperationAdd(item.place, item.content if isinstance(item.content, bytes) else str(item.content))
            for item in shared.items
        ]
        message = f"{Path(shared.run).name}: {len(operations)} files"
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*about to commit a data file"
            )  # the records are meant to be there
            commit = api.create_commit(repo, operations, commit_message=message, revision=revision)
    return Pushed(commit.commit_url, private, shared)


def write_contents(shared: Contents, out: Path) -> Path:
    """Write what would be uploaded into a new folder.

    Raises:
        InputError: the folder exists, or cannot be written.
    """
    if out.exists():
        raise InputError(f"{out} exists: choose another --out")
    with whole_folder(out) as place:
        for item in shared.items:
            target = place / item.place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(item.read())
    return out
