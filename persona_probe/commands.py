"""The commands behind `persona-probe`: each takes the parsed arguments and calls the library."""

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.study import Study

Arguments = argparse.Namespace
ROOT = Path(__file__).parents[1]
DEMO = "finetune_configs/demo.yaml"


@dataclass(frozen=True)
class Option:
    """One argument of a command: names and what argparse takes."""

    names: tuple[str, ...]
    settings: dict[str, Any]


def option(*names: str, **settings: Any) -> Option:
    """Shorthand for `Option`."""
    return Option(names, settings)


@dataclass(frozen=True)
class Command:
    """One command: its function, its help, an example, and its own options."""

    name: str
    function: Callable[[Arguments], int | None]
    help: str
    example: str
    options: tuple[Option, ...] = ()
    out: str = "where the result goes"

    def add_to(self, commands: Any) -> None:
        """Add a parser with the common options --out, --seed, --device and --quiet."""
        parser = commands.add_parser(
            self.name, help=self.help, description=self.help, epilog=f"example: {self.example}"
        )
        for extra in self.options:
            parser.add_argument(*extra.names, **extra.settings)
        parser.add_argument("--out", type=Path, help=self.out)
        parser.add_argument("--seed", type=int, help="seed of every random draw of this command")
        parser.add_argument("--device", help="cpu, cuda or auto")
        parser.add_argument("--quiet", action="store_true", help="only results and errors")
        parser.set_defaults(function=self.function)


@dataclass(frozen=True)
class Group:
    """Commands below a common word."""

    name: str
    help: str
    example: str
    commands: tuple[Command, ...]
    aliases: tuple[str, ...] = ()


def echo(text: str) -> None:
    """Write a result to standard output."""
    sys.stdout.write(text + "\n")


def find_config(name: str) -> Path:
    """A config path as given, or below the checkout."""
    path = Path(name)
    return path if path.exists() or not (ROOT / path).exists() else ROOT / path


def new_study(args: Arguments, config_name: str) -> "Study":
    """The study of a config file, with --seed or --seeds, --out, --overwrite and --device applied."""
    from persona_probe.config import StudyConfig
    from persona_probe.config_files import load_config

    config = load_config(find_config(config_name), StudyConfig)  # first: a bad config is told before torch loads
    from persona_probe.quiet import quiet_libraries
    from persona_probe.study import Study

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
    from persona_probe.quiet import quiet_libraries
    from persona_probe.study import Study

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
    """The whole loop of one config."""
    finish(new_study(args, args.config))


def finish(study: "Study") -> None:
    """Run all stages that are not done, and show the table."""
    from persona_probe.terminal import show_summary

    report = study.run()
    show_summary(study.summary)
    echo(f"report: {report}")


def induce(args: Arguments) -> None:
    """Fine-tune the arms of a config."""
    echo(f"organisms: {new_study(args, args.config).induce().path / 'arms'}")


def locate(args: Arguments) -> None:
    """Rank latents, test the best for cause."""
    study = opened(args).locate()
    columns = ["latent", "rank", "rise", "cosine", "effect_base", "effect_base_low", "effect_base_high", "label"]
    tested = study.features[study.features["kind"] == "candidate"].sort_values("effect_base", ascending=False)
    echo(tested[columns].to_string(index=False, float_format="%.4f"))


def track(args: Arguments) -> None:
    """Read features and contrast index at every checkpoint."""
    study = opened(args).track()
    persona = study.readings[study.readings["feature"] == "persona"]
    columns = ["arm", "seed", "step", "mean", "ci_low", "ci_high", "explained_variance"]
    echo(persona[columns].to_string(index=False, float_format="%.4f"))


def realign(args: Arguments) -> None:
    """Repair the incorrect organism under the monitor's eye."""
    from persona_probe.summary import summarise

    study = opened(args).track().realign()
    for verdict in summarise(study.context)["verdicts"].values():
        echo(verdict["statement"])


def evaluate(args: Arguments) -> None:
    """Sample answers of every arm."""
    echo(f"samples: {opened(args).evaluate().path / 'samples.jsonl'}")


def report(args: Arguments) -> None:
    """Figures and report.html."""
    echo(f"report: {opened(args).report()}")


def figures(args: Arguments) -> None:
    """Figures alone, from the run folder's tables."""
    from persona_probe.report import export_figures, load_records
    from persona_probe.runs import RunFolder

    folder = RunFolder.open(args.run).path
    target = args.out or folder / "figures"
    for path in export_figures(load_records(folder), target, only=args.only, formats=tuple(args.format)):
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
    from persona_probe.config_files import load_config
    from persona_probe.quiet import quiet_libraries
    from persona_probe.saes.config import SaeConfig

    config = load_config(find_config(args.config), SaeConfig)
    if args.seed is not None:
        config = replace(config, seed=args.seed)
    quiet_libraries()
    from persona_probe.saes.train import train_sae

    echo(f"sae: {train_sae(config, args.out or Path('saes'), args.device or 'cpu')}")


def saes_check(args: Arguments) -> None:
    """Quality of an SAE on chat text."""
    from persona_probe.quiet import quiet_libraries

    quiet_libraries()
    from persona_probe.saes.report import quality_report
    from persona_probe.terminal import show_quality

    result = quality_report(args.sae, args.model, args.data, args.layer, args.device or "cpu")
    if args.out is not None:
        from persona_probe.runs import write_atomic

        write_atomic(args.out, result.to_json(orient="records", indent=2) + "\n")
    show_quality(result)


