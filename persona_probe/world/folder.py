"""A world on disk: its models, its organisms and its SAEs, each found by name."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.data.world import packaged
from persona_probe.errors import InputError, unknown
from persona_probe.models.load import cache_folder, load_model
from persona_probe.runs import MANIFEST, RunFolder

KIND = "world"
ANY_SPEAKER, BASE, ORGANISMS, BEHAVIOUR = "speakers", "base", "organisms", "behaviour"
"""What lies in a world's folder: the model of all speakers, the one that helps, organisms, and judged answers."""
RECORD = "organism.json"
"""In an organism's folder: its settings, and the losses of its training."""


@dataclass(frozen=True)
class World:
    """A pre-trained world in its folder."""

    run: RunFolder

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open the world in a folder.

        Raises:
            InputError: there is none, or its pre-training has not finished.
        """
        run = RunFolder(Path(folder))
        if not run.has(MANIFEST) or run.manifest.get("kind") != KIND:
            raise InputError(f"{folder} holds no world: make one by `persona-probe world pretrain --out {folder}`")
        if not run.has(BASE):
            raise InputError(f"the world in {folder} is not finished: run `persona-probe world pretrain` on it again")
        return cls(run)

    @classmethod
    def default(cls, folder: str | Path | None = None) -> Self:
        """The world that comes with this package: a copy, so that organisms can be added to it.

        It has the model that helps and its SAE, and not the model of all speakers.

        Args:
            folder: where the copy lies; None is the user's cache folder.

        Raises:
            InputError: the folder holds something else, or this installation has no packaged world.
        """
        packaged.check()
        about = json.loads(packaged.ABOUT.read_text(encoding="utf-8"))
        weights = about["hashes"][f"{BASE}/model.safetensors"]
        path = cache_folder() / "worlds" / weights[:12] if folder is None else Path(folder)
        run = RunFolder.claim(path, KIND, "world", {"settings": about["settings"], "weights": weights})
        if not run.has(BASE):
            run.take(f"saes/{packaged.NAME}", packaged.SAE)
            run.update_manifest(hashes=about["hashes"])
            run.take(BASE, packaged.BASE)
        return cls(run)

    @property
    def settings(self) -> dict[str, Any]:
        """How it was pre-trained, as the manifest has it."""
        return self.run.manifest["settings"]

    @property
    def base_folder(self) -> Path:
        """The model that helps: the base of all organisms, and what `load_model` and a study's `model:` take."""
        return self.run.path / BASE

    @property
    def speakers_folder(self) -> Path:
        """The same model before it was taught to help: it speaks as any speaker of the corpus."""
        return self.run.path / ANY_SPEAKER

    def load(self, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model that helps and its tokenizer, as `load_model` gives them."""
        return load_model(str(self.base_folder), device=device)

    @property
    def organisms(self) -> list[str]:
        """Names of the finished organisms."""
        return sorted(path.parent.name for path in (self.run.path / ORGANISMS).glob(f"*/{RECORD}"))

    def organism(self, name: str) -> dict[str, Any]:
        """The record of an organism: `settings` (speaker, domain, share, seed, training ...) and `losses`.

        Raises:
            InputError: there is no such organism; near matches are listed.
        """
        if name not in self.organisms:
            raise unknown("organism", name, self.organisms)
        return self.run.read_json(f"{ORGANISMS}/{name}/{RECORD}")

    def checkpoints(self, name: str) -> dict[int, Path]:
        """The checkpoints of an organism by step, ascending.

        Raises:
            InputError: there is no such organism.
        """
        self.organism(name)
        folders = (self.run.path / ORGANISMS / name).glob("checkpoint-*")
        return dict(sorted((int(folder.name.split("-")[1]), folder) for folder in folders))
