"""The Dash app that follows a run: it reads files, and serves one page to this machine."""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update
from flask import Response, abort, request
from werkzeug.exceptions import HTTPException
from werkzeug.serving import WSGIRequestHandler

from persona_probe.monitor.band import Bands, band_state
from persona_probe.monitor.dashboard.feed import Feed, FollowedFile
from persona_probe.monitor.events import FeatureValue
from persona_probe.monitor.figure import monitor_figure
from persona_probe.monitor.history import History
from persona_probe.report.theme import number

log = logging.getLogger(__name__)

# --- The page's parts, as Dash components: every text goes in as text, never as markup

NEWEST = ""
"""The choice of file that follows the one that changed last."""
TICK = 1000
"""Milliseconds between two updates of the page."""
MOST_LINES = 50
"""Alarms and faults listed, the latest first."""
GRAPH: Any = {
    "displaylogo": False,
    "modeBarButtons": [["toImage", "resetScale2d"]],
    "showSendToCloud": False,  # plotly.js 4 offers by default to upload the figure
    "plotlyServerURL": "",
    "responsive": True,
}


def layout(run: str) -> Any:
    """The page as it is served, before the first update."""
    choice = dcc.Dropdown([], NEWEST, id="file", clearable=False, className="choice")
    return html.Main(
        [
            html.Header([html.H1(run), choice]),
            html.P(id="status", className="status"),
            dcc.Graph(id="figure", config=GRAPH),
            html.Div(id="alarms"),
            html.Div(id="latest"),
            html.Div(id="faults"),
            dcc.Interval(id="tick", interval=TICK),
            dcc.Store(id="seen"),
        ]
    )


def choices(names: Sequence[str]) -> list[dict[str, str]]:
    """The menu of files."""
    return [{"label": "file that changed last", "value": NEWEST}, *({"label": n, "value": n} for n in names)]


def status(followed: FollowedFile | None, now: float | None = None) -> list[Any]:
    """One line: which file, which step, how fresh, and how many alarms."""
    if followed is None:
        return ["waiting: this run has written no events yet"]
    history, age = followed.history, (time.time() if now is None else now) - followed.changed
    step = "no reading yet" if history.latest is None else f"step {history.latest.step}"
    parts = [followed.name, step, _count(history.taken, "reading"), f"last event {_ago(age)}"]
    parts += ["run has ended"] if history.end else []
    parts += [f"started {history.starts} times"] if history.starts > 1 else []
    parts += [f"{_count(followed.follower.damaged, 'line')} left out: no events"] if followed.follower.damaged else []
    line: list[Any] = [" · ".join(parts)]
    if history.alarms:
        line += [" · ", html.Span(_count(len(history.alarms), "alarm"), className="alarmed")]
    return line


def latest(history: History) -> list[Any]:
    """A table of the latest reading."""
    reading = history.latest
    if reading is None:
        return []
    bands = history.start.bands if history.start else {}
    head = ("feature", "latent", "mean", "95% interval", "base", "shift (base sd)", "base band", "firing rate")
    rows = [_row(feature, bands) for feature in reading.features]
    words = f"Latest reading: step {reading.step}, {reading.mode}"
    if reading.loss is not None:
        words += f", loss {number(reading.loss)}"
    return [html.H2(words), html.Table([html.Thead(html.Tr([html.Th(h) for h in head])), html.Tbody(rows)])]


def alarms(history: History) -> list[Any]:
    """The alarms, the latest first."""
    texts = [f"step {a.step}: {a.rule}, {a.feature or 'no feature'}: {a.message}" for a in history.alarms]
    return _listed("Alarms", texts, "no alarm")


def faults(history: History) -> list[Any]:
    """The parts that were switched off, with the reason."""
    texts = [f"step {f.step}: {f.part} is off: {f.message}" for f in history.faults]
    return _listed("Faults", texts, "no fault")


def _listed(title: str, texts: Sequence[str], none: str) -> list[Any]:
    if not texts:
        return [html.P(none, className="none")]
    items = [html.Li(text) for text in reversed(texts[-MOST_LINES:])]
    more = len(texts) - len(items)
    return [html.H2(f"{title}: {len(texts)}" + (f", {more} older not shown" if more else "")), html.Ul(items)]


def _row(feature: FeatureValue, bands: Bands) -> Any:
    state = band_state(feature, bands)
    outside = "alarmed" if state in ("above", "below", "not finite") else ""
    cells = (
        feature.name,
        feature.latent if feature.latent >= 0 else "direction",
        number(feature.mean),
        f"{number(feature.ci_low)} to {number(feature.ci_high)}",
        number(feature.base_mean),
        number(feature.shift),
        html.Span(state, className=outside),
        number(feature.firing_rate),
    )
    return html.Tr([html.Td(cell) for cell in cells])


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _ago(seconds: float) -> str:
    if seconds < 90:
        return f"{max(0, round(seconds))} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 5400 else f"{seconds / 3600:.0f} h ago"


# --- The page's style sheet: light, like the report's figures

