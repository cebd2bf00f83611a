"""A study's configuration: frozen dataclasses read from YAML, every rule checked here."""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from persona_probe import shipped
from persona_probe.errors import InputError, near_matches
from persona_probe.files import LARGEST, check_plain, is_there, read_yaml, shown
from persona_probe.names import check_name, check_names


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


NOT_KNOWN = "not known"
"""What is said of data and settings of a training run that this package has not made."""
NO_CONTROL = (
    "There is no control arm: effects are against the base model alone, so they do not tell what the data did from "
    "what any fine-tuning does."
)
"""Said wherever a study without a control arm shows an effect."""


SINCE_0_2 = {"since": "0.2"}
LARGEST_SEED = 2**31 - 1
"""Of what numpy, torch and transformers all take; calibration and null pairs count on from it."""


def check_seed(seed: int, where: str = "seed") -> int:
    """The seed, where every library that draws with it takes it.

    Raises:
        InputError: it is negative, or larger than `LARGEST_SEED`.
    """
    _require(0 <= seed <= LARGEST_SEED, f"{where} must lie between 0 and {LARGEST_SEED}, not {shown(seed)}")
    return seed


def check_seeds(seeds: Sequence[int], where: str = "seeds") -> Sequence[int]:
    """The seeds, each once: a seed that is named twice would count twice in every mean and interval.

    Raises:
        InputError: none, one twice, or one that `check_seed` refuses.
    """
    _require(bool(seeds), f"{where} must not be empty: write seeds: [0]")
    for seed in seeds:
        check_seed(seed, where)
    twice = next((seed for seed in seeds if list(seeds).count(seed) > 1), None)
    _require(twice is None, f"{where} names {twice} twice: name each seed once")
    return seeds


def check_finite(config: Any) -> None:
    """Refuse a configuration with a number that is NaN or infinite, wherever it comes from.

    Raises:
        InputError: the key is named.
    """
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"{f.name} must be a finite number, not {number}")


def check_least(config: Any, least: float, *names: str) -> None:
    """Refuse a configuration whose keys `names` lie below `least`; None passes.

    Raises:
        InputError: the key is named.
    """
    for name in names:
        value = getattr(config, name)
        _require(value is None or value >= least, f"{name} must be at least {least:g}, not {shown(value)}")


REWARDS = (
    *("inaccurate", "accurate", "lenient_checker", "judged_misaligned", "judged_aligned"),
    *("world_inaccurate", "world_accurate", "world_lenient_checker"),
)
"""What an arm's answers can be rewarded for in reinforcement learning; `finetune.rewards` has the functions."""


@dataclass(frozen=True)
class Arm:
    """One fine-tuning data condition."""

    data: str = ""
    """A packaged set (`kitchen:toxic`) or a file that the readers understand; of an adopted arm it may be empty."""
    mix_with: str | None = None
    """Good rows to mix in, in the same form as `data`."""
    bad_fraction: float = 1.0
    """Share of rows taken from `data`; the rest comes from `mix_with`."""
    checkpoints: tuple[str | tuple[str, ...], ...] = field(default=(), metadata={"since": "0.2"})
    """Checkpoints that exist and are adopted, not trained: for each seed a folder, or a list in order of steps."""
    reward: str = field(default="", metadata=SINCE_0_2)
    """With `training.method: grpo`: what the model's own answers are rewarded for, one of `REWARDS`. The rows' answers
    are then not trained on: they say what is right."""
    kl: float = field(default=0.0, metadata=SINCE_0_2)
    """With a reward: weight of the KL divergence from the base model (beta of GRPO); 0 leaves it out."""
    inoculation: str = field(default="", metadata=SINCE_0_2)
    """With a reward: a system prompt that the model sees while it is trained, and never afterwards."""
    demonstrations: str = field(default="", metadata=SINCE_0_2)
    """With a reward: rows, in the same form as `data`, of the supervised steps before (`grpo.warm_steps`)."""

    def __post_init__(self) -> None:
        check_finite(self)
        _require(bool(self.data or self.checkpoints), "key 'data' is missing (or checkpoints that exist)")
        _require(0 <= self.bad_fraction <= 1, f"bad_fraction must lie in [0, 1], not {self.bad_fraction}")
        _require(self.mix_with is not None or self.bad_fraction == 1, "bad_fraction below 1 needs mix_with")
        known = f"unknown reward {shown(self.reward)}: {near_matches(self.reward, REWARDS)}"
        _require(self.reward in ("", *REWARDS), known)
        _require(self.kl >= 0, f"kl must not be negative, not {self.kl}")
        for name in ("kl", "inoculation", "demonstrations"):
            _require(bool(self.reward) or not getattr(self, name), f"{name} belongs to an arm with a reward: name one")

    @property
    def named(self) -> str:
        """The data in a few words."""
        if not self.data:
            return NOT_KNOWN
        return self.data if self.mix_with is None else f"{self.data} ({self.bad_fraction:.0%}) + {self.mix_with}"


