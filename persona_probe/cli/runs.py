"""Commands on runs that exist: figures, comparison, hashes, citation, and the page that follows one."""

import json
import logging
import socket
import sys
import webbrowser
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from persona_probe.cli.options import Common, columns, command, echo, echo_json, json_option, many, run_argument
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from werkzeug.serving import BaseWSGIServer

    from persona_probe.report.printing import Width
    from persona_probe.report.theme import Theme

FORMATS = ("html", "csv", "svg", "pdf", "png", "pgf")
WIDTHS = ("column", "page", "icml", "icml-wide", "neurips", "nature", "nature-wide", "slides")
"""Of `report.printing`, which loads plotly."""


@command(
    example="persona-probe figures runs/demo --only arms --format pdf csv --preset icml",
    out="Folder (default RUN/figures).",
)
@run_argument
@many("--only", metavar="NAME", help="Names of figures.")
@many("--format", type=click.Choice(FORMATS), default=["html", "csv", "svg"], help="File formats.")
@click.option(
    "--width",
    "--preset",
    "width",
    type=click.Choice(WIDTHS),
    default="page",
    help="Of images: 89 mm, 183 mm, or what a journal or conference asks for.",
)
@click.option("--theme", type=click.Choice(["light", "dark"]), default="light", help="Of pages and images.")
@click.option("--footer/--no-footer", default=True, help="A line in images that says where they come from.")
def figures(
    run: str,
    only: tuple[str, ...],
    format: tuple[str, ...],
    width: "Width",
    theme: "Theme",
    footer: bool,
    common: Common,
) -> None:
    """Draw figures from a run folder, without a model."""
    from persona_probe.report.export import export_figures
    from persona_probe.report.records import load_records
    from persona_probe.runs import RunFolder

    folder = RunFolder.open(run).path
    target = common.out or folder / "figures"
    records = load_records(folder)
    looks = {"width": width, "theme": theme, "footer": footer}
    for path in export_figures(records, target, only=only or None, formats=format, **looks):
        echo(str(path))


@command(
    example="persona-probe compare runs/demo runs/mine --out compare.html",
    out="HTML file (default compare-RUN-OTHER.html).",
)
@run_argument
@click.argument("other", metavar="OTHER", help="The other run folder; differences are OTHER minus RUN.")
def compare(run: str, other: str, common: Common) -> None:
    """Show two runs side by side.

    The page has numbers with their differences, figures and configs.
    """
    from persona_probe.runs import RunFolder

    for folder in (run, other):  # before the libraries that draw are loaded
        RunFolder.open(folder)
    from persona_probe.report.compare import write_comparison

    out = common.out or Path(f"compare-{Path(run).name}-{Path(other).name}.html")
    echo(f"comparison: {write_comparison(run, other, out)}")


@command(example="persona-probe verify runs/demo", out="JSON file for the findings.")
@run_argument
@json_option
def verify(run: str, as_json: bool, common: Common) -> int:
    """Recompute a run's hashes.

    What does not match is listed, and the exit code is 1.
    """
    from persona_probe.report.tables import Table
    from persona_probe.study.hashes import verify as find_differences
    from persona_probe.writing import write_text

    findings = find_differences(run)
    if common.out is not None:
        write_text(common.out, json.dumps([asdict(one) for one in findings], indent=2) + "\n")
    if as_json:
        echo_json([asdict(one) for one in findings])
        return 1 if any(one.bad for one in findings) else 0
    rows = [one for one in findings if one.bad or not common.quiet]
    if rows:
        rows.sort(key=lambda one: one.bad)  # what does not match is read last
        cells = [(one.state, one.name, one.detail) for one in rows]
        echo(Table(("state", "what", "detail"), cells).text(columns()))
    counts = {state: sum(one.state == state for one in findings) for state in dict.fromkeys(f.state for f in findings)}
    echo(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 1 if any(one.bad for one in findings) else 0


@command(example="persona-probe cite runs/demo", out="File for the text (default: print it).")
@run_argument
def cite(run: str, common: Common) -> None:
    """Write a run's methods paragraph and BibTeX.

    The paragraph is LaTeX and names the methods that the run used.
    """
    from persona_probe.report.cite import cite as citation
    from persona_probe.writing import write_text

    text = str(citation(run))
    echo(f"citation: {write_text(common.out, text)}" if common.out is not None else text.rstrip())


# --- A page that follows a run while it trains, on this machine only

HOST = "127.0.0.1"


@command(example="persona-probe watch runs/mine", out="Not used.")
@click.argument("run", metavar="RUN", help="A run folder, or a monitor's event file.")
@click.option("--port", type=int, default=8050, help="Port on 127.0.0.1; 0 takes a free one.")
@click.option("--no-browser", is_flag=True, help="Do not open a browser.")
def watch(run: str, port: int, no_browser: bool, common: Common) -> None:  # noqa: ARG001
    """Follow a run's monitor while it trains, on a page on 127.0.0.1."""
    from persona_probe.monitor.dashboard.feed import event_files

    event_files(run)  # a mistyped run is refused before dash loads
    server = make_server(run, port)
    url = f"http://{HOST}:{server.port}/"
    echo(f"watching {run} at {url} (Ctrl-C ends)")
    sys.stdout.flush()
    if not no_browser:
        webbrowser.open(url)
    with suppress(KeyboardInterrupt):
        server.serve_forever()
    server.server_close()
    echo("stopped watching; the run continues")


def make_server(run: str, port: int) -> "BaseWSGIServer":
    """A server of the page on 127.0.0.1, bound and ready for `serve_forever`.

    Raises:
        InputError: a port that cannot be used, or dash is not installed.
    """
    try:
        import dash  # noqa: F401
    except ImportError as error:
        raise InputError("watch needs dash: pip install 'persona-probe[dashboard]'") from error
    from werkzeug.serving import make_server as bound_server

    from persona_probe.monitor.dashboard.app import BoundedRequests, make_app
    from persona_probe.monitor.dashboard.feed import Feed

    app = make_app(Feed(run))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request otherwise
    with listen(port) as listening:  # our own socket: werkzeug would exit by itself where the port is taken
        port, fd = listening.getsockname()[1], listening.fileno()
        return bound_server(HOST, port, app.server, threaded=True, request_handler=BoundedRequests, fd=fd)


def listen(port: int) -> socket.socket:
    """A socket that listens on 127.0.0.1; port 0 takes a free one.

    Raises:
        InputError: the port cannot be used.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen(64)
    except (OSError, OverflowError) as error:
        listening.close()
        raise InputError(f"port {port} cannot be used ({error}): choose another --port") from error
    return listening
