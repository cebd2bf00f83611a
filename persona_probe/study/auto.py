"""Unattended studies: plan, run, hold every claim against the rules of evidence, repeat where seeds decide, and stop.

The loop is the same for a study of real models (`StudyLab`) and for the blind organisms that score it
(`world.blind.BlindLab`). It decides by the functions of `study.auto_rules` alone, and writes each decision with its
numbers (`study.auto_log`).
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from persona_probe.config import StudyConfig, check_finite, load_config
from persona_probe.errors import InputError, unknown
from persona_probe.realignment.stress import TESTS
from persona_probe.report.tables import Table
from persona_probe.study.auto_log import LOG, Decision, DecisionLog
from persona_probe.study.auto_rules import (
    MARGIN,
    Claim,
    Expected,
    answer_sentence,
    claims_of,
    expected,
    next_seeds,
)
from persona_probe.study.plan.estimate import REPORT
from persona_probe.study.plan.plan import Plan, dry_run, duration
from persona_probe.study.study import Study
from persona_probe.study.summary import summary_of
from persona_probe.writing import json_values, make_folder, write_json, write_text

log = logging.getLogger(__name__)

ANSWER, ANSWERS = "answer.md", "answer.json"


@dataclass(frozen=True)
class AutoConfig:
    """What an unattended study is given."""

    question: str
    """What is asked, in words: it heads the log and the answer."""
    studies: tuple[str, ...]
    """Paths of study configs: models, data, SAE and seeds. They are answered in this order, from one budget."""
    budget_minutes: float = 60.0
    """No stage starts that is not expected to end within this time, which all studies share."""
    max_seeds: int = 5
    """No claim is repeated with more seeds than these."""
    stress: tuple[str, ...] = ("triggers",)
    """Stress tests of the corrections: `triggers`, `remisalign`, `length`, `hidden`, `drift`."""

    def __post_init__(self) -> None:
        check_finite(self)
        if not self.question.strip():
            raise InputError("the question is empty: write what is asked")
        if not self.studies:
            raise InputError("an unattended study needs studies: write the path of at least one config")
        if not self.budget_minutes > 0:
            raise InputError(f"budget_minutes must be positive, not {self.budget_minutes:g}")
        if self.max_seeds < 1:
            raise InputError(f"max_seeds must be at least 1, not {self.max_seeds}")
        for test in self.stress:
            if test not in TESTS:
                raise unknown("stress test", test, TESTS)


# --- The loop


class Lab(Protocol):
    """What the loop works with."""

    @property
    def stages(self) -> Sequence[str]:
        """In their order."""
        ...

    @property
    def needed(self) -> Sequence[str]:
        """Those without which there is no claim."""
        ...

    def plan(self, seeds: Sequence[int]) -> dict[str, float]:
        """Seconds of each stage, without the work that earlier rounds did."""
        ...

    def run(self, stage: str, seeds: Sequence[int]) -> None:
        """Do one stage; what is finished is kept."""
        ...

    def claims(self, seeds: Sequence[int]) -> list[Claim]:
        """The claims that the finished stages support."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What an investigation ended with."""

    seeds: tuple[int, ...]
    claims: tuple[Claim, ...]
    sentence: str


