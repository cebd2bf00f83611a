"""What every stage of a study works with: the run folder, and model, tokenizer and SAE loaded once."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.config import Loading, ReadSae, StudyConfig, check_seed
from persona_probe.data.chat import Conversation
from persona_probe.data.load import (
    SETS,
    Row,
    has_2x2,
    load_contrast,
    load_contrast_2x2,
    load_data,
    load_rows,
    read_contrast_2x2_file,
    read_contrast_file,
)
from persona_probe.data.template import TEMPLATE_SETTINGS
from persona_probe.errors import InputError
from persona_probe.evaluate.contrast import ContrastItems
from persona_probe.evaluate.questions.read import read_prompts
from persona_probe.models.adapters import folded, frozen_in_bf16, organism, organisms
from persona_probe.models.layers import layer_device, output_head
from persona_probe.models.load import load_model, load_tokenizer
from persona_probe.models.places import Place
from persona_probe.runs import RunFolder
from persona_probe.saes.hooks import PlacedSae, sae_layer
from persona_probe.saes.load import check_fit, check_placed, find_folder, load_sae
from persona_probe.units import Workers

log = logging.getLogger(__name__)

PACKAGED_2X2 = "general_contrast_2x2"


class ModelSettings(Protocol):
    """The settings of a study that say which model and SAE to load."""

    @property
    def model(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def sae(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def contrast(self) -> str: ...
    @property
    def device(self) -> str: ...


class ModelAndSae:
    """A base model, its tokenizer and its SAE, each loaded on first use."""

    config: ModelSettings
    loading: Loading = Loading()
    """How the model's weights are loaded."""
    sae_dtype: str | None = None
    """Precision of the SAE; None is its own."""

    workers: Workers | None = None
    """Other processes that make units of the run; None makes them in this one."""

    def __init__(self, config: ModelSettings, device: str | None = None) -> None:
        self.config = config
        self.device = pick_device(device or config.device)

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return self.load()

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load another copy of the base model and its tokenizer, by the study's settings."""
        config = self.config
        settings: dict[str, Any] = {name: getattr(config, name, None) for name in TEMPLATE_SETTINGS}
        return load_model(
            config.model, revision=config.revision, device=self.device, **settings, **asdict(self.loading)
        )

    @property
    def model(self) -> PreTrainedModel:
        """The base model; stages put adapters on it and take them off again."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return self._loaded[1]

    def tokenizer_alone(self) -> PreTrainedTokenizerBase:
        """The tokenizer without the base model in memory."""
        settings = {name: getattr(self.config, name, None) for name in TEMPLATE_SETTINGS}
        return load_tokenizer(self.config.model, revision=self.config.revision, **settings)

    @cached_property
    def sae(self) -> Any:
        """The SAE, checked against the model."""
        split = self.loading.device_map is not None
        sae = load_sae(self.sae_place(self.config.sae), device="cpu" if split else self.device, dtype=self.sae_dtype)
        layer = sae_layer(sae, self.config.layer)
        check_fit(sae, self.model, layer)
        return sae.to(layer_device(self.model, layer)) if split else sae

    def sae_place(self, name: str) -> str:
        """Where an SAE of the config lies."""
        return name

    @cached_property
    def layer(self) -> int:
        """The decoder layer that is read and steered."""
        return sae_layer(self.sae, self.config.layer)

    def load_further(self, further: Sequence[ReadSae]) -> list[PlacedSae]:
        """SAEs that are read beside the study's own, checked against the model."""
        placed = []
        for one in further:
            split = self.loading.device_map is not None
            sae = load_sae(self.sae_place(one.sae), device="cpu" if split else self.device, dtype=self.sae_dtype)
            placed.append(PlacedSae.of(sae, one.layer, one.label))
            check_placed(placed[-1], self.model)
            if split:
                sae.to(layer_device(self.model, placed[-1].reads.layer))
        return placed

    def contrast_rows(self, split: str) -> list[Row]:
        """Contrast items of one split, from the packaged set or from a file."""
        if self.config.contrast == "general_contrast":
            return load_contrast(split)
        return read_contrast_file(self.config.contrast, split)


def name_of_2x2(config: StudyConfig) -> str | None:
    """The set that tells a study's harm from its register: its packaged name or a file; None where there is none."""
    if config.contrast_2x2 is not None:
        return None if config.contrast_2x2 == "none" else config.contrast_2x2
    if config.contrast == "general_contrast":
        return PACKAGED_2X2
    return config.contrast if has_2x2(config.contrast) else None


def load_2x2(name: str, split: str) -> list[Row]:
    """The items of one split of a 2x2 set.

    Raises:
        InputError: a file that cannot be read, without one of the four answers, or without rows of that split.
    """
    return load_contrast_2x2(split) if name == PACKAGED_2X2 else read_contrast_2x2_file(name, split)


