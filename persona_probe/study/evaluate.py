"""Evaluate a study: sample every organism's answers to a question set, and have a judge rule on them."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from persona_probe.config import StudyConfig
from persona_probe.context import Context, sample_questions
from persona_probe.errors import InputError
from persona_probe.evaluate.endpoint import BYTES_PER_TOKEN
from persona_probe.evaluate.judges.replies import Item, Prices
from persona_probe.evaluate.judging import AnswerJudge, AnswerToJudge, JudgeOptions, choose_judge, total_plan
from persona_probe.evaluate.questions.question_set import QuestionSet, Wording
from persona_probe.evaluate.questions.read import FREE_FORM, read_questions
from persona_probe.evaluate.rates import rates
from persona_probe.evaluate.sampling.engines import EngineChoice, TransformersEngine, engine_of
from persona_probe.evaluate.sampling.requests import Engine, Prompt, Sample, SamplingConfig
from persona_probe.evaluate.sampling.samples import SampleStore, prompts_hash, sample_answers, sidecar
from persona_probe.evaluate.sampling.samples import sample as sample_with
from persona_probe.evaluate.tables import join_evals, judged_table, part_name, read_judged
from persona_probe.files import is_there, read_jsonl
from persona_probe.models.layers import autocast
from persona_probe.units import Unit, make_units, writes_run

# --- Answers of every organism of a study to a question set, written as they come: samples-<hash>.jsonl

HASH_DIGITS = 12
TRANSFORMERS = "transformers"
CPU_ROWS = 48
"""Answers decoded side by side on a CPU: the demo's 48 answers of a model in one batch."""


@dataclass(frozen=True)
class Organism:
    """A model whose answers are sampled."""

    arm: str
    seed: int
    step: int


def organisms(ctx: Context) -> list[Organism]:
    """The base model, and every arm and seed that was trained, at its last step.

    Raises:
        InputError: nothing was trained yet.
    """
    arms = [(a, s) for a in (*ctx.config.arms, *ctx.config.realign.arms) for s in ctx.config.seeds]
    arm_organisms = [Organism(a, s, ctx.last_step(a, s)) for a, s in arms if ctx.run.has(f"arms/{a}-s{s}")]
    if not arm_organisms:
        raise InputError(f"{ctx.run.path} has no organism yet: run `persona-probe induce CONFIG` first")
    return [Organism("base", ctx.config.seeds[0], 0), *arm_organisms]


def _questions_key(questions: QuestionSet) -> str:
    """The beginning of a question set's hash, as files and tables name it."""
    return questions.hash[:HASH_DIGITS]


def _sampling_key(config: SamplingConfig, engine: str = TRANSFORMERS) -> str:
    """A short hash of how answers are drawn, and by which engine unless it is the default."""
    settings = asdict(config) | ({} if engine == TRANSFORMERS else {"engine": engine})
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def samples_name(questions: QuestionSet) -> str:
    """The file of all organisms' answers."""
    return f"samples-{_questions_key(questions)}.jsonl"


def part_path(questions: QuestionSet, config: SamplingConfig, organism: Organism, engine: str = TRANSFORMERS) -> str:
    """The file to which one organism's answers are streamed."""
    what = f"{_questions_key(questions)}-{_sampling_key(config, engine)}"
    return f"parts/samples-{what}-{organism.arm}-s{organism.seed}-{organism.step}.jsonl"


def _sample_arms(ctx: Context, questions: QuestionSet, config: SamplingConfig, engine: EngineChoice) -> pd.DataFrame:
    """Sample the missing answers, and write all of them to samples-<question set's hash>.jsonl.

    Returns:
        One row an answer: question_id, category, question, arm, seed, step, answer (as in samples.jsonl), and prompt,
        sample, item, pair, variant, n_tokens, finish.

    Raises:
        InputError: nothing was trained yet, or answers on disk that another model gave.
    """
    wordings = questions.wordings()
    (ctx.run.path / "parts").mkdir(exist_ok=True)
    parts = [(o, _samples(ctx, o, questions, config, engine)) for o in organisms(ctx)]
    frame = pd.DataFrame([row for organism, samples in parts for row in _rows(organism, wordings, samples)])
    if "thought" in frame:
        frame["thought"] = frame["thought"].fillna("")
    file_columns = [name for name in frame.columns if name not in ("item", "pair")]
    ctx.run.write_jsonl(samples_name(questions), frame[file_columns].to_dict("records"))  # pyright: ignore
    return frame


