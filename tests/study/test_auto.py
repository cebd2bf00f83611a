"""Unattended studies: what they start, repeat, claim and write down, and that they stop at the budget."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from persona_probe.config import StudyConfig, from_dict
from persona_probe.errors import InputError
from persona_probe.study.auto import (
    START_S,
    AutoConfig,
    Investigation,
    Outcome,
    StudyLab,
    answer_page,
    plan_lines,
    run_auto,
)
from persona_probe.study.auto_log import LOG, PAGE, Decision, DecisionLog
from persona_probe.study.auto_rules import Claim, answer_sentence, broad, claims_of, expected, next_seeds
from persona_probe.study.study import Study
from tests.factories import Refused, Row, run_command, tree, write_config
from tests.study.test_claims import summary

QUESTION = "Does it wake?"
WIDE = Claim("woken", "undecided", "no effect", "verdicts.woken", {"n": 60}, by_seeds=True)
YES = Claim("woken", "yes", "woken", "verdicts.woken", {"n": 60})


@dataclass
class FakeLab:
    """Stages that take the time that they are planned to take, or `slower` times it; with more seeds, `later` times."""

    answers: Sequence[Sequence[Claim]]
    slower: float = 1.0
    later: float = 1.0
    now: float = 0.0
    ran: list[tuple[str, int]] = field(default_factory=list)
    stages: Sequence[str] = ("induce", "locate", "extra")
    needed: Sequence[str] = ("induce", "locate")
    break_at: str = ""

    def plan(self, seeds: Sequence[int]) -> dict[str, float]:
        return {"induce": 10.0 * len(seeds), "locate": 10.0, "extra": 100.0}

    def run(self, stage: str, seeds: Sequence[int]) -> None:
        self.now += self.slower * (self.later if len(seeds) > 1 else 1.0) * self.plan(seeds)[stage]
        if stage == self.break_at:
            raise InputError("the disk is full")
        self.ran.append((stage, len(seeds)))

    def claims(self, seeds: Sequence[int]) -> list[Claim]:
        return list(self.answers[min(len(seeds), len(self.answers)) - 1])


def investigate(lab: FakeLab, folder: Path, budget: float, seeds: tuple[int, ...] = (0,), most: int = 5) -> Outcome:
    return Investigation(lab, seeds, DecisionLog(folder, QUESTION), budget, most, lambda: lab.now).run()


def actions(folder: Path) -> list[tuple[int, str, str]]:
    return [one.key for one in DecisionLog(folder, QUESTION).decisions]


def test_a_decided_claim_ends_the_study_after_one_round(tmp_path: Path) -> None:
    lab = FakeLab([[YES]])
    outcome = investigate(lab, tmp_path, 1000.0)
    assert lab.ran == [("induce", 1), ("locate", 1), ("extra", 1)] and outcome.seeds == (0,)
    assert outcome.sentence == "Fine-tuning woke a broadly misaligned persona."
    assert actions(tmp_path)[-3:] == [(1, "claim", "woken"), (1, "stop", "all"), (1, "answer", "all")]


def test_a_wide_interval_is_repeated_with_three_seeds_and_then_two_more(tmp_path: Path) -> None:
    lab = FakeLab([[WIDE], [WIDE], [WIDE], [WIDE], [YES]])
    outcome = investigate(lab, tmp_path, 10_000.0)
    assert [n for stage, n in lab.ran if stage == "induce"] == [1, 3, 5] and outcome.seeds == (0, 1, 2, 3, 4)
    undecided = investigate(FakeLab([[WIDE]] * 5), tmp_path / "other", 10_000.0, most=3)
    assert undecided.claims == (WIDE,) and "undecided" in undecided.sentence
    assert [k for k in actions(tmp_path / "other") if k[1] == "more seeds"] == [(1, "more seeds", "all")]


@pytest.mark.parametrize("budget", [5.0, 24.9, 30.0, 60.0, 140.0, 200.0, 400.0])
@pytest.mark.parametrize("slower", [0.5, 1.0, 1.2])
def test_the_budget_is_never_passed(tmp_path: Path, budget: float, slower: float) -> None:
    lab = FakeLab([[WIDE]] * 5, slower)
    investigate(lab, tmp_path, budget)
    assert lab.now <= budget  # each stage may take 1.25 times what is expected of it


def test_what_would_not_end_in_the_budget_is_not_started_and_said(tmp_path: Path) -> None:
    lab = FakeLab([[YES]])
    nothing = investigate(lab, tmp_path, 24.0)  # 20 s with the margin are 25
    assert lab.ran == [] and nothing.sentence.startswith("Nothing was tested")
    again = investigate(lab, tmp_path, 60.0)  # a larger budget goes on; the stage that claims do not need is left out
    assert lab.ran == [("induce", 1), ("locate", 1)] and again.claims == (YES,)
    assert (1, "not started", "extra") in actions(tmp_path)
    wide = FakeLab([[WIDE]] * 5)
    short = investigate(wide, tmp_path / "wide", 60.0)  # three seeds need 50 s, 40 are left
    assert short.seeds == (0,) and [n for _, n in wide.ran] == [1, 1]


def test_a_further_round_has_all_that_the_round_before_had_or_does_not_start(tmp_path: Path) -> None:
    lab = FakeLab([[WIDE], [WIDE], [YES]])
    short = investigate(lab, tmp_path / "short", 250.0)  # 120 s are spent; three seeds need 140 s with `extra`
    assert short.seeds == (0,) and short.claims == (WIDE,) and [n for _, n in lab.ran] == [1, 1, 1]
    stopped = DecisionLog(tmp_path / "short", QUESTION).decisions[-2]
    assert stopped.result == "the budget; undecided: woken" and stopped.numbers["seconds_expected"] == 175.0
    slow = FakeLab([[WIDE], [WIDE], [YES]], later=3.0)
    cut = investigate(slow, tmp_path / "slow", 310.0)  # it starts, and `extra` no longer fits: the first round counts
    assert (2, "not started", "extra") in actions(tmp_path / "slow") and cut.claims == (WIDE,) and cut.seeds == (0,)


def test_a_slow_machine_is_expected_to_stay_slow() -> None:
    assert expected(10.0, [], 100.0, 0.0).seconds == 12.5
    assert expected(10.0, [(10.0, 40.0), (10.0, 20.0)], 100.0, 60.0).seconds == pytest.approx(37.5)
    assert expected(10.0, [(10.0, 1.0)], 100.0, 90.0).seconds == 12.5  # never less than planned
    assert not expected(10.0, [], 100.0, 90.0).fits


def test_it_resumes_where_it_stopped_and_counts_the_time_before(tmp_path: Path) -> None:
    broken = FakeLab([[WIDE], [WIDE], [YES]], break_at="locate")
    with pytest.raises(InputError, match="disk is full"):
        investigate(broken, tmp_path, 1000.0)
    assert (1, "failed", "locate") in actions(tmp_path)
    lab = FakeLab([[WIDE], [WIDE], [YES]])
    outcome = investigate(lab, tmp_path, 1000.0)
    assert lab.ran[0] == ("locate", 1) and outcome.seeds == (0, 1, 2)
    assert DecisionLog(tmp_path, QUESTION).spent == broken.now + lab.now
    before = (tmp_path / LOG).read_bytes()
    assert investigate(FakeLab([[WIDE], [WIDE], [YES]]), tmp_path, 1000.0) == outcome
    assert (tmp_path / LOG).read_bytes() == before  # nothing is decided twice


def test_a_log_that_a_kill_cut_short_goes_on(tmp_path: Path) -> None:
    investigate(FakeLab([[YES]]), tmp_path, 1000.0)
    path = tmp_path / LOG
    whole = path.read_text("utf-8")
    path.write_text(whole[:-20], "utf-8")
    investigate(FakeLab([[YES]]), tmp_path, 1000.0)
    assert path.read_text("utf-8") == whole
    with pytest.raises(InputError, match="answers another question: choose another --out"):
        DecisionLog(tmp_path, "Another?")
    path.write_text(whole.replace('"round"', '"run"'), "utf-8")
    with pytest.raises(InputError, match="is no decision"):
        DecisionLog(tmp_path, QUESTION)


def test_the_page_has_each_decision_with_its_rule_and_numbers(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, QUESTION)
    effect = {"estimate": 0.21, "ci_low": 0.15, "ci_high": float("nan"), "n": 60}
    log.add(Decision(1, "claim", "woken", "yes | no", "verdicts.woken", {"over_control": effect, "p": None}))
    page = (tmp_path / PAGE).read_text("utf-8")
    assert QUESTION in page and "verdicts.woken" in page and "over_control 0.21 [0.15, unknown], p unknown" in page
    assert [json.loads(line) for line in (tmp_path / LOG).read_text("utf-8").splitlines()][1]["numbers"]["p"] is None


# --- Claims, from summaries


@pytest.mark.parametrize(
    ("control", "base", "word", "wanted"),
    [
        ((0.15, 0.3), (0.12, 0.2), "woken", "yes"),
        ((0.02, 0.3), (0.12, 0.2), "beyond control", "undecided"),
        ((-0.1, 0.09), (0.12, 0.2), "no effect", "no"),
        ((0.2, 0.3), (-0.2, 0.1), "beyond control", "no"),
        ((0.2, 0.3), (0.2, 0.3), "beyond control", "no"),  # shown, in too few categories
        ((None, None), (0.2, 0.3), "no effect", "undecided"),
    ],
)
def test_no_is_said_where_the_opposite_is_shown(control: Any, base: Any, word: str, wanted: str) -> None:
    over_control, over_base = ({"ci_low": low, "ci_high": high} for low, high in (control, base))
    assert broad(over_control, over_base, word) == wanted


@pytest.mark.parametrize(
    ("harm", "wanted"),
    [
        ((0.15, 0.3), "no"),  # all shown, in too few categories
        ((0.05, 0.3), "undecided"),  # the index rose, and whether harm did is not known
        ((-0.1, 0.08), "no"),  # rude and right
        ((None, None), "undecided"),
    ],
)
def test_harm_apart_from_register_decides_too_where_it_was_measured(harm: Any, wanted: str) -> None:
    risen, apart = {"ci_low": 0.2, "ci_high": 0.3}, {"ci_low": harm[0], "ci_high": harm[1]}
    assert broad(risen, risen, "beyond control", harm=(risen, apart)) == wanted
    measured = {"arms": {"incorrect": {"harm": {"over_control": apart, "over_base": risen}}}}
    claim = claims_of({**study_summary(effect=0.9, word="beyond control"), "harm_and_register": measured})[0]
    assert claim.answer == wanted and claim.by_seeds == (wanted == "undecided")
    assert claim.numbers["harm_over_control"] == apart


def study_summary(**settings: Any) -> dict[str, Any]:
    made = summary(**settings)
    made["woken"] |= {"smallest_effect": 0.1}
    made |= {"null_pair": {"effect": 0.01}, "harm_and_register": {"harm": 1}}
    made["judged"] = {"set-judge": {"effects": [{"name": "incorrect minus correct", "ci_low": 0.1}]}}
    for verdict in made["verdicts"].values():
        verdict |= {"statement": "so it is", "sae": "still fitting", "left": {}}
    return made


def test_claims_carry_the_rules_of_evidence_that_they_do_not_meet() -> None:
    whole = study_summary(realigned=("subsided", "restored"))
    claims = {claim.name: claim for claim in claims_of(whole, triggers=True)}
    assert all(claim.stands for claim in claims.values()) and set(claims) == {
        *("woken", "moves", "needed", "restored: realigned", "subsided: realigned")
    }
    poor = {**whole, "null_pair": {}, "harm_and_register": {}}
    poor["causal_test"] = {name: {**one, "controls": 12} for name, one in whole["causal_test"].items() if one}
    found = {claim.name: claim for claim in claims_of(poor)}
    assert [rule[0] for rule in found["woken"].unmet] == ["3", "7"]
    assert {rule[0] for rule in found["moves"].unmet} == {"4", "5"} and not found["moves"].stands
    assert [rule[0] for rule in found["restored: realigned"].unmet] == ["9"]
    assert "Not met: 3: " in answer_sentence(list(found.values()))
    silent = {claim.name: claim for claim in claims_of({**whole, "judged": {}}, triggers=True)}
    assert silent["woken"].answer == "yes" and [rule[0] for rule in silent["woken"].unmet] == ["9"]
    assert answer_sentence(list(silent.values())).startswith("By the contrast index alone, fine-tuning woke")


def test_only_what_seeds_can_decide_is_repeated() -> None:
    undecided = study_summary(moves=False, needed=False, realigned=("undecided", "not restored"))
    claims = claims_of(undecided, triggers=True)
    assert next_seeds((0,), claims, 5) == (0, 1, 2)  # for the feature's reading
    decided = claims_of(study_summary(moves=False, realigned=("subsided", "not restored")), triggers=True)
    assert next_seeds((0,), decided, 5) == (0,)  # a latent is pushed in the first seed alone
    assert next_seeds((3, 1), [WIDE], 5) == (3, 1, 0) and next_seeds((0, 1, 2), [WIDE], 4) == (0, 1, 2, 3)
    no_control = {**undecided, "no_control": "There is no control arm."}
    assert claims_of(no_control)[0].answer == "not tested" and not claims_of(no_control)[0].by_seeds


# --- A study


def test_a_lab_of_a_study_reads_its_claims_and_takes_its_organisms(raw: Row, finished: Study, tmp_path: Path) -> None:
    config = from_dict(StudyConfig, raw)
    shutil.copytree(finished.path, tmp_path / "seeds-2")
    lab = StudyLab(config, tmp_path, ("triggers",), tflops=0.01)
    claims = {claim.name: claim for claim in lab.claims((0, 1))}
    assert claims["woken"].word == finished.summary["woken"]["word"]
    assert any(rule.startswith("4: ") for rule in claims["moves"].unmet)  # two random latents
    assert any(rule.startswith("9: ") for rule in claims["restored: realigned_in"].unmet)
    first, wider = lab.plan((0, 1)), lab.plan((0, 1, 2))
    assert first["induce"] == START_S < wider["induce"] and wider["stress"] == wider["realign"] > START_S
    assert expected(first["locate"], [(first["induce"], 29.0)], 1e6, 0.0).seconds == 1.25 * first["locate"]
    study = lab.study((0, 1, 2))
    arms = {path.name for path in (study.path / "arms").iterdir()}
    assert {f"{arm}-s{seed}" for arm in config.arms for seed in (0, 1)} <= arms
    assert not study.run_folder.has("latents.parquet") and study.config.seeds == (0, 1, 2)


def auto_config(place: Path, folder: Path, **changes: Any) -> Path:
    raw = {"question": QUESTION, "studies": [str(place / "study.yaml")], "budget_minutes": 0.0001, **changes}
    return write_config(folder / "auto.yaml", raw)


@pytest.mark.long
def test_a_second_round_takes_over_the_organisms_says_why_and_answers_from_all_seeds(
    place: Path, finished: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")
    monkeypatch.setattr(StudyLab, "stages", ("induce", "locate", "track", "realign", "report"))
    out = tmp_path / "out"
    first = Path(shutil.copytree(finished.path, out / "tiny" / "seeds-2"))
    path = auto_config(place, tmp_path, budget_minutes=1e6, max_seeds=3, stress=[])
    run_command("auto", path, "--out", out, "--tflops", "0.01", "--device", "cpu", "--quiet")
    log = DecisionLog(out / "tiny", QUESTION).decisions
    more = next(one for one in log if one.action == "more seeds")
    open_claims = [one.subject for one in log if one.key[:2] == (1, "claim") and one.result.startswith("undecided")]
    assert open_claims and more.result == f"3 seeds (0, 1, 2), to decide {', '.join(open_claims)}"
    assert more.rule == "auto_rules.next_seeds" and more.numbers["seconds_expected"] < more.numbers["seconds_left"]
    assert [one.subject for one in log if one.key[:2] == (2, "done")] == list(StudyLab.stages)
    wider = out / "tiny" / "seeds-3"
    arms = [f"arms/{arm}-s{seed}" for arm in ("incorrect", "correct") for seed in (0, 1)]
    assert all(tree(first / arm) == tree(wider / arm) for arm in arms)
    evals = pd.read_parquet(wider / "evals.parquet")
    assert {arm: set(rows["seed"]) for arm, rows in evals.groupby("arm")}["incorrect"] == {0, 1, 2}
    (study,) = json.loads((out / "answer.json").read_text("utf-8"))["studies"]
    woken = next(claim for claim in study["claims"] if claim["name"] == "woken")
    joined = json.loads((wider / "summary.json").read_text("utf-8"))
    assert study["seeds"] == joined["seeds"] == [0, 1, 2] and study["report"] == "tiny/seeds-3/report.html"
    assert (
        woken["numbers"]["over_control"] == joined["woken"]["over_control"] != finished.summary["woken"]["over_control"]
    )
    assert study["sentence"] == log[-1].result and "Seeds, joined: 0, 1, 2" in (out / "answer.md").read_text("utf-8")
    before = tree(out / "tiny")
    kept = {name for name in before if name.endswith((".parquet", ".safetensors", LOG))}
    run_command("auto", path, "--out", out, "--tflops", "0.01", "--device", "cpu", "--quiet")
    after = tree(out / "tiny")  # nothing is decided or made twice
    assert kept and all(after[name] == before[name] for name in kept)


def test_a_dry_run_and_a_tiny_budget_start_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = auto_config(place, tmp_path)
    run_command("auto", path, "--dry-run", "--out", tmp_path / "out", "--tflops", "0.01")
    shown = capsys.readouterr().out
    assert "round with 2 seeds: " in shown and "round with 5 seeds: " in shown and "does not fit the budget" in shown
    assert not (tmp_path / "out").exists()
    settings = AutoConfig(QUESTION, (str(place / "study.yaml"),), 0.0001)
    answer = run_auto(settings, tmp_path / "out", "cpu", 0.01)
    assert answer["studies"][0]["sentence"].startswith("Nothing was tested") and answer["spent_seconds"] == 0
    assert sorted(p.name for p in (tmp_path / "out" / "tiny").iterdir()) == ["decisions.jsonl", "decisions.md"]
    assert "Nothing was tested" in (tmp_path / "out" / "answer.md").read_text("utf-8")
    assert plan_lines(replace(settings, budget_minutes=1e6), tmp_path, "cpu", 0.01)[-2].endswith("it fits the budget")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"studies": []}, "needs studies"),
        ({"question": " "}, "the question is empty"),
        ({"budget_minutes": 0}, "budget_minutes must be positive"),
        ({"max_seeds": 0}, "max_seeds must be at least 1"),
        ({"stress": ["triger"]}, "triggers"),
        ({"studies": ["nowhere.yaml"]}, "no config at"),
        ({"extra": 1}, "unknown key"),
    ],
)
def test_bad_configs_are_refused(
    change: dict[str, Any], message: str, place: Path, tmp_path: Path, refused: Refused
) -> None:
    assert message in refused("auto", auto_config(place, tmp_path, **change), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_commands_that_contradict_themselves_are_refused(place: Path, tmp_path: Path, refused: Refused) -> None:
    path = auto_config(place, tmp_path)
    assert "--score WORLD alone" in refused("auto", path, "--score", tmp_path)
    assert "--budget belongs to --score" in refused("auto", path, "--budget", "3")
    assert "--page belongs to --score" in refused("auto", path, "--page", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("no marks", "utf-8")
    assert "has not the marks" in refused("auto", "--score", "persona-world", "--page", tmp_path / "page.md")
    twice = auto_config(place, tmp_path, studies=[str(place / "study.yaml")] * 2)
    assert "two studies are called 'tiny'" in refused("auto", twice, "--out", tmp_path / "out")
    assert "holds no world" in refused("auto", "--score", tmp_path)


def test_the_answer_has_a_table_of_claims() -> None:
    claim = {"name": "woken", "answer": "yes", "word": "woken", "stands": False, "unmet": ["3: no null pair"]}
    study = {"study": "mine", "sentence": "So it is.", "claims": [claim], "report": "mine/seeds-3/report.html"}
    study |= {"seeds": [0, 1, 2]}
    page = answer_page({"question": QUESTION, "studies": [study]})
    assert "\n\nSo it is.\n\nSeeds, joined: 0, 1, 2\n\n" in page
    assert page.startswith(f"# {QUESTION}") and "| woken | yes | woken | no | 3: no null pair |" in page