class Context(ModelAndSae):
    """A study's run folder, and the things loaded for it, each on first use."""

    config: StudyConfig

    def __init__(self, run: RunFolder, device: str | None = None, seed: int | None = None) -> None:
        super().__init__(run.config, device)
        self.run, self.loading, self.sae_dtype = run, self.config.loading, self.config.sae_dtype
        self.seed = self._draw_seed(seed)

    def sae_place(self, name: str) -> str:
        """As the config names it, or the copy that came with a run of somebody else (`persona-probe pull`)."""
        copy = self.run.path / "sae" / Path(name).name
        return str(copy) if (copy / "cfg.json").is_file() and not find_folder(name).is_dir() else name

    @classmethod
    def open(cls, path: str | Path, device: str | None = None, seed: int | None = None) -> "Context":
        """The context of an existing run folder.

        Raises:
            InputError: the folder is no run folder, or the device is not available.
        """
        return cls(RunFolder.open(path), device, seed)

    def opener(self, device: str) -> "Callable[[], Context]":
        """Makes this context in another process."""
        return partial(_reopened, self.run.path.resolve(), self.config, device)

    def _draw_seed(self, seed: int | None) -> int:
        """The seed of random controls, bootstraps and samples: fixed by the first command that names one."""
        if seed is not None:
            check_seed(seed)
        recorded = self.run.manifest.get("draw_seed")
        if recorded is None:
            first = self.config.seeds[0] if seed is None else seed
            recorded = self.run.edit_manifest(lambda manifest: manifest.setdefault("draw_seed", first))["draw_seed"]
        if seed is not None and seed != recorded:
            raise InputError(f"this run draws with seed {recorded}, not {seed}: leave --seed out, or use another --out")
        return int(recorded)

    @cached_property
    def saes(self) -> list[PlacedSae]:
        """All SAEs of the study with their places; the first is the one whose latents are tested for cause."""
        first, *further = self.config.all_saes
        place = Place(self.layer)
        return [PlacedSae(self.sae, place, place, first.label), *self.load_further(further)]

    @cached_property
    def evaluation(self) -> ContrastItems:
        """Items that effects are reported on."""
        return ContrastItems.build(self.tokenizer, self.contrast_rows("evaluation"), batch_size=32)

    @cached_property
    def selection(self) -> ContrastItems:
        """Items that choose latents, and nothing else."""
        return ContrastItems.build(self.tokenizer, self.contrast_rows("selection"), batch_size=32)

    @property
    def set_2x2(self) -> str | None:
        """The set that tells harm from register: its packaged name or a file; None where the study has none."""
        return name_of_2x2(self.config)

    def rows_2x2(self, split: str) -> list[Row]:
        """2x2 items of one split; none in a study without such a set.

        Raises:
            InputError: a file that cannot be read, without one of the four answers, or without rows of that split.
        """
        return [] if self.set_2x2 is None else load_2x2(self.set_2x2, split)

    @cached_property
    def probes(self) -> list[Conversation]:
        """The monitor's probes."""
        return load_data(self.config.monitor.probes, allow_prompts=True)[: self.config.monitor.limit]

    @contextmanager
    def organism(self, arm: str, seed: int, step: int | None = None, fold: bool = False) -> Iterator[nn.Module]:
        """The organism of an arm and seed at a step (None: its last) while the block lasts; arm `base` is the base.

        Args:
            fold: fold its adapter into bf16 weights where that is faster. It rounds, by about 0.005 nats per token in a
                contrast index: for sweeps, which compare one model with itself, and samples; not for readings.
        """
        checkpoint = None if arm == "base" else self.run.checkpoint(arm, seed, self.last_step(arm, seed, step))
        folds, in_bf16 = fold and checkpoint is not None, self.device == "cpu" and self.config.bf16
        with (
            organism(self.model, checkpoint) as model,
            folded(model, self.config.bf16) if folds else nullcontext(),
            frozen_in_bf16(output_head(model) if folds else model, in_bf16),
        ):
            yield model

    @contextmanager
    def trajectory(self, arm: str, seed: int) -> Iterator[Callable[[int], nn.Module]]:
        """A function from step to organism for all checkpoints of one run, ready to be measured.

        Each takes the place of the one before: keep no reference to a model when you ask for the next. Adapters of one
        shape only have their tensors copied in.
        """
        in_bf16 = self.device == "cpu" and self.config.bf16
        with organisms(self.model) as opened, ExitStack() as casts:

            def at(step: int) -> nn.Module:
                casts.close()  # they hold bf16 copies of the weights that are about to change
                model = opened(self.run.checkpoint(arm, seed, step))
                casts.enter_context(frozen_in_bf16(model, in_bf16))
                return model

            yield at

    def base(self) -> AbstractContextManager[nn.Module]:
        """The base model, ready to be measured."""
        return self.organism("base", self.config.seeds[0])

    def last_step(self, arm: str, seed: int, step: int | None = None) -> int:
        """`step`, or the last step of that arm's run."""
        return self.run.steps(arm, seed)[-1] if step is None else step


def _reopened(path: Path, config: StudyConfig, device: str) -> Context:
    """A run's context in another process; its config may have other rankers than the manifest's."""
    ctx = Context.open(path, device)
    ctx.config = config
    return ctx


def pick_device(name: str) -> str:
    """`auto` becomes `cuda` if there is a GPU, else `cpu`.

    Raises:
        InputError: a device that this machine does not have.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}: write cpu, cuda or auto") from error
    device_counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= device_counts.get(device.type, 0):
        raise InputError(f"device {name!r} is not available here: write --device cpu")
    return name


def sample_questions(ctx: Context) -> list[dict[str, str]]:
    """Rows with id, category and question, of the packaged set or of the user's file."""
    spec = ctx.config.samples.questions
    if spec in SETS:
        return [{"id": r["id"], "category": r.get("category", ""), "question": r["question"]} for r in load_rows(spec)]
    conversations = read_prompts(spec)
    longer = [n for n, turns in enumerate(conversations, start=1) if len(turns) > 1]
    if longer:
        raise InputError(
            f"samples.questions {spec!r}: row {longer[0]} has a system prompt or earlier turns, and these answers are "
            "to bare questions; ask it with `persona-probe evaluate --questions` instead"
        )
    return [{"id": f"q{n:03d}", "category": "", "question": c[-1]["content"]} for n, c in enumerate(conversations)]