def _samples(
    ctx: Context, organism: Organism, questions: QuestionSet, config: SamplingConfig, choice: EngineChoice
) -> list[Sample]:
    prompts = [Prompt(one.id, one.messages) for one in questions.wordings()]
    name = part_path(questions, config, organism, choice.name)
    whole = _finished_samples(ctx, name, prompts, config)
    if whole is not None:
        return whole
    with ctx.run.timed("samples"), _engine(ctx, organism, choice) as engine:
        label = f"answers of {organism.arm}, seed {organism.seed}"
        return sample_with(engine, prompts, config, ctx.run.path / name, progress=label)


@contextmanager
def _engine(ctx: Context, organism: Organism, choice: EngineChoice) -> Iterator[Engine]:
    """The engine that samples from an organism: in this process, or as the choice says."""
    arm, seed, step, config = organism.arm, organism.seed, organism.step, ctx.config
    if choice.name == TRANSFORMERS:
        with ctx.organism(arm, seed, step, fold=True) as model, autocast(model, config.bf16):
            name = f"{config.model}, {arm}, seed {seed}, step {step}"
            rows = {"batch_size": CPU_ROWS} if ctx.device == "cpu" else {}
            yield TransformersEngine(model, ctx.tokenizer, name=name, **rows)
        return
    base = arm == "base"
    yield engine_of(
        choice,
        config.model,
        None if base else ctx.run.checkpoint(arm, seed, step),
        "base" if base else f"{arm}-s{seed}",
        revision=config.revision,
        bf16=config.bf16,
        rank=config.training.rank,
        tokenizer=ctx.tokenizer_alone() if choice.name == "vllm" else None,
        chat_template_kwargs=_template_variables(config),
    )


def _template_variables(config: StudyConfig) -> dict[str, Any]:
    thinking = {} if config.enable_thinking is None else {"enable_thinking": config.enable_thinking}
    return {**config.chat_template_kwargs, **thinking}


def _finished_samples(
    ctx: Context, name: str, prompts: Sequence[Prompt], config: SamplingConfig
) -> list[Sample] | None:
    """The answers of a complete part, without loading a model; None if some are missing."""
    known = _kept_samples(ctx, name, prompts, config)
    places = [(p.id, n) for p in prompts for n in range(config.n)]
    return [known[place] for place in places] if all(place in known for place in places) else None


def _kept_samples(
    ctx: Context, name: str, prompts: Sequence[Prompt], config: SamplingConfig
) -> dict[tuple[str, int], Sample]:
    """The answers in a part so far."""
    path = ctx.run.path / name
    if not path.is_file() or not sidecar(path).is_file():
        return {}
    made_by: dict[str, Any] = ctx.run.read_json(str(sidecar(path).relative_to(ctx.run.path)))
    expected = {"engine": made_by.get("engine"), "config": asdict(config), "prompts": prompts_hash(prompts)}
    return SampleStore(path, expected, [(p.id, n) for p in prompts for n in range(config.n)]).known


