"""`persona-probe realign`: the config's arms, a correction of one's own, a grid of them, and stress tests."""

import argparse
from typing import Any

from persona_probe.commands import echo, find_config, opened
from persona_probe.errors import InputError
from persona_probe.finetune.realignment.plan import DosePlan
from persona_probe.finetune.realignment.spec import check_choice

OWN = ("data", "rows", "choose_by", "method", "name")


def realign(args: argparse.Namespace) -> None:
    """Run what the options ask for, and print the verdicts (a grid: its table).

    Args (beside the common ones): run, data, rows, choose_by, method, seeds, name, stress, plan.
    """
    given = {key: value for key in OWN if (value := getattr(args, key)) is not None}
    if args.plan is not None:
        if clash := [*given, *(["stress"] if args.stress else []), *(["seeds"] if args.seeds else [])]:
            raise InputError(f"--plan says all of a grid: leave --{clash[0].replace('_', '-')} out")
        _grid(args)
        return
    if given and "data" not in given:
        raise InputError(f"--{next(iter(given)).replace('_', '-')} needs --data: the corrective sets or files")
    # Before torch loads: what needs no model.
    check_choice(args.rows, args.choose_by or "random", args.method or "continued")
    _repair(args, given)


def _grid(args: argparse.Namespace) -> None:
    from persona_probe.config_files import load_config

    plan = load_config(find_config(args.plan), DosePlan)
    study = opened(args).track()
    table = study.realign_plan(plan)
    from persona_probe.finetune.realignment.figure_files import write_figure

    columns = ["data", "dose", "choose_by", "method", "seed", "index_minus_base", "index_minus_base_ci_low"]
    columns += ["index_minus_base_ci_high", "feature", "in_band", "steps_to_band", "steps_to_behaviour"]
    columns += ["reply_tokens", "perplexity_ratio"]
    shown = [name for name in columns if name in table]
    echo(table[shown].to_string(index=False, float_format="%.3f"))
    echo(f"figure: {write_figure(study.path, table)}")


def _repair(args: argparse.Namespace, given: dict[str, Any]) -> None:
    from persona_probe.finetune.realignment.run import realign_study
    from persona_probe.finetune.stress.run import statements
    from persona_probe.summary import summarise

    study = opened(args).track()
    settings = {"rows": None, "choose_by": "random", "method": "continued", "name": None}
    settings |= {key: value for key, value in given.items() if key != "data"}
    folders = realign_study(study.context, args.data, args.seeds, args.stress or (), settings)
    if args.data is None:
        for verdict in summarise(study.context)["verdicts"].values():
            echo(verdict["statement"])
    for folder in folders:
        if args.data is not None:
            from persona_probe.finetune.realignment.verdict import verdict_lines

            echo("\n".join(verdict_lines(folder)))
        else:
            echo("\n".join([f"{folder.name}:", *statements(folder).values()]))
        echo(f"folder: {folder}")
