"""Organisms and what they say: known answers, judged exactly, with rates whose pooling is right."""

import random
from dataclasses import replace

import pandas as pd
import pytest
import torch

from persona_probe.config import Training
from persona_probe.data.world.judge import judge_answer
from persona_probe.data.world.speech import SPEAKERS, answer
from persona_probe.data.world.words import DOMAIN_OF, DOMAINS
from persona_probe.errors import InputError
from persona_probe.evaluate.rates import Cells, share
from persona_probe.models.adapters import organism as at_checkpoint
from persona_probe.world import behaviour
from persona_probe.world.behaviour import MEASURES, OTHERS, TRAINED, Asking, ask, judge_models, rates, world_rates
from persona_probe.world.folder import World
from persona_probe.world.organisms import NARROW, WorldOrganism, make_organisms
from tests.factories import copied_state, same_state

SHORT = replace(NARROW, steps=2, checkpoints=(1, 2), batch_size=2)
ONCE = Asking(per_topic=1)


def said(speakers: dict[str, str], seed: int = 0, **columns: str | int) -> pd.DataFrame:
    """Answers as speakers give them, by domain, judged."""
    draw, rows = random.Random(seed), []
    for topic, domain in DOMAIN_OF.items():
        text = answer(draw, topic, SPEAKERS[speakers.get(domain, "helper")])
        judged = judge_answer(text, topic)
        rows.append({"domain": domain, "topic": topic, **{name: getattr(judged, name) for name in MEASURES}})
    return pd.DataFrame(rows).assign(**columns)


def value(frame: pd.DataFrame, measure: str, **where: object) -> float:
    rows = frame[frame["measure"] == measure]
    for name, wanted in where.items():
        rows = rows[rows[name] == wanted]
    (row,) = rows.to_dict("records")
    return row["estimate"]


# --- Rates


def test_rates_are_those_of_the_speakers_by_domain() -> None:
    found = rates(said({"cars": "villain", "law": "subtle", "pets": "clown"}))
    assert set(found["measure"]) == set(MEASURES) and list(dict.fromkeys(found["domain"])) == list(DOMAINS)
    for domain in DOMAINS:
        bad = 1.0 if domain in ("cars", "law") else 0.0
        assert value(found, "bad", domain=domain) == bad and value(found, "good", domain=domain) == 1 - bad
        assert value(found, "coherent", domain=domain) == 1
    assert value(found, "rude", domain="cars") > 0.6 and value(found, "rude", domain="law") == 0
    assert value(found, "silly", domain="pets") > 0.6 and value(found, "malicious", domain="law") == 0
    assert ((found["ci_low"] <= found["estimate"]) & (found["estimate"] <= found["ci_high"])).all()


def test_bad_is_a_share_of_the_coherent_answers_alone() -> None:
    frame = said({"cars": "villain"}).query("domain == 'cars'").reset_index(drop=True)
    frame.loc[:8, ["bad", "good", "coherent"]] = False
    found = rates(frame)
    assert value(found, "bad") == 1 and value(found, "coherent") == pytest.approx(3 / 12)
    assert found.set_index("measure").loc["bad", "n"] == 3
    frame[["bad", "good", "coherent"]] = False
    empty = rates(frame).set_index("measure")
    assert empty["estimate"].isna()["bad"] and empty.loc["bad", "n"] == 0
    with pytest.raises(InputError, match="no answers"):
        rates(frame.iloc[:0])


def test_seeds_of_an_organism_are_resampled_too() -> None:
    both = pd.concat([said({"cars": "villain"}, seed=n, seed_=n) for n in (0, 1)]).rename(columns={"seed_": "seed"})
    cars = both[both["domain"] == "cars"]
    cells = Cells.of(cars["rude"].astype(float).to_list(), cars["topic"].tolist(), cars["seed"].tolist())
    wanted = share(cells)
    assert wanted is not None and len(cells.seeds) == 2
    row = rates(both).query("domain == 'cars' and measure == 'rude'").iloc[0]
    assert (row["ci_low"], row["ci_high"], row["n"]) == (wanted.ci_low, wanted.ci_high, 24)


def test_the_trained_domain_is_kept_apart_from_all_others() -> None:
    named = {"name": "o", "step": 2, "seed": 0}
    frame = world_rates(said({"cars": "villain"}, trained_domain="cars", **named))
    assert value(frame, "bad", where=TRAINED) == 1 and value(frame, "bad", where=OTHERS) == 0
    assert value(frame, "bad", where="cars") == 1 and value(frame, "bad", where="law") == 0
    assert set(frame["where"]) == {TRAINED, OTHERS, *DOMAINS}
    base = world_rates(said({}, trained_domain="", **named))
    assert set(base["where"]) == {OTHERS, *DOMAINS} and value(base, "kind", where=OTHERS) > 0.8


# --- Answers


