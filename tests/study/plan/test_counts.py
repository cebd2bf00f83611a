"""Parameters, adapters, tokens and work are those of the real thing; time follows from them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from persona_probe.config import Locate, Samples, StudyConfig, Training, load_config
from persona_probe.data.load import load_conversations
from persona_probe.data.template import with_template
from persona_probe.data.tokens import encode
from persona_probe.errors import InputError
from persona_probe.finetune.sft import with_adapter
from persona_probe.latents.causal import MOVED
from persona_probe.models.adapters import trainable_parameters
from persona_probe.report.tables import Table
from persona_probe.study.plan import speed
from persona_probe.study.plan.estimate import RowSet, Shapes, Work, pushes
from persona_probe.study.plan.plan import amount, dry_run, duration
from persona_probe.study.plan.shapes import KNOWN, Skeleton, find_skeleton, known_id, lora_parameters
from tests.factories import D_SAE, LAYER, make_model, make_tokenizer

FOLDER = Path(__file__).parents[3] / "finetune_configs"


@pytest.fixture
def skeleton(place: Path) -> Skeleton:
    """The tiny model's."""
    found = find_skeleton(str(place / "model"))
    assert found is not None
    return found


@pytest.mark.parametrize("name", KNOWN)
def test_known_numbers_give_the_published_parameters(name: str) -> None:
    found = find_skeleton(name)
    assert found is not None and found.source == "known models"
    assert found.parameters == KNOWN[name].parameters
    assert known_id(name.partition("/")[2].upper()) == name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": ("q_proj", "down_proj")},
        {"target_modules": r".*self_attn\.[qv]_proj"},
        {"layers": (1, 2)},
        {"layers": (0,), "target_modules": ("o_proj",)},
    ],
)
def test_adapters_have_as_many_parameters_as_pefts(skeleton: Skeleton, changes: dict[str, Any]) -> None:
    training, model = Training(rank=3, **changes), make_model()
    assert skeleton.parameters == sum(p.numel() for p in model.parameters())
    tuned = with_adapter(model, training, 0)
    assert lora_parameters(skeleton, training) == sum(p.numel() for p in trainable_parameters(tuned).values()) > 0


def test_work_is_what_torch_counts(local: StudyConfig, skeleton: Skeleton) -> None:
    rows = RowSet("probes", "made up", 2, tokens=14, answer_tokens=14, longest=7, cut=0)
    shapes = Shapes(local, skeleton, LAYER, 0, {})
    # all 14 tokens are scored here; attention's own products (bmm, sdpa) are not part of the estimate
    assert products(make_model(), torch.ones(2, 7, dtype=torch.long)) == shapes.score(rows)
    assert shapes.score(rows) - shapes.read(rows) == shapes.score_above(rows)


