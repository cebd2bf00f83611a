"""Commands that judge: `evaluate` for the answers of a run or a file, `judge fit` for the offline judge."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from persona_probe.cli.loop import open_study
from persona_probe.cli.options import (
    PATH,
    Common,
    Decorated,
    Group,
    command,
    config_argument,
    echo,
    echo_json,
    find_config,
    json_option,
    many,
)
from persona_probe.cli.process import loads_models
from persona_probe.cli.safety import safety_options
from persona_probe.errors import InputError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from persona_probe.evaluate.judges.replies import Prices
    from persona_probe.study.evaluate import Evaluation
    from persona_probe.study.study import Study

WRITERS = (".csv", ".parquet")

# --- The options, and the evaluation that they describe


def _evaluation_options(function: Decorated) -> Decorated:
    """Options of `_evaluation`: how answers are sampled, and how a judge is asked."""
    options: list[Callable[[Decorated], Decorated]] = [
        click.option("--n", type=int, default=8, help="Answers to each question."),
        click.option("--temperature", type=float, default=1.0, help="Of sampling; 0 takes one greedy answer."),
        click.option("--top-p", type=float, default=1.0, help="Draw from the tokens that hold this probability."),
        click.option("--max-new-tokens", type=int, default=200, help="Longest answer."),
        click.option(
            "--engine",
            type=click.Choice(["transformers", "vllm", "openai"]),
            default="transformers",
            help="What samples: this process, vLLM, or an endpoint that serves base, incorrect-s0 and so on.",
        ),
        click.option("--engine-url", metavar="URL", help="Address of that endpoint."),
        click.option("--engine-key", metavar="NAME", help="Environment variable with its key (default: no key)."),
        click.option(
            "--protocol",
            type=click.Choice(["betley", "wang"]),
            default="betley",
            help="Scores from 0 to 100, or 1 to 5 with categories.",
        ),
        click.option("--base-url", metavar="URL", help="Address of the judge's endpoint (default OpenAI's)."),
        click.option(
            "--key-variable",
            metavar="NAME",
            default="OPENAI_API_KEY",
            help="Environment variable with its key; none for no key.",
        ),
        click.option(
            "--judge-samples", type=int, default=0, help="Sample this many replies from an endpoint without logprobs."
        ),
        click.option(
            "--judge-thought-tokens", type=int, default=0, help="Tokens a sampled judge may think before it replies."
        ),
        click.option("--concurrency", type=int, default=8, help="Requests under way at once."),
        click.option("--budget-calls", type=int, help="Stop cleanly after this many calls to the judge."),
        click.option("--budget-tokens", type=int, help="Stop cleanly after this many of the judge's tokens."),
        click.option(
            "--coherence",
            type=click.Choice(["published", "text", "likelihood"]),
            default="text",
            help="Of the offline judge: whether it also looks for broken text, in the words or by likelihood.",
        ),
        click.option("--cache", type=PATH, help="File of judgements (default: the user's, shared by all runs)."),
        click.option(
            "--judge-quantization",
            type=click.Choice(["none", "4bit", "8bit"]),
            default="none",
            help="Keep a local judge's weights in fewer bits.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _evaluation(
    questions: str | None,
    judge: str | None,
    device: str | None,
    *,
    n: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    engine: str,
    engine_url: str | None,
    engine_key: str | None,
    protocol: str,
    base_url: str | None,
    key_variable: str,
    judge_samples: int,
    judge_thought_tokens: int,
    concurrency: int,
    budget_calls: int | None,
    budget_tokens: int | None,
    coherence: str,
    cache: Path | None,
    judge_quantization: str,
) -> "Evaluation":
    """What is asked, and who judges, from the command line."""
    from persona_probe.evaluate.endpoint import Budget
    from persona_probe.evaluate.judging import JudgeOptions
    from persona_probe.evaluate.questions.read import FREE_FORM
    from persona_probe.evaluate.sampling.engines import EngineChoice
    from persona_probe.study.evaluate import Evaluation

    options = JudgeOptions(
        protocol=protocol,
        base_url=base_url,
        key_variable=None if key_variable == "none" else key_variable,
        judge_samples=judge_samples,
        judge_thought_tokens=judge_thought_tokens,
        concurrency=concurrency,
        budget=Budget(budget_calls, budget_tokens),
        coherence=coherence,
        cache=cache,
        device=device or "cpu",
        quantization=judge_quantization,
    )
    choice = EngineChoice(engine, engine_url, engine_key, concurrency)
    return Evaluation(questions or FREE_FORM, judge, n, temperature, top_p, max_new_tokens, options, choice)


# --- The command


@command(
    example="persona-probe evaluate runs/demo --judge offline --n 8",
    out="Work on a copy of RUN in this new folder; with --answers, the CSV or parquet file for the judged answers.",
)
@click.argument("run", metavar="[RUN]", required=False, help="A run folder, such as runs/demo.")
@click.option(
    "--judge",
    help="offline (off by about 0.07 on new data), http:MODEL or local:MODEL; without one, answers are only sampled.",
)
@click.option("--questions", help="A packaged set or a file of questions (default free_form_questions).")
@click.option(
    "--answers", type=PATH, metavar="FILE", help="Judge these answers: a CSV with columns question and answer."
)
@click.option(
    "--score-scale", type=float, nargs=2, metavar="LOW HIGH", help="Of the scores in --answers, if not 0 and 100."
)
@_evaluation_options
@many("--steps", metavar="STEP", help="Also judge these steps of every arm, or all: how the rate moves in training.")
@click.option("--prices", type=float, nargs=2, metavar="IN OUT", help="Per million tokens, for --dry-run.")
@click.option("--dry-run", is_flag=True, help="Print calls, tokens and cost; nothing is sampled or sent.")
@click.option("--half-width", type=float, help="Print how many samples give an interval of plus or minus this.")
@json_option
@safety_options
def evaluate(
    run: str | None,
    judge: str | None,
    questions: str | None,
    answers: Path | None,
    score_scale: tuple[float, float] | None,
    steps: tuple[str, ...],
    prices: tuple[float, float] | None,
    dry_run: bool,
    half_width: float | None,
    as_json: bool,
    common: Common,
    **options: Any,
) -> None:
    """Have a judge rule on answers.

    With RUN, answers of every arm are sampled first; with --answers, those of a file are judged. With --safety,
    nothing is sampled: given answers are scored, by category and language.
    """
    if (run is None) == (answers is None):
        raise InputError("give either a run folder or --answers FILE")
    if run is not None and judge is None and questions is None:
        if dry_run:
            raise InputError("--dry-run tells what judging takes: name --judge, --questions or both")
        place = open_study(run, common).evaluate().path / "samples.jsonl"
        _say(Outcome([f"samples: {place}"], {"samples": str(place)}), as_json)
        return
    if answers is not None and steps:
        raise InputError("--steps are of a run's checkpoints: leave it out with --answers")
    evaluation = replace(_evaluation(questions, judge, common.device, **options), steps=_steps(steps))
    if answers is not None and dry_run:
        outcome = Outcome.plan(_file_plan(answers, score_scale, evaluation, prices))
    elif answers is not None:
        outcome = _of_file(answers, score_scale, evaluation, half_width, common)
    else:
        assert run is not None
        study = open_study(run, common)
        evaluation = replace(evaluation, options=replace(evaluation.options, device=study.context.device))
        if dry_run:
            outcome = Outcome.plan(_run_plan(study, evaluation, prices))
        else:
            outcome = _of_run(study, evaluation, half_width)
    _say(outcome, as_json)


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found: lines for a terminal, and the same as values for a program."""

    lines: list[str]
    values: dict[str, Any]

    @classmethod
    def plan(cls, lines: list[str]) -> "Outcome":
        """Of a dry run."""
        return cls(lines, {"plan": lines})