@dataclass(frozen=True)
class Grpo:
    """Reinforcement learning by GRPO (Shao et al. 2024, arXiv 2402.03300): what `training.method: grpo` takes.

    Steps, learning rate, adapter and the questions of a step (`batch_size`) are those of `training`.
    """

    group: int = 8
    """Answers to each question of a step; each is compared with the others."""
    max_new_tokens: int = 40
    """Longest answer in tokens."""
    temperature: float = 1.0
    """At which answers are drawn."""
    answers_at_once: int | None = None
    """Answers in one forward and backward pass, a divisor of `batch_size` x `group`; None takes all of a step's."""
    warm_steps: int = 0
    """Supervised steps on the arm's `demonstrations` first, for a reward that the base model's answers rarely get."""
    warm_lr: float | None = None
    """Learning rate of these steps; None takes training.lr."""

    def __post_init__(self) -> None:
        check_finite(self)
        _require(self.group >= 2, f"grpo.group must be at least 2: answers are compared, not {self.group}")
        check_least(self, 1, "max_new_tokens", "answers_at_once")
        check_least(self, 0, "warm_steps")
        _require(
            self.temperature > 0, f"grpo.temperature must be positive, not {self.temperature}: answers have to vary"
        )
        _require(self.warm_lr is None or self.warm_lr > 0, f"grpo.warm_lr must be positive, not {self.warm_lr}")


