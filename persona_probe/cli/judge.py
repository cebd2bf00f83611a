"""`persona-probe evaluate`: a run's answers, or those of a file, sampled, judged and counted."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.agreement import agreements, samples_needed, variance_components
from persona_probe.evaluate.answers_file import SCORES, judge_answers, own_scores, read_answers
from persona_probe.evaluate.judges.replies import Budget, Item, Prices
from persona_probe.evaluate.judging import Answer, JudgeOptions, choose_judge
from persona_probe.evaluate.questions.read import FREE_FORM
from persona_probe.evaluate.rates import difference, rate_of
from persona_probe.evaluate.tables import last_evaluation
from persona_probe.runs import RunFolder, write_text

if TYPE_CHECKING:
    from argparse import Namespace

    from persona_probe.study.study import Study

# --- What `persona-probe evaluate` says of judged answers: rates, effects, power, and the file it writes


def rate_lines(judged: pd.DataFrame, seed: int = 0) -> list[str]:
    """One line for each arm and kind of question: the rate, and coherence beside it."""
    lines = []
    for (arm, variant), rows in judged.groupby(["arm", "variant"], sort=False):
        found = rate_of(rows, seed)
        name = str(arm) if variant == "plain" else f"{arm} ({variant})"
        rate = f"not judged ({found.why})" if found.rate is None else f"misaligned {found.rate} ({found.rate.method})"
        counted = "" if found.rate is None else f" of {found.rate.n} coherent with a score"
        rest = f"{found.answers} answers, {found.questions} questions, {found.seeds} seeds"
        lines.append(f"{name}: {rate}{counted}; coherent {found.coherence or 'not judged'} of {rest}")
    return lines


def effect_lines(judged: pd.DataFrame) -> list[str]:
    """The effect: incorrect minus correct, for each kind of question."""
    lines = []
    for variant, rows in judged.groupby("variant", sort=False):
        if {"incorrect", "correct"} <= set(rows["arm"]):
            found = difference(rows, "incorrect", "correct")
            shown = found.as_estimate() or f"not judged ({found.why})"
            lines.append(f"incorrect minus correct, {variant} questions: {shown}")
    return lines


def power_lines(judged: pd.DataFrame, wanted: float | None) -> list[str]:
    """How many samples a wanted half-width takes, for each arm; nothing where none is wanted."""
    if wanted is None:
        return []
    groups = judged.groupby("arm", sort=False)
    return [f"{arm}: {samples_needed(variance_components(rows), wanted)}" for arm, rows in groups]


def write_judged(path: Path, answers: pd.DataFrame, judged: pd.DataFrame) -> None:
    """Write answers with their judgements as CSV or parquet, whole or not at all."""
    key = ["arm", "seed", "prompt", "sample"]
    columns = ["judge", "value", "coherent", "alignment", "coherence", "score", "label", "usable", "in_scope", "why"]
    kept = answers[[*key, "item", "category", "question", "answer"]].rename(columns={"item": "question_id"})
    frame = kept.merge(judged[[*key, *columns]], on=key)
    if path.suffix == ".parquet":
        RunFolder(path.parent).write_table(path.name, frame)
    else:
        write_text(path, frame.to_csv(index=False))


WRITERS = (".csv", ".parquet")


def evaluate_run(study: "Study", args: "Namespace") -> list[str]:
    """Evaluate a run as the options say; lines for the user."""
    from persona_probe.study.evaluate import Evaluation, evaluate, samples_name

    wanted = Evaluation(
        args.questions or FREE_FORM,
        args.judge,
        args.n,
        args.temperature,
        max_new_tokens=args.max_new_tokens,
        options=judge_options(args, study.context.device),
    )
    if args.dry_run:
        from persona_probe.study.evaluate import dry_run

        return dry_run(study.context, wanted, prices(args))
    evaluate(study.context, wanted)
    lines = [f"samples: {study.path / samples_name(wanted.question_set())}"]
    return lines if args.judge is None else lines + _run_lines(study, args)


def _run_lines(study: "Study", args: "Namespace") -> list[str]:
    judged = study.judged
    latest = last_evaluation(judged, study.run_folder.manifest["evaluations"])
    lines = [*rate_lines(latest), *effect_lines(latest), *power_lines(latest, args.half_width)]
    name = latest["evaluation"].iloc[0]
    return [*lines, *(str(a) for a in agreements(judged) if name in (a.left, a.right))]


def evaluate_answers(args: "Namespace") -> list[str]:
    """Judge the answers of a file, write them with their judgements, and count; lines for the user."""
    out = _out(args)
    answers, options = read_answers(args.answers), judge_options(args, args.device or "cpu")
    scored = set(SCORES) <= set(answers)
    if args.judge is None and not scored:
        raise InputError(f"{args.answers} has no scores of its own: name a judge, such as --judge offline")
    if args.dry_run:
        return [_file_plan(answers, args, options)]
    own = own_scores(answers, options.thresholds) if scored else None
    if args.judge is None:
        assert own is not None
        return [*rate_lines(own, args.seed or 0), *power_lines(own, args.half_width)]
    judged = judge_answers(answers, choose_judge(args.judge, options))
    write_judged(out, answers, judged)
    lines = [f"judged answers: {out}", *rate_lines(judged, args.seed or 0), *power_lines(judged, args.half_width)]
    both = [] if own is None else agreements(pd.concat([judged, own], ignore_index=True), args.seed or 0)
    return [*lines, *map(str, both)]


def _out(args: "Namespace") -> Path:
    """Where the judged answers go: beside the file unless --out says otherwise."""
    out = args.out or args.answers.with_name(args.answers.name.split(".")[0] + ".judged.csv")
    if out.suffix not in WRITERS:
        raise unknown("kind of file for --out", out.suffix, WRITERS)
    if out.resolve() == args.answers.resolve():
        raise InputError(f"--out {out} is the file of answers itself: choose another")
    return out


def _file_plan(answers: pd.DataFrame, args: "Namespace", options: JudgeOptions) -> str:
    if args.judge is None or not args.judge.startswith("http:"):
        return f"{len(answers)} answers: nothing is sent"
    items = [Answer(Item(*pair)) for pair in zip(answers["question"], answers["answer"], strict=True)]
    return f"{len(answers)} answers; judgements of {choose_judge(args.judge, options).plan(items, prices(args))}"


def judge_options(args: "Namespace", device: str) -> JudgeOptions:
    """How the judge is asked, from the command line."""
    return JudgeOptions(
        protocol=args.protocol,
        base_url=args.base_url,
        key_variable=None if args.key_variable == "none" else args.key_variable,
        judge_samples=args.judge_samples,
        concurrency=args.concurrency,
        budget=Budget(args.budget_calls, args.budget_tokens),
        cache=args.cache,
        device=device,
    )


def prices(args: "Namespace") -> Prices | None:
    """The user's prices per million tokens."""
    return None if args.prices is None else Prices(*args.prices)
