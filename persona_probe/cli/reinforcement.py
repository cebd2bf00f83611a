"""`persona-probe reinforcement`: a study's arms of reinforcement learning, on one axis."""

from pathlib import Path

import click

from persona_probe.cli.options import Common, command, echo, echo_json, json_option, run_argument, show_rows

HEADS = {"arm": "arm", "step": "step", "measure": "measure", "value": "estimate [95% interval]", "n": "n"}


@command(example="persona-probe reinforcement runs/grpo-smollm2", out="Folder of the figure (default RUN/figures).")
@run_argument
@click.option("--last", is_flag=True, help="Show the last step alone.")
@click.option("--page", type=Path, help="Markdown page whose marked part gets the arms, their rises and the time.")
@json_option
def reinforcement(run: str, last: bool, page: Path | None, as_json: bool, common: Common) -> None:
    """Show reward, hacking, behaviour and reading of a study's arms of reinforcement learning, step by step.

    Writes reinforcement.parquet and the figure, and says whether each arm's reward rose. Behaviour and reading are
    there once `track` has run.
    """
    from persona_probe.report.export import export_figures
    from persona_probe.report.records import Records
    from persona_probe.report.tables import check_page, fill_page
    from persona_probe.runs import RunFolder
    from persona_probe.study.reinforcement import marks, reinforcement_table, reinforcement_text

    folder = RunFolder.open(run)
    if page is not None:
        check_page(page, marks(folder))
    with folder.writing():
        table = reinforcement_table(folder)
    if as_json:
        echo_json(table.to_dict("records"))
        return
    rows = (table[table["step"] == table["step"].max()] if last else table).to_dict("records")
    for row in rows:
        known = row["ci_low"] == row["ci_low"]
        row["value"] = f"{row['estimate']:+.3f}" + (f" [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]" if known else "")
    show_rows(HEADS, rows, as_json=False, framed=False)  # pyright: ignore[reportArgumentType]
    text = reinforcement_text(folder, table)
    echo("\n" + text.rpartition("\n\n")[2])
    if page is not None:
        fill_page(page, marks(folder), text)
    drawn = common.out or Path(run) / "figures"
    for path in export_figures(Records(reinforcement=table), drawn, only=["reinforcement"]):
        echo(f"figure: {path}")
