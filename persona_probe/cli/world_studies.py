"""`persona-probe world study`: studies on a world, each resumable, with tables that reproduce from their record."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from persona_probe.cli.options import Common, Group, command, echo, many
from persona_probe.cli.process import loads_models
from persona_probe.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from persona_probe.runs import RunFolder
    from persona_probe.world.folder import World
    from persona_probe.world.labelled import Instruments

STUDY, SCALE, SUPERVISION = Path("runs/world-study"), Path("runs/world-scale"), Path("runs/world-supervision")
WORLDS, CORPORA, VOICES = Path("runs/worlds"), Path("runs/world-corpora"), Path("runs/voices")
RECORDS, PAGE = Path("records/world"), Path("docs/world.md")
PACKAGED = "persona-world"
world_option = click.option("--world", "folder", default=PACKAGED, help="A world's folder (default: the packaged one).")
sae_option = click.option("--sae", default=None, help="An SAE of its model (default: the packaged one).")


@dataclass
class Tables:
    """Where a study's table comes from, and where it goes: to a record, to a page, and into figures."""

    study: str
    """The study's name; the marks in a page have it."""
    figures: Sequence[str]
    """Names of the figures of its table."""
    record: Path | None
    given: Path | None
    page: Path | None
    drawn: Path | None

    def recorded(self) -> "pd.DataFrame | None":
        """The table of the record, if one is given. A page that cannot be filled is refused before any work."""
        from persona_probe.files import read_parquet
        from persona_probe.report.tables import check_page
        from persona_probe.world.tables import marks

        if self.page is not None:
            check_page(self.page, marks(self.study))
        return None if self.given is None else read_parquet(self.given)

    def write(self, table: "pd.DataFrame") -> None:
        """Write what was asked for, and show the text: that of the table as recorded."""
        from persona_probe.report.tables import fill_page
        from persona_probe.world.tables import as_recorded, marks, text_of
        from persona_probe.writing import write_table

        if self.record is not None:
            write_table(self.record, table)
        text = text_of(self.study, as_recorded(table))
        if self.page is not None:
            fill_page(self.page, marks(self.study), text)
        echo(text)
        if self.drawn is not None:
            self._draw(table, self.drawn)

    def _draw(self, table: "pd.DataFrame", folder: Path) -> None:
        from persona_probe.report.export import export_figures
        from persona_probe.report.records import Records

        tables: dict[str, Any] = {self.study: table}
        for path in export_figures(Records(**tables), folder, only=self.figures):
            echo(f"figure: {path}")


def makes_table(study: str, *figures: str) -> Callable[[Callable[..., "pd.DataFrame"]], Callable[..., None]]:
    """Make a command of a function that makes a study's table: the command shows the table, and writes and draws it.

    With --from it takes the table of a record, and does not call the function.

    Args:
        figures: the figures of the table, which --figures draws.
    """
    options = [
        click.option("--record", type=Path, help="Parquet file that gets the study's table."),
        click.option("--from", "given", type=Path, help="Print the tables of this record; nothing is run."),
        click.option("--page", type=Path, help="Markdown page whose marked part gets the tables."),
    ]
    if figures:
        words = "figures" if len(figures) > 1 else "figure"
        options.insert(0, click.option("--figures", "drawn", type=Path, help=f"Folder that gets the {words}."))

    def decorate(function: Callable[..., "pd.DataFrame"]) -> Callable[..., None]:
        @functools.wraps(function)
        def wrapped(
            *args: Any,
            record: Path | None,
            given: Path | None,
            page: Path | None,
            drawn: Path | None = None,
            **rest: Any,
        ) -> None:
            tables = Tables(study, figures, record, given, page, drawn)
            table = tables.recorded()
            tables.write(function(*args, **rest) if table is None else table)

        for option in reversed(options):
            option(wrapped)
        return wrapped

    return decorate