@dataclass
class Investigation:
    """One question to one lab, within a budget."""

    lab: Lab
    seeds: tuple[int, ...]
    log: DecisionLog
    budget: float
    """Seconds."""
    max_seeds: int
    clock: Callable[[], float] = time.monotonic
    timings: list[tuple[float, float]] = field(default_factory=list)
    """Planned and measured seconds of finished stages."""

    def run(self) -> Outcome:
        """Decide until nothing is left to decide, or the budget ends; resumes where its log ends.

        Raises:
            InputError: what a stage refuses; the log says which.
        """
        number, seeds, claims, tested, needed = 1, self.seeds, list[Claim](), self.seeds, tuple(self.lab.needed)
        while True:
            if not self._stages(number, seeds, needed):
                return self._stop(number, tested, claims, "the budget", {})
            claims, tested = self.lab.claims(seeds), seeds
            for claim in claims:
                self._note(number, "claim", claim.name, _claim_words(claim), claim.rule, claim.numbers)
            wanted = next_seeds(seeds, claims, self.max_seeds)
            if wanted == seeds:
                return self._stop(number, seeds, claims, *self._why_enough(seeds, claims))
            needed = self._as_before(number)
            if not self.log.has(number, "more seeds", "all"):
                planned = self.lab.plan(wanted)
                time_needed = self._expected(sum(planned[stage] for stage in needed))
                undecided = [claim.name for claim in claims if claim.by_seeds]
                numbers = {"seconds_expected": time_needed.seconds, "seconds_left": time_needed.left}
                if not time_needed.fits:
                    return self._stop(number, seeds, claims, f"the budget; undecided: {', '.join(undecided)}", numbers)
                self._note(
                    number,
                    "more seeds",
                    "all",
                    f"{len(wanted)} seeds ({', '.join(map(str, wanted))}), to decide {', '.join(undecided)}",
                    "auto_rules.next_seeds",
                    numbers,
                )
            number, seeds = number + 1, wanted

    def _as_before(self, number: int) -> tuple[str, ...]:
        """What the round after this one needs: all that this one finished, so that no claim of it is lost."""
        return tuple(
            stage for stage in self.lab.stages if stage in self.lab.needed or self.log.has(number, "done", stage)
        )

    def _stages(self, number: int, seeds: tuple[int, ...], needed: Sequence[str]) -> bool:
        """Run a round; whether all stages that it needs are done."""
        planned = self.lab.plan(seeds)
        whole = sum(planned[stage] for stage in needed)
        if not self.log.has(number, "plan", "all"):
            time_needed = self._expected(whole)
            numbers = {"seconds": planned, "seconds_expected": time_needed.seconds, "seconds_left": time_needed.left}
            verdict = "fits the budget" if time_needed.fits else "does not fit the budget: nothing is started"
            self._note(number, "plan", "all", f"{len(seeds)} seeds; {verdict}", "auto_rules.expected", numbers)
        started = any(one.round == number and one.action == "start" for one in self.log.decisions)
        if not started and not self._expected(whole).fits:
            return False
        for stage in self.lab.stages:
            if self.log.has(number, "done", stage):
                self._remember(number, stage)
            elif not self._stage(number, stage, seeds, planned[stage]) and stage in needed:
                return False
        return True

    def _stage(self, number: int, stage: str, seeds: tuple[int, ...], planned: float) -> bool:
        """Run a stage if it fits."""
        time_needed = self._expected(planned)
        numbers = {"seconds_expected": time_needed.seconds, "seconds_left": time_needed.left}
        if not time_needed.fits:
            self._note(number, "not started", stage, "it would not end in the budget", "auto_rules.expected", numbers)
            return False
        self._note(number, "start", stage, "it fits the budget", "auto_rules.expected", numbers)
        before = self.clock()
        try:
            self.lab.run(stage, seeds)
        except BaseException as error:
            took = {"seconds": self.clock() - before}
            what = str(error) if isinstance(error, InputError) else type(error).__name__
            self._note(number, "failed", stage, what, "", took)
            raise
        took = self.clock() - before
        self.timings.append((planned, took))
        self._note(number, "done", stage, "finished", "", {"seconds": took, "planned": planned})
        return True

    def _remember(self, number: int, stage: str) -> None:
        """The timing of a stage that an earlier process did."""
        for one in self.log.decisions:
            if one.key == (number, "done", stage):
                self.timings.append((one.numbers["planned"], one.numbers["seconds"]))

    def _expected(self, planned: float) -> Expected:
        return expected(planned, self.timings, self.budget, self.log.spent)

    def _why_enough(self, seeds: Sequence[int], claims: Sequence[Claim]) -> tuple[str, dict[str, Any]]:
        waiting = [claim.name for claim in claims if claim.by_seeds]
        if waiting:
            return f"{len(seeds)} seeds are the most; undecided: {', '.join(waiting)}", {"max_seeds": self.max_seeds}
        return "no claim is left that more seeds could decide", {}

    def _stop(
        self, number: int, seeds: tuple[int, ...], claims: Sequence[Claim], why: str, numbers: dict[str, Any]
    ) -> Outcome:
        self._note(number, "stop", "all", why, "auto_rules.next_seeds", numbers)
        sentence = answer_sentence(claims)
        self._note(number, "answer", "all", sentence, "auto_rules.answer_sentence", {})
        return Outcome(seeds, tuple(claims), sentence)

    def _note(self, round: int, action: str, subject: str, result: str, rule: str, numbers: dict[str, Any]) -> None:
        self.log.add(Decision(round, action, subject, result, rule, numbers))
        log.info("%s, %s: %s", action, subject, result)


