"""Outputs of an executed notebook made small enough to commit: no widget state, images beside figures, no paths."""

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from persona_probe.report.static import find_browser

PLOTLY, WIDGET, SVG = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json", "image/svg+xml"
IMAGE_WIDTH = 860
"""Pixels of a figure's image, unless the figure has a width of its own."""
DIGITS = 6
"""Significant digits of a number in a figure."""
LIVE = "A live figure: it is drawn while the cell runs; its last state is the figure further down."
NOISE = re.compile(r"Warning: |^\s*warnings\.warn\(|it/s\]|s/it\]|\?it/s|^\[transformers\]")
"""Lines of stderr that say nothing to a reader: warnings of other libraries, and bars of progress."""
PLACE = re.compile(r'( (?:d|transform|points|viewBox|x|y|x1|x2|y1|y2|cx|cy|r|width|height)=")([^"]*)')
LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
DEFAULT_STYLE = re.compile(r"(?:(?:fill|stroke)-)?opacity: 1|vector-effect: none|stroke-miterlimit: 2")


def slim(notebook: Any, root: Path) -> Any:
    """Shorten the outputs of an executed notebook in place, and return it.

    The state of widgets goes (it holds plotly.js whole), bars of progress and warnings of other libraries go, streams
    are joined, and every plotly figure gets an SVG beside it, where a Chromium is there to draw it.

    Args:
        notebook: an `nbformat` notebook, version 4.
        root: folder of this machine that paths are shown relative to.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined(filter(None, (_plain(output, root) for output in cell.outputs)))
    _draw([o["data"] for c in notebook.cells for o in c.get("outputs", []) if PLOTLY in o.get("data", {})])
    return notebook


def _plain(output: Any, root: Path) -> Any | None:
    """One output without widgets and without what only this machine has; None where nothing is left."""
    if output.output_type == "stream":
        text = output.text if output.name == "stdout" else _said(output.text)
        output.text = _relative(text, root)
        return output if output.text.strip() else None
    data = output.get("data", {})
    if WIDGET in data:
        return _live(output) if data.get("text/plain", "").startswith("FigureWidget") else None
    for kind in ("text/plain", "text/html"):
        if kind in data:
            data[kind] = _relative(data[kind], root)
    if PLOTLY in data:
        data[PLOTLY] = _rounded(data[PLOTLY])
    return None if data.get("text/plain", "").startswith("TrainOutput(") else output


def _live(output: Any) -> Any:
    output.data = {"text/plain": LIVE}
    return output


def _said(text: str) -> str:
    """What a stream of stderr tells: the end state of overwritten lines, without noise."""
    lines = [line.rpartition("\r")[2] for line in text.splitlines(keepends=True)]
    return "".join(line for line in lines if not NOISE.search(line))


def _relative(text: str, root: Path) -> str:
    return text.replace(f"{root}/", "").replace(str(root), ".")


def _rounded(value: Any) -> Any:
    """A figure with its numbers in few digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _joined(outputs: Iterable[Any]) -> list[Any]:
    """Streams of one name that follow each other become one."""
    kept: list[Any] = []
    for output in outputs:
        last = kept[-1] if kept else None
        both = last is not None and {last.output_type, output.output_type} == {"stream"}
        if last is not None and both and last.name == output.name:
            last.text += output.text
        else:
            kept.append(output)
    return kept


def _draw(bundles: list[Any]) -> None:
    """Put an SVG beside each plotly figure; all by one browser."""
    browser = find_browser()
    if not bundles or browser is None:
        return
    import kaleido

    with tempfile.TemporaryDirectory() as scratch:
        places = [Path(scratch) / f"{number}.svg" for number in range(len(bundles))]
        jobs = [_job(bundle[PLOTLY], path) for bundle, path in zip(bundles, places, strict=True)]
        kaleido.write_fig_from_object_sync(jobs, kopts={"path": browser, "mathjax": False, "timeout": 120})
        for bundle, path in zip(bundles, places, strict=True):
            bundle[SVG] = smaller(path.read_text(encoding="utf-8"))


def smaller(svg: str) -> str:
    """The same image in fewer characters: hundredths of a pixel, no style that says nothing, no empty groups.

    Text is left as it is.
    """
    svg = PLACE.sub(lambda found: found[1] + LONG_NUMBER.sub(_hundredths, found[2]), svg)
    svg = re.sub(r'( style=")([^"]*)', lambda found: found[1] + _short_style(found[2]), svg)
    return re.sub(r'<g class="[\w -]*"/>', "", svg)


def _hundredths(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _short_style(style: str) -> str:
    kept = [part.strip() for part in style.split(";") if part.strip() and not DEFAULT_STYLE.fullmatch(part.strip())]
    return ";".join(part.replace(": ", ":", 1).replace(", ", ",") for part in kept)


def _job(figure: Any, path: Path) -> dict[str, Any]:
    layout = figure["layout"]
    size = {"width": int(layout.get("width") or IMAGE_WIDTH), "height": int(layout.get("height") or 420)}
    shown = {"data": figure["data"], "layout": layout}
    return {"fig": shown, "path": path, "opts": {"format": "svg", **size}}
