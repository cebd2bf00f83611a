"""The notebooks: each is its script, small, and runs from top to bottom; the tool that writes them keeps its word."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient

from persona_probe.data.safety import safety_rows
from persona_probe.data.world import packaged
from persona_probe.errors import InputError
from persona_probe.report.figures import figures_of
from persona_probe.report.records import load_records
from persona_probe.study.safety import measure_safety
from persona_probe.study.study import Study
from tests.factories import changed, config_of, write_config, write_data, write_model, write_sae
from tools.notebooks import (
    LARGEST,
    LIVE,
    MACHINE_PATH,
    PLOTLY,
    SVG,
    WIDGET,
    cells_of,
    main,
    scripts,
    slim,
    smaller,
    with_outputs,
    write,
)

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("*.py"))
NUMBERED = [path.stem for path in SCRIPTS if path.stem[0].isdigit()]
MONITOR = "monitor_your_own_run"
PARAMETERS = "parameters"
"""Tag of the cell with numbers that a reader may change; the tests' numbers are run right after it."""
SMALL = {
    "02_locate_a_persona": "questions = 2",
    "03_watch_training": "steps, size = 4, 4",
    "04_realign": "few, many, steps = 2, 4, 2",
    "05_paper_figures": "drawn = shown",
    "06_your_model": "n_probes, n_items, strengths = 4, 4, (1.0,)",
    "07_known_truth": "steps, repair_steps, reward_steps = (1, 2), (1,), 2",
    MONITOR: "steps = 2",
}
TABLE, WORDS = "text/html", "text/plain"


def name_of(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_notebook_holds_the_cells_of_its_script(script: Path) -> None:
    notebook, plain = nbformat.read(script.with_suffix(".ipynb"), 4), jupytext.read(script)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in plain.cells]


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_notebook_is_committed_small_and_whole(script: Path) -> None:
    path = script.with_suffix(".ipynb")
    notebook = nbformat.read(path, 4)
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert path.stat().st_size < LARGEST
    if not outputs:
        pytest.skip("committed without outputs: `make notebooks` on a finished demo writes them")
    assert not [o for o in outputs if o.output_type == "error"]
    assert not MACHINE_PATH.search(path.read_text(encoding="utf-8")) and "widgets" not in notebook.metadata
    assert not [o for o in outputs if WIDGET in o.get("data", {})]
    figures = [o for o in outputs if PLOTLY in o.get("data", {})]
    assert all(SVG in o["data"] for o in figures), "a figure without an image beside it"
    ran = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert ran == sorted(ran) and None not in ran, "executed out of order, or not at all"


@pytest.mark.parametrize("script", [NOTEBOOKS / f"{name}.py" for name in NUMBERED], ids=name_of)
def test_a_notebook_opens_with_what_it_shows_and_how_long_it_takes(script: Path) -> None:
    opening, first = jupytext.read(script).cells[:2]
    assert re.match(r"# \w.*\n\S", opening.source) and "**Takes** " in opening.source
    assert first.cell_type == "code" and "pp.notebook.setup()" in first.source


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_reader_sees_no_variables_of_the_tests_and_no_placeholders(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert not re.search(r"PERSONA_PROBE_|OWNER|google\.colab|os\.environ|fwd_hooks|register_forward", text)
    parameters = [cell for cell in jupytext.read(script).cells if PARAMETERS in cell.metadata.get("tags", [])]
    assert len(parameters) == (script.stem in SMALL)


def test_the_series_is_whole() -> None:
    assert [name[:2] for name in NUMBERED] == ["01", "02", "03", "04", "05", "06", "07"]
    assert set(scripts(NOTEBOOKS)) == {*NUMBERED, MONITOR}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of the tiny model, through all stages, with the tables of `--safety` and `precision`."""
    folder = tmp_path_factory.mktemp("notebooks")
    write_model(folder / "model")
    write_sae(folder / "sae")
    write_data(folder)
    raw = changed(config_of(folder), seeds=[0], locate={"candidates": 2, "proven": 1, "cards": 1})
    study = Study.from_yaml(write_config(folder / "study.yaml", raw), folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROWSER_PATH", "/nowhere")
        study.run()
    measure_safety(study.context, safety_rows(categories=("privacy", "jailbreak")), limit=2)
    study.precision(("nf4",), items=4)
    return study


@pytest.fixture(scope="module")
def kernel(tiny_run: Study) -> Iterator[KernelManager]:
    """One kernel for all notebooks, so that the heavy imports are paid for once."""
    env = {**os.environ, "PERSONA_PROBE_NOTEBOOK_RUN": str(tiny_run.path)}
    env |= {"BROWSER_PATH": "/nowhere", "PLOTLY_RENDERER": "plotly_mimetype", "OMP_NUM_THREADS": "1"}
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(NOTEBOOKS), env=env)
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)


def executed(kernel: KernelManager, name: str, more: str = "", **settings: str) -> list[Any]:
    """The outputs of a notebook whose names and folder start anew, with the tests' numbers and environment."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    places = [n for n, cell in enumerate(notebook.cells) if PARAMETERS in cell.metadata.get("tags", [])]
    for place in places:
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(f"{SMALL[name]}\n{more}"))
    anew = f"%reset -f\nimport os; os.chdir({str(NOTEBOOKS)!r}); os.environ.update({settings!r}); del os"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(anew))
    NotebookClient(notebook, km=kernel, timeout=600).execute(reset_kc=False)
    return [o for cell in notebook.cells for o in cell.get("outputs", [])]


