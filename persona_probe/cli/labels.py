"""`persona-probe label`: what latents fire on, in words, with the words' scores on held-out passages."""

from pathlib import Path

import click

from persona_probe.cli.loop import open_study
from persona_probe.cli.options import COPY, PATH, Common, command, echo_json, json_option, run_argument, show_rows

HEADS = {
    "latent": "latent",
    "author": "by",
    "detection": "detection",
    "fuzzing": "fuzzing",
    "label": "label",
    "reason": "why none",
}


@command(example="persona-probe label runs/demo --judge http:gpt-4o-mini", out=COPY)
@run_argument
@click.option("--judge", help="http:MODEL writes and scores labels of its own; local:MODEL scores those of the rule.")
@click.option("--base-url", metavar="URL", help="Address of the judge's endpoint (default OpenAI's).")
@click.option(
    "--key-variable", metavar="NAME", default="OPENAI_API_KEY", help="Variable with its key; none for no key."
)
@click.option("--cache", type=PATH, help="File of judgements (default: the user's, shared by all runs).")
@click.option("--unembedding", is_flag=True, help="Also score the tokens that each latent promotes as its label.")
@json_option
def label(
    run: str,
    judge: str | None,
    base_url: str | None,
    key_variable: str,
    cache: Path | None,
    unembedding: bool,
    as_json: bool,
    common: Common,
) -> None:
    """Label the latents of the run's cards, and score the labels.

    By detection and fuzzing on held-out passages; below 0.7 in either there is no label.
    """
    study = open_study(run, common)
    from persona_probe.evaluate.judges.cache import JudgementCache
    from persona_probe.evaluate.judging import JudgeOptions, choose_backend
    from persona_probe.latents.labels_by_model import label_cards, label_table, unembedding_labels

    backend, kept = None, None
    if judge is not None:
        key = None if key_variable == "none" else key_variable
        options = JudgeOptions(base_url=base_url, key_variable=key, cache=cache, device=common.device or "cpu")
        backend, kept = choose_backend(judge, options), JudgementCache(cache)
    cards = label_cards(study.context, backend, judge or "", kept)
    rows = label_table(cards, unembedding_labels(study.context) if unembedding else ()).to_dict("records")
    if as_json:
        echo_json(rows)
        return
    for row in rows:
        for name in ("detection", "fuzzing"):
            known = row[name] is not None and row[name] == row[name]
            ends = f"[{row[f'{name}_ci_low']:.2f}, {row[f'{name}_ci_high']:.2f}]" if known else ""
            row[name] = f"{row[name]:.2f} {ends}" if known else None
    show_rows(HEADS, rows, as_json=False, framed=False)  # pyright: ignore[reportArgumentType]
