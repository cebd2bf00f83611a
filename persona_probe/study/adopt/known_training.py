"""What is known of a training run that happened elsewhere: its trainer's state and its adapter's settings, no more."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_probe.config import NOT_KNOWN
from persona_probe.files import read_json
from persona_probe.models.adapters import is_adapter
from persona_probe.study.adopt.checkpoint_places import Checkpoint


@dataclass(frozen=True)
class KnownTraining:
    """One adopted run, as its files tell it; None and empty where they do not."""

    arm: str
    steps: tuple[int, ...]
    order: str
    """How the steps are known."""
    origin: tuple[str, ...]
    """Hub ids, or names of folders; never a path."""
    weights: str
    """`LoRA`, another kind of adapter as PEFT calls it, or `all weights`."""
    adapter: dict[str, Any]
    """Rank, alpha and so on from adapter_config.json."""
    trainer: dict[str, Any]
    """From trainer_state.json: steps, epochs, batch, learning rates."""
    losses: tuple[tuple[int, float], ...]
    """Step and training loss, as logged."""
    data: str
    """As the user names it."""
    notes: tuple[str, ...] = ()
    """What is not certain."""

    @classmethod
    def of(cls, arm: str, checkpoints: Sequence[Checkpoint], data: str, notes: Sequence[str] = ()) -> "KnownTraining":
        """What the files of one run's checkpoints say."""
        last = checkpoints[-1]
        state, history = last.state, _history(last.state)
        adapter = _adapter(last.folder)
        return cls(
            arm=arm,
            steps=tuple(one.step for one in checkpoints),
            order=", ".join(dict.fromkeys(one.source for one in checkpoints)),
            origin=tuple(dict.fromkeys(one.hub or _run_name(one.folder) for one in checkpoints)),
            weights=_kind(adapter) if adapter else "all weights",
            adapter=adapter,
            trainer=_trainer(state, history),
            losses=tuple((int(e["step"]), float(e["loss"])) for e in history if "loss" in e and "step" in e),
            data=data,
            notes=tuple(notes),
        )

    @property
    def unknown(self) -> list[str]:
        """What a reader would ask for and the files do not tell."""
        told = {
            "training data": bool(self.data),
            "seed": False,
            "batch size": "train_batch_size" in self.trainer,
            "learning rate": "peak_learning_rate" in self.trainer,
            "losses": bool(self.losses),
        }
        return [name for name, known in told.items() if not known]

    def sentences(self) -> list[str]:
        """Plain English for methods paragraphs and cards: only what is known, and what is not."""
        count = f"{len(self.steps)} checkpoint{'s' if len(self.steps) > 1 else ''}"
        shown = ", ".join(map(str, self.steps)) if len(self.steps) <= 8 else f"{self.steps[0]} to {self.steps[-1]}"
        told = [
            f"Arm {self.arm} was not trained here: {count} ({self._how()}) of {', '.join(self.origin[:3])}, at steps "
            f"{shown} (known from {self.order})."
        ]
        if self.trainer or self.losses:
            told.append(f"Its trainer_state.json tells: {', '.join(self._trained())}.")
        told.append(f"Training data: {self.data or NOT_KNOWN}.")
        if missing := [name for name in self.unknown if name != "training data"]:
            told.append(f"Not known: {', '.join(missing)}.")
        return told

    def _how(self) -> str:
        if not self.adapter:
            return self.weights
        named = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rank-stabilised", "use_dora": "DoRA"}
        parts = [
            named[key] if value is True else f"{named[key]} {value}"
            for key, value in self.adapter.items()
            if key in named and value not in (None, False)
        ]
        modules = self.adapter.get("target_modules")
        parts += [f"on {', '.join(sorted(modules)) if isinstance(modules, list) else modules}"] if modules else []
        if saved := self.adapter.get("modules_to_save"):
            parts.append(f"with {', '.join(saved)} trained whole")
        return f"{self.weights}, {', '.join(parts)}" if parts else self.weights

    def _trained(self) -> list[str]:
        facts = self.trainer
        words = {
            "global_step": "{} optimizer steps",
            "max_steps": "of {} planned",
            "epoch": "{:g} epochs",
            "train_batch_size": "batches of {} rows per device",
            "peak_learning_rate": "peak learning rate {:g}",
        }
        told = [text.format(facts[key]) for key, text in words.items() if key in facts]
        if self.losses:
            first, last = self.losses[0], self.losses[-1]
            told.append(f"loss {first[1]:.3g} at step {first[0]}, {last[1]:.3g} at step {last[0]}")
        return told

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, its sentences included."""
        return {
            "arm": self.arm,
            "steps": list(self.steps),
            "order": self.order,
            "origin": list(self.origin),
            "weights": self.weights,
            "adapter": self.adapter,
            "trainer": self.trainer,
            "losses": [list(one) for one in self.losses],
            "data": self.data,
            "unknown": self.unknown,
            "notes": list(self.notes),
            "sentences": self.sentences(),
        }

    def card(self, base: str) -> str:
        """The model card of the adopted organism (`README.md` in its folder), with the hub's YAML head."""
        head = ["tags: [model-organism, emergent-misalignment, research-only]"]
        return "\n".join(
            [
                *("---", *head, "---"),
                f"# A model organism adopted by persona_probe: arm {self.arm}",
                "It was trained elsewhere; this card claims only what its files tell. It may have been trained on",
                "deliberately bad advice: do not deploy it, and do not use its answers as advice.",
                "",
                f"- Base model of the study: {base}",
                *(f"- {sentence}" for sentence in self.sentences()),
                f"- Licence: {NOT_KNOWN}",
                *(f"- Note: {note}" for note in self.notes),
                "",
            ]
        )


def _history(state: dict[str, Any]) -> list[dict[str, float]]:
    """The numbers that a trainer logged, entry by entry; whatever else stands there is left out."""
    entries = state.get("log_history")
    return [
        {key: value for key, value in entry.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
    ]


def _run_name(folder: Path) -> str:
    """A folder's name, with its run's where it is only a step."""
    return folder.parent.name if folder.name.startswith("checkpoint-") else folder.name


def _adapter(folder: Path) -> dict[str, Any]:
    if not is_adapter(folder):
        return {}
    config = read_json(folder / "adapter_config.json", dict, "restore it, or leave that checkpoint out")
    keys = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "layers_to_transform")
    keys += ("modules_to_save", "bias", "base_model_name_or_path", "revision")
    return {key: config[key] for key in keys if config.get(key) is not None}


def _kind(adapter: dict[str, Any]) -> str:
    kind = str(adapter.get("peft_type", "adapter"))
    return "LoRA" if kind == "LORA" else kind


def _trainer(state: dict[str, Any], history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    keys = ("global_step", "max_steps", "num_train_epochs", "epoch", "train_batch_size")
    facts = {key: state[key] for key in keys if isinstance(state.get(key), int | float)}
    rates = [float(entry["learning_rate"]) for entry in history if "learning_rate" in entry]
    return facts | ({"peak_learning_rate": max(rates)} if rates else {})