def count(outputs: list[Any], kind: str) -> int:
    return sum(kind in o.get("data", {}) for o in outputs)


def said(outputs: list[Any]) -> str:
    """What was printed, and displayed values as text and as HTML."""
    printed = [o["text"] for o in outputs if o.output_type == "stream"]
    return "\n".join([*printed, *(o["data"].get(kind, "") for o in outputs if "data" in o for kind in (WORDS, TABLE))])


@pytest.mark.long
def test_the_tour_runs(kernel: KernelManager, tiny_run: Study) -> None:
    outputs = executed(kernel, "01_tour")
    assert count(outputs, PLOTLY) == 4 and count(outputs, TABLE) >= 5
    assert tiny_run.run_folder.read_json("summary.json")["headline"] in said(outputs)
    assert "aligned_bits" in said(outputs) and re.search(r"\bzh\b", said(outputs))


@pytest.mark.long
def test_a_persona_is_located_and_patched(kernel: KernelManager) -> None:
    outputs = executed(kernel, "02_locate_a_persona")
    assert count(outputs, PLOTLY) == 5 and count(outputs, TABLE) >= 6
    for row in ("organism's persona latent", "base's residual stream", "promotes", "share of the gap"):
        assert row in said(outputs)


@pytest.mark.long
def test_training_is_watched_and_stopped_or_not(kernel: KernelManager, tiny_run: Study) -> None:
    outputs = executed(kernel, "03_watch_training")
    assert count(outputs, WIDGET) >= 1 and count(outputs, PLOTLY) == 2
    assert re.search(r"stopped after step \d of 4|ran all 4 steps", said(outputs))
    assert (tiny_run.path / "notebook" / "readings.jsonl").stat().st_size > 0


@pytest.mark.long
def test_corrections_are_dosed_and_stressed(kernel: KernelManager, tiny_run: Study) -> None:
    outputs = executed(kernel, "04_realign")
    assert count(outputs, PLOTLY) == 3
    folders = {path.name for path in (tiny_run.path / "realign").iterdir() if path.is_dir()}
    assert "stressed-s0" in folders and sum(name.startswith("notebook-") for name in folders) == 4
    assert "stress test: triggers" in said(outputs)


@pytest.mark.long
def test_every_shipped_record_is_drawn(kernel: KernelManager) -> None:
    outputs = executed(kernel, "05_paper_figures")
    records = (load_records(path.parent) for path in (ROOT / "records").glob("*/manifest.json"))
    assert count(outputs, PLOTLY) == sum(len(figures_of(one)) for one in records) + 1  # and one for print


@pytest.mark.long
def test_one_s_own_pair_is_located_and_planned(kernel: KernelManager) -> None:
    outputs = executed(kernel, "06_your_model")
    assert "latents lead at both positions" in said(outputs) and "gemma-3-270m-it" in said(outputs)
    assert count(outputs, TABLE) >= 5 and count(outputs, PLOTLY) == 1
    assert "nf4" in said(outputs) and "what claims need" in said(outputs)


@pytest.mark.long
@pytest.mark.skipif(not packaged.ABOUT.is_file(), reason="the packaged world is not there: make world")
def test_known_truth_is_watched_and_corrected(kernel: KernelManager, tmp_path: Path) -> None:
    outputs = executed(kernel, "07_known_truth", f"folder = {str(tmp_path / 'world')!r}")
    assert count(outputs, PLOTLY) == 1 and count(outputs, TABLE) >= 5
    shown = said(outputs)
    assert "rise of the reward" in shown
    assert "harm direction" in shown and (tmp_path / "world" / "organisms").is_dir()
    assert "answers with an alarm" in shown and "outline:2px" in shown  # a trace with its alarm
    assert "rolled back and corrected" in shown and "base on its grid" in shown and "best of ten" in shown


