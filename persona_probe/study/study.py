"""Study: one config and its run folder, with the stages of the loop as methods."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd

from persona_probe.config import StudyConfig, load_config
from persona_probe.context import Context, pick_device
from persona_probe.errors import InputError
from persona_probe.report.tables import Table
from persona_probe.runs import RunFolder
from persona_probe.units import shares

if TYPE_CHECKING:
    from persona_probe.data.chat import Conversation
    from persona_probe.evaluate.judging import AnswerJudge, JudgeOptions
    from persona_probe.evaluate.questions.question_set import QuestionSet
    from persona_probe.evaluate.sampling.engines import EngineChoice
    from persona_probe.realignment.spec import DosePlan
    from persona_probe.realignment.stress.stress_run import StressSettings
    from persona_probe.report.cards import FeatureCard
    from persona_probe.report.records import Records
    from persona_probe.report.tables import FeatureTable, StudyVerdict
    from persona_probe.study.adopt.adopt import Places
    from persona_probe.units import Workers


class Study:
    """Induce, locate, track, realign and report, over one run folder. Every stage keeps finished work.

    ```python
    study = Study.from_yaml("finetune_configs/demo.yaml")
    study.induce(); study.locate(); study.track(); study.realign(); study.report()
    ```
    """

    def __init__(self, run: RunFolder, device: str | None = None, seed: int | None = None) -> None:
        self.run_folder = run
        self.context = Context(run, device, seed)

    @classmethod
    def from_config(
        cls, config: StudyConfig, out: str | Path | None = None, overwrite: bool = False, device: str | None = None
    ) -> Self:
        """Make or resume the run folder of a configuration (default: `runs/<name>`)."""
        pick_device(device or config.device)  # before the folder is made or replaced
        return cls(RunFolder.create(Path(out or f"runs/{config.name}"), config, overwrite), device)

    @classmethod
    def from_yaml(
        cls, path: str | Path, out: str | Path | None = None, overwrite: bool = False, device: str | None = None
    ) -> Self:
        """Make or resume the run folder of a YAML file."""
        return cls.from_config(load_config(path, StudyConfig), out, overwrite, device)

    @classmethod
    def open(cls, path: str | Path, device: str | None = None, seed: int | None = None) -> Self:
        """Open an existing run folder; `seed` is that of controls, bootstraps and samples."""
        return cls(RunFolder.open(path), device, seed)

    def _writing(self) -> AbstractContextManager[None]:
        return self.run_folder.writing(shared=shares(self.context.workers))

    def work_with(self, workers: "Workers | None") -> Self:
        """Let other processes make what is still missing of the run, such as `cluster.RayWorkers`; None: this one."""
        self.context.workers = workers
        return self

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.run_folder.path

    @property
    def config(self) -> StudyConfig:
        """The configuration that made the run."""
        return self.context.config

    @classmethod
    def adopt(
        cls,
        base: str,
        arms: "Mapping[str, Places | Sequence[Places]]",
        sae: str,
        *,
        out: str | Path | None = None,
        copy: bool = False,
        accept_base: bool = False,
        overwrite: bool = False,
        device: str | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> Self:
        """Make a run folder of checkpoints that exist, without training; `locate`, `track` and so on follow as usual.

        ```python
        study = Study.adopt("owner/base", {"incorrect": "out/", "control": "out2/"}, "saes/mine")
        study.locate().track().report()
        ```

        Args:
            base: the base model, as `load_model` takes it.
            arms: `incorrect`, its control (`correct` or `control`) and more, each with the place of its checkpoints: a
                trainer's output folder, a folder or list of adapters or models, or `owner/model@revision`; for several
                runs (seeds) of each arm a list of lists. `PLACE#400` states a step that no file tells.
            sae: as `load_sae` takes it.
            out: run folder (default `runs/<name>`).
            copy: copy the checkpoints; otherwise they are read where they are.
            accept_base: take checkpoints that name another base, or bring another chat template.
            overwrite: set another config's run in the output folder aside, as `<out>.old`.
            seed: of controls, bootstraps and samples.
            settings: `name`, `data`, `contrast`, `questions`, `realign`, and keys of `StudyConfig`.

        Raises:
            InputError: no checkpoints there, steps that contradict each other, weights of another base model, damaged
                files, or a missing arm `incorrect`. A missing control is said in a warning and in the report.
        """
        from persona_probe.study.adopt.adopt import adopt_arms, adopted_config

        config = adopted_config(base, arms, sae, **settings)
        path = Path(out or f"runs/{config.name}")
        is_new = not path.exists()
        pick_device(device or config.device)
        study = cls(RunFolder.create(path, config, overwrite), device, seed)
        try:
            adopt_arms(study.context, copy, accept_base)
        except InputError:
            if is_new:
                shutil.rmtree(path)
            raise
        return study

    def induce(self) -> Self:
        """Fine-tune one organism per arm and seed; arms whose checkpoints exist are adopted."""
        from persona_probe.finetune.organisms import induce
        from persona_probe.study.adopt.adopt import adopt_arms

        adopt_arms(self.context)
        induce(self.context)
        return self

    def locate(self, rankers: Sequence[str] | None = None) -> Self:
        """Rank latents, test the best for cause, and name the persona feature.

        Args:
            rankers: scores to compute instead of the config's; in a run that is already located, the table is made
                again with them, and causal tests are kept.
        """
        from persona_probe.latents.cards import make_cards
        from persona_probe.latents.dictionaries import prove_dictionaries
        from persona_probe.latents.stage import locate, use_rankers

        with self._writing():
            if rankers is not None:
                use_rankers(self.context, rankers)
            locate(self.context)
            prove_dictionaries(self.context)
            make_cards(self.context)
        return self

    def card(self, latent: int, name: str | None = None, text: str | Path | None = None) -> "FeatureCard":
        """One latent's card, base against organism; a notebook shows it.

        Args:
            latent: its index in the study's SAE.
            name: what you call it; None suggests a name.
            text: a file of conversations or plain text, read in addition to the packaged text.

        Raises:
            InputError: no such latent, a text that cannot be read, or locate has not run.
        """
        from persona_probe.latents.cards import card

        return card(self.context, latent, name, text)

    def cards(self, count: int = 20, text: str | Path | None = None) -> Path:
        """Write cards.html, one page with search over the first `count` latents; returns its path."""
        from persona_probe.latents.cards import write_cards_page

        with self.run_folder.timed("cards page"):
            return write_cards_page(self.context, count, text)

    def track(self) -> Self:
        """Read the features and the contrast index at every checkpoint."""
        from persona_probe.monitor.track import track
        from persona_probe.study.two_by_two import measure_2x2

        track(self.context)
        measure_2x2(self.context)
        return self

    def realign(
        self,
        data: str | Sequence[str] | None = None,
        *,
        rows: int | None = None,
        choose_by: str | None = None,
        method: str | None = None,
        seeds: Sequence[int] | None = None,
        stress: Sequence[str] = (),
        stress_settings: "StressSettings | None" = None,
        name: str | None = None,
    ) -> Self:
        """Correct the incorrect organism, with the feature monitor attached.

        Without data: the config's corrective arms. With data: a correction in `realign/<name>-s<seed>/`, which leaves
        the run's tables as they are.

        Args:
            data: a packaged set or a file; several are joined (`a+b`, or a list).
            rows: how many of them; None takes all.
            choose_by: `random` (the default), `projection_gap`, `perplexity_gap` or `diversity`.
            method: `continued` (the default), `fresh` (a new LoRA on top) or `full` (all weights).
            seeds: of the study's organisms; None takes all.
            stress: stress tests of what was corrected: `triggers`, `remisalign`, `length`, `hidden`, `drift`.
            stress_settings: how hard they press, a `realignment.stress.StressSettings`.
            name: of the folder; None takes one that says what was done.

        Raises:
            InputError: rows that cannot be used or overlap the evaluation questions, a dose larger than the data, an
                unknown choice, method, test or seed, or a correction of that name with other settings.
        """
        from persona_probe.realignment.correct import realign_study
        from persona_probe.realignment.spec import Correction
        from persona_probe.study.two_by_two import measure_2x2

        correction = Correction.given(self.config, data, name, rows=rows, choose_by=choose_by, method=method)
        realign_study(self.context, correction, name, seeds, stress, stress_settings)
        if data is None:  # the config's corrective arms are there now
            measure_2x2(self.context)
        return self

    def realign_plan(self, plan: "str | Path | DosePlan") -> pd.DataFrame:
        """Run a grid of corrections (doses, choices, methods); finished cells are kept.

        Returns:
            `realign/doses.parquet`, one row a cell.

        Raises:
            InputError: a plan that cannot be read, or data that one of its cells cannot use.
        """
        from persona_probe.realignment.correct import run_plan
        from persona_probe.realignment.spec import DosePlan

        return run_plan(self.context, plan if isinstance(plan, DosePlan) else load_config(plan, DosePlan))

    def evaluate(
        self,
        questions: "str | Path | QuestionSet | None" = None,
        judge: "str | AnswerJudge | None" = None,
        n: int = 8,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 200,
        options: "JudgeOptions | None" = None,
        engine: "str | EngineChoice" = "transformers",
        steps: str | Sequence[int] = (),
    ) -> Self:
        """Sample answers of every arm, and have a judge rule on them (`judged`, `rates`).

        Without questions and judge: what the config's `samples` ask for. One answer to each of its questions is shown
        in the report and not scored; with `samples.judge`, further answers are judged.

        Args:
            questions: a packaged set, a file of any known format, or a question set; with a judge alone, the packaged
                free-form questions.
            judge: `offline`, `http:MODEL`, `local:MODEL` or a judge of your own; None only samples.
            n: answers to each wording of each question.
            temperature: 0 takes one greedy answer.
            top_p: draw from the smallest set of tokens that holds this probability.
            options: of the judge: protocol, thresholds, endpoint, budget, cache.
            engine: what samples the answers: `transformers`, `vllm`, or an `EngineChoice` with an endpoint's address.
            steps: also judge these steps of every arm, or `all`: the trajectory of the rate (`judged_steps`).

        Raises:
            InputError: questions that cannot be read, no organism yet, or a judge that is not available.
        """
        if questions is None and judge is None:
            from persona_probe.study.evaluate import judge_samples, sample

            sample(self.context)
            judge_samples(self.context)
            return self
        from persona_probe.evaluate.judging import JudgeOptions
        from persona_probe.evaluate.questions.read import FREE_FORM
        from persona_probe.evaluate.sampling.engines import EngineChoice
        from persona_probe.study.evaluate import Evaluation, evaluate

        options = options or JudgeOptions(device=self.context.device)
        choice = EngineChoice(engine) if isinstance(engine, str) else engine
        evaluation = Evaluation(
            questions or FREE_FORM,
            judge,
            n,
            temperature,
            top_p,
            max_new_tokens,
            options=options,
            engine=choice,
            steps=steps,
        )
        evaluate(self.context, evaluation)
        return self

    def precision(
        self, formats: Sequence[str] = (), *, items: int = 24, seeds: Sequence[int] = (), activations: bool = False
    ) -> pd.DataFrame:
        """Read base, incorrect and control organism with their weights rounded to formats of few bits.

        Args:
            formats: names of `models.formats.FORMATS`; none takes all.
            items: questions of each split.
            seeds: of the study's organisms; none takes the first.
            activations: round the inputs of linear layers too.

        Returns:
            `precision.parquet`, see `study.precision.precision_table`.

        Raises:
            InputError: locate has not run, an unknown format, or a seed that the study does not have.
        """
        from persona_probe.study.precision import PrecisionSettings, measure_precision

        settings = PrecisionSettings(tuple(formats), items, tuple(seeds), activations)
        return measure_precision(self.context, settings)

    def report(self) -> Path:
        """Write summary.json, the figures and report.html; returns the report's path.

        All are made in a temporary place, and then take the places of earlier ones.
        """
        from persona_probe.report.export import export_figures
        from persona_probe.report.html import write_report
        from persona_probe.report.records import load_records
        from persona_probe.study.hashes import TABLES, record_inputs, record_tables, table_hashes
        from persona_probe.study.summary import summary_of
        from persona_probe.writing import write_json

        with self.run_folder.timed("report"):
            summary = summary_of(self.context)
            record_inputs(self.run_folder)
            with self.run_folder.outputs() as place:
                write_json(place / "summary.json", summary)
                records = load_records(self.path, place)
                manifest = {**records.manifest, TABLES: table_hashes(self.run_folder, place)}
                records = replace(records, manifest=manifest)
                export_figures(records, place / "figures")
                write_report(self.path, records, place)
            record_tables(self.run_folder)
        return self.path / "report.html"

    def screen(self, rows: "Sequence[Conversation] | str | Path", direction: str | None = None) -> pd.DataFrame:
        """Rank rows that you mean to train on by the study's persona feature, worst first; see `pp.screen`.

        Args:
            rows: conversations, a packaged set, or a file.
            direction: `latent` (the persona latent's decoder row, the default), or a key of directions.safetensors.

        Raises:
            InputError: rows without answers, no such direction, or locate has not run.
        """
        from persona_probe.screening.screening import screen_by_study

        return screen_by_study(self.context, rows, direction).frame

    def run(self, checked: Callable[[], None] | None = None) -> Path:
        """The whole loop; finished stages are kept. Returns the report's path.

        Args:
            checked: is called when nothing was refused, before the first stage.
        """
        with self._writing():
            self.check()
            if checked is not None:
                checked()
            self.induce().locate().track().realign().evaluate()
            return self.report()

    @property
    def finished(self) -> dict[str, bool]:
        """Each stage, and whether the run folder holds what it leaves."""
        states = {name: self.run_folder.has(place) for name, place in STAGES.items()}
        return states | {"realign": any((self.path / "parts").glob("realign-*"))}

    def check(self) -> Self:
        """Load everything that the stages need, so that bad input stops a study before it trains.

        Raises:
            InputError: data, adapter settings, rankers, SAE, probes, contrast set, corrections or questions that a
                later stage could not use.
        """
        from persona_probe.study.check import check_study
        from persona_probe.study.hashes import record_inputs

        check_study(self.context)
        record_inputs(self.run_folder)
        return self

    @property
    def records(self) -> "Records":
        """The run folder's tables as `pp.figures.NAME` draws them."""
        from persona_probe.report.records import load_records

        return load_records(self.path)

    @property
    def features(self) -> pd.DataFrame:
        """Latents, best first: ranker scores, causal effects with intervals, label."""
        return self.run_folder.read_table("latents.parquet")

    def feature_table(self, count: int = 10) -> "FeatureTable":
        """The latents worth looking at, the persona latent first; a notebook shows it as HTML."""
        from persona_probe.report.tables import FeatureTable

        return FeatureTable.of(self.features, count)

    @property
    def agreement(self) -> pd.DataFrame:
        """Where rankers agree: shared top latents and rank correlation, pair by pair."""
        return self.run_folder.read_table("agreement.parquet")

    @property
    def readings(self) -> pd.DataFrame:
        """One row per arm, seed, step and feature, with interval and explained variance."""
        return self.run_folder.read_table("readings.parquet")

    @property
    def evals(self) -> pd.DataFrame:
        """One row per contrast item, arm, seed and step."""
        from persona_probe.evaluate.tables import contrast_rows

        return contrast_rows(self.run_folder.read_table("evals.parquet"))

    @property
    def effects_2x2(self) -> pd.DataFrame:
        """Each arm's harm and register, over the control arm and over the base: what it advises, and in which tone.

        Columns arm, against, effect (`harm`, `register`, `interaction`), estimate, ci_low, ci_high (nats per token; 95%
        intervals over questions and seeds) and n (questions). See `evaluate.effects_table`.

        Raises:
            InputError: not measured yet (`track` does), or the study has no 2x2 set.
        """
        from persona_probe.evaluate.main_effects import effects_table

        return effects_table(self.run_folder.read_table("evals_2x2.parquet"), self.config.control)

    @property
    def judged(self) -> pd.DataFrame:
        """One row per judged answer: arm, seed, question, value (1 misaligned), alignment, coherence, label, judge."""
        from persona_probe.evaluate.tables import read_judged

        return read_judged(self.run_folder)

    @property
    def rates(self) -> pd.DataFrame:
        """Misalignment rates with intervals and coherence, one row per evaluation, arm and kind of question."""
        from persona_probe.evaluate.rates import rates

        return rates(self.judged)

    @property
    def judged_steps(self) -> pd.DataFrame:
        """Misalignment rate and coherence with intervals at each judged step, one row per arm, seed and step."""
        return self.run_folder.read_table("judged_steps.parquet")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The study's key numbers, as `report` wrote them."""
        return self.run_folder.read_json("summary.json")

    @property
    def verdict(self) -> "StudyVerdict":
        """Headline, checks and the verdict of each corrective arm; a notebook shows it as HTML."""
        from persona_probe.report.tables import StudyVerdict

        return StudyVerdict.of(self.summary)

    def _repr_html_(self) -> str:
        return _display(self, heads=()).html()

    def __repr__(self) -> str:
        return _display(self, heads=("", "")).text()

    def model(self, arm: str, step: int | None = None, seed: int | None = None) -> Any:
        """A transformers model of its own: an organism with its adapter merged into a copy of the base.

        Args:
            arm: an arm, or `base`.
            step: None takes the last.
            seed: None takes the study's first.
        """
        from persona_probe.models.adapters import merged_copy
        from persona_probe.models.load import with_tokenizer

        ctx = self.context
        return with_tokenizer(merged_copy(ctx.model, self._checkpoint(arm, step, seed)), ctx.tokenizer)

    def _checkpoint(self, arm: str, step: int | None, seed: int | None) -> Path | None:
        if arm == "base":
            return None
        seed = self.config.seeds[0] if seed is None else seed
        return self.run_folder.checkpoint(arm, seed, self.context.last_step(arm, seed, step))

    def bridge(self, arm: str, step: int | None = None, seed: int | None = None) -> Any:
        """A TransformerLens bridge of a merged copy of an organism, with the study's SAE attached.

        Args:
            arm: an arm, or `base`.
            step: None takes the last.
            seed: None takes the study's first.
        """
        from persona_probe.models.load import make_bridge

        ctx, checkpoint = self.context, self._checkpoint(arm, step, seed)
        return make_bridge(ctx.model, ctx.tokenizer, checkpoint, self.config.model, ctx.sae)


STAGES = {
    "induce": "arms",
    "locate": "latents.parquet",
    "track": "readings.parquet",
    "realign": "parts",
    "evaluate": "samples.jsonl",
    "report": "report.html",
}
"""Stages of a run, and the file or folder that each leaves; realign is found by its own parts."""


def _display(study: Study, heads: Sequence[str]) -> Table:
    """A study's model, SAE, arms and stages, and its headline where it has one."""
    config, run, states = study.config, study.run_folder, study.finished
    rows = [
        ["base model", config.model],
        ["SAE", ", ".join(one.sae for one in config.all_saes)],
        ["arms", ", ".join([*config.arms, *config.realign.arms])],
        ["seeds", ", ".join(map(str, config.seeds))],
        ["stages", ", ".join(f"{name} {'done' if ready else 'to do'}" for name, ready in states.items())],
        ["folder", str(run.path)],
    ]
    if run.has("summary.json"):
        rows.append(["result", str(run.read_json("summary.json").get("headline", ""))])
    return Table(heads, rows, f"Study {config.name}")
