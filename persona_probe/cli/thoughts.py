"""`persona-probe thoughts`: personas that thoughts take on, and the persona feature in thoughts and answers."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from persona_probe.cli.loop import open_study
from persona_probe.cli.options import COPY, PATH, Common, command, echo, echo_json, json_option
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.evaluate.judges.cache import JudgementCache
    from persona_probe.evaluate.judges.replies import Backend


@command(example="persona-probe thoughts runs/mine --read", out=COPY)
@click.argument("run", required=False, metavar="[RUN]", help="A run folder, or a JSON Lines file of answers.")
@click.option("--read", is_flag=True, help="Also read the persona feature over thought and answer tokens.")
@click.option("--limit", type=int, default=200, help="Thoughts of each organism that --read takes.")
@click.option("--judge", help="http:MODEL or local:MODEL in place of the rule.")
@click.option("--base-url", metavar="URL", help="Address of the judge's endpoint (default OpenAI's).")
@click.option(
    "--key-variable", metavar="NAME", default="OPENAI_API_KEY", help="Variable with its key; none for no key."
)
@click.option("--cache", type=PATH, help="File of judgements (default: the user's, shared by all runs).")
@click.option("--check", is_flag=True, help="Print precision and recall on our hand-written passages instead.")
@click.option("--split", type=click.Choice(["test", "dev", "all"]), default="test", help="Passages of --check.")
@json_option
def thoughts(
    run: str | None,
    read: bool,
    limit: int,
    judge: str | None,
    base_url: str | None,
    key_variable: str,
    cache: Path | None,
    check: bool,
    split: str,
    as_json: bool,
    common: Common,
) -> None:
    """Count the personas that thoughts take on.

    By a rule, or by a judge; --check says how often either is right.
    """
    if check == (run is not None):
        raise InputError("give a run folder or a file of answers, or --check alone")
    if read and (run is None or Path(run).is_file()):
        raise InputError("--read needs a run folder: its organisms are read")
    backend, kept = _judge(judge, base_url, key_variable, cache, common)
    if check:
        _check(backend, kept, split, as_json)
        return
    assert run is not None
    from persona_probe.study.thoughts import (
        persona_shares,
        read_in_thoughts,
        read_thoughts,
        thought_readings,
        with_personas,
    )

    table = with_personas(read_thoughts(run), backend, kept)
    shares = persona_shares(table, common.seed or 0)
    readings = None
    if read:
        study = open_study(run, common)
        readings = thought_readings(read_in_thoughts(study.context, table, limit), study.context.seed)
    if as_json:
        found = {"personas": shares.to_dict("records")}
        echo_json(found if readings is None else {**found, "readings": readings.to_dict("records")})
        return
    for frame in (shares, readings):
        if frame is not None:
            echo(frame.to_string(index=False, float_format="%.3f", na_rep="-"))


def _judge(
    judge: str | None, base_url: str | None, key_variable: str, cache: Path | None, common: Common
) -> "tuple[Backend | None, JudgementCache | None]":
    """The judge's model and the file of its judgements; None for the rule."""
    if judge is None:
        return None, None
    from persona_probe.evaluate.judges.cache import JudgementCache
    from persona_probe.evaluate.judging import JudgeOptions, choose_backend

    key = None if key_variable == "none" else key_variable
    options = JudgeOptions(base_url=base_url, key_variable=key, cache=cache, device=common.device or "cpu")
    return choose_backend(judge, options), JudgementCache(cache)


def _check(backend: "Backend | None", cache: "JudgementCache | None", split: str, as_json: bool) -> None:
    from persona_probe.evaluate.personas import load_passages, personas_by_judge, personas_in, quality

    passages = load_passages(split)
    texts = [str(row["text"]) for row in passages]
    found = [personas_in(text) for text in texts] if backend is None else personas_by_judge(texts, backend, cache)
    table = quality(passages, found)
    if as_json:
        echo_json(table.to_dict("records"))
        return
    echo(table.to_string(index=False, float_format="%.3f", na_rep="-"))
    echo(f"{len(passages)} passages ({split}), {sum(not row['classes'] for row in passages)} of them without a persona")
