"""`persona-probe precision`: what number formats of few bits keep of a fine-tune."""

import click

from persona_probe.cli.loop import open_study
from persona_probe.cli.options import COPY, Common, command, echo_json, json_option, many, run_argument, show_rows

HEADS = {
    "format": "format",
    "arm": "arm",
    "seed": "seed",
    "kept": "kept",
    "reading": "reading",
    "band": "base band",
    "state": "state",
    "explained_variance": "expl. var.",
    "index": "index",
    "difference": "minus control",
    "ranks": "rank by rise / firing / cosine",
}


@command(example="persona-probe precision runs/demo --formats nf4 mxfp4 hif4 q4_1", out=COPY)
@run_argument
@many("--formats", help="int8 fp8 hif8 mxfp8 nf4 mxfp4 nvfp4 hif4 int4 q4_1 int3; default all.")
@click.option("--items", type=int, default=24, help="Questions of each split, spread over the categories.")
@many("--seeds", type=int, help="Of the study's organisms (default the first).")
@click.option("--activations", is_flag=True, help="Round the inputs of linear layers too, where the format does.")
@json_option
def precision(
    run: str,
    formats: tuple[str, ...],
    items: int,
    seeds: tuple[int, ...],
    activations: bool,
    as_json: bool,
    common: Common,
) -> None:
    """Read base and organisms in number formats of few bits.

    Warns where a format erases the fine-tune: a quiet reading in it is a false all-clear.
    """
    from persona_probe.models.formats import formats_named

    formats_named(formats)  # before the model is loaded
    table = open_study(run, common).precision(formats, items=items, seeds=seeds, activations=activations)
    rows = table.to_dict("records")
    if as_json:
        echo_json(rows)
        return
    for row in rows:
        row["band"] = f"{row['band_low']:.2f} to {row['band_high']:.2f}"
        ends = f"[{row['index_minus_control_ci_low']:+.3f}, {row['index_minus_control_ci_high']:+.3f}]"
        known = row["index_minus_control"] == row["index_minus_control"]
        row["difference"] = f"{row['index_minus_control']:+.3f} {ends}" if known else ""
        row["ranks"] = " / ".join(str(int(row[f"{name}_rank"])) for name in ("rise", "firing_rise", "cosine"))
        row["kept"] = None if row["arm"] == "base" else row["kept"]
    show_rows(HEADS, rows, as_json=False, framed=False)  # pyright: ignore[reportArgumentType]