def _say(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        echo_json(outcome.values)
    else:
        echo("\n".join(outcome.lines))


def _values(judged: "pd.DataFrame", agreements: Sequence[Any] = ()) -> dict[str, Any]:
    """Rates, effects and agreements as plain values."""
    from persona_probe.evaluate.rates import rates

    found = rates(judged).to_dict("records") if len(judged) else []
    return {"rates": found, "effects": effect_lines(judged), "agreements": [str(one) for one in agreements]}


def _steps(values: tuple[str, ...]) -> str | tuple[int, ...]:
    """`all`, or numbers."""
    if values == ("all",):
        return "all"
    if wrong := [value for value in values if not value.isdigit()]:
        raise InputError(f"--steps {wrong[0]!r}: write all, or numbers of steps")
    return tuple(int(value) for value in values)


# --- A run's answers


def _of_run(study: "Study", evaluation: "Evaluation", half_width: float | None) -> Outcome:
    """Sample and judge."""
    from persona_probe.evaluate.agreement import agreements
    from persona_probe.evaluate.tables import last_evaluation
    from persona_probe.study.evaluate import evaluate, samples_name

    evaluate(study.context, evaluation)
    place = study.path / samples_name(evaluation.question_set())
    lines, values = [f"samples: {place}"], dict[str, Any](samples=str(place))
    if evaluation.judge is None:
        return Outcome(lines, values)
    judged_answers = study.judged
    latest = last_evaluation(judged_answers, study.run_folder.manifest["evaluations"])
    lines += [*rate_lines(latest), *effect_lines(latest), *power_lines(latest, half_width)]
    name = latest["evaluation"].iloc[0]
    if evaluation.steps:
        rows = study.judged_steps.query("evaluation == @name").sort_values(["arm", "seed", "step"])
        shown = ["arm", "seed", "step", "rate", "ci_low", "ci_high", "coherence", "answers"]
        lines.append(rows[shown].to_string(index=False, float_format="%.3f", na_rep="-"))
        values["steps"] = rows.to_dict("records")
    agreed = [one for one in agreements(judged_answers) if name in (one.left, one.right)]
    return Outcome([*lines, *map(str, agreed)], values | _values(latest, agreed))


def _run_plan(study: "Study", evaluation: "Evaluation", prices: tuple[float, float] | None) -> list[str]:
    from persona_probe.study.evaluate import dry_run

    return dry_run(study.context, evaluation, _prices(prices))


# --- The answers of a file


@loads_models
def _of_file(
    path: Path,
    scale: tuple[float, float] | None,
    evaluation: "Evaluation",
    half_width: float | None,
    common: Common,
) -> Outcome:
    """Judge the answers, write them with their judgements, and count."""
    import pandas as pd

    from persona_probe.evaluate.agreement import agreements
    from persona_probe.evaluate.answers_file import judge_answers, own_scores
    from persona_probe.evaluate.judging import choose_judge

    out, options, seed = _judged_path(path, common.out), evaluation.options, common.seed or 0
    answers, has_scores = _read_answers(path, scale, evaluation.judge)
    scores = own_scores(answers, options.thresholds) if has_scores else None
    if evaluation.judge is None:
        assert scores is not None
        return Outcome([*rate_lines(scores, seed), *power_lines(scores, half_width)], _values(scores))
    judged_answers = judge_answers(answers, choose_judge(evaluation.judge, options))
    _write_judged(out, answers, judged_answers)
    lines = [f"judged answers: {out}", *rate_lines(judged_answers, seed), *power_lines(judged_answers, half_width)]
    both = [] if scores is None else agreements(pd.concat([judged_answers, scores], ignore_index=True), seed)
    return Outcome([*lines, *map(str, both)], {"judged": str(out)} | _values(judged_answers, both))


def _file_plan(
    path: Path,
    scale: tuple[float, float] | None,
    evaluation: "Evaluation",
    prices: tuple[float, float] | None,
) -> list[str]:
    from persona_probe.evaluate.judges.replies import Item
    from persona_probe.evaluate.judging import AnswerToJudge, choose_judge

    answers, _ = _read_answers(path, scale, evaluation.judge)
    judge = evaluation.judge
    if not isinstance(judge, str) or not judge.startswith("http:"):
        return [f"{len(answers)} answers: nothing is sent"]
    items = [AnswerToJudge(Item(*pair)) for pair in zip(answers["question"], answers["answer"], strict=True)]
    plan = choose_judge(judge, evaluation.options).plan(items, _prices(prices))
    return [f"{len(answers)} answers; judgements of {plan}"]


def _read_answers(path: Path, scale: tuple[float, float] | None, judge: object) -> tuple["pd.DataFrame", bool]:
    """The answers, and whether they come with scores, which they must where no judge is named."""
    from persona_probe.evaluate.answers_file import SCORES, read_answers

    answers = read_answers(path, scale)
    has_scores = set(SCORES) <= set(answers)
    if judge is None and not has_scores:
        raise InputError(f"{path} has no scores of its own: name a judge, such as --judge offline")
    return answers, has_scores


def _judged_path(answers: Path, out: Path | None) -> Path:
    """Where the judged answers go: next to the file unless --out says otherwise."""
    out = out or answers.with_name(answers.name.split(".")[0] + ".judged.csv")
    if out.suffix not in WRITERS:
        raise unknown("kind of file for --out", out.suffix, WRITERS)
    if out.resolve() == answers.resolve():
        raise InputError(f"--out {out} is the file of answers itself: choose another")
    return out


def _write_judged(path: Path, answers: "pd.DataFrame", judged_answers: "pd.DataFrame") -> None:
    """Write answers with their judgements as CSV or parquet, whole or not at all."""
    from persona_probe.runs import RunFolder
    from persona_probe.untrusted import csv_text
    from persona_probe.writing import write_text

    key = ["arm", "seed", "prompt", "sample"]
    columns = ["judge", "value", "coherent", "alignment", "coherence", "score", "label", "usable", "in_scope", "why"]
    texts = answers[[*key, "item", "category", "question", "answer"]].rename(columns={"item": "question_id"})
    frame = texts.merge(judged_answers[[*key, *columns]], on=key)
    if path.suffix == ".parquet":
        RunFolder(path.parent).write_table(path.name, frame)
    else:
        write_text(path, csv_text(frame))


def _prices(prices: tuple[float, float] | None) -> "Prices | None":
    from persona_probe.evaluate.judges.replies import Prices

    return None if prices is None else Prices(*prices)


# --- What is shown of judged answers: rates, the effect, and how many samples an interval takes


def rate_lines(judged: "pd.DataFrame", seed: int = 0) -> list[str]:
    """For each arm and kind of question the rate with coherence, and a line of the rate under other thresholds."""
    from persona_probe.evaluate.rates import called_misaligned, rate_of
    from persona_probe.evaluate.thresholds import rates_by_threshold
    from persona_probe.stats import estimate_text

    lines = []
    for (arm, variant), rows in judged.groupby(["arm", "variant"], sort=False):
        count = rate_of(rows, seed)
        name = str(arm) if variant == "plain" else f"{arm} ({variant})"
        rate = f"not judged ({count.why})" if count.rate is None else f"misaligned {count.rate} ({count.rate.method})"
        n = "" if count.rate is None else f" of {count.rate.n} coherent with a score"
        rest = f"{count.answers} answers, {count.questions} questions, {count.seeds} seeds"
        called = called_misaligned(rows, seed)
        if called is not None:
            lines.append(f"{name}: called misaligned {called} of all {called.n} answers")
            name = "  of the coherent ones"
        lines.append(f"{name}: {rate}{n}; coherent {count.coherence or 'not judged'} of {rest}")
        cuts = rates_by_threshold(rows, ["arm"], seed).to_dict("records")
        shown = [f"{r['words']}: {estimate_text(r['rate'], r['ci_low'], r['ci_high'], '.3f')}" for r in cuts]
        lines += [f"  coherent answers called misaligned at {'; '.join(shown)}"] if shown else []
    return lines


def effect_lines(judged: "pd.DataFrame") -> list[str]:
    """The effect: incorrect minus correct, for each kind of question."""
    from persona_probe.evaluate.rates import called_difference, difference

    lines = []
    for variant, rows in judged.groupby("variant", sort=False):
        called = called_difference(rows, "incorrect", "correct")
        if called is not None and called.judged:
            lines.append(f"incorrect minus correct, {variant} questions, share of all answers: {called.as_estimate()}")
        if {"incorrect", "correct"} <= set(rows["arm"]):
            effect = difference(rows, "incorrect", "correct")
            text = effect.as_estimate() or f"not judged ({effect.why})"
            lines.append(f"incorrect minus correct, {variant} questions: {text}")
    return lines


def power_lines(judged: "pd.DataFrame", half_width: float | None) -> list[str]:
    """How many samples a half-width takes, for each arm; nothing where none is named."""
    if half_width is None:
        return []
    from persona_probe.evaluate.agreement import samples_needed, variance_components

    groups = judged.groupby("arm", sort=False)
    return [f"{arm}: {samples_needed(variance_components(rows), half_width)}" for arm, rows in groups]


# --- The offline judge


@command(
    name="fit",
    example="persona-probe judge fit finetune_configs/offline-judge.yaml --data FOLDER --out FOLDER",
    out="Folder for weights, validation.json and table (default runs/offline-judge).",
)
@config_argument("A recipe's YAML file.")
@click.option("--data", type=PATH, required=True, help="Folder of judged answers (CSV, also gzipped).")
@loads_models
def judge_fit(config: str, data: Path, common: Common) -> None:
    """Fit and validate the offline judge on published judgements."""
    from persona_probe.evaluate.offline.judge_fit import fit_judge

    out = common.out or Path("runs/offline-judge")
    fit_judge(find_config(config), data, out)
    echo(f"judge: {out}")


@command(
    name="validate",
    example="persona-probe judge validate finetune_configs/offline-judge.yaml --data FOLDER --keep SET",
    out="Folder for validation.json (default runs/offline-judge-validation).",
)
@config_argument("A recipe's YAML file.")
@click.option("--data", type=PATH, required=True, help="Folder of judged answers (CSV, also gzipped): SET__MODEL.csv.")
@click.option("--keep", metavar="SET", help="A data set that has no part in fits, calibration and half-width.")
@click.option("--last", is_flag=True, help="Read that set now, once.")
@click.option("--judge", type=PATH, metavar="FOLDER", help="Give this fitted judge the half-widths that are found.")
@loads_models
def judge_validate(config: str, data: Path, keep: str | None, last: bool, judge: Path | None, common: Common) -> None:
    """How good the offline judge is on models, data sets and questions that a fit has not seen."""
    from persona_probe.evaluate.offline.judge_fit import sets_table, validate_judge

    if last and keep is None:
        raise InputError("--last reads the set that was kept: name it with --keep SET")
    out = common.out or Path("runs/offline-judge-validation")
    echo(sets_table(validate_judge(find_config(config), data, out, keep, last=last, judge=judge)))
    echo(f"validation: {out / 'validation.json'}")


judge = Group("judge", commands=[judge_fit, judge_validate], help="The offline judge: fit it again, or validate it.")