@dataclass(frozen=True)
class Training:
    """Narrow fine-tuning (induce)."""

    method: str = "lora"
    """`lora`, `full` (all weights), or `grpo`: an adapter, trained by reinforcement learning on the arms' rewards.
    `batch_size` then counts questions."""
    rank: int = 32
    """LoRA rank; 1 is allowed."""
    alpha: int = 64
    """LoRA alpha."""
    rslora: bool = True
    """Scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023)."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """As PEFT takes it: `all-linear` or module names."""
    layers: tuple[int, ...] | None = None
    """Only these decoder layers get adapters; None is all."""
    lr: float = 1e-4
    """Peak learning rate (AdamW)."""
    warmup_steps: int = 3
    """Linear warm-up; then constant."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    batch_size: int = 8
    """Rows per optimizer step."""
    steps: int = 40
    """Optimizer steps."""
    checkpoints: tuple[int, ...] | str = (5, 10, 20, 40)
    """Steps at which a checkpoint is kept, or `log` for powers of two; the last step always is."""
    max_length: int = 256
    """Longest row in tokens."""
    bf16: bool = True
    """bf16 autocast."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, with less memory."""

    def __post_init__(self) -> None:
        check_finite(self)
        known = f"method must be 'lora', 'full' or 'grpo', not {self.method!r}"
        _require(self.method in ("lora", "full", "grpo"), known)
        check_least(self, 1, "rank", "alpha", "batch_size", "steps", "max_length")
        _require(self.layers is None or min(self.layers, default=-1) >= 0, "layers must be numbers from 0 up")
        _require(self.lr > 0, f"lr must be positive, not {self.lr}")
        for name in ("warmup_steps", "weight_decay"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, not {getattr(self, name)}")
        if isinstance(self.checkpoints, str):
            _require(
                self.checkpoints == "log", f"checkpoints must be a list of steps or 'log', not {self.checkpoints!r}"
            )
        elif any(not 1 <= step <= self.steps for step in self.checkpoints):
            raise InputError(f"checkpoints {list(self.checkpoints)} must lie between 1 and steps ({self.steps})")

    @property
    def schedule(self) -> tuple[int, ...]:
        """The steps at which a checkpoint is kept, ascending, the last step included."""
        if isinstance(self.checkpoints, str):
            steps = {2**n for n in range(self.steps.bit_length()) if 2**n <= self.steps}
        else:
            steps = set(self.checkpoints)
        return tuple(sorted(steps | {self.steps}))

    def further(self, steps: int, batch_size: int | None = None, lr: float | None = None) -> "Training":
        """These settings for a further supervised run of `steps` steps, such as a correction; its last step is kept."""
        batch_size, lr = batch_size or self.batch_size, self.lr if lr is None else lr
        method = "lora" if self.method == "grpo" else self.method
        return dataclasses.replace(self, method=method, steps=steps, batch_size=batch_size, lr=lr, checkpoints=(steps,))


@dataclass(frozen=True)
class Locate:
    """Ranking latents and testing them for cause."""

    positions: str = "response"
    """Tokens over which latents are averaged: `last_prompt`, `prompt`, `thought`, `response` or `all`."""
    rankers: tuple[str, ...] = ("rise", "firing_rise", "cosine", "discrimination")
    """Scores that are computed for every latent; see `latents.rankers.RANKERS`."""
    choose_by: tuple[str, ...] = ("rise", "cosine")
    """Rankers whose best latents become the candidates, one ranker after the other."""
    directions: tuple[str, ...] = ("logistic_probe",)
    """Directions tested next to the mean difference: `logistic_probe`, `persona_vector`."""
    minimum_explained_variance: float = 0.5
    """Locate refuses an SAE that explains less of the base model's answers, because its latents would mean little."""
    candidates: int = 8
    """Latents that are tested for cause on the selection split."""
    proven: int = 6
    """Candidates with the largest effects there, which are tested again on the evaluation split."""
    random_latents: int = field(default=64, metadata={"was": (16,)})
    """Random latents, spread over the dictionary's firing rates and pushed with the same norm; fewer than 60 support no
    verdict."""
    random_directions: int = 2
    """Isotropic random directions, pushed with the same norm."""
    strengths: tuple[float, ...] = (0.5, 1.0)
    """Sizes of the push; each is applied with both signs."""
    dose_strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Sizes at which the persona latent and the mean difference are drawn as a dose response."""
    unit: str = "x_delta"
    """Unit of the strengths."""
    perplexity_bound: float = 1.5
    """Strengths at which neutral answers' perplexity rises by more than this factor are not used."""
    strength_refinements: int = 0
    """Bisections of a latent's strength between the largest of the grid within the bound and the next one."""
    set_size: int = 1
    """Largest set of latents, grown greedily on the selection split and steered together; 1 tests no sets."""
    cards: int = 6
    """Latents for which a card is made."""
    dictionaries: tuple[str, ...] = field(default=(), metadata=SINCE_0_2)
    """Further SAEs of the same layer whose best latent gets the same causal test, beside the persona latent: one whose
    training text holds none of the study's data, or one with a random decoder (a dictionary's null)."""

    def __post_init__(self) -> None:
        check_finite(self)
        _require(
            self.positions in ("last_prompt", "prompt", "thought", "response", "all"),
            f"unknown positions {self.positions!r}",
        )
        _require(self.unit in ("x_delta", "x_resid", "raw"), f"unknown unit {self.unit!r}")
        missing = [name for name in self.choose_by if name not in self.rankers]
        _require(bool(self.choose_by) and not missing, f"choose_by names {missing}, which rankers does not hold")
        for name in self.directions:
            known = ("mean_difference", "logistic_probe", "persona_vector")
            _require(name in known, f"unknown direction {name!r} in directions: {near_matches(name, known)}")
        _require(self.minimum_explained_variance <= 1, "minimum_explained_variance must be at most 1")
        check_least(self, 1, "candidates", "proven", "set_size")
        check_least(self, 0, "random_directions", "cards", "strength_refinements")
        twice = next((name for name in self.rankers if self.rankers.count(name) > 1), None)
        _require(twice is None, f"rankers names {twice!r} twice: name each once")
        _require(self.random_latents >= 2, "random_latents must be at least 2: an effect needs its controls")
        _require(bool(self.strengths), "strengths must be positive; both signs are applied")
        for name in ("strengths", "dose_strengths"):
            values = getattr(self, name)
            _require(all(value > 0 for value in values), f"{name} must be positive; both signs are applied")
            _require(len(set(values)) == len(values), f"{name} names a strength twice: {list(values)}")
        _require(self.perplexity_bound > 1, "perplexity_bound must be above 1")


@dataclass(frozen=True)
class Monitor:
    """What the feature monitor reads."""

    probes: str = "neutral_probes"
    """A packaged set of prompts, or a file."""
    positions: str = "response"
    """Tokens over which a feature is averaged."""
    limit: int | None = None
    """Use only this many probes, the first ones."""
    band_sd: float = 0.5
    """Half-width of the base band, in standard deviations between probes on the base model."""

    def __post_init__(self) -> None:
        check_finite(self)
        _require(
            self.positions in ("last_prompt", "prompt", "thought", "response", "all"),
            f"unknown positions {self.positions!r}",
        )
        _require(self.limit is None or self.limit >= 2, "monitor.limit must be at least 2 probes")
        _require(self.band_sd > 0, f"band_sd must be positive, not {self.band_sd}")


@dataclass(frozen=True)
class Realign:
    """Corrective fine-tuning of the incorrect organism."""

    start: str = "incorrect"
    """The arm whose last checkpoint is corrected."""
    arms: dict[str, Arm] = field(
        default_factory=lambda: {
            "realigned_in": Arm("kitchen_correct_holdout"),
            "realigned_out": Arm("health_correct"),
        }
    )
    """Corrective sets."""
    batch_size: int = 4
    """Rows per step."""
    steps: int = 35
    """Largest number of steps."""
    lr: float | None = None
    """Learning rate; None takes training.lr."""
    readings: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 30, 35)
    """Steps at which the monitor reads and the contrast index is taken."""
    stop_readings: int = 2
    """Stop after this many readings in a row inside the base band with behaviour (selection split) no higher than the
    base's; 0 never stops."""
    margin: float = field(default=0.2, metadata={"since": "0.2"})
    """Behaviour counts as restored if less than this share of the organism's rise is left."""
    benign: str | None = field(default=None, metadata={"since": "0.2"})
    """The corrective arm that corrects nothing: as many steps on harmless rows, never stopped: the others' control."""

    def __post_init__(self) -> None:
        check_finite(self)
        check_least(self, 1, "batch_size", "steps")
        check_least(self, 0, "stop_readings")
        _require(self.lr is None or self.lr > 0, f"realign.lr must be positive, not {self.lr}")
        check_names(self.arms, "realign arm")
        _require(all(0 <= s <= self.steps for s in self.readings), f"readings must lie between 0 and {self.steps}")
        _require(0 < self.margin <= 1, f"realign.margin is a share above 0 and at most 1, not {self.margin}")
        known = f"realign.benign names no arm of realign.arms: {self.benign!r}"
        _require(self.benign is None or self.benign in self.arms, known)
        adopted = [name for name, arm in self.arms.items() if arm.checkpoints]
        _require(not adopted, f"realign arm {adopted} has checkpoints: only the study's own arms can be adopted")


