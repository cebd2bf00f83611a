"""`persona-probe mitigate`."""

import argparse
import logging
import socket
import sys
import webbrowser
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from persona_probe.cli.loop import echo, find_config
from persona_probe.errors import InputError
from persona_probe.monitor.dashboard.feed import event_files

if TYPE_CHECKING:
    from werkzeug.serving import BaseWSGIServer

    from persona_probe.screening.screen import Screening
    from persona_probe.study.study import Study

Arguments = argparse.Namespace
PIPED = 220
"""Characters of a line where standard output is no terminal."""


def mitigate(args: Arguments) -> None:
    """A grid of mitigations against the same inducing data, and its table.

    Args (beside the common ones): config, run, only, page, dry_run.
    """
    from dataclasses import replace

    from persona_probe.config import load_config
    from persona_probe.mitigate.grid.config import Grid

    grid = load_config(find_config(args.config), Grid)
    if args.seed is not None:
        grid = replace(grid, seeds=(args.seed,))
    if args.page is not None:
        from persona_probe.mitigate.grid.summary import MARKS
        from persona_probe.report.tables import check_page

        check_page(args.page, MARKS)
    from persona_probe.cli.process import keep_freed_memory, quiet_libraries

    keep_freed_memory()
    quiet_libraries()
    out = args.out or Path("runs") / grid.name
    if args.dry_run:
        from persona_probe.mitigate.grid.summary import plan_lines

        echo("\n".join(plan_lines(grid, out, args.run, args.only)))
        return
    from persona_probe.mitigate.grid.run import run_grid

    outcome = run_grid(grid, out, args.device, args.run, args.only)
    from rich.console import Console

    from persona_probe.mitigate.grid.summary import HEADINGS, MARKS, markdown, show_tables, shown
    from persona_probe.report.tables import fill_page

    width = Console().width if sys.stdout.isatty() else PIPED
    for table in show_tables(shown(outcome.table), HEADINGS, grid.name, width):
        echo(table.text(width))
    for found in outcome.summary["verdicts"]:
        echo(found["statement"])
    if args.page is not None:
        fill_page(args.page, MARKS, markdown(outcome.table, outcome.missing))
    if outcome.missing:
        echo(f"{len(outcome.missing)} cells are still missing: the same command without --only trains them")
    echo(f"table: {out / 'mitigations.csv'}")


# --- `persona-probe monitor calibrate` and `persona-probe monitor study`

DEFAULT_SEEDS = 5


def monitor_calibrate(args: Arguments) -> None:
    """Thresholds from the benign arms of a located study over new seeds.

    Args (beside the common ones): config, run, seeds, arms, features, rate, per, held, side.
    """
    source = _located(args)
    from persona_probe.monitor.calibration import HeldRule, benign_readings, calibration_record, calibration_study

    rule = HeldRule(args.held, args.side)
    seeds = args.seeds or _new_seeds(source.config.seeds)
    benign = calibration_study(source.context, args.out, args.device)
    readings = benign_readings(source.context, benign, seeds, args.arms)
    record = calibration_record(readings, args.features, rule, args.rate, args.per.replace("-", " "))
    benign.run.write_json("calibration.json", record)
    for name, found in record["features"].items():
        echo(f"{name}: {found['statement']}")
    echo(f"calibration: {benign.run.path / 'calibration.json'}")


def _located(args: Arguments) -> "Study":
    """The located study of a config: the run that --run names, else runs/<name>; CONFIG may be that run itself."""
    from persona_probe.config import StudyConfig, load_config

    given = Path(args.config)
    config = None if given.is_dir() else load_config(find_config(args.config), StudyConfig)
    folder = args.run or (Path("runs") / config.name if config else given)
    _prepare()
    from persona_probe.study.study import Study

    study = Study.open(folder, args.device)
    # Seeds may be another choice of the command that made the run.
    if config is not None and replace(config, seeds=study.config.seeds).hash != study.config.hash:
        raise InputError(f"{folder} is the run of another config: name the run of {args.config} by --run")
    return study


def _new_seeds(used: tuple[int, ...]) -> list[int]:
    first = max(used) + 1
    return list(range(first, first + DEFAULT_SEEDS))


def monitor_study(args: Arguments) -> None:
    """Labelled runs under the monitor: AUROC, false alarms, and lead over behaviour, beside the baselines.

    Args (beside the common ones): config, only, page.
    """
    from persona_probe.config import load_config
    from persona_probe.monitor.study.config import MonitorStudy

    config = load_config(find_config(args.config), MonitorStudy)
    _prepare()
    from persona_probe.monitor.study.results import MARKS, markdown, run_study
    from persona_probe.report.tables import fill_page

    out = args.out or Path("runs") / config.name
    results = run_study(config, out, args.device, args.only)
    if results is None:
        echo(f"runs are still missing in {out}: the same command without --only trains them")
        return
    if args.page is not None:
        fill_page(args.page, MARKS, markdown(results))
    echo(markdown(results))
    echo(f"results: {out / 'results.json'}")


