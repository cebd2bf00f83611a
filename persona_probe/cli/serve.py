"""`persona-probe serve` and `persona-probe incidents`: answers that are watched while they are written."""

import logging
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from persona_probe.cli.loading import loading_options
from persona_probe.cli.options import PATH, Common, command, echo, echo_json, json_option, many, show_rows
from persona_probe.cli.process import loads_models
from persona_probe.cli.runs import HOST, listen
from persona_probe.config import Loading
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from persona_probe.monitor.generation.actions import AnswerAction
    from persona_probe.monitor.generation.monitor import GenerationMonitor
    from persona_probe.monitor.generation.serving.adapters import Deployment
    from persona_probe.monitor.generation.serving.requests import Limits

log = logging.getLogger(__name__)

ACTIONS = ("annotate", "stop", "regenerate", "steer")
THRESHOLDS = "answer-thresholds.json"
FOLDER = Path("runs/serve")


@command(
    example="persona-probe serve runs/demo --adapters runs/demo/arms/correct-s0/checkpoint-60 --actions stop",
    out="Folder of thresholds and incidents (default RUN/serve, which the report shows; of a model runs/serve).",
)
@click.argument("model", metavar="MODEL", help="A model (alias, folder, hub id), or a located run folder.")
@click.option("--sae", metavar="SAE", help="A folder or release; of a run folder it is the run's.")
@many("--features", metavar="NAME=LATENT", help="Latents to read; of a run folder its persona latent.")
@many("--adapters", type=PATH, metavar="DIR", help="Adapters, oldest first; the last one answers.")
@click.option("--clean", metavar="DATA", default="smalltalk", help="Questions that the base answers for thresholds.")
@click.option("--rate", type=float, default=0.05, help="Share of clean answers that may alarm.")
@click.option("--window", type=int, default=8, help="Tokens whose mean is compared with the threshold.")
@click.option("--thresholds", type=PATH, help="Their file (default OUT/answer-thresholds.json): read, or made.")
@many("--actions", type=click.Choice(ACTIONS), default=["annotate"], help="At an alarm, besides the incident.")
@click.option("--rollback-rate", type=float, help="Go back when more answers alarm (default 2 x --rate).")
@click.option("--rollback-block", type=int, default=50, help="Answers that are counted together for it.")
@click.option("--port", type=int, default=8000, help="Port on 127.0.0.1; 0 takes a free one.")
@click.option("--queue", type=int, default=64, help="Requests that may wait; the next gets 503.")
@click.option("--batch", type=int, default=8, help="Answers written side by side.")
@click.option("--max-tokens", type=int, default=1024, help="Longest answer that may be asked for.")
@click.option("--incidents", type=PATH, help="File of incidents (default OUT/incidents.jsonl).")
@click.option("--keep-text", is_flag=True, help="Keep question, answer and its trace with each incident.")
@click.option("--bf16", is_flag=True, help="Compute in bf16 autocast.")
@loading_options
def serve(
    model: str,
    sae: str | None,
    features: tuple[str, ...],
    adapters: tuple[Path, ...],
    clean: str,
    rate: float,
    window: int,
    thresholds: Path | None,
    actions: tuple[str, ...],
    rollback_rate: float | None,
    rollback_block: int,
    port: int,
    queue: int,
    batch: int,
    max_tokens: int,
    incidents: Path | None,
    keep_text: bool,
    bf16: bool,
    loading: Loading,
    common: Common,
) -> None:
    """Answer on 127.0.0.1 as OpenAI's API does, and watch every answer.

    Each answer carries its features token by token. Alarms are written as incidents.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError("serve needs FastAPI and uvicorn: pip install 'persona-probe[serve]'") from error
    from persona_probe.runs import INCIDENTS, SERVED

    is_run = (Path(model) / "manifest.json").is_file()
    named = _latents(features)
    if not is_run and (sae is None or not named):
        raise InputError(f"{model} is no run folder: name what is read by --sae SAE --features NAME=LATENT")
    for folder in adapters:
        if not (folder / "adapter_config.json").is_file():
            raise InputError(f"{folder} holds no adapter (adapter_config.json): name checkpoint folders, oldest first")
    out = common.out or (Path(model) / SERVED if is_run else FOLDER)
    sampling = {"max_new_tokens": min(64, max_tokens), "seed": common.seed or 0, "batch_size": batch, "bf16": bf16}
    files = thresholds or out / THRESHOLDS, incidents or out / INCIDENTS
    with listen(port) as listening:  # a port that is taken is refused before minutes of loading
        base, monitor = _monitor(model if is_run else None, model, sae, named, window, actions, loading, common)
        _calibrate(monitor, files[0], clean, rate, sampling)
        limits, deployment = _settings(adapters, rate, rollback_rate, rollback_block, queue, batch, max_tokens)
        _check_adapters(base, adapters)
        engine_settings = {"name": Path(model).name, "keep_text": keep_text, "bf16": bf16}
        _serve(base, monitor, limits, deployment, files[1], listening, engine_settings)


def _latents(features: Sequence[str]) -> dict[str, int]:
    named: dict[str, int] = {}
    for one in features:
        name, _, latent = one.rpartition("=")
        if not name or not re.fullmatch(r"\d{1,9}", latent):
            raise InputError(f"--features {one}: write NAME=LATENT, such as persona=2144")
        if name in named:
            raise InputError(f"--features {name} is named twice: rename one")
        named[name] = int(latent)
    return named


@loads_models
def _monitor(
    run: str | None,
    model: str,
    sae: str | None,
    features: dict[str, int],
    window: int,
    actions: Sequence[str],
    loading: Loading,
    common: Common,
) -> "tuple[PreTrainedModel, GenerationMonitor]":
    from persona_probe.models.load import load_model
    from persona_probe.monitor.generation.monitor import GenerationMonitor
    from persona_probe.monitor.generation.rules import AnswerRule
    from persona_probe.saes.load import load_sae

    layer = None
    if run is None:
        from persona_probe.context import pick_device

        device = pick_device(common.device or "auto")
        assert sae is not None
        base, tokenizer = load_model(model, device=device, **asdict(loading))
        dictionary = load_sae(sae, device=device)
    else:
        from persona_probe.latents.stage import persona_latent
        from persona_probe.study.study import Study

        ctx = Study.open(run, common.device).context
        features = features or {"persona": persona_latent(ctx)}
        base, tokenizer, layer = ctx.model, ctx.tokenizer, ctx.layer
        dictionary = ctx.sae if sae is None else load_sae(sae, device=ctx.device)
    rules = [AnswerRule(name, window=window) for name in features]
    monitor = GenerationMonitor(base, dictionary, features, rules, _actions(actions), tokenizer=tokenizer, layer=layer)
    return base, monitor


def _actions(names: Sequence[str]) -> "list[AnswerAction]":
    from persona_probe.monitor.generation.actions import Annotate, Regenerate, SteerDown, StopAnswer

    known: Mapping[str, Any] = {"annotate": Annotate, "stop": StopAnswer, "regenerate": Regenerate, "steer": SteerDown}
    return [known[name]() for name in dict.fromkeys(names)]


def _calibrate(monitor: "GenerationMonitor", path: Path, clean: str, rate: float, sampling: dict[str, Any]) -> None:
    """Take the thresholds of a file, or let the base answer clean questions and write it."""
    if path.exists():
        found = monitor.use(path)
        echo(f"thresholds of {path}:\n{found.statement}")
        return
    from persona_probe.data.load import load_data

    questions = [
        [turn for turn in talk if turn["role"] != "assistant"] for talk in load_data(clean, allow_prompts=True)
    ]
    echo(f"the base answers {len(questions)} clean questions for its thresholds ({clean})")
    sys.stdout.flush()
    found = monitor.calibrate(questions, rate, path=path, progress="clean answers", **sampling)
    echo(f"{found.statement}\nthresholds: {path}")


def _settings(
    adapters: Sequence[Path],
    rate: float,
    rollback_rate: float | None,
    rollback_block: int,
    queue: int,
    batch: int,
    max_tokens: int,
) -> "tuple[Limits, Deployment]":
    from persona_probe.monitor.generation.serving.adapters import Deployment, RollbackRule
    from persona_probe.monitor.generation.serving.requests import Limits

    rule: RollbackRule | None = None
    if adapters:
        rule = RollbackRule(2 * rate if rollback_rate is None else rollback_rate, rollback_block)
        echo(rule.describe())
    return Limits(queue=queue, batch=batch, max_tokens=max_tokens), Deployment(adapters, rule)


def _check_adapters(base: "PreTrainedModel", adapters: Sequence[Path]) -> None:
    """Put each on once: one that does not fit is refused before the first request."""
    from persona_probe.models.adapters import organisms

    with organisms(base) as opened:
        for folder in adapters:
            opened(folder)


def _serve(
    base: "PreTrainedModel",
    monitor: "GenerationMonitor",
    limits: "Limits",
    deployment: "Deployment",
    incidents: Path,
    listening: Any,
    settings: Mapping[str, Any],
) -> None:
    import uvicorn

    from persona_probe.monitor.generation.incidents import IncidentLog
    from persona_probe.monitor.generation.serving.app import make_app
    from persona_probe.monitor.generation.serving.engine import Engine

    kept = IncidentLog(incidents)
    engine = Engine(base, monitor, limits, deployment, kept, **settings).start()
    port = listening.getsockname()[1]
    current = deployment.current
    echo(f"serving {engine.name} ({current.name if current else 'nothing'}) at http://{HOST}:{port}/v1 (Ctrl-C ends)")
    echo(f"incidents: {incidents}")
    sys.stdout.flush()
    # open streams are given a moment; a second Ctrl-C ends at once
    config = uvicorn.Config(make_app(engine), log_level="error", access_log=False, timeout_graceful_shutdown=3)
    before = signal.getsignal(signal.SIGINT)
    try:
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGINT, before)
        engine.close()
        kept.close()
    state = engine.state
    echo(f"stopped after {state['answers']} answers, {state['answers_with_alarm']} of them with an alarm")


HEADS = {
    "at": "time (UTC)",
    "adapter": "adapter",
    "rule": "rule",
    "reached": "value, threshold",
    "token": "token",
    "what": "what was done",
}
"""Of the table; JSON has all that the file holds."""


@command(example="persona-probe incidents runs/demo --json", out="Not used.")
@click.argument("path", metavar="PATH", type=PATH, help="A file of incidents, its folder, or the run that was served.")
@click.option("--last", type=int, help="Only the latest so many.")
@json_option
def incidents(path: Path, last: int | None, as_json: bool, common: Common) -> None:  # noqa: ARG001
    """List the incidents of a server.

    These are alarms on answers and roll-backs of adapters.
    """
    from persona_probe.monitor.generation.incidents import alarm_counts, read_incidents
    from persona_probe.runs import INCIDENTS, SERVED

    if last is not None and last < 1:
        raise InputError(f"--last must be at least 1, not {last}")
    place = path / SERVED if (path / SERVED / INCIDENTS).is_file() else path
    rows = read_incidents(place / INCIDENTS if place.is_dir() else place)
    shown = rows if last is None else rows[-last:]
    if as_json:
        echo_json(shown)
        return
    for row in shown:
        row["at"] = row["time"][:19].replace("T", " ")
        row["reached"] = ", ".join(f"{row[key]:.3g}" for key in ("value", "threshold") if _is_number(row.get(key)))
        row["what"] = row.get("message") or ", ".join(map(str, row.get("actions") or ()))
    if shown:
        show_rows(HEADS, shown, as_json=False)
    counts = ", ".join(f"{count} of {rule} with {adapter}" for (adapter, rule), count in alarm_counts(rows).items())
    echo(f"{len(rows)} incidents{f': {counts}' if counts else ''}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
