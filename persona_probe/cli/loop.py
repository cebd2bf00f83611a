"""The commands behind `persona-probe`: each takes the parsed arguments and calls the library."""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_probe.errors import InputError
from persona_probe.realignment.spec import DosePlan, check_choice

if TYPE_CHECKING:
    from persona_probe.study.study import Study

Arguments = argparse.Namespace
ROOT = Path(__file__).parents[2]
DEMO = "finetune_configs/demo.yaml"


def echo(text: str) -> None:
    """Write a result to standard output."""
    sys.stdout.write(text + "\n")


def find_config(name: str) -> Path:
    """A config path as given, or below the checkout."""
    path = Path(name)
    return path if path.exists() or not (ROOT / path).exists() else ROOT / path


def new_study(args: Arguments, config_name: str) -> "Study":
    """The study of a config file, with --seed or --seeds, --out, --overwrite and --device applied."""
    from persona_probe.config import StudyConfig, load_config

    config = load_config(find_config(config_name), StudyConfig)  # first: a bad config is told before torch loads
    from persona_probe.cli.process import keep_freed_memory, quiet_libraries
    from persona_probe.study.study import Study

    keep_freed_memory()
    seeds = args.seeds if args.seeds is not None else ([args.seed] if args.seed is not None else None)
    name = config.name
    if seeds is not None and tuple(seeds) != config.seeds:
        config = replace(config, seeds=tuple(seeds))
        name += "-s" + "-".join(map(str, seeds))
    quiet_libraries()
    return Study.from_config(config, args.out or Path("runs") / name, args.overwrite, args.device)


def opened(args: Arguments) -> "Study":
    """An existing run; with --out, a copy of it there, so that RUN stays as it is."""
    from persona_probe.runs import RunFolder

    folder = RunFolder.open(args.run).path
    if args.out is not None and args.out.exists():
        raise InputError(f"{args.out} exists: choose another --out")
    from persona_probe.cli.process import keep_freed_memory, quiet_libraries
    from persona_probe.study.study import Study

    keep_freed_memory()
    if args.out is not None:
        shutil.copytree(folder, args.out)
        folder = args.out
    quiet_libraries()
    try:
        return Study.open(folder, args.device, args.seed)
    except InputError:
        if args.out is not None:
            shutil.rmtree(args.out)
        raise


def demo(args: Arguments) -> None:
    """The whole loop on the embedded model."""
    finish(new_study(args, DEMO))


def run(args: Arguments) -> None:
    """The whole loop of one config, or only its plan."""
    if not args.dry_run:
        finish(new_study(args, args.config))
        return
    from persona_probe.cli.process import quiet_libraries
    from persona_probe.config import StudyConfig, load_config

    config = load_config(find_config(args.config), StudyConfig)
    quiet_libraries()
    from persona_probe.study.plan.plan import dry_run

    plan = dry_run(config, args.tflops, args.device)
    echo("\n".join(plan.lines()))


def finish(study: "Study") -> None:
    """Run all stages that are not done, and show the table."""
    from persona_probe.cli.output import show_summary

    report = study.run()
    show_summary(study.summary)
    echo(f"report: {report}")


def induce(args: Arguments) -> None:
    """Fine-tune the arms of a config."""
    echo(f"organisms: {new_study(args, args.config).induce().path / 'arms'}")


def locate(args: Arguments) -> None:
    """Rank latents, test the best for cause."""
    study = opened(args).locate(args.rankers)
    columns = ["latent", "rank", "rise", "cosine", "effect_base", "effect_base_low", "effect_base_high"]
    columns += ["effect_organism", "ablation", "causal", "label"]
    tested = study.features[study.features["kind"] == "candidate"].sort_values("effect_base", ascending=False)
    echo(tested[columns].to_string(index=False, float_format="%.4f"))
    if args.cards is not None or args.text is not None:
        echo(f"cards: {study.cards(20 if args.cards is None else args.cards, args.text)}")


def track(args: Arguments) -> None:
    """Read features and contrast index at every checkpoint."""
    study = opened(args).track()
    persona = study.readings[study.readings["feature"] == "persona"]
    columns = ["arm", "seed", "step", "mean", "ci_low", "ci_high", "explained_variance"]
    echo(persona[columns].to_string(index=False, float_format="%.4f"))


def evaluate(args: Arguments) -> None:
    """Sample answers of every arm and have a judge rule on them, or judge the answers of a file."""
    if (args.run is None) == (args.answers is None):
        raise InputError("give either a run folder or --answers FILE")
    if args.run is not None and args.judge is None and args.questions is None:
        if args.dry_run:
            raise InputError("--dry-run tells what judging takes: name --judge, --questions or both")
        echo(f"samples: {opened(args).evaluate().path / 'samples.jsonl'}")
        return
    from persona_probe.cli.judge import evaluate_answers, evaluate_run
    from persona_probe.cli.process import quiet_libraries

    quiet_libraries()
    echo("\n".join(evaluate_answers(args) if args.run is None else evaluate_run(opened(args), args)))


def report(args: Arguments) -> None:
    """Figures and report.html."""
    echo(f"report: {opened(args).report()}")


def figures(args: Arguments) -> None:
    """Figures alone, from the run folder's tables."""
    from persona_probe.report.export import export_figures
    from persona_probe.report.records import load_records
    from persona_probe.runs import RunFolder

    folder = RunFolder.open(args.run).path
    target = args.out or folder / "figures"
    look = {"width": args.width, "theme": args.theme}
    for path in export_figures(load_records(folder), target, only=args.only, formats=tuple(args.format), **look):
        echo(str(path))


