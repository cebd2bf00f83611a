"""`persona-probe data screen FILE`: rank the rows of a data set before training on it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.screening.screen import Screening

MODEL = "smollm2-135m-instruct"
SAE = "saes/smollm2-135m-instruct/layer20-topk32-4608"


def data_screen(args: argparse.Namespace) -> None:
    """Screen a file and write table, scores and page into a folder."""
    _check(args)
    from persona_probe.commands import echo
    from persona_probe.memory import keep_freed_memory
    from persona_probe.quiet import quiet_libraries

    keep_freed_memory()
    quiet_libraries()
    from persona_probe.screening.inputs import check_rows
    from persona_probe.screening.write import result_lines, write_screening

    rows = check_rows(args.file)  # first: bad rows are told before a model loads
    out = args.out or Path("runs") / f"screen-{Path(args.file).name.split('.')[0].replace(':', '-')}"
    found = _by_run(args, rows, out) if args.run else _by_latent(args, rows, out)
    page = write_screening(found, out, args.file, _model_name(args), args.worst)
    echo("\n".join([*result_lines(found), f"page: {page}"]))


def _check(args: argparse.Namespace) -> None:
    if args.worst < 1:
        raise InputError(f"--worst must be at least 1, not {args.worst}")
    if args.run is None and args.latent is None:
        raise InputError("no persona feature: give --run RUN, or --latent (with --model and --sae)")
    if args.run is not None and (args.latent is not None or args.model or args.sae):
        raise InputError("--run brings its own model, SAE and latent: leave --model, --sae and --latent out")
    if args.run is None and args.direction:
        raise InputError("--direction names one of a run's directions: give --run as well")


def _by_run(args: argparse.Namespace, rows: list, out: Path) -> "Screening":
    from persona_probe.screening.of_study import screen_by_study
    from persona_probe.study import Study

    return screen_by_study(
        Study.open(args.run, args.device, args.seed).context, rows, args.direction, args.rankers, out
    )


def _by_latent(args: argparse.Namespace, rows: list, out: Path) -> "Screening":
    from persona_probe.context import pick_device
    from persona_probe.models.load import load_model
    from persona_probe.saes.load import load_sae
    from persona_probe.screening.evidence import available
    from persona_probe.screening.feature import latent_feature
    from persona_probe.screening.rankers import choose_rankers
    from persona_probe.screening.screen import screening
    from persona_probe.screening.write import settings_for

    device = pick_device(args.device or "auto")
    feature = latent_feature(load_sae(args.sae or SAE, device=device), args.latent)
    choose_rankers(args.rankers, available(feature, organism=False))  # before the model loads
    model, tokenizer = load_model(args.model or MODEL, device=device)
    return screening(rows, model, feature, tokenizer=tokenizer, rankers=args.rankers, settings=settings_for(out))


def _model_name(args: argparse.Namespace) -> str:
    if args.run is None:
        return args.model or MODEL
    from persona_probe.runs import RunFolder

    return RunFolder.open(args.run).config.model