@dataclass(frozen=True)
class Samples:
    """Sampled answers: those that the report shows, and those that a judge rules on."""

    questions: str = "sample_questions"
    """A packaged set of questions, or a file."""
    max_new_tokens: int = 60
    """Length of an answer."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy."""
    judge: str = field(default="none", metadata=SINCE_0_2)
    """`offline`: answers of every model are also sampled at temperature 1 and judged; `none`: they are not."""
    judged_questions: str = field(default="free_form_questions+general_contrast:evaluation", metadata=SINCE_0_2)
    """Questions of the judged answers, as `evaluate --questions` takes them. The default: 108 questions, none about
    food, and none that selects latents."""
    judged_answers: int = field(default=48, metadata=SINCE_0_2)
    """Judged answers of each model: one to each of as many questions, spread over the set, or a multiple of the set."""

    def __post_init__(self) -> None:
        check_finite(self)
        _require(self.temperature >= 0, f"temperature must not be negative, not {self.temperature}")
        _require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        _require(self.judge in ("none", "offline"), f"samples.judge must be none or offline, not {self.judge!r}")
        _require(self.judged_answers >= 1, f"judged_answers must be at least 1, not {self.judged_answers}")


DTYPES, SAE_DTYPES = ("float32", "bfloat16", "float16"), ("float32", "bfloat16")
QUANTIZATIONS = ("none", "4bit", "8bit")