def _claim_words(claim: Claim) -> str:
    rest = f"; rules of evidence not met: {'; '.join(claim.unmet)}" if claim.unmet else ""
    return f"{claim.answer} ({claim.word}){rest}"


# --- A study of real models

STAGES = ("induce", "locate", "track", "realign", "stress", "samples", "report")
NEEDED = ("induce", "locate", "track", "report")
START_S = 30.0
"""Seconds of each stage besides the plan's: libraries and models are loaded, files written, figures drawn. Without them
the ratio of measured to planned time of a short stage would say nothing about the next."""


class StudyLab:
    """A study in its run folders: one for each number of seeds, which takes the organisms of the earlier one."""

    stages, needed = STAGES, NEEDED

    def __init__(
        self,
        config: StudyConfig,
        out: Path,
        stress: Sequence[str],
        device: str | None = None,
        tflops: float | None = None,
    ) -> None:
        self.config, self.out, self.stress, self.device, self.tflops = config, out, tuple(stress), device, tflops

    def place(self, seeds: Sequence[int]) -> Path:
        """The run folder of a round."""
        return self.out / f"seeds-{len(seeds)}"

    @cached_property
    def _plans(self) -> dict[tuple[int, ...], Plan]:
        return {}

    def plan_of(self, seeds: Sequence[int]) -> Plan:
        """The dry run of a round.

        Raises:
            InputError: parts that do not fit together, or a model whose sizes are not known here.
        """
        key = tuple(seeds)
        if key not in self._plans:
            plan = dry_run(replace(self.config, seeds=key), self.tflops, self.device)
            if not plan.stages:
                why = "; ".join(plan.notes) or "its sizes are unknown"
                raise InputError(f"no times can be planned for {self.config.model} ({why}): download the model first")
            self._plans[key] = plan
        return self._plans[key]

    def plan(self, seeds: Sequence[int]) -> dict[str, float]:
        """Seconds by stage, with `START_S`; organisms that are there are not counted, a stress test is a correction."""
        plan = self.plan_of(seeds)
        assert plan.throughput is not None
        seconds = {work.stage: plan.stage_seconds(work) for work in plan.stages}
        organisms = [(arm, seed) for arm in self.config.arms for seed in seeds]
        missing = sum(not self._has_organism(arm, seed) for arm, seed in organisms)
        seconds["induce"] *= missing / len(organisms)
        seconds["stress"] = seconds["realign"] * len(self.stress)
        seconds["report"] = plan.throughput.seconds(REPORT)
        return {stage: START_S + float(seconds.get(stage, 0.0)) for stage in STAGES}

    def _has_organism(self, arm: str, seed: int) -> bool:
        return any(self.out.glob(f"seeds-*/arms/{arm}-s{seed}"))

    def study(self, seeds: Sequence[int]) -> Study:
        """The round's study; its organisms that other rounds have are copied into it."""
        study = Study.from_config(replace(self.config, seeds=tuple(seeds)), self.place(seeds), device=self.device)
        for place in (f"arms/{arm}-s{seed}" for arm in self.config.arms for seed in seeds):
            made = sorted(self.out.glob(f"seeds-*/{place}"))
            if made and not study.run_folder.has(place):
                study.run_folder.take(place, made[0])
        return study

    def run(self, stage: str, seeds: Sequence[int]) -> None:
        """Do one stage of the round's study."""
        study = self.study(seeds)
        if stage == "induce":
            study.check().induce()
        elif stage == "stress":
            if self.stress:
                study.realign(stress=self.stress)
        elif stage == "samples":
            study.evaluate()
        else:
            getattr(study, stage)()

    def claims(self, seeds: Sequence[int]) -> list[Claim]:
        """The claims of summary.json."""
        study = self.study(seeds)
        tried = "triggers" in self.stress and any((study.path / "realign").glob("*/stress.parquet"))
        return claims_of(summary_of(study.context), triggers=tried)

    def tell(self, seeds: Sequence[int], decisions: Path, left: float) -> None:
        """Put the log into the round's run folder, and draw its report again where `left` seconds are enough."""
        study = self.study(seeds)
        study.run_folder.take(LOG, decisions)
        if MARGIN * self.plan(seeds)["report"] <= left:
            study.report()


# --- The command