def saes_list(_args: Arguments) -> None:
    """SAEs that come with the checkout."""
    import json

    for cfg in sorted((ROOT / "saes").rglob("cfg.json")):
        quality = cfg.with_name("quality.json")
        numbers = json.loads(quality.read_text()) if quality.is_file() else {}
        shown = {k: round(numbers[k], 3) for k in ("explained_variance", "l0", "dead_share") if k in numbers}
        echo(f"saes/{cfg.parent.relative_to(ROOT / 'saes')}  {shown}")


def saes_train(args: Arguments) -> None:
    """Train an SAE by its recipe."""
    from persona_probe.cli.process import quiet_libraries
    from persona_probe.config import load_config
    from persona_probe.saes.stream import SaeConfig

    config = load_config(find_config(args.config), SaeConfig)
    if args.seed is not None:
        config = replace(config, seed=args.seed)
    quiet_libraries()
    from persona_probe.saes.train import train_sae

    echo(f"sae: {train_sae(config, args.out or Path('saes'), args.device or 'cpu')}")


def saes_check(args: Arguments) -> None:
    """Quality of an SAE on chat text."""
    from persona_probe.cli.process import quiet_libraries

    quiet_libraries()
    from persona_probe.cli.output import show_quality
    from persona_probe.saes.quality import quality_report

    result = quality_report(args.sae, args.model, args.data, args.layer, args.device or "cpu")
    if args.out is not None:
        from persona_probe.runs import write_text

        write_text(args.out, result.to_json(orient="records", indent=2) + "\n")
    show_quality(result)


def data_list(_args: Arguments) -> None:
    """The packaged sets."""
    from persona_probe.data.load import SETS, load_rows

    for name in SETS:
        rows = load_rows(name)
        echo(f"{name}: {len(rows)} rows, columns {', '.join(rows[0])}")


def data_check(args: Arguments) -> None:
    """Validate a data file; exit code 2 when it has bad rows."""
    import json

    from persona_probe.data.check import check_file

    result = check_file(args.file, _tokenizer(args))
    text = json.dumps(result.to_dict(), indent=2)
    if args.out is not None:
        from persona_probe.runs import write_text

        write_text(args.out, text + "\n")
    echo(text)
    if bad := len(result.bad_rows):
        total = result.rows + bad
        raise InputError(f"{args.file}: {bad} of {total} rows are not conversations: mend what bad_rows lists")


def bench_planted(args: Arguments) -> None:
    """Known plants in the embedded model: the tables of what was found."""
    from persona_probe.cli.process import quiet_libraries

    quiet_libraries()
    from persona_probe.latents.planted.run import Bench, run_embedded
    from persona_probe.latents.planted.table import format_table

    given = {"plants": args.plants, "seed": args.seed}
    bench = Bench(**{key: value for key, value in given.items() if value is not None})
    frame = run_embedded(bench, args.device or "cpu", progress=not args.quiet)
    if args.out is not None:
        from persona_probe.runs import RunFolder

        RunFolder(args.out.parent).write_table(args.out.name, frame)
    echo(format_table(frame))


def judge_fit(args: Arguments) -> None:
    """Fit the offline judge anew from published judgements."""
    from persona_probe.cli.process import quiet_libraries

    quiet_libraries()
    from persona_probe.evaluate.offline.fit import fit_judge

    out = args.out or Path("runs/offline-judge")
    fit_judge(find_config(args.config), args.data, out)
    echo(f"judge: {out}")


def _tokenizer(args: Arguments) -> Any:
    if args.model is None:
        return None
    from persona_probe.cli.process import quiet_libraries
    from persona_probe.models.load import load_model

    quiet_libraries()
    return load_model(args.model)[1]


def doctor(args: Arguments) -> int:
    """What is installed and what is missing."""
    from persona_probe.cli.output import examine, show_findings

    findings = examine(args.device or "auto")
    show_findings(findings)
    return 1 if any(f.state == "missing" for f in findings) else 0


# --- `persona-probe realign`: the config's arms, a correction of one's own, a grid of them, and stress tests

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
    from persona_probe.config import load_config

    plan = load_config(find_config(args.plan), DosePlan)
    study = opened(args).track()
    table = study.realign_plan(plan)
    from persona_probe.report.export import write_figure
    from persona_probe.report.figures.doses import doses, doses_data

    columns = ["data", "dose", "choose_by", "method", "seed", "index_minus_base", "index_minus_base_ci_low"]
    columns += ["index_minus_base_ci_high", "feature", "in_band", "steps_to_band", "steps_to_behaviour"]
    columns += ["reply_tokens", "perplexity_ratio"]
    shown = [name for name in columns if name in table]
    echo(table[shown].to_string(index=False, float_format="%.3f"))
    page = write_figure(
        study.path / "realign", "doses", "How many corrective rows are enough", doses(table), doses_data(table)
    )
    echo(f"figure: {page}")


def _repair(args: argparse.Namespace, given: dict[str, Any]) -> None:
    from persona_probe.realignment.correct import realign_study
    from persona_probe.realignment.stress.run import statements
    from persona_probe.study.summary import summarise

    study = opened(args).track()
    settings = {"rows": None, "choose_by": "random", "method": "continued", "name": None}
    settings |= {key: value for key, value in given.items() if key != "data"}
    folders = realign_study(study.context, args.data, args.seeds, args.stress or (), settings)
    if args.data is None:
        for verdict in summarise(study.context)["verdicts"].values():
            echo(verdict["statement"])
    for folder in folders:
        if args.data is not None:
            from persona_probe.realignment.correct import verdict_lines

            echo("\n".join(verdict_lines(folder)))
        else:
            echo("\n".join([f"{folder.name}:", *statements(folder).values()]))
        echo(f"folder: {folder}")