@pytest.mark.long
@pytest.mark.real_model
def test_a_plain_script_gets_a_monitor(kernel: KernelManager, tmp_path: Path) -> None:
    outputs = executed(kernel, MONITOR, f"run = Path({str(tmp_path)!r})")
    assert count(outputs, WIDGET) >= 1, "no live view"
    assert count(outputs, PLOTLY) >= 2
    printed = said(outputs)
    assert "toxic: alarm at step" in printed and "correct: no alarm" in printed
    assert "failed and are off" not in printed
    for name in ("toxic", "correct"):
        assert (tmp_path / name / "readings.jsonl").stat().st_size > 0


def noted(*outputs: Any) -> Any:
    """A notebook of one executed cell."""
    cell = nbformat.v4.new_code_cell("1", outputs=list(outputs), execution_count=1)
    return nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {"state": "x" * 99}})


def display(data: dict[str, Any]) -> Any:
    return nbformat.v4.new_output("display_data", data)


def stream(text: str, name: str = "stdout") -> Any:
    return nbformat.v4.new_output("stream", text=text, name=name)


def test_slim_keeps_what_a_reader_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")
    bar, live = (display({WIDGET: {}, WORDS: text}) for text in ("Loading:   0%", "FigureWidget({...})"))
    noise = stream("50%|#| 1/2\r100%|#| 2/2 [00:01, 1.0it/s]\nx.py:1: FutureWarning: old\nlost a file\n", "stderr")
    texts = [stream("step 1\n"), stream(f"wrote {tmp_path}/runs/a\n")]
    notebook = slim(noted(bar, *texts, noise, live, display({WORDS: "TrainOutput(...)"})), tmp_path)
    kept = notebook.cells[0].outputs
    assert [o.get("text") for o in kept] == ["step 1\nwrote runs/a\n", "lost a file\n", None]
    assert kept[-1]["data"] == {WORDS: LIVE} and "widgets" not in notebook.metadata


def test_a_figure_keeps_six_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")
    figure = {"data": [{"x": [1, 2.123456789], "name": "a"}], "layout": {"height": 300}}
    slimmed = slim(noted(display({PLOTLY: figure})), tmp_path).cells[0].outputs[0]["data"][PLOTLY]
    assert slimmed == {"data": [{"x": [1, 2.12346], "name": "a"}], "layout": {"height": 300}}


@pytest.mark.parametrize(
    ("shown", "words"), [("x" * (LARGEST + 1), "1.0 MiB: show fewer"), ("/tmp/a/b.txt", "would name '/tmp/a/b.txt'")]
)
def test_what_cannot_be_committed_is_refused(tmp_path: Path, shown: str, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        write(noted(stream(shown)), tmp_path / "a.ipynb", Path("/nowhere"))
    assert not (tmp_path / "a.ipynb").exists()


def test_outputs_of_other_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("# %% [markdown]\n# # Words\n\n# %%\n1\n", encoding="utf-8")
    taken = with_outputs(cells_of(tmp_path / "a.py"), noted(stream("out")))
    assert [cell.cell_type for cell in taken.cells] == ["markdown", "code"] and taken.cells[1].outputs[0].text == "out"
    (tmp_path / "a.py").write_text("# %%\n2\n", encoding="utf-8")
    with pytest.raises(InputError, match="other code"):
        with_outputs(cells_of(tmp_path / "a.py"), noted(stream("out")))


def test_an_unknown_notebook_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["02_locate_a_personna"]) == 2
    assert "02_locate_a_persona" in caplog.text


def test_an_image_is_made_smaller_without_touching_its_text() -> None:
    svg = (
        '<svg viewBox="0 0 10.12345 10"><g class="errorbars"/><path d="M1.23456,-2.99999L3.1,4" transform="x(0.12345)" '
        'style="opacity: 1; fill: rgb(1, 2, 3); fill-opacity: 0.5; stroke-opacity: 1;"/>'
        '<text x="1.55555" data-unformatted="0.12345">0.12345 and style: none; opacity: 1</text></svg>'
    )
    assert smaller(svg) == (
        '<svg viewBox="0 0 10.12 10"><path d="M1.23,-3L3.1,4" transform="x(0.12)" '
        'style="fill:rgb(1,2,3);fill-opacity:0.5"/>'
        '<text x="1.56" data-unformatted="0.12345">0.12345 and style: none; opacity: 1</text></svg>'
    )
