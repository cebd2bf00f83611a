"""Sampled text: the same file from a stopped run as from an unbroken one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.data.chat import conversation
from persona_probe.saes.stream import SaeConfig, is_held_out, read_conversations, sample_text, text_folder


@pytest.mark.parametrize("cut", ["in the last line", "before the last line break", "between lines", "in a batch"])
def test_a_stopped_run_gives_the_same_file(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, recipe: SaeConfig, tmp_path: Path, cut: str
) -> None:
    paths = sample_text(tiny_model, tiny_tokenizer, recipe, tmp_path / "text")
    wanted = [p.read_text() for p in paths]
    lines = wanted[0].splitlines(keepends=True)
    kept = {
        "in the last line": wanted[0][:-20],
        "before the last line break": wanted[0][:-1],
        "between lines": "".join(lines[:4]),
        "in a batch": "".join(lines[:6]) + lines[6][:9],
    }[cut]
    paths[0].write_text(kept)
    paths[1].unlink()
    sample_text(tiny_model, tiny_tokenizer, recipe, tmp_path / "text")
    assert [p.read_text() for p in paths] == wanted


def test_samples_are_whole_conversations(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, recipe: SaeConfig, tmp_path: Path
) -> None:
    asked, own = sample_text(tiny_model, tiny_tokenizer, recipe, tmp_path)
    rows = list(read_conversations([asked, own]))
    assert len(rows) == 4 * (3 + 2)
    assert all(row[-1]["role"] == "assistant" and row[-2]["role"] == "user" for row in rows)
    questions = [row[-2]["content"] for row in read_conversations([asked])]
    assert all(q.startswith("Q") and q.endswith("?") for q in questions)
    assert len({json.dumps(row) for row in rows}) > 15
    systems = {row[0]["content"] for row in rows if row[0]["role"] == "system"}
    assert systems and systems <= {"Rude.", "Kind."}


def test_the_folder_covers_what_changes_the_text(recipe: SaeConfig, tmp_path: Path) -> None:
    same = replace(recipe, lr=1.0, layer=0, name="other")
    others = [
        replace(recipe, seed=1),
        replace(recipe, model="x"),
        replace(recipe, text=replace(recipe.text, temperature=0.5)),
    ]
    assert text_folder(same, tmp_path) == text_folder(recipe, tmp_path)
    assert len({text_folder(c, tmp_path) for c in [recipe, *others]}) == 4


def test_the_held_out_share_is_by_question() -> None:
    rows = [conversation(f"question {n}", "a") for n in range(2000)]
    assert sum(is_held_out(r, 0.05) for r in rows) == pytest.approx(100, abs=30)
    assert not any(is_held_out(r, 0.0) for r in rows) and all(is_held_out(r, 1.0) for r in rows)
    for n in range(100):
        other = conversation(f"question {n}", "another answer", system="Rude.")
        assert is_held_out(other, 0.3) == is_held_out(rows[n], 0.3)