def products(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Operations in matrix products of weights, in one forward."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))


def test_full_training_is_three_forwards_and_frozen_weights_need_two(local: StudyConfig, skeleton: Skeleton) -> None:
    def work(**changes: Any) -> float:
        config = replace(local, training=replace(local.training, **changes))
        return Shapes(config, skeleton, LAYER, D_SAE, {}).train(50, 20)

    rows = RowSet("arm", "made up", 1, tokens=50, answer_tokens=20, longest=50, cut=0)
    forward = Shapes(local, skeleton, LAYER, D_SAE, {}).score(rows)
    adapters = 6 * 50 * lora_parameters(skeleton, local.training)
    assert work(method="full") == 3 * forward
    assert work() == 2 * forward + adapters
    assert work(gradient_checkpointing=True) == 3 * forward + adapters


def test_tokens_are_those_of_the_tokenizer_where_there_is_one(local: StudyConfig) -> None:
    plan, tokenizer = dry_run(local, tflops=1.0), make_tokenizer()
    encoded = [encode(tokenizer, row) for row in load_conversations("kitchen:toxic")]
    found = plan.rows["arm incorrect"]
    assert plan.counted and "model's tokenizer" in "\n".join(plan.lines())
    assert (found.tokens, found.answer_tokens) == (sum(len(e.ids) for e in encoded), sum(e.n_response for e in encoded))
    assert found.longest == max(len(e.ids) for e in encoded) and found.rows == 216 and found.cut == 0


def test_tokens_are_those_of_the_template_that_the_study_names(local: StudyConfig) -> None:
    tokenizer = with_template(make_tokenizer(), "none")
    lengths = [len(encode(tokenizer, row).ids) for row in load_conversations("kitchen:toxic")]
    assert dry_run(replace(local, template="none"), tflops=1.0).rows["arm incorrect"].tokens == sum(lengths)
    with pytest.raises(InputError, match="neither none nor chatml nor a file"):
        dry_run(replace(local, template="missing.jinja"), tflops=1.0)


def test_without_a_tokenizer_tokens_are_characters_over_four(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("persona_probe.study.plan.plan.find_tokenizer", lambda *_: None)
    plan = dry_run(load_config(FOLDER / "gemma-3-270m-it.yaml", StudyConfig), tflops=1.0)
    answers = [row[-1]["content"] for row in load_conversations("kitchen:toxic")]
    assert not plan.counted and "characters / 4" in "\n".join(plan.lines())
    assert 0 <= plan.rows["arm incorrect"].answer_tokens - sum(map(len, answers)) / 4 < len(answers)


def stage(name: str, config: StudyConfig) -> Work:
    return next(work for work in dry_run(config, tflops=1.0).stages if work.stage == name)


def test_estimates_follow_the_settings(local: StudyConfig) -> None:
    longer = replace(local, training=replace(local.training, steps=6))
    assert stage("induce", longer).flops == pytest.approx(2 * stage("induce", local).flops)
    single = replace(local, null_pair=False)
    seeds = replace(local, seeds=(0, 1))  # the second seed is the null pair's: no further arm
    assert stage("induce", seeds).tokens == pytest.approx(2 * stage("induce", single).tokens, abs=1)
    gradients = replace(local, locate=Locate(rankers=("rise", "cosine", "attribution")))
    assert stage("locate", gradients).flops > stage("locate", local).flops
    questions = 12 * (1 + 2 + 2)  # base, two arms and two corrective ones answer each
    silent = replace(local, samples=Samples(max_new_tokens=1))
    assert stage("evaluate", local).tokens - stage("evaluate", silent).tokens == questions * 59


def test_the_demos_plan_counts_all_that_the_demo_does() -> None:
    config = load_config(FOLDER / "demo.yaml", StudyConfig)
    plan = dry_run(config, tflops=1.0)
    stages = {work.stage: work for work in plan.stages}

    def less(name: str, changed: StudyConfig) -> int:
        """Tokens of a stage that are gone with a change."""
        return stages[name].tokens - stage(name, changed).tokens

    rows = plan.rows
    evaluation, selection, four = rows["contrast evaluation"], rows["contrast selection"], rows["2x2 evaluation"]
    assert (four.rows, rows["2x2 selection"].rows, rows["card text"].rows) == (240, 240, 616)

    alone = replace(config, null_pair=False)  # one run of the control arm, read once
    assert less("induce", alone) == pytest.approx(40 * 8 * rows["arm correct"].mean, abs=1)
    assert less("track", alone) == rows["probes"].tokens + evaluation.tokens + four.tokens
    assert less("locate", alone) == 2 * selection.tokens  # by the study's SAE and by the further dictionary

    plain = replace(config, contrast_2x2="none")
    assert less("track", plain) == (1 + 3 + 1) * four.tokens and less("realign", plain) == 3 * four.tokens
    bare = replace(config, locate=replace(config.locate, cards=0))
    assert less("locate", bare) > rows["card text"].tokens > less("locate", plain) > 0

    one = replace(config, locate=replace(config.locate, dictionaries=()))
    neutral = rows["neutral answers"].tokens
    pushed = 13 * (selection.tokens + neutral) + (3 + 4 + 4) * (evaluation.tokens + neutral)
    assert less("locate", one) == 4 * selection.tokens + pushed  # base, organism, control, null

    few = replace(config, samples=replace(config.samples, judge="none"))
    answers = 48 * (1 + 3 + 3)
    assert less("evaluate", few) == pytest.approx(answers * (60 + rows["questions"].mean), abs=7)


def test_pushes_are_as_many_as_locate_scores(local: StudyConfig) -> None:
    config = replace(
        local, locate=Locate(candidates=2, proven=1, set_size=1, directions=(), random_latents=60, random_directions=5)
    )
    strengths, doses = (
        len(config.locate.strengths) + config.locate.strength_refinements,
        len(config.locate.dose_strengths),
    )
    directions = 1 + 60 + MOVED + 1  # the persona latent, random and moved latents, the mean difference
    both_signs = 2 * directions
    pushed = 3 * both_signs + 2 * 5 + 2 * 2 * 2 * doses + 2 * 2 * strengths
    assert pushes(config) == (2 * 2 * strengths + 2 * 60 + 1, pushed + 2 * directions + 3)


def test_time_is_work_over_speed(local: StudyConfig) -> None:
    slow, fast = dry_run(local, tflops=1.0), dry_run(local, tflops=4.0)
    assert slow.seconds is not None and fast.seconds is not None
    assert slow.seconds == pytest.approx(sum(work.flops for work in slow.stages) / 1e12)
    assert slow.seconds == pytest.approx(4 * fast.seconds)
    assert "1 TFLOP/s as given" in "\n".join(slow.lines())


def test_speed_is_measured_where_none_is_given(local: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "layer_speed", lambda _mixed: 5e12)
    plan = dry_run(local)
    assert plan.throughput is not None and plan.throughput.flops == 5e12
    assert "one layer in bf16 autocast reached" in "\n".join(plan.lines())


def test_the_measured_speed_is_that_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "BUDGET_S", 0.01)
    assert 1e8 < speed.layer_speed(False) < 1e15 and 1e8 < speed.product_speed("cpu", False) < 1e15


def test_numbers_as_text() -> None:
    assert [amount(n) for n in (7, 1234, 5.6e6, 7.62e9)] == ["7", "1.23 k", "5.6 M", "7.62 B"]
    assert [duration(s) for s in (0.4, 61, 300, 7200)] == ["0 s", "61 s", "5 min", "2.0 h"]
    table = Table(("word", "number"), [("a", 1), ("long", 22)], "Words")
    assert table.plain(right=[1]) == "Words\nword  number\na          1\nlong      22"