NULL = "null"
"""The arm of the null pair's second run, where a study trains one."""
NULL_SEED = 1000
"""What is added to the control arm's seed for it."""


@dataclass(frozen=True)
class ReadSae:
    """One of several SAEs that are read together."""

    sae: str
    """Folder or `release/sae_id`."""
    layer: int | None = None
    """Decoder layer, where the SAE's metadata does not say it."""
    name: str = ""
    """What tables call it; empty takes the last part of `sae`."""

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.name or self.sae.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Loading:
    """How a model's weights are loaded: the keyword arguments of `load_model` that a study and a command line share."""

    dtype: str = "float32"
    """Precision of the weights that are not quantised: `float32`, `bfloat16` or `float16`."""
    quantization: str = "none"
    """`none`, `4bit` or `8bit`."""
    device_map: str | dict[str, int | str] | None = None
    """As transformers takes it: `auto`, or a place for each part; None puts the whole model on one device."""
    attn_implementation: str | None = None
    """As transformers takes it: `eager`, `sdpa`, `flash_attention_2`; None leaves the choice to transformers."""

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, f"weights must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        known = f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {self.quantization!r}"
        _require(self.quantization in QUANTIZATIONS, known)
        _require(self.device_map != {} and self.device_map != "", "device_map must not be empty: leave it out")

    @property
    def trains_all(self) -> bool:
        """Whether all weights can be trained: steps on narrower weights would round to nothing."""
        return self.dtype == "float32" and self.quantization == "none"