def _prepare() -> None:
    """What every command that loads a model does first."""
    from persona_probe.cli.process import keep_freed_memory, quiet_libraries

    keep_freed_memory()
    quiet_libraries()


# --- `persona-probe data screen FILE`: rank the rows of a data set before training on it

MODEL = "smollm2-135m-instruct"
SAE = "saes/smollm2-135m-instruct/layer20-topk32-4608"


def data_screen(args: argparse.Namespace) -> None:
    """Screen a file and write table, scores and page into a folder."""
    _check(args)
    from persona_probe.cli.loop import echo
    from persona_probe.cli.process import keep_freed_memory, quiet_libraries

    keep_freed_memory()
    quiet_libraries()
    from persona_probe.screening.page import result_lines, write_screening
    from persona_probe.screening.screen import check_rows

    rows = check_rows(args.file)  # first: bad rows are told before a model loads
    out = args.out or Path("runs") / f"screen-{Path(args.file).name.split('.')[0].replace(':', '-')}"
    found = _by_run(args, rows, out) if args.run else _by_latent(args, rows, out)
    page = write_screening(found, out, args.file, _model_name(args), args.worst)
    echo("\n".join([*result_lines(found), f"page: {page}"]))


def _check(args: argparse.Namespace) -> None:
    if args.worst < 1:
        raise InputError(f"--worst must be at least 1, not {args.worst}")
    if args.run is None and args.latent is None:
        raise InputError("no persona feature: give --run RUN, or --latent (with --model and --sae)")
    if args.run is not None and (args.latent is not None or args.model or args.sae):
        raise InputError("--run brings its own model, SAE and latent: leave --model, --sae and --latent out")
    if args.run is None and args.direction:
        raise InputError("--direction names one of a run's directions: give --run as well")


def _by_run(args: argparse.Namespace, rows: list, out: Path) -> "Screening":
    from persona_probe.screening.screen import screen_by_study
    from persona_probe.study.study import Study

    return screen_by_study(
        Study.open(args.run, args.device, args.seed).context, rows, args.direction, args.rankers, out
    )


def _by_latent(args: argparse.Namespace, rows: list, out: Path) -> "Screening":
    from persona_probe.context import pick_device
    from persona_probe.models.load import load_model
    from persona_probe.saes.load import load_sae
    from persona_probe.screening.feature import latent_feature
    from persona_probe.screening.rankers import available, choose_rankers
    from persona_probe.screening.reading import settings_for
    from persona_probe.screening.screen import screening

    device = pick_device(args.device or "auto")
    feature = latent_feature(load_sae(args.sae or SAE, device=device), args.latent)
    choose_rankers(args.rankers, available(feature, organism=False))  # before the model loads
    model, tokenizer = load_model(args.model or MODEL, device=device)
    return screening(rows, model, feature, tokenizer=tokenizer, rankers=args.rankers, settings=settings_for(out))


def _model_name(args: argparse.Namespace) -> str:
    if args.run is None:
        return args.model or MODEL
    from persona_probe.runs import RunFolder

    return RunFolder.open(args.run).config.model


# --- `persona-probe watch RUN`: the page that follows a run, on this machine only

HOST = "127.0.0.1"


def watch(args: argparse.Namespace) -> None:
    """Serve the page until it is interrupted.

    Args:
        args: `run` (a run folder or a file of events), `port` (0 takes a free one), `no_browser`.

    Raises:
        InputError: no such run, a port that cannot be used, or dash is not installed.
    """
    event_files(args.run)  # first: a mistyped run is told before dash loads
    server = make_server(args.run, args.port)
    url = f"http://{HOST}:{server.port}/"
    sys.stdout.write(f"watching {args.run} at {url} (Ctrl-C ends)\n")
    sys.stdout.flush()
    if not args.no_browser:
        webbrowser.open(url)
    with suppress(KeyboardInterrupt):
        server.serve_forever()
    server.server_close()
    sys.stdout.write("stopped watching; the run goes on\n")


def make_server(run: str, port: int) -> "BaseWSGIServer":
    """A server of the page on 127.0.0.1, bound and ready for `serve_forever`.

    Raises:
        InputError: as for `watch`.
    """
    try:
        import dash  # noqa: F401
    except ImportError as error:
        raise InputError("watch needs dash: pip install 'persona-probe[dashboard]'") from error
    from werkzeug.serving import make_server as bound_server

    from persona_probe.monitor.dashboard.app import make_app
    from persona_probe.monitor.dashboard.feed import Feed

    app = make_app(Feed(run))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request otherwise
    with _listen(port) as listening:  # our own socket: werkzeug would exit by itself where the port is taken
        return bound_server(HOST, listening.getsockname()[1], app.server, threaded=True, fd=listening.fileno())


def _listen(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen(64)
    except (OSError, OverflowError) as error:
        listening.close()
        raise InputError(f"port {port} cannot be used ({error}): choose another --port") from error
    return listening
