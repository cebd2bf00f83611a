"""Execute the notebooks and write them, with small outputs, beside their scripts.

python -m persona_probe.bench.notebooks [NAME ...]
python -m persona_probe.bench.notebooks NAME --executed FILE.ipynb

The script (jupytext's percent format) is the source; the notebook holds the same cells and their outputs. Needs the
packages of the extra `dev`, and a finished run in runs/demo (or PERSONA_PROBE_NOTEBOOK_RUN).
"""

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persona_probe.bench.notebook_outputs import slim
from persona_probe.errors import InputError, unknown
from persona_probe.report.page import write_text

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

    def told(cell: Any, cell_index: int, **_: Any) -> None:
        logger.info("cell %d of %d, %.0f s", cell_index + 1, len(notebook.cells), time.monotonic() - started)

    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=where, on_cell_executed=told)
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
    if found := MACHINE_PATH.search(text):
        raise InputError(f"{path} would name {found.group()!r}: run it in the repository's top, and show less")
    return write_text(path, text)


def make(name: str, executed: Path | None = None, folder: Path = FOLDER) -> Path:
    """Execute a notebook (or take the outputs of an executed copy) and write it beside its script.

    Raises:
        InputError: no such notebook, or one that cannot be committed.
    """
    import nbformat

    known, root = scripts(folder), Path.cwd()
    if name not in known:
        raise unknown("notebook", name, known)
    notebook, started = cells_of(known[name]), time.monotonic()
    done = execute(notebook, root) if executed is None else with_outputs(notebook, nbformat.read(executed, 4))
    path = write(done, known[name].with_suffix(".ipynb"), root)
    logger.info("%s: %.0f s, %d KiB", path, time.monotonic() - started, path.stat().st_size // 1024)
    return path


def main(args: Sequence[str]) -> int:
    """Make the named notebooks, or all; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for talkative in ("kaleido", "choreographer", "traitlets"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(prog="python -m persona_probe.bench.notebooks", description=__doc__)
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
