"""Execute the notebooks and write them, with small outputs, next to their scripts.

python -m tools.notebooks [NAME ...]
python -m tools.notebooks NAME --executed FILE.ipynb

The script (jupytext's percent format) is the source; the notebook holds the same cells and their outputs. Needs the
packages of the extra `dev`, and a finished run in runs/demo (or PERSONA_PROBE_NOTEBOOK_RUN).
"""

import argparse
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from persona_probe.errors import InputError, unknown
from persona_probe.report.images import find_browser
from persona_probe.writing import write_text

# --- Outputs of an executed notebook made small enough to commit: no widget state, images next to figures, no paths

PLOTLY, WIDGET, SVG = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json", "image/svg+xml"
IMAGE_WIDTH = 860
"""Pixels of a figure's image, unless the figure has a width of its own."""
DIGITS = 6
"""Significant digits of a number in a figure."""
LIVE = "A live figure: it is drawn while the cell runs; its last state is the figure further down."
NOISE = re.compile(r"Warning: |^\s*warnings\.warn\(|it/s\]|s/it\]|\?it/s|^\[transformers\]|kernels-community")
"""Lines of stderr that tell a reader nothing: warnings of other libraries, and progress bars."""
PLACE = re.compile(r'( (?:d|transform|points|viewBox|x|y|x1|x2|y1|y2|cx|cy|r|width|height)=")([^"]*)')
LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
DEFAULT_STYLE = re.compile(r"(?:(?:fill|stroke)-)?opacity: 1|vector-effect: none|stroke-miterlimit: 2")


def slim(notebook: Any, root: Path) -> Any:
    """Shorten the outputs of an executed notebook in place, and return it.

    The state of widgets (it contains all of plotly.js), progress bars and warnings of other libraries are removed.
    Streams are joined. Every plotly figure gets an SVG next to it, if Chromium is installed.

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
        text = output.text if output.name == "stdout" else _last_lines(output.text)
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


def _last_lines(text: str) -> str:
    """A stream of stderr without noise; of lines that overwrite each other, the last."""
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
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        both = last is not None and {last.output_type, output.output_type} == {"stream"}
        if last is not None and both and last.name == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _draw(bundles: list[Any]) -> None:
    """Put an SVG next to each plotly figure; one browser draws them all."""
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
    svg = PLACE.sub(lambda match: match[1] + LONG_NUMBER.sub(_hundredths, match[2]), svg)
    svg = re.sub(r'( style=")([^"]*)', lambda match: match[1] + _short_style(match[2]), svg)
    return re.sub(r'<g class="[\w -]*"/>', "", svg)


def _hundredths(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _short_style(style: str) -> str:
    parts = [part.strip() for part in style.split(";") if part.strip() and not DEFAULT_STYLE.fullmatch(part.strip())]
    return ";".join(part.replace(": ", ":", 1).replace(", ", ",") for part in parts)


def _job(figure: Any, path: Path) -> dict[str, Any]:
    layout = figure["layout"]
    size = {"width": int(layout.get("width") or IMAGE_WIDTH), "height": int(layout.get("height") or 420)}
    return {"fig": {"data": figure["data"], "layout": layout}, "path": path, "opts": {"format": "svg", **size}}


logger = logging.getLogger(__name__)

FOLDER = Path("notebooks")
LARGEST = 2**20
"""Bytes that a committed notebook may have."""
MACHINE_PATH = re.compile(r"(?:/home/|/root/|/Users/|/tmp/|site-packages/)[^\s\"\\]*")
"""What must not be in an output."""
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def scripts(folder: Path = FOLDER) -> dict[str, Path]:
    """Name to script of every notebook."""
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def cells_of(script: Path) -> Any:
    """The notebook of a script, without outputs; cells are numbered, so that ids do not change at every writing."""
    import jupytext
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=jupytext.read(script).cells, metadata={"kernelspec": KERNEL})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
    return notebook


def execute(notebook: Any, root: Path, timeout: int = 3600) -> Any:
    """Run all cells in a fresh kernel in `root`, and return the notebook with its outputs."""
    from nbclient import NotebookClient

    os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")
    where, started = {"metadata": {"path": str(root)}}, time.monotonic()

    def log_cell(cell_index: int, **_: Any) -> None:
        logger.info("cell %d of %d, %.0f s", cell_index + 1, len(notebook.cells), time.monotonic() - started)

    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources=where, on_cell_executed=log_cell
    )
    return client.execute()


def with_outputs(notebook: Any, executed: Any) -> Any:
    """The notebook with the outputs of an executed one.

    Raises:
        InputError: the executed one has other code.
    """
    ours, theirs = ([c for c in nb.cells if c.cell_type == "code"] for nb in (notebook, executed))
    if [c.source for c in ours] != [c.source for c in theirs]:
        raise InputError("the executed notebook has other code than the script: execute it again")
    for cell, done in zip(ours, theirs, strict=True):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
    return notebook


def write(notebook: Any, path: Path, root: Path) -> Path:
    """Make the outputs small and write the notebook.

    Raises:
        InputError: the file is too large to commit, or an output names a path of this machine.
    """
    import nbformat

    text = nbformat.writes(slim(notebook, root)) + "\n"
    if len(text.encode()) > LARGEST:
        raise InputError(f"{path} would have {len(text.encode()) / 2**20:.1f} MiB: show fewer or smaller figures")
    if place := MACHINE_PATH.search(text):
        raise InputError(f"{path} would name {place.group()!r}: run it in the repository's top, and show less")
    return write_text(path, text)


def make(name: str, executed: Path | None = None, folder: Path = FOLDER) -> Path:
    """Execute a notebook (or take the outputs of an executed copy) and write it next to its script.

    Raises:
        InputError: no such notebook, or one that cannot be committed.
    """
    import nbformat

    sources, root = scripts(folder), Path.cwd()
    if name not in sources:
        raise unknown("notebook", name, sources)
    notebook, started = cells_of(sources[name]), time.monotonic()
    done = execute(notebook, root) if executed is None else with_outputs(notebook, nbformat.read(executed, 4))
    path = write(done, sources[name].with_suffix(".ipynb"), root)
    logger.info("%s: %.0f s, %d KiB", path, time.monotonic() - started, path.stat().st_size // 1024)
    return path


def main(args: Sequence[str]) -> int:
    """Make the named notebooks, or all; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for talkative in ("kaleido", "choreographer", "traitlets"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--executed", type=Path, help="take the outputs from this copy, made with the same code")
    options = parser.parse_args(args)
    try:
        for name in options.names or scripts():
            make(name, options.executed)
    except InputError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
