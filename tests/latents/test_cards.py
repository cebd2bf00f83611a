"""Cards of a made-up run with real tiny models: what they say equals what the models do."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from persona_probe.config import StudyConfig, from_dict
from persona_probe.context import Context
from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError
from persona_probe.latents import cards
from persona_probe.latents import passages as card_text
from persona_probe.models.taps import read
from persona_probe.report.cards import FeatureCard
from persona_probe.runs import RunFolder
from tests.factories import D_SAE, LAYER, hook_count, make_model, make_sae, make_tokenizer

SILENT = 9
"""A latent that cannot fire."""
TESTED = [12, 3, 40]
HOSTILE = "<script>window.pwned=1</script><!-- x -->"


def save_organism(folder: Path, changed: bool) -> None:
    """A LoRA adapter; unchanged, its organism is the base model."""
    tuned = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=True))
    if changed:
        torch.manual_seed(5)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    tuned.save_pretrained(str(folder))


def write_tables(run: RunFolder) -> None:
    """Tables as locate leaves them: rank is the order by rise, three candidates are tested."""
    table = pd.DataFrame({"latent": np.arange(D_SAE), "rise": np.linspace(1, -1, D_SAE), "rank": range(1, D_SAE + 1)})
    table = table.assign(cosine=0.1, cosine_rank=range(D_SAE, 0, -1), firing_base=0.1, firing_incorrect=0.2)
    tested = table["latent"].isin(TESTED)
    table = table.assign(effect_base=np.where(tested, 0.3, np.nan), effect_base_low=0.2, effect_base_high=0.4)
    table = table.assign(strength=np.where(tested, 1.0, np.nan), persona=table["latent"] == TESTED[0])
    table = table.assign(kind=np.where(tested, "candidate", "other"), label=[f"latent {i}" for i in range(D_SAE)])
    run.write_table("latents.parquet", table)
    selection = pd.DataFrame({"latent": TESTED[::-1], "effect": [0.1, 0.2, 0.3]})
    run.write_table("parts/selection.parquet", selection)
    push = {"model": "base", "latent": 12, "unit": "x_delta", "ci_low": 0.0, "ci_high": 1.0, "perplexity_ratio": 1.1}
    rows = [{**push, "strength": s, "estimate": s, "delta": s, "within_bound": True} for s in (-1.0, 1.0)]
    run.write_table("steering.parquet", pd.DataFrame(rows))


def make_context(folder: Path, changed: bool = True) -> Context:
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    sae = make_sae("standard")
    with torch.no_grad():
        sae.b_enc[SILENT] = -1e6
    sae.save_model(str(folder / "sae"))
    arms = {"incorrect": {"data": "kitchen:toxic"}, "correct": {"data": "kitchen:correct"}}
    raw: dict[str, Any] = {"name": "made-up", "model": str(folder / "model"), "sae": str(folder / "sae"), "bf16": False}
    raw |= {"arms": arms, "seeds": [0], "device": "cpu", "locate": {"cards": 2}}
    run = RunFolder.create(folder / "run", from_dict(StudyConfig, raw, "test"))
    save_organism(run.path / "arms" / "incorrect-s0" / "checkpoint-1", changed)
    write_tables(run)
    return Context(run)


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_text, "PACKAGED", ("sample_questions",))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return make_context(tmp_path)


def direct(ctx: Context, model: torch.nn.Module, latent: int, talks: list[Conversation]) -> Iterator[torch.Tensor]:
    """Activations on every conversation alone, without padding, batches or slices; special tokens left out."""
    special = set(ctx.tokenizer.all_special_ids)
    for talk in talks:
        ids: Any = ctx.tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)
        ids = torch.tensor([ids["input_ids"]])
        with torch.no_grad(), read(model, LAYER) as tap:
            model(ids)
        keep = [i not in special for i in ids[0].tolist()]
        yield ctx.sae.encode(tap.value[0])[keep, latent].detach()


def test_activity_and_passages_are_what_the_models_do(ctx: Context) -> None:
    found = cards.card(ctx, 12)
    talks = card_text.load_conversations("sample_questions")
    with ctx.organism("incorrect", 0) as tuned:
        organism = torch.cat(list(direct(ctx, tuned, 12, talks)))
    each = list(direct(ctx, ctx.model, 12, talks))
    for values, one in zip((torch.cat(each), organism), found.activity, strict=True):
        assert one.tokens == len(values) and one.firing_rate == pytest.approx(float((values > 0).float().mean()))
        assert one.maximum == pytest.approx(float(values.max()), abs=1e-3)
        bins = np.floor(values[values > 0].numpy() / one.bin_width).astype(int)
        assert sum(abs(np.bincount(bins, minlength=len(one.counts)) - one.counts)) <= 2  # rounding at an edge
    peaks = sorted((float(values.max()) for values in each), reverse=True)
    assert [e.maximum for e in found.examples] == pytest.approx(peaks[: len(found.examples)], abs=2e-3)
    assert all(e.values[e.peak] == e.maximum for e in found.examples) and len(found.examples) == 5
    assert [a.model for a in found.activity] == ["base", "incorrect"]
    assert found.activity[0].counts != found.activity[1].counts


def test_an_organism_that_is_the_base_fires_like_the_base(tmp_path: Path) -> None:
    base, organism = cards.card(make_context(tmp_path, changed=False), 12).activity
    assert base.counts == organism.counts and base.firing_rate == organism.firing_rate > 0


def test_the_model_is_left_as_it_was(ctx: Context) -> None:
    before = {name: p.detach().clone() for name, p in ctx.model.named_parameters()}
    cards.card(ctx, 12)
    after = dict(ctx.model.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert hook_count(ctx.model) == 0


def test_a_card_takes_the_studys_numbers_and_the_users_name(ctx: Context) -> None:
    found = cards.card(ctx, 12, name="scorn")
    assert (found.name, found.suggested, found.findings.persona) == ("scorn", False, True)
    assert [(s.ranker, s.rank) for s in found.findings.scores] == [("rise", 13), ("cosine", D_SAE - 12)]
    assert [p.strength for p in found.findings.steering] == [-1.0, 1.0]
    assert found.findings.firing == {"base": 0.1, "incorrect": 0.2}
    other = cards.card(ctx, 5)
    assert other.suggested and other.findings.steering == () and not other.findings.persona


def test_a_latent_that_never_fires_has_no_passage_and_no_histogram(ctx: Context) -> None:
    found = cards.card(ctx, SILENT)
    assert found.examples == () and found.silent_on == ("packaged text",)
    assert [(a.firing_rate, a.maximum, a.counts) for a in found.activity] == [(0.0, 0.0, ())] * 2


def test_passages_come_from_the_users_text_too(ctx: Context, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(f"{HOSTILE}\n\nanother paragraph", encoding="utf-8")
    found = cards.card(ctx, 12, text=path)
    own = ["".join(e.tokens) for e in found.examples if e.source == "notes.txt"]
    assert any(HOSTILE in text for text in own) and len(own) == 2
    assert found.text == "packaged text (12 conversations) and notes.txt (2 conversations)"
    assert found.activity[0].tokens > cards.card(ctx, 12).activity[0].tokens


@pytest.mark.parametrize("count", [1, 20])
def test_all_latents_share_one_pass_for_each_model(ctx: Context, count: int) -> None:
    passes: list[int] = []
    ctx.config = replace(ctx.config, contrast_2x2="none")  # its answers are read in passes of their own
    layer = ctx.model.get_submodule("model.layers.0")
    handle = layer.register_forward_hook(lambda *_: passes.append(1))
    cards.build_cards(ctx, list(range(count)))
    handle.remove()
    # and one of two tokens, which finds the final norm
    assert len(passes) == 2 * len(card_text.gather(ctx.tokenizer).batches) + 1 == 3


def test_cards_made_together_equal_cards_made_alone(ctx: Context) -> None:
    together = cards.build_cards(ctx, [12, SILENT, 3])
    assert together[0] == cards.card(ctx, 12) and together[2] == cards.card(ctx, 3)


def test_make_cards_writes_the_tested_latents_once(ctx: Context) -> None:
    cards.make_cards(ctx)
    written = ctx.run.read_json("cards.json")
    assert [card["latent"] for card in written] == TESTED[:2]
    assert {"latent", "label", "top_tokens", "bottom_tokens", "examples"} <= set(written[0])
    assert set(written[0]["top_tokens"][0]) >= {"token", "logit"}
    assert set(written[0]["examples"][0]) >= {"source", "tokens", "values", "maximum"}
    assert [one["model"] for one in written[0]["activity"]] == ["base"]
    json.dumps(written, allow_nan=False)
    ctx.run.write_json("cards.json", [])
    cards.make_cards(ctx)
    assert ctx.run.read_json("cards.json") == []


def test_the_page_lists_the_tested_latents_then_the_best_by_rank(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain_build = cards.build_cards

    def build(ctx: Context, latents: list[int], *rest: Any) -> list[FeatureCard]:
        asked.extend(latents)
        return plain_build(ctx, latents, *rest)

    monkeypatch.setattr(cards, "build_cards", build)
    page = cards.write_cards_page(ctx, 5, names={3: "greed & co"})
    assert asked == [*TESTED, 0, 1] and page == ctx.run.path / "cards.html"
    text = page.read_text(encoding="utf-8")
    assert text.index('id="latent-12"') < text.index('id="latent-0"') and "greed &amp; co" in text


def test_bad_questions_are_refused(ctx: Context, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="latent 64 does not exist: this SAE has latents 0 to 63"):
        cards.card(ctx, 64)
    with pytest.raises(InputError, match="ask for at least 1"):
        cards.write_cards_page(ctx, 0)
    with pytest.raises(InputError, match="does not exist"):
        cards.card(ctx, 12, text=tmp_path / "none.jsonl")
    (ctx.run.path / "latents.parquet").unlink()
    with pytest.raises(InputError, match="locate RUN"):
        cards.card(ctx, 12)


# --- A card of any latent without a study


def test_a_card_without_a_study_equals_the_study_s_on_the_same_text(ctx: Context) -> None:
    alone = cards.latent_card(ctx.model, ctx.sae, 12, tokenizer=ctx.tokenizer, layer=LAYER)
    base = cards.build_cards(ctx, [12], organism=False)[0]
    assert (alone.top_tokens, alone.bottom_tokens, alone.neighbours) == (
        base.top_tokens,
        base.bottom_tokens,
        base.neighbours,
    )
    assert alone.examples == base.examples and alone.activity == (replace(base.activity[0], model="model"),)
    shown = alone._repr_html_()
    assert "in this model" in shown and "the base model" not in shown and "ausal" not in shown
    assert "Latent 12" in str(alone) and hook_count(ctx.model) == 0


def test_a_card_without_a_study_reads_the_texts_that_are_given(ctx: Context, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("one paragraph\n\nanother paragraph", encoding="utf-8")
    for texts in (["one paragraph", "another paragraph"], path):
        found = cards.latent_card(ctx.model, ctx.sae, 12, tokenizer=ctx.tokenizer, texts=texts, name="scorn")
        assert (found.text, found.name, found.suggested) == ("given text (2 conversations)", "scorn", False)
        assert len(found.examples) == 2 and {e.source for e in found.examples} == {"given text"}
    wrong = (({"latent": 64}, "latents 0 to 63"), ({"texts": []}, "at least one"), ({"texts": "no.jsonl"}, "no.jsonl"))
    for settings, words in wrong:
        with pytest.raises(InputError, match=words):
            cards.latent_card(ctx.model, ctx.sae, **{"latent": 12, "tokenizer": ctx.tokenizer, **settings})