def data_list(_args: Arguments) -> None:
    """The packaged sets."""
    from persona_probe.data.packaged import SETS, load_rows

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
        from persona_probe.runs import write_atomic

        write_atomic(args.out, text + "\n")
    echo(text)
    if bad := len(result.bad_rows):
        total = result.rows + bad
        raise InputError(f"{args.file}: {bad} of {total} rows are not conversations: mend what bad_rows lists")


def _tokenizer(args: Arguments) -> Any:
    if args.model is None:
        return None
    from persona_probe.models.load import load_model
    from persona_probe.quiet import quiet_libraries

    quiet_libraries()
    return load_model(args.model)[1]


def doctor(args: Arguments) -> int:
    """What is installed and what is missing."""
    from persona_probe.doctor import examine
    from persona_probe.terminal import show_findings

    findings = examine(args.device or "auto")
    show_findings(findings)
    return 1 if any(f.state == "missing" for f in findings) else 0


SEEDS = option("--seeds", type=int, nargs="+", help="one organism per arm for each of these seeds")
OVERWRITE = option("--overwrite", action="store_true", help="replace another config's run in the output folder")
CONFIG = option("config", metavar="CONFIG", help="a study's YAML file")
RUN = option("run", metavar="RUN", help="a run folder, e.g. runs/demo")
FORMATS = ("html", "csv", "svg")
COPY = "work on a copy of RUN in this new folder"

COMMANDS = (
    Command(
        "demo",
        demo,
        "the whole loop on the embedded model",
        "persona-probe demo --seeds 0 1 2",
        (SEEDS, OVERWRITE),
        "run folder (default runs/demo)",
    ),
    Command(
        "run",
        run,
        "the whole loop of one config",
        f"persona-probe run {DEMO} --out runs/mine",
        (CONFIG, SEEDS, OVERWRITE),
        "run folder (default runs/<name>)",
    ),
    Command(
        "induce",
        induce,
        "fine-tune the arms of a config",
        f"persona-probe induce {DEMO}",
        (CONFIG, SEEDS, OVERWRITE),
        "run folder (default runs/<name>)",
    ),
    Command(
        "locate", locate, "rank latents and test the best for cause", "persona-probe locate runs/demo", (RUN,), COPY
    ),
    Command(
        "track",
        track,
        "read features and contrast index at every checkpoint",
        "persona-probe track runs/demo",
        (RUN,),
        COPY,
    ),
    Command(
        "realign",
        realign,
        "repair the incorrect organism under the monitor's eye",
        "persona-probe realign runs/demo",
        (RUN,),
        COPY,
    ),
    Command("evaluate", evaluate, "sample answers of every arm", "persona-probe evaluate runs/demo", (RUN,), COPY),
    Command("report", report, "write summary, figures and report.html", "persona-probe report runs/demo", (RUN,), COPY),
    Command(
        "figures",
        figures,
        "draw figures from a run folder, without a model",
        "persona-probe figures runs/demo --only arms --format svg csv",
        (
            RUN,
            option("--only", nargs="+", help="names of figures"),
            option("--format", nargs="+", default=["html", "csv", "svg"], choices=FORMATS, help="file formats"),
        ),
        "folder (default RUN/figures)",
    ),
    Command("doctor", doctor, "what is installed, and what is missing", "persona-probe doctor"),
)
GROUPS = (
    Group(
        "saes",
        "sparse autoencoders: list, train, check",
        "example: persona-probe sae check saes/smollm2-135m-instruct/layer20-topk32-4608",
        (
            Command("list", saes_list, "SAEs that come with the checkout", "persona-probe saes list"),
            Command(
                "train",
                saes_train,
                "train an SAE by its recipe",
                "persona-probe sae train finetune_configs/sae-smollm2.yaml",
                (option("config", metavar="CONFIG", help="a recipe's YAML file"),),
                "folder (default saes)",
            ),
            Command(
                "check",
                saes_check,
                "measure an SAE on chat text",
                "persona-probe sae check saes/smollm2-135m-instruct/layer20-topk32-4608",
                (
                    option("sae", metavar="SAE", help="a folder, or release/sae_id"),
                    option("--model", default="smollm2-135m-instruct", help="the model that the SAE reads"),
                    option(
                        "--data",
                        nargs="+",
                        help="packaged sets or files; default: the recipe's held-out samples and two packaged sets",
                    ),
                    option("--layer", type=int, help="decoder layer, where the SAE's metadata does not say"),
                ),
                "JSON file for the numbers",
            ),
        ),
        ("sae",),
    ),
    Group(
        "data",
        "data sets: list, check",
        "example: persona-probe data check mine.jsonl",
        (
            Command("list", data_list, "the packaged sets", "persona-probe data list"),
            Command(
                "check",
                data_check,
                "validate a file; lengths and duplicates",
                "persona-probe data check mine.jsonl --model smollm2-135m-instruct",
                (
                    option("file", metavar="FILE", help="JSONL (also gzipped), JSON or datasets folder"),
                    option("--model", help="count tokens with this model's tokenizer"),
                ),
                "JSON file for the numbers",
            ),
        ),
    ),
)
