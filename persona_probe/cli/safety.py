"""`persona-probe evaluate --safety`: the bilingual safety set, and published files, by category and language."""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from persona_probe.cli.loop import open_study
from persona_probe.cli.options import PATH, Common, echo, echo_json, many
from persona_probe.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from persona_probe.data.load import Row

OTHERS = ("judge", "questions", "answers", "score_scale", "steps", "prices", "dry_run", "half_width")
"""Options of `evaluate` that belong to judged answers."""


def safety_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give `evaluate` the option --safety and what belongs to it; without it the function is called as before."""

    @wraps(function)
    def evaluate(
        *,
        safety: bool,
        safety_files: tuple[Path, ...],
        safety_answers: Path | None,
        safety_items: int | None,
        **options: Any,
    ) -> None:
        if not safety:
            if safety_files or safety_answers or safety_items is not None:
                raise InputError("--safety-files, --safety-answers and --safety-items belong to --safety: add it")
            function(**options)
            return
        if clash := next((name for name in OTHERS if options.get(name)), None):
            raise InputError(f"--safety scores given answers: leave --{clash.replace('_', '-')} out")
        if options["run"] is None:
            raise InputError("--safety needs a run folder")
        if safety_items is not None and safety_items < 2:
            raise InputError(f"--safety-items must be at least 2, not {safety_items}")
        rows = _rows(safety_files, safety_answers)
        _show(options["run"], rows, safety_items, options["as_json"], options["common"])

    added = [
        click.option("--safety", is_flag=True, help="Score the bilingual safety set: no sampling, no judge."),
        many("--safety-files", type=PATH, help="With --safety: files of SafetyBench, BBQ, CBBQ, XSTest or CValues."),
        click.option("--safety-answers", type=PATH, help="Of a SafetyBench test file."),
        click.option("--safety-items", type=int, help="At most this many questions a category and language."),
    ]
    command: Callable[..., None] = evaluate
    for option in reversed(added):
        command = option(command)
    return command


def _rows(files: Sequence[Path], answers: Path | None) -> "list[Row]":
    from persona_probe.data.safety import safety_rows
    from persona_probe.data.safety_files import read_safety_file

    if answers is not None and not files:
        raise InputError("--safety-answers belongs to a SafetyBench file: name it with --safety-files")
    return [row for file in files for row in read_safety_file(file, answers)] if files else safety_rows()


def _show(run: str, rows: "list[Row]", items: int | None, as_json: bool, common: Common) -> None:
    study = open_study(run, common)
    from persona_probe.evaluate.safety import safety_summary, wrapper_effects
    from persona_probe.study.safety import measure_safety
    from persona_probe.study.safety_latent import REFUSAL, read_by_language, transfer_lines, transfer_summary

    table = measure_safety(study.context, rows, items)
    summary = safety_summary(table, study.config.control, study.context.seed)
    wrappers = wrapper_effects(table, study.context.seed)
    plain = (table["wrapper"] == "plain") & (table["category"] != REFUSAL)
    located = study.run_folder.has("parts/selection.parquet") and plain.any()
    read = read_by_language(study.context, rows, items) if located else None
    transfer = None if read is None else transfer_summary(read, study.config.control, study.context.seed)
    if as_json:
        found = {"categories": summary, "wrappers": wrappers} | ({} if transfer is None else {"latent": transfer})
        echo_json({name: frame.to_dict("records") for name, frame in found.items()})
        return
    echo(_table(summary))
    if len(wrappers):
        echo("\nwhat a wrapper adds to the index of the same requests asked plainly")
        echo(
            _lines(
                wrappers.assign(effect=_with_ends(wrappers, "effect", "ci"))[["arm", "language", "wrapper", "effect"]]
            )
        )
    if read is not None and transfer is not None:
        echo("\n" + "\n".join(transfer_lines(transfer, int(read["latent"].iloc[0]))))
    bits = table[table["arm"] == "base"].groupby("language")["aligned_bits"].mean()
    told = ", ".join(f"{language} {value:.1f}" for language, value in bits.items())
    echo(f"\nbits a character of aligned answers, base: {told}")


def _table(summary: "pd.DataFrame") -> str:
    plain = summary[summary["wrapper"] == "plain"]
    columns = {name: _with_ends(plain, name, name) for name in ("index", "over_base", "over_control")}
    shown = plain.assign(**columns)
    names = ["category", "language", "arm", "index", "over_base", "over_control", "preferred", "questions"]
    return _lines(shown[names])


def _lines(frame: "pd.DataFrame") -> str:
    return frame.to_string(index=False, float_format="%.2f", na_rep="-")


def _with_ends(frame: "pd.DataFrame", value: str, ends: str) -> list[str]:
    prefix = "ci" if ends == "ci" else f"{ends}_ci"
    rows = zip(frame[value], frame[f"{prefix}_low"], frame[f"{prefix}_high"], strict=True)
    return ["" if v != v else f"{v:+.3f} [{low:+.3f}, {high:+.3f}]" for v, low, high in rows]
