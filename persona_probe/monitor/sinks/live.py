"""A figure in a notebook that grows while the cell that trains is running."""

import logging
import time
from typing import TYPE_CHECKING, Any

from persona_probe.monitor.events import Alarm, End, Event, Fault

if TYPE_CHECKING:
    import plotly.graph_objects as go

log = logging.getLogger(__name__)

SHARE = 0.05
"""Largest share of the time that drawing may take; a slow figure is drawn less often."""


class LiveView:
    """Draws features with base bands, alarms, behaviour and the SAE's fit in a plotly `FigureWidget`, live.

    ```python
    pp.FeatureMonitor(sae, features, sinks=[LiveView()])   # the figure appears below the cell when training starts
    ```

    Outside a notebook, or without anywidget and ipywidgets, it warns once and does nothing.

    Args:
        seconds: least time between two drawings; alarms and the end are drawn at once.
        limit: points per curve (`History` thins longer curves).
    """

    def __init__(self, seconds: float = 1.0, limit: int = 1000) -> None:
        from persona_probe.monitor.history import History

        self.history, self.seconds = History(limit), seconds
        self._widget: Any = None
        self._next, self._displayed, self._missing = 0.0, False, not _has_widgets()
        if self._missing:
            log.warning("live view is off, no anywidget or ipywidgets: pip install 'persona-probe[notebooks]'")

    @property
    def figure(self) -> Any:
        """The `FigureWidget`, up to date; put it in a cell to show it again. None where the view is off."""
        if not self._missing:
            self._draw()
        return self._widget

    def emit(self, event: Event) -> None:
        """Add the event; show the figure at the first one, then update it in place."""
        if self._missing:
            return
        self.history.add([event])
        if not self._displayed:
            self._displayed = True
            self._show()
        elif self._widget is not None and (isinstance(event, Alarm | Fault | End) or time.monotonic() >= self._next):
            self._draw()

    def close(self) -> None:
        """Draw what was not drawn yet."""
        if self._widget is not None:
            self._draw()

    def _show(self) -> None:
        if not _in_notebook():
            log.warning("live view is off: no notebook here; TerminalSink() is for scripts")
            return
        from IPython.display import display

        self._draw()
        display(self._widget)

    def _draw(self) -> None:
        from persona_probe.monitor.figure import monitor_figure

        begun = time.monotonic()
        fresh = monitor_figure(self.history)
        if self._widget is None:
            import plotly.graph_objects as go

            self._widget = go.FigureWidget(fresh)
        elif _structure(fresh) == _structure(self._widget):
            _update(self._widget, fresh)
        else:
            _replace(self._widget, fresh)
        now = time.monotonic()
        self._next = now + max(self.seconds, (now - begun) / SHARE)


def _structure(fig: "go.Figure") -> list[tuple[Any, ...]]:
    """What must be equal so that new data fits into the old traces."""
    return [(t.type, t.mode, t.fill, t.name, t.xaxis, t.yaxis) for t in fig.data]  # pyright: ignore[reportAttributeAccessIssue]


def _update(widget: "go.FigureWidget", fresh: "go.Figure") -> None:
    """New data and alarms, in one message to the page."""
    with widget.batch_update():
        for old, new in zip(widget.data, fresh.data, strict=True):
            old.update(x=new.x, y=new.y, text=new.text)  # pyright: ignore[reportAttributeAccessIssue]
        widget.layout.shapes = fresh.layout.shapes  # pyright: ignore[reportAttributeAccessIssue]


def _replace(widget: "go.FigureWidget", fresh: "go.Figure") -> None:
    """Other panels or traces: a feature, a mode or a behaviour is new."""
    widget.data = ()
    widget.update_layout(shapes=())  # the page keeps what a new layout does not mention
    widget.layout = fresh.layout
    widget.add_traces(fresh.data)


def _has_widgets() -> bool:
    try:
        import anywidget
        import ipywidgets
    except ImportError:
        return False
    return bool(anywidget and ipywidgets)


def _in_notebook() -> bool:
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    return shell is not None and "IPKernelApp" in shell.config
