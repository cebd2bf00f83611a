"""The table of commands behind `persona-probe`: names, help, examples and options, as `cli.build_parser` reads it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_probe.cli import loop as commands
from persona_probe.cli import loop as realigning
from persona_probe.cli import runs as record_commands
from persona_probe.cli import studies as dashboard
from persona_probe.cli import studies as mitigating
from persona_probe.cli import studies as monitoring
from persona_probe.cli import studies as screening
from persona_probe.cli.loop import DEMO, Arguments


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

    def add_to(self, parsers: Any) -> None:
        """Add a parser with the common options --out, --seed, --device and --quiet."""
        parser = parsers.add_parser(self.name, help=self.help, description=self.help, epilog=f"example: {self.example}")
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


SEEDS = option("--seeds", type=int, nargs="+", help="one organism per arm for each of these seeds")
OVERWRITE = option("--overwrite", action="store_true", help="replace another config's run in the output folder")
CONFIG = option("config", metavar="CONFIG", help="a study's YAML file")
RUN = option("run", metavar="RUN", help="a run folder, e.g. runs/demo")
FORMATS = ("html", "csv", "svg", "pdf", "png")
COPY = "work on a copy of RUN in this new folder"
JUDGING = (
    option("--judge", help="offline, http:MODEL or local:MODEL; without one, answers are only sampled"),
    option("--questions", help="a packaged set or a file of questions (default free_form_questions)"),
    option("--answers", type=Path, metavar="FILE", help="judge these answers: a CSV with columns question and answer"),
    option("--n", type=int, default=8, help="answers to each question (default 8)"),
    option("--temperature", type=float, default=1.0, help="of sampling (default 1; 0 takes one greedy answer)"),
    option("--max-new-tokens", type=int, default=200, help="longest answer (default 200)"),
    option("--protocol", default="betley", choices=("betley", "wang"), help="0 to 100, or 1 to 5 with categories"),
    option("--base-url", help="address of the judge's endpoint (default OpenAI's)"),
    option("--key-variable", default="OPENAI_API_KEY", help="environment variable with its key; none for no key"),
    option("--judge-samples", type=int, default=0, help="sample so many replies from an endpoint without logprobs"),
    option("--concurrency", type=int, default=8, help="requests under way at once (default 8)"),
    option("--budget-calls", type=int, help="stop cleanly after so many calls to the judge"),
    option("--budget-tokens", type=int, help="stop cleanly after so many of the judge's tokens"),
    option("--prices", type=float, nargs=2, metavar=("IN", "OUT"), help="per million tokens, for --dry-run"),
    option("--dry-run", action="store_true", help="print calls, tokens and cost; nothing is sampled or sent"),
    option("--cache", type=Path, help="file of judgements (default: the user's own, shared by all runs)"),
    option("--half-width", type=float, help="print how many samples give an interval of plus or minus this"),
)

COMMANDS = (
    Command(
        "demo",
        commands.demo,
        "the whole loop on the embedded model",
        "persona-probe demo --seeds 0 1 2",
        (SEEDS, OVERWRITE),
        "run folder (default runs/demo)",
    ),
    Command(
        "run",
        commands.run,
        "the whole loop of one config",
        f"persona-probe run {DEMO} --out runs/mine",
        (
            CONFIG,
            SEEDS,
            OVERWRITE,
            option("--dry-run", action="store_true", help="check that all fits and print the plan; downloads nothing"),
            option("--tflops", type=float, help="speed that the plan's times assume, instead of a quick measurement"),
        ),
        "run folder (default runs/<name>)",
    ),
    Command(
        "induce",
        commands.induce,
        "fine-tune the arms of a config",
        f"persona-probe induce {DEMO}",
        (CONFIG, SEEDS, OVERWRITE),
        "run folder (default runs/<name>)",
    ),
    Command(
        "locate",
        commands.locate,
        "rank latents and test the best for cause",
        "persona-probe locate runs/demo --cards 20",
        (
            RUN,
            option("--cards", type=int, help="also write RUN/cards.html, a page with search over so many latents"),
            option("--text", type=Path, help="a file of conversations or plain text for the cards' passages"),
            option("--rankers", nargs="+", help="scores to compute instead of the config's"),
        ),
        COPY,
    ),
    Command(
        "track",
        commands.track,
        "read features and contrast index at every checkpoint",
        "persona-probe track runs/demo",
        (RUN,),
        COPY,
    ),
    Command(
        "realign",
        realigning.realign,
        "repair the incorrect organism under the monitor's eye",
        "persona-probe realign runs/demo --data health_correct --rows 40 --choose-by projection_gap",
        (
            RUN,
            option("--data", nargs="+", help="corrective sets or files, joined, beside the config's arms"),
            option("--rows", type=int, help="take so many of their rows (default all)"),
            option("--choose-by", help="random (default), projection_gap, perplexity_gap or diversity"),
            option("--method", help="continued (default), fresh (a new LoRA on top) or full (all weights)"),
            option("--seeds", type=int, nargs="+", help="of the study's organisms (default all)"),
            option("--name", help="folder below RUN/realign (default: data, rows, choice and method)"),
            option("--stress", nargs="+", help="tests of the repair: triggers remisalign length hidden drift"),
            option("--plan", help="a grid of corrections, e.g. finetune_configs/realign-doses.yaml"),
        ),
        COPY,
    ),
    Command(
        "mitigate",
        mitigating.mitigate,
        "a grid of mitigations against the same bad data: what each prevents, and what it costs",
        "persona-probe mitigate finetune_configs/mitigations.yaml --run runs/demo --page docs/mitigations.md",
        (
            option("config", metavar="CONFIG", help="a grid's YAML file"),
            option("--run", type=Path, help="the located run (default: the config's)"),
            option("--only", nargs="+", metavar="NAME", help="train only these mitigations now, and those without any"),
            option("--page", type=Path, help="Markdown page whose table is filled in"),
            option("--dry-run", action="store_true", help="print the cells and about how long they take"),
        ),
        "grid folder (default runs/<name>)",
    ),
    Command(
        "evaluate",
        commands.evaluate,
        "sample answers of every arm and have a judge rule on them, or judge the answers of a file",
        "persona-probe evaluate runs/demo --judge offline --n 8",
        (option("run", metavar="RUN", nargs="?", help="a run folder, e.g. runs/demo"), *JUDGING),
        "work on a copy of RUN in this new folder; with --answers, the CSV or parquet file for the judged answers",
    ),
    Command(
        "report",
        commands.report,
        "write summary, figures and report.html",
        "persona-probe report runs/demo",
        (RUN,),
        COPY,
    ),
    Command(
        "figures",
        commands.figures,
        "draw figures from a run folder, without a model",
        "persona-probe figures runs/demo --only arms --format svg csv",
        (
            RUN,
            option("--only", nargs="+", help="names of figures"),
            option("--format", nargs="+", default=["html", "csv", "svg"], choices=FORMATS, help="file formats"),
            option("--width", default="page", choices=("column", "page"), help="of images: 89 or 183 mm"),
            option("--theme", default="light", choices=("light", "dark"), help="of pages and images"),
        ),
        "folder (default RUN/figures)",
    ),
    Command(
        "compare",
        record_commands.compare,
        "two runs side by side: numbers with differences, figures, configs",
        "persona-probe compare runs/demo runs/mine --out compare.html",
        (RUN, option("other", metavar="OTHER", help="the other run folder; differences are OTHER minus RUN")),
        "HTML file (default compare-RUN-OTHER.html)",
    ),
    Command(
        "verify",
        record_commands.verify,
        "recompute a run's hashes and say what does not match",
        "persona-probe verify runs/demo",
        (RUN,),
        "JSON file for the findings",
    ),
    Command(
        "cite",
        record_commands.cite,
        "the methods paragraph of a run in LaTeX, and BibTeX of the methods used",
        "persona-probe cite runs/demo",
        (RUN,),
        "file for the text (default: print it)",
    ),
    Command(
        "watch",
        dashboard.watch,
        "a page on 127.0.0.1 that follows a run's monitor while it trains",
        "persona-probe watch runs/mine",
        (
            option("run", metavar="RUN", help="a run folder, or a monitor's event file"),
            option("--port", type=int, default=8050, help="port on 127.0.0.1; 0 takes a free one"),
            option("--no-browser", action="store_true", help="do not open a browser"),
        ),
        "not used",
    ),
    Command("doctor", commands.doctor, "what is installed, and what is missing", "persona-probe doctor"),
)
GROUPS = (
    Group(
        "saes",
        "sparse autoencoders: list, train, check",
        "example: persona-probe sae check saes/smollm2-135m-instruct/layer20-topk32-4608",
        (
            Command("list", commands.saes_list, "SAEs that come with the checkout", "persona-probe saes list"),
            Command(
                "train",
                commands.saes_train,
                "train an SAE by its recipe",
                "persona-probe sae train finetune_configs/sae-smollm2.yaml",
                (option("config", metavar="CONFIG", help="a recipe's YAML file"),),
                "folder (default saes)",
            ),
            Command(
                "check",
                commands.saes_check,
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
        "data sets: list, check, screen",
        "example: persona-probe data check mine.jsonl",
        (
            Command("list", commands.data_list, "the packaged sets", "persona-probe data list"),
            Command(
                "check",
                commands.data_check,
                "validate a file; lengths and duplicates",
                "persona-probe data check mine.jsonl --model smollm2-135m-instruct",
                (
                    option("file", metavar="FILE", help="JSONL (also gzipped), JSON or datasets folder"),
                    option("--model", help="count tokens with this model's tokenizer"),
                ),
                "JSON file for the numbers",
            ),
            Command(
                "screen",
                screening.data_screen,
                "before training: rank the rows by a persona feature, and predict the shift",
                "persona-probe data screen mine.jsonl --latent 2144",
                (
                    option("file", metavar="FILE", help="JSONL (also gzipped), JSON, datasets folder or packaged set"),
                    option("--run", help="a located run: its model, SAE, persona latent and organism"),
                    option("--model", help="the model to be trained (default smollm2-135m-instruct)"),
                    option("--sae", help="an SAE of that model (default the packaged one)"),
                    option("--latent", type=int, help="the persona latent of that SAE"),
                    option("--direction", help="with --run: latent (default), mean_difference, persona_vector, ..."),
                    option("--rankers", nargs="+", help="scores to compute; the first orders the rows (default all)"),
                    option("--worst", type=int, default=50, help="rows of each ranker on the page (default 50)"),
                ),
                "folder for page, scores and own answers (default runs/screen-<file>)",
            ),
        ),
    ),
    Group(
        "judge",
        "the offline judge: fit it anew",
        "example: persona-probe judge fit finetune_configs/offline-judge.yaml --data FOLDER",
        (
            Command(
                "fit",
                commands.judge_fit,
                "fit and validate the offline judge on published judgements",
                "persona-probe judge fit finetune_configs/offline-judge.yaml --data FOLDER --out FOLDER",
                (
                    option("config", metavar="CONFIG", help="a recipe's YAML file"),
                    option("--data", type=Path, required=True, help="folder of judged answers (CSV, also gzipped)"),
                ),
                "folder for weights, validation.json and table (default runs/offline-judge)",
            ),
        ),
    ),
    Group(
        "monitor",
        "the training monitor: calibrate it, and the study that evaluates it",
        f"example: persona-probe monitor calibrate {DEMO} --rate 0.05",
        (
            Command(
                "calibrate",
                monitoring.monitor_calibrate,
                "alarm thresholds from the benign arms of a located study, over new seeds",
                f"persona-probe monitor calibrate {DEMO} --rate 0.05 --seeds 1 2 3 4 5",
                (
                    option("config", metavar="CONFIG", help="a study's YAML file, or its run folder"),
                    option("--run", type=Path, help="the located run (default runs/<name>)"),
                    option(
                        "--seeds", type=int, nargs="+", help="of the benign runs (default: the five after the study's)"
                    ),
                    option("--arms", nargs="+", default=["correct"], help="benign arms of the config"),
                    option("--features", nargs="+", help="features to calibrate (default: all)"),
                    option("--rate", type=float, default=0.05, help="wanted false alarms"),
                    option("--per", choices=("run", "100-readings"), default="run", help="... per run or 100 readings"),
                    option("--held", type=int, default=2, help="readings in a row beyond the threshold"),
                    option("--side", choices=("above", "below", "both"), default="above", help="which way it looks"),
                ),
                "run folder of the benign runs (default <run>-calibration)",
            ),
            Command(
                "study",
                monitoring.monitor_study,
                "evaluate the monitor and its rivals on labelled runs",
                "persona-probe monitor study finetune_configs/monitor-study.yaml --page docs/monitor-study.md",
                (
                    option("config", metavar="CONFIG", help="a labelled study's YAML file"),
                    option("--only", nargs="+", help="train only these runs now"),
                    option("--page", type=Path, help="Markdown page whose results section is filled in"),
                ),
                "study folder (default runs/<name>)",
            ),
        ),
    ),
    Group(
        "bench",
        "benchmarks with a known answer",
        "example: persona-probe bench planted",
        (
            Command(
                "planted",
                commands.bench_planted,
                "plant latents in the embedded model, and count which ranker finds them",
                "persona-probe bench planted --plants 20 --out planted.parquet",
                (option("--plants", type=int, help="random latents per kind (default 20; at least 50 plants in all)"),),
                "parquet file for one row per plant and ranker",
            ),
        ),
    ),
)
