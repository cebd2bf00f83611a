"""The events that a monitor sends to its sinks: plain records, each of them one line of JSON."""

import functools
import json
import math
import typing
from dataclasses import asdict, dataclass, field
from typing import Any

from persona_probe.files import LARGEST, decode_json
from persona_probe.writing import json_values


@dataclass(frozen=True)
class FeatureValue:
    """One feature in one reading, in the units of its activation (or of its projection, for a direction)."""

    name: str
    latent: int
    """Latent index; -1 for a direction."""
    mean: float
    """Mean over probes (passive readings: over sequences)."""
    ci_low: float
    ci_high: float
    """95% bootstrap interval over probes."""
    maximum: float
    """Largest value at a single token."""
    firing_rate: float
    """Mean over probes of the share of tokens above zero."""
    base_mean: float
    base_sd: float
    """Mean and standard deviation between probes on the base model."""
    sae: str = ""
    """The SAE's name where several are read; empty for a direction, and where there is one SAE."""
    chance: float = math.nan
    """For a direction: by how much a random direction in the same place has moved from the base (root mean square over
    all directions, in the same units). NaN for a latent, and where the base's activations are not known."""

    @property
    def shift(self) -> float:
        """Difference from the base model in base standard deviations; NaN where the base does not vary."""
        return (self.mean - self.base_mean) / self.base_sd if self.base_sd > 0 else math.nan


@dataclass(frozen=True)
class Reading:
    """One measurement of all features at one training step."""

    step: int
    mode: str
    """`probe` or `passive`."""
    features: tuple[FeatureValue, ...]
    explained_variance: float
    """Of the SAE, on the tokens that were read; NaN where no SAE is used. Of several SAEs, the first one's."""
    l0: float
    residual_norm: float
    n_probes: int
    """Probes, or sequences of a passive reading."""
    seconds: float
    """Wall time of this reading."""
    loss: float | None = None
    """Latest training loss that was logged (nats per token)."""
    learning_rate: float | None = None
    tokens_seen: int | None = None
    """Training tokens so far, padding not counted."""
    fits: dict[str, dict[str, float]] = field(default_factory=dict)
    """Where several SAEs are read: for each its explained_variance, l0 and residual_norm; those of directions under
    the empty name."""
    finite: bool = True
    """Whether all activations that were read, and all features, are finite numbers. False once a model has diverged."""

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per feature, with the fields of the reading in every row.

        Where several SAEs are read, a row says which its feature is of, and holds that SAE's fit.
        """
        shared = {k: v for k, v in vars(self).items() if k not in ("features", "fits")}
        left_out = ("name",) if self.fits else ("name", "sae")
        return [
            {
                **shared,
                **self.fits.get(f.sae, {}),
                "feature": f.name,
                **_without(asdict(f), *left_out),
                "shift": f.shift,
            }
            for f in self.features
        ]


@dataclass(frozen=True)
class Start:
    """The monitor is attached: what is read, and the base model's values."""

    features: dict[str, int]
    """Feature name to latent, -1 for a direction."""
    layer: int
    n_probes: int
    bands: dict[str, tuple[float, float]]
    """Feature name to its base band."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """SAE, model, package versions: what somebody who reads the file needs."""


@dataclass(frozen=True)
class Alarm:
    """A rule that fired."""

    step: int
    rule: str
    feature: str
    message: str
    """One line: what happened, in numbers."""
    value: float
    threshold: float


@dataclass(frozen=True)
class Behaviour:
    """A measurement of what the model does, drawn next to the features."""

    step: int
    name: str
    """For example `contrast index (nats/token)`."""
    value: float
    ci_low: float | None = None
    ci_high: float | None = None


@dataclass(frozen=True)
class Fault:
    """An error in a part of the monitor, which is now off; training goes on."""

    step: int
    part: str
    message: str


@dataclass(frozen=True)
class End:
    """Training is over."""

    step: int
    readings: int
    seconds: float
    """Wall time of all readings together."""


Event = Start | Reading | Alarm | Behaviour | Fault | End
KINDS: dict[str, type] = {kind.__name__.lower(): kind for kind in (Start, Reading, Alarm, Behaviour, Fault, End)}


def to_line(event: Event) -> str:
    """One line of JSON, with its kind under `event`; NaN and infinities become null."""
    record = asdict(event)
    if isinstance(event, Reading) and not event.fits:  # one SAE: nothing to tell apart
        record = {**_without(record, "fits"), "features": [_without(f, "sae") for f in record["features"]]}
    return json.dumps({"event": type(event).__name__.lower(), **json_values(record)}) + "\n"


def from_line(line: str) -> Event:
    """The event that `to_line` wrote; null where a float was expected becomes NaN.

    Raises:
        ValueError: the line is no event (torn, or of another program).
    """
    record = decode_json(line)
    name = record.pop("event", None) if isinstance(record, dict) else None
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"no event of a monitor: {line[:60]!r}")
    return _read(KINDS[name], record)


def _read(kind: type, record: dict[str, Any]) -> Any:
    try:
        if kind is Reading:
            record["features"] = tuple(FeatureValue(**_nan(f, FeatureValue)) for f in record["features"])
            fits = record.get("fits", {}).items()
            record.setdefault("finite", not any(math.isnan(f.mean) for f in record["features"]))  # before version 0.2
            record["fits"] = {sae: {k: _float(v) for k, v in fit.items()} for sae, fit in fits}
        if kind is Start:
            record["bands"] = {k: tuple(_float(end) for end in band) for k, band in record["bands"].items()}
        event = kind(**_nan(record, kind))
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"a damaged {kind.__name__.lower()} event: {error}") from error
    for one in (event, *event.features) if isinstance(event, Reading) else (event,):
        for name, hint in _hints(type(one)).items():
            if not _fits(getattr(one, name), hint):
                raise ValueError(f"a damaged {kind.__name__.lower()} event: {name} is no {_words(hint)}")
    return event


_hints = functools.cache(typing.get_type_hints)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a field's type, and no whole number that is too large to draw."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, int) and hint in (int, float):
        return not isinstance(value, bool) and abs(value) <= LARGEST
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if origin is tuple:
        every = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return isinstance(value, tuple) and len(value) == len(every) and all(map(_fits, value, every))
    if inner:
        return any(_fits(value, one) for one in inner)
    return hint is Any or isinstance(value, hint)


def _words(hint: Any) -> str:
    return str(hint) if typing.get_args(hint) else hint.__name__


def _nan(record: dict[str, Any], kind: type) -> dict[str, Any]:
    floats = {name for name, hint in kind.__annotations__.items() if hint is float}
    return {k: math.nan if v is None and k in floats else v for k, v in record.items()}


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _without(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in names}


BASE_KEY = "base_explained_variance"
"""Key of `Start.metadata` that holds the base's explained variance."""
NOT_FINITE = "not finite"
"""Rule of the alarm that a monitor raises by itself at the first reading that is not finite."""