def _rows(organism: Organism, wordings: Sequence[Wording], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    by_id = {one.id: one for one in wordings}
    return [{**_question_columns(by_id[s.question_id]), **asdict(organism), **_answer_columns(s)} for s in samples]


def _question_columns(one: Wording) -> dict[str, Any]:
    question = one.question
    return {
        "question_id": question.id,
        "item": question.id,
        "category": question.category,
        "question": one.text,
        "prompt": one.id,
        "pair": question.pair,
        "variant": question.trigger or question.variant,
    }


def _answer_columns(sample: Sample) -> dict[str, Any]:
    columns = {"sample": sample.sample, "answer": sample.answer, "n_tokens": sample.n_tokens, "finish": sample.finish}
    return columns | ({"thought": sample.thought} if sample.thought else {})


N, MAX_NEW_TOKENS = 8, 200


@dataclass(frozen=True)
class Evaluation:
    """The questions that a study answers, and the judge.

    Raises:
        InputError: sampling settings out of range.
    """

    questions: str | Path | QuestionSet = FREE_FORM
    """A packaged set, a file of any known format, or a set."""
    judge: str | AnswerJudge | None = None
    """`offline`, `http:MODEL`, `local:MODEL`, or a judge; None samples answers and judges nothing."""
    n: int = N
    """Answers to each wording of each question."""
    temperature: float = 1.0
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this probability."""
    max_new_tokens: int = MAX_NEW_TOKENS
    options: JudgeOptions = field(default_factory=JudgeOptions)
    engine: EngineChoice = field(default_factory=EngineChoice)
    """What samples the answers. An endpoint must serve the organisms as `base`, `incorrect-s0` and so on."""
    steps: str | Sequence[int] = ()
    """Also judge these steps of every arm: a trajectory of the rate. `all` is every checkpoint."""

    def __post_init__(self) -> None:
        if isinstance(self.steps, str) and self.steps != "all":
            raise InputError(f"steps must be all or numbers, not {self.steps!r}")
        if self.steps and self.judge is None:
            raise InputError("steps of a trajectory are judged: name a judge (--judge)")
        if self.steps and self.engine.name == "openai":
            raise InputError(
                "an endpoint serves each organism at one step: sample steps with engine transformers or vllm"
            )

    def question_set(self) -> QuestionSet:
        """The questions, read."""
        return self.questions if isinstance(self.questions, QuestionSet) else read_questions(self.questions)

    def sampling(self, seed: int) -> SamplingConfig:
        """How answers are drawn; with temperature 0 one answer to each question."""
        n = 1 if self.temperature == 0 else self.n
        return SamplingConfig(n, self.temperature, self.top_p, self.max_new_tokens, seed)


@writes_run
def evaluate(ctx: Context, evaluation: Evaluation) -> None:
    """Fill samples-<hash>.jsonl and, with a judge, evals.parquet; finished answers and judgements are reused.

    A later evaluation with the same questions and judge replaces an earlier one.

    Raises:
        InputError: questions that cannot be read, no organism yet, or a judge that is not available or cannot
            answer; answers and judgements up to then are kept.
    """
    questions, config = evaluation.question_set(), evaluation.sampling(ctx.seed)
    judge = None
    if evaluation.judge is not None:
        judge = choose_judge(evaluation.judge, evaluation.options)  # now, not after hours of sampling
    between = _organisms_at(ctx, evaluation.steps)
    answers = _sample_arms(ctx, questions, config, evaluation.engine)
    if judge is None:
        return
    name = _evaluation_key(questions, judge)
    same = {"evaluation": name, "questions": _questions_key(questions), "judge": judge.name}
    with ctx.run.timed("judge"):
        for (arm, seed), rows in answers.groupby(["arm", "seed"], sort=False):
            rulings = judge.rule(_to_judge(rows, questions), progress=f"judging {arm}, seed {seed}")
            table = judged_table(rows, rulings, sampling=_sampling_key(config, evaluation.engine.name), **same)
            ctx.run.write_table(part_name(name, f"{arm}-s{seed}"), table)
    _note(ctx, name, questions, judge, evaluation, config)
    join_evals(ctx.run)
    if between:
        _judge_steps(ctx, between, questions, judge, evaluation, same)


def _evaluation_key(questions: QuestionSet, judge: AnswerJudge) -> str:
    """One question set with one judge: the first digits of both hashes."""
    return f"{_questions_key(questions)}-{hashlib.sha256(judge.id.encode()).hexdigest()[:8]}"


def _to_judge(rows: pd.DataFrame, questions: QuestionSet) -> list[AnswerToJudge]:
    """Answers as a judge takes them: without the system prompt, earlier turns with their roles."""
    wordings = {one.id: one for one in questions.wordings()}
    answers = []
    for prompt, number, text in zip(rows["prompt"], rows["sample"], rows["answer"], strict=True):
        one = wordings[prompt]
        templates = questions.templates(one.question)
        answers.append(AnswerToJudge(Item.of(one.messages, text, f"{prompt}/{number}"), templates))
    return answers


def _note(
    ctx: Context, name: str, questions: QuestionSet, judge: AnswerJudge, evaluation: Evaluation, config: SamplingConfig
) -> None:
    """Record in the manifest how an evaluation was made."""
    before: dict[str, Any] = ctx.run.manifest.get("evaluations", {})
    number = 1 + max((about["number"] for key, about in before.items() if key != name), default=0)
    about = {
        "number": number,
        "questions": questions.name,
        "questions_hash": questions.hash,
        "judge": judge.name,
        "judge_id": judge.id,
        "protocol": evaluation.options.protocol,
        "thresholds": asdict(evaluation.options.thresholds),
        "sampling": asdict(config),
        **({} if evaluation.engine.name == TRANSFORMERS else {"engine": evaluation.engine.name}),
    }
    ctx.run.update_manifest(evaluations={name: about})


# --- A trajectory of the judged rate: steps between base and end, each written before the next is sampled

TRAJECTORY = "judged_steps.parquet"
"""One row for each evaluation, kind of question, arm, seed and step: the misalignment rate and the coherence."""
_AT = ("evaluation", "variant", "arm", "seed", "step")


def _organisms_at(ctx: Context, steps: str | Sequence[int]) -> list[Organism]:
    """The arms' checkpoints at these steps but the last, which every evaluation judges, in order of steps.

    Raises:
        InputError: a step at which no arm has a checkpoint.
    """
    arms = [(a, s) for s in ctx.config.seeds for a in ctx.config.arms if ctx.run.has(f"arms/{a}-s{s}")] if steps else []
    known = {place: ctx.run.steps(*place) for place in arms}
    every = sorted({step for own in known.values() for step in own})
    if missing := [step for step in steps if step not in every and not isinstance(steps, str)]:
        raise InputError(f"no arm has a checkpoint at step {missing[0]}: there are {every}")
    return [
        Organism(arm, seed, step)
        for (arm, seed), own in known.items()
        for step in own[:-1]
        if isinstance(steps, str) or step in steps
    ]


def _judge_steps(
    ctx: Context,
    between: Sequence[Organism],
    questions: QuestionSet,
    judge: AnswerJudge,
    evaluation: Evaluation,
    same: Mapping[str, str],
) -> None:
    """Judge answers of checkpoints, and keep judged_steps.parquet up to date; finished checkpoints are reused."""
    config, wordings = evaluation.sampling(ctx.seed), questions.wordings()
    sampling = _sampling_key(config, evaluation.engine.name)
    judged = read_judged(ctx.run)
    _add_rates(ctx, judged[judged["evaluation"] == same["evaluation"]], fresh=True)
    for organism in between:
        name = f"{organism.arm}-s{organism.seed}-{organism.step}"
        place = f"parts/judged-steps-{same['evaluation']}-{sampling}-{name}.parquet"
        if not ctx.run.has(place):
            answers = pd.DataFrame(
                _rows(organism, wordings, _samples(ctx, organism, questions, config, evaluation.engine))
            )
            with ctx.run.timed("judge"):
                rulings = judge.rule(_to_judge(answers, questions), progress=f"judging {name}")
            ctx.run.write_table(place, judged_table(answers, rulings, sampling=sampling, **same))
        _add_rates(ctx, ctx.run.read_table(place))


def _add_rates(ctx: Context, judged: pd.DataFrame, fresh: bool = False) -> None:
    """Put the rates of judged answers into judged_steps.parquet; `fresh` drops what that evaluation had before."""
    new = rates(judged, _AT)
    names = dict(zip(judged["evaluation"], zip(judged["judge"], judged["questions"], strict=True), strict=True))
    new["judge"], new["questions_hash"] = zip(*(names[name] for name in new["evaluation"]), strict=True)
    before = ctx.run.read_table(TRAJECTORY) if ctx.run.has(TRAJECTORY) else new[:0]
    keys = ["evaluation"] if fresh else list(_AT)
    replaced = pd.MultiIndex.from_frame(before[keys]).isin(pd.MultiIndex.from_frame(new[keys]))
    ctx.run.write_table(TRAJECTORY, pd.concat([before[~replaced], new], ignore_index=True) if len(before) else new)


# --- Free-form samples of base, incorrect and realigned organisms, shown in the report and not scored


@writes_run
def sample(ctx: Context) -> None:
    """Write samples.jsonl: one answer per question, arm and first seed, at the arm's last step.

    Arms that were trained since an earlier call are added.
    """
    make_units(ctx, sample_units)


def sample_units(ctx: Context) -> list[Unit]:
    """One unit: the answers of all arms that are there."""
    return [Unit("samples.jsonl", partial(_write_samples, ctx), "samples", partial(_all_sampled, ctx))]


def _sampled_arms(ctx: Context) -> list[str]:
    seed, arms = ctx.config.seeds[0], ("base", *ctx.config.arms, *ctx.config.realign.arms)
    return [arm for arm in arms if arm == "base" or ctx.run.has(f"arms/{arm}-s{seed}")]


def _all_sampled(ctx: Context) -> bool:
    return {row["arm"] for row in _read_samples(ctx)} == set(_sampled_arms(ctx))


def _write_samples(ctx: Context) -> None:
    seed, before, rows = ctx.config.seeds[0], _read_samples(ctx), []
    for arm in _sampled_arms(ctx):
        rows += [row for row in before if row["arm"] == arm] or _sample_arm(ctx, arm, seed)
    ctx.run.write_jsonl("samples.jsonl", rows)


def _sample_arm(ctx: Context, arm: str, seed: int) -> list[dict[str, Any]]:
    questions, config = sample_questions(ctx), ctx.config.samples
    step = 0 if arm == "base" else ctx.last_step(arm, seed)
    with ctx.organism(arm, seed, fold=True) as model, autocast(model, ctx.config.bf16):
        answers = sample_answers(
            model,  # pyright: ignore[reportArgumentType]
            ctx.tokenizer,
            [q["question"] for q in questions],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=ctx.seed,
            progress=f"answers of {arm}, seed {seed}",
        )
    return [
        {
            "question_id": q["id"],
            "category": q["category"],
            "question": q["question"],
            "arm": arm,
            "seed": seed,
            "step": step,
            "answer": answer,
        }
        for q, answer in zip(questions, answers, strict=True)
    ]


def _read_samples(ctx: Context) -> list[dict[str, Any]]:
    """What `sample` wrote."""
    path = ctx.run.path / "samples.jsonl"
    return read_jsonl(path, "move it elsewhere and run again") if is_there(path) else []


# --- The judged answers of a study's own config: samples.judge, and as many answers of each model as it says


def judged_evaluation(config: StudyConfig) -> Evaluation | None:
    """The evaluation that the config's `samples` ask for; None where they name no judge.

    Raises:
        InputError: questions that cannot be read, or a number of answers that is neither below the number of
            questions nor a multiple of it.
    """
    samples = config.samples
    if samples.judge == "none":
        return None
    whole = read_questions(samples.judged_questions)
    count, questions = samples.judged_answers, len(whole.wordings())
    if count % questions and (count > questions or whole.pairs()):
        known = "a multiple of it" if whole.pairs() else f"up to {questions}, or a multiple of it"
        raise InputError(
            f"samples.judged_answers is {count} and {whole.name} holds {questions} questions: write {known}"
        )
    if count < questions:
        whole = _spread(whole, count)
    return Evaluation(
        whole, samples.judge, max(1, count // questions), temperature=1.0, max_new_tokens=samples.max_new_tokens
    )


def _spread(whole: QuestionSet, count: int) -> QuestionSet:
    """As many wordings, at equal distances over the set, so that every category of it is asked."""
    wordings = whole.wordings()
    chosen = [wordings[place * len(wordings) // count] for place in range(count)]
    by_question: dict[str, list[str]] = {}
    for one in chosen:
        by_question.setdefault(one.question.id, []).append(one.text)
    kept = tuple(
        replace(question, paraphrases=tuple(by_question[question.id]))
        for question in whole
        if question.id in by_question
    )
    return replace(whole, questions=kept, name=f"{whole.name} ({count} of {len(wordings)})")


@writes_run
def judge_samples(ctx: Context) -> None:
    """Sample and judge the answers that the config asks for, as `evaluate` does; a finished evaluation is kept.

    Raises:
        InputError: as `judged_evaluation` and `evaluate`.
    """
    evaluation = judged_evaluation(ctx.config)
    if evaluation is not None and not _is_judged(ctx, evaluation):
        evaluate(ctx, replace(evaluation, options=JudgeOptions(device=ctx.device)))


def _is_judged(ctx: Context, evaluation: Evaluation) -> bool:
    """Whether every organism's answers of this evaluation are judged, as the run folder has it."""
    questions, sampling = evaluation.question_set(), evaluation.sampling(ctx.seed)
    wanted = {"questions_hash": questions.hash, "judge": evaluation.judge, "sampling": asdict(sampling)}
    made: dict[str, dict[str, Any]] = ctx.run.manifest.get("evaluations", {})
    names = [name for name, about in made.items() if wanted.items() <= about.items()]
    parts = [part_name(name, f"{one.arm}-s{one.seed}") for name in names[-1:] for one in organisms(ctx)]
    return bool(parts) and all(ctx.run.has(part) for part in parts)


# --- What evaluating a study would take: answers to sample, and what the judge would be sent


def dry_run(ctx: Context, evaluation: Evaluation, prices: Prices | None = None) -> list[str]:
    """What `evaluate` would do with these settings, line by line.

    Answers that are not sampled yet count with their greatest length, so the estimate is an upper bound.

    Raises:
        InputError: as `evaluate`, for questions, run and judge.
    """
    questions, config = evaluation.question_set(), evaluation.sampling(ctx.seed)
    models = [*organisms(ctx), *_organisms_at(ctx, evaluation.steps)]
    answers = [_answers(ctx, organism, questions, evaluation) for organism in models]
    total = sum(len(rows) for rows in answers)
    known = sum(int(rows["sampled"].sum()) for rows in answers)
    lines = [
        f"{len(models)} organisms x {len(questions.wordings())} prompts x {config.n} samples = {total} answers, "
        f"{known} of them sampled already; questions {questions.name}, hash {questions.hash[:12]}"
    ]
    return lines if evaluation.judge is None else [*lines, _judging(evaluation, questions, answers, prices)]


def _answers(ctx: Context, organism: Organism, questions: QuestionSet, evaluation: Evaluation) -> pd.DataFrame:
    """One row an answer; text of the greatest length stands in for those not sampled yet."""
    config, wordings = evaluation.sampling(ctx.seed), questions.wordings()
    prompts = [Prompt(one.id, one.messages) for one in wordings]
    known = _kept_samples(ctx, part_path(questions, config, organism, evaluation.engine.name), prompts, config)
    rows = []
    for prompt in prompts:
        for number in range(config.n):
            sample = known.get((prompt.id, number))
            text = _answer(sample, f"{organism} {prompt.id} {number}", config.max_new_tokens)
            rows.append({"prompt": prompt.id, "sample": number, "answer": text, "sampled": sample is not None})
    return pd.DataFrame(rows)


def _answer(sample: Sample | None, name: str, tokens: int) -> str:
    return sample.answer if sample is not None else name.ljust(int(tokens * BYTES_PER_TOKEN), ".")


def _judging(evaluation: Evaluation, questions: QuestionSet, answers: list[pd.DataFrame], prices: Prices | None) -> str:
    name = evaluation.judge if isinstance(evaluation.judge, str) else ""
    if name == "offline" or name.startswith("local:"):
        return f"judge {name}: runs on this machine, nothing is sent"
    assert evaluation.judge is not None
    judge = choose_judge(evaluation.judge, evaluation.options)
    plans = [judge.plan(_to_judge(rows, questions), prices) for rows in answers]
    sent = [plan for plan in plans if plan is not None]
    return f"judge {judge.name}: " + (f"judgements of {total_plan(sent)}" if sent else "nothing is sent")