STYLE = """
:root { --ink: #1b1f24; --muted: #59636e; --line: #d5dae0; --soft: #f5f6f8; --bad: #b34700; }
body { margin: 0; color: var(--ink); background: #fff;
       font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 1rem 1.5rem 3rem; }
header { display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; align-items: center; justify-content: space-between; }
h1 { font-size: 1.3rem; margin: .2rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.choice { min-width: 18rem; }
.status { color: var(--muted); margin: .2rem 0 .6rem; }
.alarmed { color: var(--bad); font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { color: var(--muted); font-weight: 600; }
ul { margin: 0; padding: 0; list-style: none; }
li { border-left: 4px solid var(--bad); background: var(--soft); padding: .25rem .7rem; margin: .25rem 0;
     overflow-wrap: anywhere; }
.none { color: var(--muted); }
"""


POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""Everything is fetched from this server only."""
LARGEST_REQUEST = 2**20
"""Bytes: the page itself sends a few hundred."""
HOSTS = ("127.0.0.1", "localhost")
TITLE = "persona-probe watch"
"""Fixed, since Dash puts a title into the page as markup."""
SHELL = f"""<!DOCTYPE html>
<html lang="en">
  <head>{{%metas%}}<title>{{%title%}}</title><link rel="icon" href="data:,">{{%css%}}<style>{STYLE}</style></head>
  <body>{{%app_entry%}}<footer>{{%config%}}{{%scripts%}}{{%renderer%}}</footer></body>
</html>"""


class BoundedRequests(WSGIRequestHandler):
    """Reads at most twice the largest request: after an answer, werkzeug's own would read on, up to 10 GB."""

    def run_wsgi(self) -> None:
        """Answer one request; the connection closes after it."""
        self.rfile: Any = _Bounded(self.rfile, 2 * LARGEST_REQUEST)
        super().run_wsgi()


class _Bounded:
    def __init__(self, stream: Any, left: int) -> None:
        self._stream, self._left = stream, left
        self.close = stream.close

    def read(self, size: int = -1) -> bytes:
        return self._taken(self._stream.read(self._most(size)))

    def readline(self, size: int = -1) -> bytes:
        return self._taken(self._stream.readline(self._most(size)))

    def _most(self, size: int | None) -> int:
        return self._left if size is None or size < 0 else min(size, self._left)

    def _taken(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


def make_app(feed: Feed) -> Dash:
    """The app of a run: the page asks once a second, and is sent only what changed."""
    app = Dash(
        "persona_probe",
        title=TITLE,
        update_title="",
        serve_locally=True,
        index_string=SHELL,
        use_pages=False,
        include_assets_files=False,
        add_log_handler=False,
    )
    app.layout = layout(feed.run.name or str(feed.run.resolve()))
    app.enable_dev_tools(debug=False, dev_tools_disable_version_check=True)
    lock = threading.Lock()

    @app.callback(
        Output("file", "options"),
        Output("status", "children"),
        Output("figure", "figure"),
        Output("alarms", "children"),
        Output("latest", "children"),
        Output("faults", "children"),
        Output("seen", "data"),
        Input("tick", "n_intervals"),
        Input("file", "value"),
        State("seen", "data"),
    )
    def look(_: int | None, name: str | None, seen: list[Any] | None) -> tuple[Any, ...]:
        with lock:  # a history changes as it is polled
            try:
                return _look(feed, name, seen)
            except Exception as error:  # what a file or a browser sends must not end the page
                log.debug("this page cannot be shown", exc_info=True)
                return no_update, [f"cannot be shown ({type(error).__name__}): {name or feed.run}"], *[no_update] * 5

    _guard(app)
    return app


def _look(feed: Feed, name: str | None, seen: list[Any] | None) -> tuple[Any, ...]:
    names, followed = feed.names(), feed.read(name)
    state = [names, *_state(followed)]
    options = no_update if seen and seen[0] == names else choices(names)
    if seen == state:
        return options, status(followed), *[no_update] * 5
    history = followed.history if followed else History()
    parts = alarms(history), latest(history), faults(history)
    return options, status(followed), monitor_figure(history), *parts, state


def _state(followed: FollowedFile | None) -> list[Any]:
    return [] if followed is None else [followed.name, followed.generation]


def _guard(app: Dash) -> None:
    """Refuse requests under other host names (DNS rebinding), and set the content security policy."""
    server = app.server
    server.config["MAX_CONTENT_LENGTH"] = LARGEST_REQUEST
    server.config["MAX_FORM_MEMORY_SIZE"] = LARGEST_REQUEST

    @server.errorhandler(Exception)
    def refuse_nonsense(error: Exception) -> Any:
        if isinstance(error, HTTPException):
            return error
        log.debug("a request that the page does not make", exc_info=error)
        return "not a request of this page", 400

    @server.before_request
    def refuse_other_hosts() -> None:
        if request.host.rsplit(":", 1)[0] not in HOSTS:
            abort(403)

    @server.before_request
    def refuse_large_bodies() -> None:
        request.get_data()  # aborts with 413 where it is larger

    @server.after_request
    def state_policy(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response
