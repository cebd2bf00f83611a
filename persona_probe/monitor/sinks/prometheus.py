"""The latest values in Prometheus' text format, as a file or on a local port."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_probe.errors import InputError
from persona_probe.monitor.events import Alarm, Behaviour, Event, Fault, Reading

if TYPE_CHECKING:
    from prometheus_client import Gauge

FEATURE = {
    "mean": "mean over probes",
    "ci_low": "lower end of the mean's 95% interval",
    "ci_high": "upper end of the mean's 95% interval",
    "maximum": "largest value at a token",
    "firing_rate": "share of tokens above zero",
    "shift": "difference from the base model in base standard deviations",
}
READING = {
    "step": "training step of the latest reading",
    "explained_variance": "share of variance that the SAE explains",
    "l0": "latents active per token",
    "residual_norm": "mean norm of the residual stream",
    "seconds": "cost of the latest reading",
    "loss": "latest logged training loss, nats per token",
    "learning_rate": "learning rate",
    "tokens_seen": "training tokens so far",
}


class PrometheusSink:
    """Offers the latest values to a Prometheus server.

    Metrics are `persona_feature_<value>{feature, mode}`, `persona_reading_<value>{mode}`, `persona_behaviour{name}`,
    `persona_alarms_total{rule, feature}` and `persona_faults_total{part}`. All have the label `run`.

    Args:
        path: file for node_exporter's textfile collector (its name must end in .prom there); replaced whole.
        port: serve `/metrics` on 127.0.0.1 instead.
        run: value of the label `run`.

    Raises:
        InputError: neither or both of path and port, a port in use, or prometheus_client is not installed.
    """

    def __init__(self, path: str | Path | None = None, *, port: int | None = None, run: str = "") -> None:
        if (path is None) == (port is None):
            raise InputError("PrometheusSink takes either path= (a file) or port= (on 127.0.0.1)")
        try:
            from prometheus_client import CollectorRegistry, Counter
        except ImportError as error:
            message = "PrometheusSink needs prometheus_client: pip install 'persona-probe[prometheus]'"
            raise InputError(message) from error
        self.path, self.run = None if path is None else Path(path), run
        self.registry: CollectorRegistry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._alarms = Counter(
            "persona_alarms", "alarms of the monitor", ("run", "rule", "feature"), registry=self.registry
        )
        self._faults = Counter("persona_faults", "parts switched off", ("run", "part"), registry=self.registry)
        self.port: int | None = None
        """The port that is served (a free one for `port=0`); None for a file."""
        self._server: Any = None
        if port is not None:
            self._open(port)

    def emit(self, event: Event) -> None:
        """Take the event's numbers, and write the file, if there is one."""
        if self.port is not None and self._server is None:
            self._open(self.port)  # closed after an earlier training run
        if isinstance(event, Reading):
            self._read(event)
        elif isinstance(event, Behaviour):
            self._set("persona_behaviour", "what the model does", {"name": event.name}, event.value)
        elif isinstance(event, Alarm):
            self._alarms.labels(self.run, event.rule, event.feature).inc()
        elif isinstance(event, Fault):
            self._faults.labels(self.run, event.part).inc()
        if self.path is not None:
            from prometheus_client import write_to_textfile

            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_to_textfile(str(self.path), self.registry)

    def close(self) -> None:
        """Free the port until the next event; a file keeps its last values."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None

    def _open(self, port: int) -> None:
        from prometheus_client import start_http_server

        try:
            self._server = start_http_server(port, addr="127.0.0.1", registry=self.registry)
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} cannot be used ({error}): choose another port for PrometheusSink") from error
        self.port = int(self._server[0].server_port)

    def _read(self, reading: Reading) -> None:
        for value, words in READING.items():
            if (number := vars(reading)[value]) is not None:
                self._set(f"persona_reading_{value}", words, {"mode": reading.mode}, number)
        for feature in reading.features:
            labels = {"feature": feature.name, "mode": reading.mode}
            for value, words in FEATURE.items():
                number = feature.shift if value == "shift" else vars(feature)[value]
                self._set(f"persona_feature_{value}", words, labels, number)

    def _set(self, metric: str, words: str, labels: dict[str, str], value: float) -> None:
        from prometheus_client import Gauge

        if metric not in self._gauges:
            self._gauges[metric] = Gauge(metric, words, ("run", *labels), registry=self.registry)
        self._gauges[metric].labels(run=self.run, **labels).set(value)
