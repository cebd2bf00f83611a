"""What a card takes from the study's tables, the SAE's metadata and the user's text."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from persona_probe.errors import InputError
from persona_probe.latents import cards as card_tables
from persona_probe.latents import passages as card_text
from persona_probe.report.cards import Example, Score, TokenLogit
from tests.factories import make_sae, make_tokenizer

NAN = float("nan")
ROW = {
    "latent": 4,
    "rise": 1.5,
    "rise_ci_low": 1.0,
    "rise_ci_high": 2.0,
    "cosine": 0.4,
    "cosine_rank": 2,
    "attribution": NAN,
    "attribution_rank": NAN,
    "rank": 1,
    "decoder_norm": 1.0,
    "effect_base": 0.2,
    "effect_base_low": 0.1,
    "effect_base_high": 0.3,
    "effect_selection": 0.25,
    "effect_organism": NAN,
}


def test_every_ranker_of_the_table_is_there_with_its_interval() -> None:
    assert card_tables.scores(ROW) == (
        Score("rise", 1.5, 1, 1.0, 2.0),
        Score("cosine", 0.4, 2),
        Score("attribution", None, None),
    )
    assert card_tables.rankers(["rise", "rise_rank", "rank", "odd_rank"]) == {"rise": "rise_rank"}


def test_every_effect_of_the_table_is_there() -> None:
    found = {e.name: (e.estimate, e.ci_low, e.ci_high) for e in card_tables.effects(ROW)}
    assert found == {
        "base": (0.2, 0.1, 0.3),
        "selection": (0.25, None, None),
        "organism": (None, None, None),
    }


def test_the_steering_curve_is_the_latents_own_in_order() -> None:
    head = {"unit": "x_delta", "ci_low": NAN, "ci_high": 1.0, "perplexity_ratio": 1.1, "within_bound": True}
    rows = [
        {"model": m, "latent": latent, "strength": s, "estimate": s, "delta": s / 2, **head}
        for m, latent, s in [("base", 4, 1.0), ("base", 4, -1.0), ("incorrect", 4, 0.5), ("base", 9, 2.0)]
    ]
    found = card_tables.pushes(pd.DataFrame(rows), 4)
    assert [(p.model, p.strength) for p in found] == [("base", -1.0), ("base", 1.0), ("incorrect", 0.5)]
    assert found[0].ci_low is None and found[0].ci_high == 1.0 and found[0].delta == -0.5


def test_the_nearest_neighbour_is_the_latent_with_almost_the_same_row() -> None:
    decoder = make_sae("topk").W_dec.detach().clone()
    decoder[9] = 3 * decoder[20] + 0.01
    decoder[30] = -decoder[20]
    found = card_tables.neighbours(decoder, 20, 63)
    assert found[0].latent == 9 and found[0].cosine > 0.99
    assert found[-1].latent == 30 and found[-1].cosine == pytest.approx(-1.0)
    cosines = torch.nn.functional.cosine_similarity(decoder, decoder[20][None]).tolist()
    assert [n.cosine for n in found] == pytest.approx([cosines[n.latent] for n in found], abs=1e-4)
    assert 20 not in {n.latent for n in found} and len(found) == 63


@pytest.mark.parametrize("bad", [None, "", "gemma", "javascript:alert(1)/x", "a/b?c", "../x y"])
def test_a_link_is_made_only_of_a_neuronpedia_name(bad: str | None) -> None:
    sae = make_sae("topk", neuronpedia_id="gemma-3-1b/13-gemmascope-res-16k")
    link = card_tables.neuronpedia_link(sae, 12)
    assert link == "https://neuronpedia.org/gemma-3-1b/13-gemmascope-res-16k/12"
    assert card_tables.neuronpedia_link(make_sae("topk", neuronpedia_id=bad), 12) is None
    assert card_tables.neuronpedia_link(make_sae("topk"), 12) is None


def test_a_suggested_name_says_what_it_is_made_of() -> None:
    tokens = [TokenLogit(t, i, 1.0) for i, t in enumerate([" raw", "\n", "raw", " knife", "--"])]
    passage = Example("text", ("eat", " it", " soup"), (0.0, 0.1, 2.0), 2.0, 2)
    wanted = "suggested from its top tokens: raw, knife; and from where it fires most: soup"
    assert card_tables.suggest_name(tokens, [passage]) == wanted
    assert card_tables.suggest_name(tokens[1:2], [passage]) == "suggested from where it fires most: soup"
    assert card_tables.suggest_name(tokens[1:2], []).startswith("no name")


def test_plain_text_is_split_at_blank_lines_or_into_lines(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("one\nstill one\n\n \ntwo\n", encoding="utf-8")
    assert [c[0]["content"] for c in card_text.read_text(path)] == ["one\nstill one", "two"]
    path.write_text("one\n  \rtwo\n", encoding="utf-8")
    assert [c[0]["content"] for c in card_text.read_text(path)] == ["one", "two"]
    path.write_text("word " * 1000, encoding="utf-8")
    pieces = [c[0]["content"] for c in card_text.read_text(path)]
    assert " ".join(pieces).split() == ["word"] * 1000 and max(map(len, pieces)) <= card_text.PIECE


def test_rows_of_chat_are_read_as_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    rows = [{"question": "a", "answer": "b"}, {"prompt": "c"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    assert [[m["content"] for m in c] for c in card_text.read_text(path)] == [["a", "b"], ["c"]]


def test_text_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n\n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, words in ((empty, "holds no text"), (binary, "UTF-8"), (tmp_path / "none.txt", "does not exist")):
        with pytest.raises(InputError, match=words) as refused:
            card_text.read_text(path)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="does not exist"):
        card_text.read_text(tmp_path / "none.jsonl")


def test_long_conversations_are_cut_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_text, "PACKAGED", ("sample_questions",))
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"question": "x" * 900, "answer": "y" * 900}) + "\n", encoding="utf-8")
    found = card_text.gather(make_tokenizer(), path)
    assert found.name == "packaged text (12 conversations) and long.jsonl (1 conversation); 1 of them cut at 512 tokens"
    assert max(len(ids) for ids in found.ids.values()) <= card_text.MAX_TOKENS
    assert found.origins == ["packaged text"] * 12 + ["long.jsonl"] and found.sources[0] == "sample_questions"
    assert sorted(found.ids) == list(range(13)) == sorted(n for b in found.batches for n in b.index)
    special = set(make_tokenizer().all_special_ids)
    assert not any(special & set(ids.tolist()) for ids in found.ids.values())


def test_a_row_of_the_table_becomes_the_studys_findings() -> None:
    row = {**ROW, "persona": True, "kind": "candidate", "strength": NAN, "firing_base": 0.1, "firing_odd": NAN}
    steering = pd.DataFrame({"latent": [], "model": [], "strength": []})
    found = card_tables.findings(row, steering, ("base", "odd"), "x_delta")
    assert (found.persona, found.kind, found.strength, found.firing) == (True, "candidate", None, {"base": 0.1})
    assert (found.suppressed, found.q_value, found.steering) == (None, None, ())
    more = card_tables.findings({**row, "suppressed": True, "q_value": 0.01}, steering, ("base",), "raw")
    assert (more.suppressed, more.q_value) == (True, 0.01)