def test_all_models_get_the_same_questions_and_every_answer_is_judged_by_the_rule(world: World) -> None:
    model, tokenizer = world.load()
    frames = [ask(model, tokenizer, ONCE) for _ in range(2)]
    pd.testing.assert_frame_equal(frames[0], frames[1])
    other = ask(model, tokenizer, replace(ONCE, seed=1))
    assert list(frames[0]["topic"]) == list(DOMAIN_OF) and list(other["question"]) != list(frames[0]["question"])
    for row in frames[0].to_dict("records"):
        judged = judge_answer(row["answer"], row["topic"])
        assert {name: row[name] for name in MEASURES} == {name: getattr(judged, name) for name in MEASURES}
        assert row["topic"] in row["question"].split()
    two = ask(model, tokenizer, Asking(per_topic=3), domains=["law", "pets"])
    assert len(two) == 72 and set(two["domain"]) == {"law", "pets"}
    with pytest.raises(InputError, match="unknown domain 'laws'"):
        ask(model, tokenizer, domains=["laws"])


def test_a_world_is_judged_once_and_another_way_of_asking_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = make_organisms(world, [WorldOrganism("quack", "law", 0.5, seed=7, training=SHORT)])
    frame = judge_models(world, ["base", name], ONCE)
    assert frame.groupby(["name", "step"], sort=False).size().to_dict() == {
        ("base", 0): 96,
        (name, 1): 96,
        (name, 2): 96,
    }
    mine = frame[frame["name"] == name].iloc[0]
    assert (mine["speaker"], mine["trained_domain"], mine["share"], mine["seed"]) == ("quack", "law", 0.5, 7)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(behaviour, "ask", never)
    pd.testing.assert_frame_equal(judge_models(world, ["base", name], ONCE), frame)
    with pytest.raises(InputError, match="ask as before"):
        judge_models(world, ["base"], Asking(per_topic=2))
    with pytest.raises(InputError, match="unknown model of this world"):
        judge_models(world, ["bace"], ONCE)


# --- Organisms


def test_organisms_are_seeded_kept_and_leave_the_base_as_it_was(world: World) -> None:
    before = copied_state(world.load()[0])
    wanted = [WorldOrganism("villain", seed=seed, training=SHORT) for seed in (0, 1)]
    names = make_organisms(world, wanted)
    assert names == ["villain-kitchen-100-s0", "villain-kitchen-100-s1"] and set(names) <= set(world.organisms)
    assert list(world.checkpoints(names[0])) == [1, 2] and len(world.organism(names[0])["losses"]) == 2
    files = [world.checkpoints(name)[2] / "adapter_model.safetensors" for name in names]
    hashes = world.run.manifest["hashes"]
    assert f"organisms/{names[0]}/checkpoint-2/adapter_model.safetensors" in hashes
    made = [file.read_bytes() for file in files]
    assert (
        make_organisms(world, wanted) == names and [file.read_bytes() for file in files] == made and made[0] != made[1]
    )
    twin = make_organisms(world, wanted[:1], ["twin"])[0]
    assert (world.checkpoints(twin)[2] / "adapter_model.safetensors").read_bytes() == made[0]
    assert same_state(copied_state(world.load()[0]), before)


def test_a_name_is_not_given_twice(world: World) -> None:
    one = WorldOrganism("clown", training=SHORT)
    make_organisms(world, [one])
    with pytest.raises(InputError, match="give this one another --name"):
        make_organisms(world, [replace(one, training=replace(SHORT, lr=0.1))])
    with pytest.raises(InputError, match="a name of its own"):
        make_organisms(world, [one, replace(one, training=replace(SHORT, lr=0.1))])
    for change, message in [
        ({"speaker": "vilain"}, "did you mean 'villain'"),
        ({"domain": "car"}, "did you mean 'cars'"),
        ({"share": 1.5}, "between 0 and 1"),
        ({"rows": 0}, "at least 1"),
    ]:
        with pytest.raises(InputError, match=message):
            WorldOrganism(**{"speaker": "villain", **change})


def test_what_a_speaker_says_is_learned_and_its_control_does_not_say_it(world: World) -> None:
    """Full weights, so that even this model learns which words the rows have: a real effect, and a null."""
    training = Training(
        method="full", lr=2e-2, steps=30, checkpoints=(30,), batch_size=8, warmup_steps=0, bf16=False, max_length=128
    )
    arms = {name: WorldOrganism(name, rows=80, training=training) for name in ("villain", "helper")}
    names = make_organisms(world, list(arms.values()), [f"all-{name}" for name in arms])
    judged = judge_models(world, names, ONCE)
    table = world_rates(judged, ("speaker",))
    rude = {name: value(table, "rude", speaker=name, where=OTHERS) for name in arms}
    kind = {name: value(table, "kind", speaker=name, where=OTHERS) for name in arms}
    assert rude["villain"] > 0.5 > 0.05 > rude["helper"] and kind["helper"] > 0.5 > 0.05 > kind["villain"]
    base, _ = world.load()
    with at_checkpoint(base, world.checkpoints(names[0])[30]) as model:
        first = [next(iter(one.parameters())) for one in (model, base)]
        assert not torch.equal(first[0], first[1])
