"""What of a run folder is shared: adapters, SAEs, records, report and latents, in the run folder's own layout."""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from persona_probe import shipped
from persona_probe.config import StudyConfig
from persona_probe.data.world import packaged
from persona_probe.errors import InputError, unknown
from persona_probe.files import expanded
from persona_probe.hub.card import model_card
from persona_probe.hub.neuronpedia import neuronpedia_batch, neuronpedia_explanations
from persona_probe.report.sections import HOLDS_TEXTS
from persona_probe.runs import INCIDENTS, MANIFEST, REFERENCES, RunFolder

PARTS = ("adapters", "sae", "records", "report", "neuronpedia")
"""What a run can be shared as; all are shared unless some are named."""
KINDS = {".json", ".jsonl", ".parquet", ".safetensors", ".md", ".yaml", ".csv", ".html", ".svg", ".jinja"}
"""Endings of files that are shared: nothing that runs code when it is loaded."""
TEXT = {".json", ".jsonl", ".md", ".yaml", ".csv", ".html"}
SAE_FILES = ("cfg.json", "sae_weights.safetensors")
SAE_KINDS = {".json", ".safetensors", ".md", ".yaml"}
"""Endings of an SAE folder's files that are shared; not its texts, which hold bad rows."""
SECRET = re.compile(rb"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16}|ghp_[A-Za-z0-9]{30,})\b")
"""Access tokens of the hub and of common services."""
MACHINE_PATH = re.compile(r'"((?:/|~/|[A-Za-z]:\\)[^"\n]*[/\\][^"\n]*)"')
"""A JSON string that is an absolute path."""


@dataclass(frozen=True)
class Item:
    """One file that is shared."""

    place: str
    """Where it goes, with `/` between folders."""
    part: str
    """One of `PARTS`, or `card`."""
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def read(self) -> bytes:
        """The file."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


@dataclass(frozen=True)
class Contents:
    """The files of a run that are shared, and what a reader should know of them."""

    run: str
    """The run folder."""
    items: tuple[Item, ...]
    notes: tuple[str, ...]
    """What is left out, and what the files tell about this machine."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(item.size for item in self.items)


def contents(run: str | Path, parts: Sequence[str] = (), steps: str = "last", repo: str = "OWNER/NAME") -> Contents:
    """What `push` shares of a run.

    Args:
        parts: some of `PARTS`; empty takes all.
        steps: `last` shares the last checkpoint of each organism and correction, `all` shares all of them.
        repo: the repository's id, for the lines of code in the card.

    Raises:
        InputError: no run folder, an unknown part, nothing to share, or a file that holds an access token.
    """
    folder = RunFolder.open(run)
    for part in parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    if steps not in ("last", "all"):
        raise InputError(f"steps is 'last' or 'all', not {steps!r}")
    chosen = parts or PARTS
    items = [item for item in _run_files(folder.path, steps) if item.part in chosen]
    notes: list[str] = []
    items = _without_kept_texts(items, notes)
    if "sae" in chosen:
        items += _saes(folder.config, notes)
    if "neuronpedia" in chosen and (batch := neuronpedia_batch(folder.path)) is not None:
        text = json.dumps(batch, ensure_ascii=False, allow_nan=False)
        items.append(Item("neuronpedia/batch-0.json", "neuronpedia", text.encode()))
        labels = [json.dumps(row, ensure_ascii=False) + "\n" for row in neuronpedia_explanations(folder.path)]
        if labels:
            items.append(Item("neuronpedia/explanations-0.jsonl", "neuronpedia", "".join(labels).encode()))
    if not items:
        raise InputError(f"{folder.path} has nothing of {', '.join(chosen)} yet: run its stages first")
    notes += _adopted(folder.path) if "adapters" in chosen else []
    items.sort(key=lambda item: item.place)
    card = Item("README.md", "card", model_card(folder, [item.place for item in items], repo).encode())
    items = [card, *items]
    notes += _paths_of_this_machine(items)
    _refuse_secrets(items)
    return Contents(str(folder.path), tuple(items), tuple(notes))


# --- The run folder's own files


def _run_files(root: Path, steps: str) -> Iterator[Item]:
    for path in sorted(root.rglob("*")):
        place = path.relative_to(root)
        hidden = any(part.startswith((".", "_")) for part in place.parts)
        if hidden or path.is_symlink() or not path.is_file() or path.suffix not in KINDS or place.name == REFERENCES:
            continue
        step = next((part for part in place.parts if part.startswith("checkpoint-")), None)
        if step is None:
            part = "report" if path.suffix in (".html", ".svg") or place.parts[0] == "figures" else "records"
        elif steps == "last" and not _is_last(root.joinpath(*place.parts[: place.parts.index(step)]), step):
            continue
        else:
            part = "adapters"
        if place != Path("README.md"):  # the card's place
            yield Item(place.as_posix(), part, path)


def _without_kept_texts(items: Sequence[Item], notes: list[str]) -> list[Item]:
    """Leave out what people asked a server, which `serve --keep-text` wrote down: incidents, and a report with them."""
    held = {item.place for item in items if _holds_texts(item)}
    notes += [f"left out: {place}, which may hold what people asked a server" for place in sorted(held)]
    return [item for item in items if item.place not in held]


def _holds_texts(item: Item) -> bool:
    name = item.place.rpartition("/")[2]
    return name == INCIDENTS or (name == "report.html" and HOLDS_TEXTS.encode() in item.read())


def _is_last(folder: Path, name: str) -> bool:
    steps = [int(n) for p in folder.glob("checkpoint-*") if (n := p.name.removeprefix("checkpoint-")).isdecimal()]
    return name == f"checkpoint-{max(steps, default=-1)}"


def _adopted(root: Path) -> list[str]:
    names = sorted(path.parent.name for path in root.glob(f"arms/*/{REFERENCES}"))
    return (
        [f"left out: the adopted checkpoints of {', '.join(names)}, which are not in the run folder"] if names else []
    )


def _saes(config: StudyConfig, notes: list[str]) -> Iterator[Item]:
    for name in dict.fromkeys([*(one.sae for one in config.all_saes), *config.locate.dictionaries]):
        folder = packaged.SAE if name == packaged.NAME else shipped.find(expanded(name))
        if not folder.is_dir():
            notes.append(f"left out: SAE {name}, which is published; its name is in the manifest")
            continue
        if not all((folder / file).is_file() for file in SAE_FILES):
            notes.append(f"left out: SAE {name}, which is no SAELens folder (`persona-probe saes convert` makes one)")
            continue
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.is_symlink() and path.suffix in SAE_KINDS and not path.name.startswith("."):
                yield Item(f"sae/{folder.name}/{path.name}", "sae", path)


# --- What must not leave this machine, or should be known before it does


def _refuse_secrets(items: Collection[Item]) -> None:
    for item in items:
        if Path(item.place).suffix in TEXT and (found := SECRET.search(item.read())):
            kind = found[0][:3].decode()
            raise InputError(f"{item.place} holds what looks like an access token ({kind}...): take it out of the file")


def _paths_of_this_machine(items: Collection[Item]) -> list[str]:
    manifest = next((item for item in items if item.place == MANIFEST), None)
    if manifest is None:
        return []
    found = sorted(set(MACHINE_PATH.findall(manifest.read().decode("utf-8", "replace"))))
    return [f"the manifest names paths of this machine: {', '.join(found[:3])}"] if found else []