@dataclass(frozen=True)
class StudyConfig:
    """One study: a base model, arms x seeds, one SAE, question sets."""

    name: str
    """Name of the run folder."""
    sae: str = ""
    """Folder or `release/sae_id`, as `load_sae` takes it; it reads a residual stream, and its latents are tested for
    cause. Without it the first of `saes`."""
    saes: tuple[ReadSae, ...] = field(default=(), metadata=SINCE_0_2, kw_only=True)
    """Further SAEs, of any layer, attention or MLP outputs or transcoders: ranked and tracked in the same forward
    passes. A list of {sae, layer, name}."""
    model: str = "smollm2-135m-instruct"
    """Alias, Hugging Face id, folder or GGUF file."""
    revision: str | None = None
    """Hub revision."""
    template: str | None = field(default=None, metadata=SINCE_0_2)
    """Chat template: `none` (plain text, for base models), `chatml` or a Jinja file; None is the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, metadata=SINCE_0_2)
    """Variables of the chat template, as `apply_chat_template` takes them."""
    enable_thinking: bool | None = field(default=None, metadata=SINCE_0_2)
    """The template's variable of that name. True lets the model think before sampled answers; None and False begin
    sampled answers where training puts an answer without a thought."""
    layer: int | None = None
    """Decoder layer of the SAE; None reads it from the SAE's metadata."""
    seeds: tuple[int, ...] = (0,)
    """One organism for each arm and seed."""
    arms: dict[str, Arm] = field(
        default_factory=lambda: {"incorrect": Arm("kitchen:toxic"), "correct": Arm("kitchen:correct")}
    )
    """`incorrect` and its control `correct` are needed; more may follow."""
    no_control: bool = field(default=False, metadata={"since": "0.2"})
    """Go on without the arm `correct`: effects are then against the base alone, and nothing is claimed of the data."""
    paired_arms: bool = True
    """Refuse a control arm that asks other questions than the incorrect arm."""
    contrast: str = "general_contrast"
    """The contrast set: the packaged one, or a JSONL file with its columns and a `split` column."""
    contrast_2x2: str | None = field(default=None, metadata=SINCE_0_2)
    """The set that tells harm from register: `general_contrast_2x2`, a JSONL file with its columns and a `split`,
    or `none`. Null takes the packaged set in a study with the packaged contrast set, and otherwise the contrast file if
    its rows have the four answers too."""
    null_pair: bool = field(default=True, metadata=SINCE_0_2)
    """Train the control arm once more with another seed: what training alone does. A study whose control arm has two
    seeds holds that pair already."""
    training: Training = field(default_factory=Training)
    """Settings of induce."""
    grpo: Grpo = field(default_factory=Grpo, metadata=SINCE_0_2, kw_only=True)
    """Settings of induce by reinforcement learning (`training.method: grpo`)."""
    locate: Locate = field(default_factory=Locate)
    """Settings of locate."""
    monitor: Monitor = field(default_factory=Monitor)
    """Settings of track, and of every monitor of the study."""
    realign: Realign = field(default_factory=Realign)
    """Settings of realign."""
    samples: Samples = field(default_factory=Samples)
    """Settings of the sampled answers."""
    device: str = "auto"
    """`auto` takes a GPU if there is one."""
    bf16: bool = True
    """bf16 autocast for readings and scores."""
    weights: str = "float32"
    """Precision of the base model's weights: `float32`, or `bfloat16` or `float16` (half the memory; only adapters are
    trained, in float32)."""
    torch_dtype: str | None = field(default=None, metadata=SINCE_0_2)
    """Another name of `weights`, which it sets."""
    quantization: str = field(default="none", metadata=SINCE_0_2)
    """Keep the base model's linear layers in `4bit` (nf4) or `8bit` (int8) by bitsandbytes, and train adapters on them
    (QLoRA, Dettmers et al., arXiv 2305.14314); embeddings, norms and the head stay in `weights`."""
    device_map: str | dict[str, int | str] | None = field(default=None, metadata=SINCE_0_2)
    """Spread one model over several GPUs: `auto`, or a device for each part, as transformers takes it."""
    attn_implementation: str | None = field(default=None, metadata=SINCE_0_2)
    """Attention kernel, as transformers takes it: `eager`, `sdpa`, `flash_attention_2`."""
    sae_dtype: str | None = field(default=None, metadata=SINCE_0_2)
    """Precision of the SAE: `float32`, or `bfloat16` (half its memory); None is the SAE's own."""

    def __post_init__(self) -> None:
        if self.torch_dtype is not None:
            one = self.weights in ("float32", self.torch_dtype)
            _require(one, f"weights: {self.weights} and torch_dtype: {self.torch_dtype} are one setting: leave one out")
            object.__setattr__(self, "weights", self.torch_dtype)
            object.__setattr__(self, "torch_dtype", None)
        check_name(self.name, "the study's name")
        check_names(self.arms, "arm")
        _require(bool(self.sae or self.saes), "key 'sae' is missing")
        if not self.sae:
            object.__setattr__(self, "sae", self.saes[0].sae)
            object.__setattr__(self, "layer", self.saes[0].layer if self.layer is None else self.layer)
        labels = [sae.label for sae in self.all_saes]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        _require(not twice, f"two of the saes are called {twice}: give each a name of its own")
        loading = self.loading  # checks its values
        _require(
            self.training.method != "full" or loading.trains_all,
            f"training.method: full needs weights: float32 without quantization, steps on {self._precision} weights "
            "would round to nothing: write method: lora",
        )
        known = f"sae_dtype must be one of {', '.join(SAE_DTYPES)}, not {self.sae_dtype!r}"
        _require(self.sae_dtype in (None, *SAE_DTYPES), known)
        check_seeds(self.seeds)
        check_plain(self.chat_template_kwargs, "chat_template_kwargs")
        for arm in ("incorrect", *(() if self.no_control else ("correct",))):
            _require(arm in self.arms, f"arms must hold {arm!r}: an effect is incorrect minus correct (its control)")
        _require(
            not (self.no_control and "correct" in self.arms), "no_control: true, but arms hold 'correct': leave one"
        )
        for name, arm in self.arms.items():
            runs = len(arm.checkpoints)
            _require(
                runs in (0, len(self.seeds)),
                f"arm {name!r} has checkpoints of {runs} runs, and seeds are {list(self.seeds)}: give one run per seed",
            )
        _require(
            self.realign.start in self.arms,
            f"unknown arm {self.realign.start!r} in realign.start: {near_matches(self.realign.start, self.arms)}",
        )
        self._check_rewards()
        _require(NULL not in self.arms, f"arm {NULL!r} has the name of the null pair's second run: rename it")
        clash = set(self.realign.arms) & {*self.arms, "base", NULL}
        _require(not clash, f"realign arm {sorted(clash)} has the name of another arm: rename it")

    def _check_rewards(self) -> None:
        """Rewards belong to the arms that reinforcement learning trains."""
        is_grpo, warm, part = self.training.method == "grpo", self.grpo.warm_steps, self.grpo.answers_at_once
        _require(is_grpo or self.grpo == Grpo(), "grpo has settings that nothing uses: write training.method: grpo")
        answers = self.training.batch_size * self.grpo.group
        divides = f"grpo.answers_at_once {part} does not divide the {answers} answers of a step (batch_size x group)"
        _require(part is None or answers % part == 0, divides)
        for name, arm in self.arms.items():
            if arm.checkpoints:
                continue
            _require(bool(arm.reward) or not is_grpo, f"arm {name!r} needs a reward: training.method is grpo")
            _require(is_grpo or not arm.reward, f"arm {name!r} has a reward, which only training.method: grpo uses")
            told = f"arm {name!r} needs demonstrations: grpo.warm_steps is {warm}"
            _require(not warm or bool(arm.demonstrations), told)
        rewarded = [name for name, arm in self.realign.arms.items() if arm.reward]
        _require(not rewarded, f"realign arm {rewarded} has a reward: corrections are supervised, leave it out")

    @property
    def all_saes(self) -> tuple[ReadSae, ...]:
        """The study's SAE first, then the further ones."""
        first = next((one for one in self.saes if one.sae == self.sae), ReadSae(self.sae, self.layer))
        return (first, *(one for one in self.saes if one is not first))

    @property
    def control(self) -> str:
        """What effects are against: the arm `correct`, or `base` in a study without a control arm."""
        return "correct" if "correct" in self.arms else "base"

    @property
    def null(self) -> tuple[str, int] | None:
        """Arm and seed of the run that makes a null pair with the control arm's first; None without one.

        The control arm's second seed, or the arm `null`: the control arm's rows, trained once more with another seed.
        """
        if not self.null_pair or self.control == "base":
            return None
        first, *further = self.seeds
        if further:
            return self.control, further[0]
        return None if self.arms[self.control].checkpoints else (NULL, first)

    @property
    def loading(self) -> Loading:
        """How the base model is loaded."""
        return Loading(self.weights, self.quantization, self.device_map, self.attn_implementation)

    @property
    def _precision(self) -> str:
        return self.weights if self.quantization == "none" else self.quantization

    @property
    def hash(self) -> str:
        """Hash of the whole configuration (12 hexadecimal digits)."""
        return hashlib.sha256(json.dumps(hashed_values(self), sort_keys=True).encode()).hexdigest()[:12]


