"""Figures as images, drawn by kaleido and a Chromium; one line says how to get them where they are not there."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from persona_probe.errors import InputError
from persona_probe.report.figures import FigureSpec
from persona_probe.report.metadata import tag
from persona_probe.report.printing import PNG_SCALE, Width, for_print
from persona_probe.report.provenance import provenance, short_provenance
from persona_probe.report.theme import Theme

logger = logging.getLogger(__name__)

STATIC = ("svg", "pdf", "png")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """Path of a Chromium: `BROWSER_PATH` where set, else the first found on the PATH."""
    if stated := os.environ.get("BROWSER_PATH"):
        return shutil.which(stated)
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def write_images(
    folder: Path,
    figures: Sequence[tuple[FigureSpec, go.Figure]],
    formats: Sequence[str],
    manifest: Mapping[str, Any],
    width: Width,
    theme: Theme,
) -> list[Path]:
    """Write `<name>.<format>` of every figure, tagged with its origin; nothing where kaleido or Chromium is missing.

    Raises:
        InputError: the browser could not draw.
    """
    if (browser := _ready(formats)) is None:
        return []
    import kaleido

    # It logs, with its stack, every message of the browser that it then ignores; what fails comes back below.
    logging.getLogger("choreographer").setLevel(logging.CRITICAL)
    footer = short_provenance(manifest)
    printed = [(spec, fig, for_print(fig, width, theme, footer)) for spec, fig in figures]
    names = [(spec, fig, shown, kind) for kind in formats for spec, fig, shown in printed]
    jobs = [_job(folder / f".{spec.name}.tmp.{kind}", shown, kind) for spec, _, shown, kind in names]
    # one browser for all of them; mathjax would be fetched from the network
    failures = kaleido.write_fig_from_object_sync(jobs, kopts={"path": browser, "mathjax": False, "timeout": 120})
    if failures:
        raise InputError(f"{browser} could not draw {len(failures)} figures ({failures[0]}): leave out its format")
    written = []
    for (spec, fig, _, kind), job in zip(names, jobs, strict=True):
        drawn: Path = job["path"]
        layout: Any = fig.layout
        image = tag(drawn.read_bytes(), kind, provenance(manifest), spec.title, str(layout.meta["caption"]))
        drawn.write_bytes(image)
        drawn.replace(path := folder / f"{spec.name}.{kind}")
        written.append(path)
    return written


def _ready(formats: Sequence[str]) -> str | None:
    """The browser to draw with; None, and one logged line, where something is missing."""
    named = ", ".join(formats).upper()
    try:
        import kaleido  # noqa: F401
    except ImportError:
        logger.warning("%s figures skipped: install kaleido (pip install 'persona-probe[figures]')", named)
        return None
    if (browser := find_browser()) is None:
        logger.warning(
            "%s figures skipped: no Chromium found; install one (Debian package chromium) or set BROWSER_PATH", named
        )
    return browser


def _job(path: Path, fig: go.Figure, kind: str) -> dict[str, Any]:
    size: Any = fig.layout
    scale = PNG_SCALE if kind == "png" else 1
    return {
        "fig": fig,
        "path": path,
        "opts": {"format": kind, "width": size.width, "height": size.height, "scale": scale},
    }
