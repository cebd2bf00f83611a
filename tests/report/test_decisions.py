"""The decisions of an unattended study, and labels of latents, in the report: all of them, escaped."""

import json
from pathlib import Path

import pytest

from persona_probe.errors import InputError
from persona_probe.report.html import write_report
from persona_probe.report.records import load_records
from persona_probe.study.auto_log import Decision, DecisionLog
from tests.report.pages import Outline
from tests.report.run_records import HOSTILE, write_run

SCORE = {"estimate": 0.91, "ci_low": 0.84, "ci_high": 0.98, "n": 80}


def test_the_report_shows_decisions_and_labels_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    log = DecisionLog(run, "Does it wake?")
    log.add(Decision(1, "claim", "woken", f"yes {HOSTILE}", "verdicts.woken", {"over_control": SCORE}))
    cards = json.loads((run / "cards.json").read_text("utf-8"))
    label = {"text": "the token of scorn", "author": "rule", "detection": SCORE, "fuzzing": SCORE, "reason": ""}
    cards[0]["explanations"] = [label, {**label, "author": HOSTILE, "reason": "under 0.7"}]
    (run / "cards.json").write_text(json.dumps(cards), "utf-8")
    page = Outline(write_report(run).read_text("utf-8"))
    assert "decisions" in page.ids and "over_control 0.91 [0.84, 0.98]" in page.text and f"yes {HOSTILE}" in page.text
    assert "Fires on, by rule: the token of scorn (detection 0.91 [0.84, 0.98], n = 80;" in page.text
    assert f"by {HOSTILE}: no label" in page.text and "under 0.7, best guess: the token of scorn" in page.text
    assert "img" not in page.tags and page.comments == 0


@pytest.mark.parametrize("line", ['{"numbers": 3}', '{"round": 1}', "[1]", "nonsense"])
def test_a_damaged_log_is_refused_by_its_name(tmp_path: Path, line: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "decisions.jsonl").write_text(f'{{"question": "?"}}\n{line}\n', "utf-8")
    with pytest.raises(InputError, match=r"decisions\.jsonl"):
        load_records(run)