def run_auto(config: AutoConfig, out: Path, device: str | None = None, tflops: float | None = None) -> dict[str, Any]:
    """Answer the question for each study; resumes if interrupted.

    Returns:
        `answer.json`: question, budget and spent seconds, and for each study its sentence, seeds, claims and report.

    Raises:
        InputError: a config that cannot be read, or what a stage refuses.
    """
    studies = _studies(config)
    make_folder(out)
    found, spent = [], 0.0
    for study in studies:
        place = make_folder(out / study.name)
        lab, decisions = StudyLab(study, place, config.stress, device, tflops), DecisionLog(place, config.question)
        budget = config.budget_minutes * 60 - spent
        outcome = Investigation(lab, study.seeds, decisions, budget, config.max_seeds).run()
        spent += decisions.spent
        if outcome.claims:
            lab.tell(outcome.seeds, place / LOG, config.budget_minutes * 60 - spent)
        found.append(
            {
                "study": study.name,
                "sentence": outcome.sentence,
                "seeds": list(outcome.seeds),
                "claims": [vars(claim) | {"stands": claim.stands} for claim in outcome.claims],
                "report": f"{study.name}/seeds-{len(outcome.seeds)}/report.html" if outcome.claims else None,
                "log": f"{study.name}/{LOG}",
            }
        )
    answer = {"question": config.question, "budget_seconds": config.budget_minutes * 60, "spent_seconds": spent}
    answer |= {"studies": found}
    write_json(out / ANSWERS, json_values(answer))
    write_text(out / ANSWER, answer_page(answer))
    return answer


def _studies(config: AutoConfig) -> list[StudyConfig]:
    studies = [load_config(path, StudyConfig) for path in config.studies]
    names = [study.name for study in studies]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two studies are called {twice[0]!r}: give each a name of its own")
    return studies


def answer_page(answer: dict[str, Any]) -> str:
    """The answer as Markdown: a sentence and a table of claims for each study."""
    lines = [f"# {answer['question']}", ""]
    for study in answer["studies"]:
        rows = [
            [one["name"], one["answer"], one["word"], "yes" if one["stands"] else "no", "; ".join(one["unmet"])]
            for one in study["claims"]
        ]
        heads = ("claim", "answer", "word", "stands", "rules of evidence not met")
        lines += [f"## {study['study']}", "", study["sentence"], "", _seeds_line(study["seeds"]), ""]
        lines += [Table(heads, rows).markdown(), ""] if rows else []
        links = [f"[report]({study['report']})"] if study["report"] else []
        lines += [", ".join([*links, f"[decisions]({study['study']}/decisions.md)"]), ""]
    return "\n".join(lines)


def _seeds_line(seeds: Sequence[int]) -> str:
    return f"{'Seed' if len(seeds) == 1 else 'Seeds, joined'}: {', '.join(map(str, seeds))}"


def plan_lines(config: AutoConfig, out: Path, device: str | None = None, tflops: float | None = None) -> list[str]:
    """What an unattended study would do, without doing it: seconds by stage and round, and whether the budget holds."""
    lines, left = [f"question  {config.question}", f"budget    {duration(config.budget_minutes * 60)}"], 0.0
    for study in _studies(config):
        lab = StudyLab(study, out / study.name, config.stress, device, tflops)
        lines += ["", *lab.plan_of(study.seeds).lines(), ""]
        for seeds in _rounds(study.seeds, config.max_seeds):
            planned = lab.plan(seeds)
            parts = ", ".join(f"{stage} {duration(planned[stage])}" for stage in STAGES)
            lines.append(f"round with {len(seeds)} seeds: {duration(sum(planned.values()))} ({parts})")
        left += sum(lab.plan(study.seeds)[stage] for stage in NEEDED)
    first = expected(left, [], config.budget_minutes * 60, 0.0)
    word = "fits" if first.fits else "does not fit"
    lines += [
        "",
        f"what claims need, once for each study: {duration(first.seconds)} with a margin; it {word} the budget",
    ]
    return [*lines, "further rounds run where an interval is too wide to decide a claim, and the budget holds"]


def _rounds(seeds: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """All rounds that could follow one another."""
    open_claim = Claim("woken", "undecided", "", "", by_seeds=True)
    rounds = [seeds]
    while (wider := next_seeds(rounds[-1], [open_claim], most)) != rounds[-1]:
        rounds.append(wider)
    return rounds