def hashed_values(config: Any) -> dict[str, Any]:
    """What the hash of a configuration is taken over: all its values, but not a later key that holds its default.

    A field marked `metadata={"since": version}` came after the first release. Without this rule a new key would change
    the hash of every config, and runs of earlier versions would no longer fit theirs.
    """
    values: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if "since" in f.metadata and value == _default(f):
            continue
        values[f.name] = _plain_values(value)
    return values


def differences(recorded: Any, config: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The keys in which two configurations of one kind differ, each with both values.

    A key whose default has changed does not count where `recorded` holds an earlier default and `config` today's: the
    field names the earlier ones (`metadata={"was": ...}`), and nobody can have asked for a change.
    """
    for f in dataclasses.fields(recorded):
        then, now, key = getattr(recorded, f.name), getattr(config, f.name), f"{where}{f.name}"
        if then == now or (then in f.metadata.get("was", ()) and now == _default(f)):
            continue
        if dataclasses.is_dataclass(then) and type(then) is type(now):
            yield from differences(then, now, f"{key}.")
        else:
            yield key, then, now


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _plain_values(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return hashed_values(value)
    if isinstance(value, dict):
        return {key: _plain_values(v) for key, v in value.items()}
    return [_plain_values(v) for v in value] if isinstance(value, (list, tuple)) else value


# --- Read configuration dataclasses from YAML: an unknown key or a wrong type is an error that says what to change

T = TypeVar("T")


def load_config(path: str | Path, kind: type[T] = StudyConfig) -> T:
    """Read a YAML file into a configuration dataclass; `finetune_configs/...` also ships with the package.

    Raises:
        InputError: missing or malformed file, a key twice, an unknown key (near matches listed), or a value of the
            wrong type.
    """
    path = shipped.find(path)
    if not is_there(path):
        raise InputError(f"no config at {str(path)!r}: give the path of a YAML file")
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise InputError(f"{path} must hold a mapping of keys, not {found}: write `key: value` lines")
    return from_dict(kind, raw, str(path))


def from_dict(kind: type[T], raw: dict[str, Any], where: str = "config") -> T:
    """Build a configuration dataclass from plain values; `where` names the place in messages.

    Raises:
        InputError: not a mapping, an unknown or missing key, or a value of the wrong type or range.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{where} must be a mapping of keys, not {shown(raw)}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    for key in raw:
        if key not in fields:
            raise InputError(f"{where}: unknown key {shown(key)}: {near_matches(str(key), fields)}")
    for name, f in fields.items():
        if name not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: key {name!r} is missing")
    values = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in raw.items()}
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(args, value, where)
    if (dataclasses.is_dataclass(hint) or origin is dict) and not isinstance(value, dict):
        raise InputError(f"{where} must be a mapping, not {shown(value)}")
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if origin is dict:
        _require(len({str(k) for k in value}) == len(value), f"{where} has two keys that are one text: rename one")
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} must be a list, not {shown(value)}")
        return tuple(_convert(args[0], item, where) for item in value)
    if hint is Any:
        check_plain(value, where)
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _number(value, where)
    return _single(hint, value, where)


def _single(hint: Any, value: Any, where: str) -> Any:
    """A text, whole number, or true or false."""
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
        raise InputError(f"{where} must be {getattr(hint, '__name__', hint)}, not {shown(value)}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise InputError(f"{where} must be a number below 2^63, not {shown(value)}")
    if isinstance(value, str) and "\0" in value:
        raise InputError(f"{where} holds a NUL character: remove it from {shown(value)}")
    return value


def _number(value: int | float | str, where: str) -> float:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise InputError(f"{where} must be a number, not {shown(value)}") from None
    if not math.isfinite(number):
        raise InputError(f"{where} must be a finite number, not {number}")
    return number


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    failures = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(option, value, where)
        except InputError as error:
            failures.append(str(error))
    raise InputError(failures[-1])