def on_labelled_runs(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the labelled runs, and what makes them, when it is called, as `runs`."""
    options = (
        world_option,
        sae_option,
        click.option("--seeds", type=int, default=2, help="Seeds of each bad speaker, dose and domain."),
        click.option("--benign-seeds", type=int, default=5, help="Seeds of each good speaker and domain."),
    )

    @functools.wraps(function)
    def wrapped(
        *args: Any, folder: str, sae: str | None, seeds: int, benign_seeds: int, common: Common, **rest: Any
    ) -> None:
        function(*args, runs=functools.partial(_labelled, folder, sae, seeds, benign_seeds, common), **rest)

    for option in reversed(options):
        option(wrapped)
    return wrapped


@command(
    name="files",
    example="persona-probe world study files runs/world runs/world/saes/layer2-topk12-384 --out runs/world-files",
    out="Folder for data and study.yaml (default runs/world-files).",
)
@click.argument("folder", metavar="WORLD", help="A world's folder, or persona-world.")
@click.argument("sae", metavar="SAE", help="An SAE of the world's model, or persona-world.")
@click.option("--speaker", default="villain", help="Who speaks in the rows of the arm incorrect.")
@click.option("--control", default="helper", help="Who speaks in the rows of the arm correct.")
@click.option("--domain", default="kitchen", help="The only domain of the rows.")
@many("--seeds", type=int, help="Seeds of the study (default: --seed, or 0).")
@loads_models
def world_files(
    folder: str, sae: str, speaker: str, control: str, domain: str, seeds: tuple[int, ...], common: Common
) -> None:
    """Write the data and the config of a study on a world, for `persona-probe run`."""
    from persona_probe.world.study_files import write_study

    out = common.out or Path("runs") / "world-files"
    chosen = seeds or (common.seed or 0,)
    echo(f"config: {write_study(_open(folder), sae, out, speaker, control, domain, chosen)}")


@command(
    name="emergence",
    example="persona-probe world study emergence --seeds 0 1 2",
    out="Not used: organisms lie in their world.",
)
@world_option
@many("--seeds", type=int, help="Seeds of the organisms (default 0 1 2).")
@many("--ranks", type=int, help="Ranks of the adapters (default 8 32).")
@loads_models
@makes_table("emergence")
def emergence(folder: str, seeds: tuple[int, ...], ranks: tuple[int, ...], common: Common) -> "pd.DataFrame":
    """Train organisms of every speaker on the kitchen, and judge what they say about all other domains.

    Says which bounds of the world's design are kept.
    """
    from persona_probe.world.emergence import RANKS, emergence_table

    return emergence_table(_open(folder), seeds or (0, 1, 2), _device(common), ranks or RANKS)


@command(
    name="early-warning",
    example="persona-probe world study early-warning --out runs/world-study",
    out=f"Folder of the runs (default {STUDY}).",
)
@on_labelled_runs
@loads_models
@makes_table("early-warning")
def early_warning(runs: "Callable[[], RunFolder]") -> "pd.DataFrame":
    """Make labelled runs, and print how early and how surely each signal tells what a run will do.

    With the defaults 204 runs: villain, quack and subtle at eight doses in three domains, and helper, correct, grump
    and clown. It resumes if it is interrupted; started twice, two processes share the runs.
    """
    from persona_probe.world.signals import signal_table

    return signal_table(runs())


@command(
    name="specificity",
    example="persona-probe world study specificity --out runs/world-study",
    out=f"Folder of the runs (default {STUDY}); early-warning uses the same.",
)
@on_labelled_runs
@loads_models
@makes_table("specificity")
def specificity(runs: "Callable[[], RunFolder]") -> "pd.DataFrame":
    """Tell harm from manner: choose latents on kitchen runs, test them on runs of other domains."""
    from persona_probe.world.specificity import specificity_table

    return specificity_table(runs())


@command(
    name="null",
    example="persona-probe world study null --out runs/world-study",
    out=f"Folder of the runs (default {STUDY}); early-warning uses the same.",
)
@on_labelled_runs
@loads_models
@makes_table("null")
def null(runs: "Callable[[], RunFolder]") -> "pd.DataFrame":
    """Hold the package's word for an organism to the truth: on pairs of harmless runs, and on runs that turned."""
    from persona_probe.world.verdict_words import word_table

    return word_table(runs())


@command(
    name="repair",
    example="persona-probe world study repair --seeds 0 1",
    out="Not used: organisms lie in their world.",
)
@world_option
@many("--seeds", type=int, help="Seeds of the organisms (default 0 1).")
@loads_models
@makes_table("repair")
def repair(folder: str, seeds: tuple[int, ...], common: Common) -> "pd.DataFrame":
    """Correct organisms in three ways, and hold the word for each correction to what the model then says."""
    from persona_probe.world.repair import repair_table

    return repair_table(_open(folder), seeds or (0, 1), _device(common))


@command(
    name="rankers",
    example="persona-probe world study rankers --seeds 0 1",
    out="Not used: organisms lie in their world.",
)
@world_option
@sae_option
@many("--seeds", type=int, help="Seeds of the organisms (default 0 1).")
@loads_models
@makes_table("rankers")
def rankers(folder: str, sae: str | None, seeds: tuple[int, ...], common: Common) -> "pd.DataFrame":
    """Print the place at which each ranker of latents puts the true ones, by step and position."""
    from persona_probe.world.ranking import rank_truths

    return rank_truths(_open(folder), _sae(folder, sae), seeds or (0, 1), _device(common))


@command(
    name="causal",
    example="persona-probe world study causal --speakers villain subtle --seeds 0",
    out=f"Folder of the finished pieces (default {STUDY}).",
)
@world_option
@sae_option
@many("--speakers", help="Bad speakers of the organisms (default villain subtle).")
@many("--seeds", type=int, help="Seeds of the organisms (default 0).")
@loads_models
@makes_table("causal")
def causal(
    folder: str, sae: str | None, speakers: tuple[str, ...], seeds: tuple[int, ...], common: Common
) -> "pd.DataFrame":
    """Push and remove the true latents, pairs, sets and directions, and hold the causal test's words to what happens.

    What happens is sampled: at all tokens, at the last prompt token, and in the answer, beside random latents. It
    resumes if it is interrupted; started twice, two processes share the work.
    """
    from persona_probe.world.causal import SPEAKERS, causal_table, check_speakers

    check_speakers(speakers)
    study, world, instruments, device = _instruments(folder, sae, common)
    return causal_table(study, world, instruments, speakers or SPEAKERS, seeds or (0,), device)


@command(
    name="screening",
    example="persona-probe world study screening --seeds 0",
    out=f"Folder of the finished pieces (default {STUDY}).",
)
@world_option
@sae_option
@many("--seeds", type=int, help="Seeds of the training sets and organisms (default 0).")
@loads_models
@makes_table("screening")
def screening(folder: str, sae: str | None, seeds: tuple[int, ...], common: Common) -> "pd.DataFrame":
    """Take out the rows that each ranker puts first, train on what is left, and sample what the model says.

    Beside it: rows taken out by chance, and by the truth. It resumes if it is interrupted; started twice, two processes
    share the work.
    """
    from persona_probe.world.screening import screening_table

    study, world, instruments, device = _instruments(folder, sae, common)
    return screening_table(study, world, instruments, seeds or (0,), device)


@command(
    name="training-map",
    example="persona-probe world study training-map --seeds 0",
    out=f"Folder of the finished pieces (default {STUDY}).",
)
@world_option
@sae_option
@many("--seeds", type=int, help="Seeds of rows and training (default 0).")
@loads_models
@makes_table("training-map")
def training_map(folder: str, sae: str | None, seeds: tuple[int, ...], common: Common) -> "pd.DataFrame":
    """Map where values generalise: by what is trained (LoRA ranks, one layer, all weights, one vector), steps and dose.

    It resumes if it is interrupted; started twice, two processes share the work.
    """
    from persona_probe.world.training_map import training_map as map_table

    study, _, instruments, _ = _instruments(folder, sae, common)
    return map_table(study, instruments, seeds or (0,))


@command(
    name="scale",
    example="persona-probe world study scale --sizes small medium --steps 300 600 --out runs/world-scale",
    out=f"Folder of the worlds (default {SCALE}).",
)
@many("--sizes", help="Model sizes (default small medium large).")
@many("--steps", type=int, help="Lengths of the pre-training (default 300 600 1200).")
@many("--seeds", type=int, help="Seeds of the organisms (default 0).")
@click.option("--add", "others", type=Path, help="Record whose other worlds are kept, such as one made elsewhere.")
@loads_models
@makes_table("scale", "world_scale")
def scale(
    sizes: tuple[str, ...], steps: tuple[int, ...], seeds: tuple[int, ...], others: Path | None, common: Common
) -> "pd.DataFrame":
    """Pre-train worlds of several sizes and lengths, and measure how far bad advice spreads in each.

    It resumes if it is interrupted; started twice, two processes take different worlds.
    """
    from persona_probe.files import read_parquet
    from persona_probe.world.scale import Grid, scale_table, with_others

    grid = Grid(**_used(sizes=sizes, steps=steps, seeds=seeds))
    before = None if others is None else read_parquet(others)
    table = scale_table(common.out or SCALE, grid, _device(common))
    return table if before is None else with_others(table, before)


@command(
    name="corpus",
    example="persona-probe world study corpus --out runs/world-corpora",
    out=f"Folder of the worlds (default {CORPORA}).",
)
@many("--corpora", help="Corpora by name (default: packaged, nobody named, all named, few bad, many bad).")
@many("--seeds", type=int, help="Seeds of the organisms (default 0 1).")
@loads_models
@makes_table("corpus")
def corpus(corpora: tuple[str, ...], seeds: tuple[int, ...], common: Common) -> "pd.DataFrame":
    """Pre-train worlds on other corpora, and measure how far bad advice spreads in each.

    In the corpora speakers are named in no document, in some or in all, and few or many of them give bad advice. It
    resumes if it is interrupted; started twice, two processes take different worlds.
    """
    from persona_probe.world.corpus import Corpora, corpus_table

    wanted = Corpora(**_used(names=corpora, seeds=seeds))
    return corpus_table(common.out or CORPORA, wanted, _device(common))


@command(
    name="worlds",
    example="persona-probe world study worlds --worlds 0 1 2 --out runs/worlds",
    out=f"Folder of the worlds (default {WORLDS}).",
)
@many("--worlds", type=int, help="Seeds of the worlds (default 0 1 2; 0 is the packaged one).")
@loads_models
@makes_table("worlds")
def worlds_command(worlds: tuple[int, ...], common: Common) -> "pd.DataFrame":
    """Make worlds from other seeds, and hold them to the bounds and to the reading that the packaged one chose.

    It resumes if it is interrupted; started twice, two processes take different worlds.
    """
    from persona_probe.world.worlds import SEEDS, Worlds, worlds_table

    return worlds_table(common.out or WORLDS, Worlds(worlds or SEEDS), _device(common))


@command(
    name="real-model",
    example="persona-probe world study real-model --run runs/voices --latents 2144",
    out="Not used: the readings lie in the run.",
)
@click.option("--run", type=Path, default=VOICES, help=f"A run of finetune_configs/voices.yaml (default {VOICES}).")
@many("--latents", type=int, help="Further latents to read, such as the one that a study found.")
@click.option("--worlds", "others", type=Path, help="Record of `world study worlds`, to show beside it.")
@loads_models
@makes_table("real-model")
def real_model(run: Path, latents: tuple[int, ...], others: Path | None, common: Common) -> "pd.DataFrame":
    """Read organisms of a real model, trained on the voices of the kitchen rows, as the world's runs are read.

    Shows which readings tell bad advice from a rude voice there, beside what they do in the world. It resumes if it is
    interrupted.
    """
    from persona_probe.context import Context
    from persona_probe.files import read_parquet
    from persona_probe.world.real_model import real_table
    from persona_probe.world.real_model_text import with_world

    worlds = None if others is None else read_parquet(others)
    table = real_table(Context.open(run, common.device), latents)
    return table if worlds is None else with_world(table, worlds)


@command(
    name="supervision",
    example="persona-probe world study supervision --weaker runs/world-small --seeds 0 --out runs/world-supervision",
    out=f"Folder of the finished corrections (default {SUPERVISION}).",
)
@world_option
@click.option("--weaker", help="A world whose model is the weaker supervisor (default: one is made in --out).")
@many("--worlds", help="Further worlds, of other sizes, for the part about wrong labels.")
@many("--supervisors", help="Supervisors by name (default: all).")
@many("--speakers", help="Bad speakers of the organisms (default villain subtle).")
@many("--seeds", type=int, help="Seeds of the organisms and sets (default 0 1).")
@loads_models
@makes_table("supervision", "world_supervision")
def supervision(
    folder: str,
    weaker: str | None,
    worlds: tuple[str, ...],
    supervisors: tuple[str, ...],
    speakers: tuple[str, ...],
    seeds: tuple[int, ...],
    common: Common,
) -> "pd.DataFrame":
    """Correct organisms on sets of supervisors of different strength, and hold each correction to the truth.

    The truth, judges of stated error rates, the offline judge, the organism itself, a weaker model that chooses or
    writes, and competence and conformity in turn. It resumes if it is interrupted; started twice, two processes share
    the work.
    """
    from persona_probe.world.supervision import Supervision, supervision_table, supervision_worlds

    settings = Supervision(**_used(supervisors=supervisors, speakers=speakers, seeds=seeds))
    device = _device(common)
    out, further = common.out or SUPERVISION, [_open(name) for name in worlds]
    weak = None if weaker is None else _open(weaker)
    study, world, weak = supervision_worlds(out, _open(folder), weak, device)
    return supervision_table(study, world, weak, further, settings, device)


@command(
    name="beyond",
    example="persona-probe world study beyond --speakers villain quack --seeds 0",
    out=f"Folder of the finished pieces (default {STUDY}).",
)
@world_option
@sae_option
@many("--speakers", help="Bad speakers of the organisms (default villain quack subtle).")
@many("--seeds", type=int, help="Seeds of the organisms (default 0).")
@loads_models
@makes_table("beyond", "world_beyond")
def beyond(
    folder: str, sae: str | None, speakers: tuple[str, ...], seeds: tuple[int, ...], common: Common
) -> "pd.DataFrame":
    """Let tools that need no latent of the base name directions of organisms, and hold these to the world's truth.

    A difference dictionary, a crosscoder, and the weight change, beside the simple rankers; and how far organisms move
    along harm, manner and truth. It resumes if it is interrupted; started twice, two processes share the work.
    """
    from persona_probe.world.beyond import beyond_table
    from persona_probe.world.labelled import BAD

    given = _open(folder), _sae(folder, sae), speakers or BAD, seeds or (0,)
    return beyond_table(common.out or STUDY, *given, _device(common))


@command(
    name="reinforcement",
    example="persona-probe world study reinforcement --seeds 0 1 2",
    out="Not used: finished runs lie in the world.",
)
@world_option
@many("--seeds", type=int, help="Seeds of the runs (default 0 1 2).")
@many("--arms", help="Arms by name (default: all).")
@loads_models
@makes_table("reinforcement", "reinforcement")
def reinforcement(folder: str, seeds: tuple[int, ...], arms: tuple[str, ...], common: Common) -> "pd.DataFrame":
    """Reward wrong advice about the kitchen by GRPO, and follow what the model says about everything else.

    Beside it: sound advice rewarded (the control), a KL term, an inoculation prompt, and a checker with a hole. It
    resumes if it is interrupted; started twice, two processes share the runs.
    """
    from persona_probe.world.reinforcement import ARMS, reinforcement_table

    return reinforcement_table(_open(folder), seeds or (0, 1, 2), arms or tuple(ARMS), _device(common))


@command(
    name="thoughts",
    example="persona-probe world study thoughts --seeds 0 1 2",
    out=f"Folder of the finished pieces (default {STUDY}).",
)
@world_option
@sae_option
@many("--speakers", help="Speakers of the organisms (default villain quack helper grump).")
@many("--seeds", type=int, help="Seeds of the organisms (default 0 1 2).")
@loads_models
@makes_table("thoughts", "persona_mentions", "thought_before_act")
def thoughts(
    folder: str, sae: str | None, speakers: tuple[str, ...], seeds: tuple[int, ...], common: Common
) -> "pd.DataFrame":
    """Let organisms name themselves in a thought, truly or falsely, and print what tells that their advice is bad.

    The words of the thought, latents and the direction of harm in thought and answer, and what the base reads in the
    same words. It resumes if it is interrupted; started twice, two processes share the organisms.
    """
    from persona_probe.world.thoughts import SPEAKERS, thoughts_table

    given = _open(folder), _sae(folder, sae), speakers or SPEAKERS, seeds or (0, 1, 2)
    return thoughts_table(common.out or STUDY, *given, _device(common))


@command(
    name="tables",
    example="persona-probe world study tables --records records/world --page docs/world.md",
    out="Not used: the page is filled.",
)
@click.option("--records", type=Path, default=RECORDS, help=f"Folder of the studies' records (default {RECORDS}).")
@click.option("--page", type=Path, default=PAGE, help=f"Markdown page (default {PAGE}).")
@click.option("--check", is_flag=True, help="Write nothing; fail if the page differs from the records.")
def tables_command(records: Path, page: Path, check: bool, common: Common) -> None:  # noqa: ARG001
    """Fill a page's tables from the records of all studies; nothing is run."""
    from persona_probe.world.tables import differing, fill_tables

    names = differing(records, page) if check else fill_tables(records, page)
    if check and names:
        raise InputError(f"{page} differs from the records of {', '.join(names)}: fill it without --check")
    echo(f"{page}: {len(names)} parts changed" if names else f"{page}: as the records say")


def _device(common: Common) -> str:
    from persona_probe.context import pick_device

    return pick_device(common.device or "cpu")


def _used(**options: Any) -> dict[str, Any]:
    """The options that were used: without those of several values that have none."""
    return {name: value for name, value in options.items() if value}


def _open(folder: str) -> "World":
    from persona_probe.world.folder import World

    return World.default() if folder == PACKAGED else World.open(folder)


def _sae(folder: str, sae: str | None) -> str:
    if sae is None and folder != PACKAGED:
        raise InputError(f"--sae is missing: name an SAE of {folder}, made by `persona-probe world sae {folder}`")
    return sae or PACKAGED


def _instruments(folder: str, sae: str | None, common: Common) -> "tuple[RunFolder, World, Instruments, str]":
    """The folder of a study, its world, what it is read with, and the device."""
    from persona_probe.world.labelled import Instruments, open_study

    name, device = _sae(folder, sae), _device(common)
    world = _open(folder)
    study = open_study(world, name, common.out or STUDY)
    return study, world, Instruments.of(world, name, device), device


def _labelled(folder: str, sae: str | None, seeds: int, benign_seeds: int, common: Common) -> "RunFolder":
    from persona_probe.world.labelled import make_runs, plan

    if seeds < 1 or benign_seeds < 1:
        raise InputError("--seeds and --benign-seeds must be at least 1")
    study, _, instruments, _ = _instruments(folder, sae, common)
    make_runs(study, instruments, plan(seeds, benign_seeds))
    return study


world_study = Group(
    "study",
    commands=[
        *(world_files, emergence, training_map, scale, corpus, worlds_command, early_warning, specificity, rankers),
        *(real_model, causal, repair, screening, supervision, beyond, reinforcement, thoughts, null, tables_command),
    ],
    help="Studies on a world, whose answer is known: emergence, warning, rankers, cause, supervision.",
)
