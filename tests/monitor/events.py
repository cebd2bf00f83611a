"""Made-up events of a monitor."""

from collections.abc import Sequence
from pathlib import Path

from persona_probe.monitor.events import Alarm, Behaviour, Event, FeatureValue, Reading, Start
from persona_probe.monitor.sinks.files import JsonlSink

TOXIC, DIRECTION = "toxic persona", "mean difference"
HOSTILE = "<script>window.pwned=1</script>"


def value(name: str, mean: float, latent: int = 3, base_sd: float = 0.5) -> FeatureValue:
    """A feature with base mean 1 and an interval of +-0.25."""
    return FeatureValue(name, latent, mean, mean - 0.25, mean + 0.25, 2 * mean, 0.5, 1.0, base_sd)


def reading(
    step: int, mean: float = 1.0, mode: str = "probe", names: Sequence[str] = (TOXIC, DIRECTION), fit: float = 0.75
) -> Reading:
    """The first feature reads `mean`, the others stay at 1."""
    features = [value(name, 1.0 if i else mean, -1 if i else 3) for i, name in enumerate(names)]
    return Reading(step, mode, tuple(features), fit, 32.0, 10.0, 8, 0.125, 2.5, 1e-4, 64 * step)


def start(names: Sequence[str] = (TOXIC, DIRECTION)) -> Start:
    """Bands from 0.75 to 1.25."""
    return Start(dict.fromkeys(names, 3), 20, 8, dict.fromkeys(names, (0.75, 1.25)))


def alarm(step: int, feature: str = TOXIC) -> Alarm:
    return Alarm(step, "outside band", feature, "1.5 over 1.25", 1.5, 1.25)


def behaviour(step: int, number: float = -0.5) -> Behaviour:
    return Behaviour(step, "contrast index (nats/token)", number, number - 0.1, number + 0.1)


def write(path: Path, *events: Event) -> None:
    """Append events to a file as a monitor does."""
    sink = JsonlSink(path)
    for event in events:
        sink.emit(event)
    sink.close()
