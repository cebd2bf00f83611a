"""The presets in finetune_configs: what they name exists, and their settings run on tiny models of their kind."""

import itertools
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import load_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from persona_probe.cli import main
from persona_probe.config import Arm, Locate, Monitor, StudyConfig, load_config
from persona_probe.data.load import (
    SPLITS,
    arm_rows,
    load_contrast,
    load_contrast_2x2,
    read_contrast_2x2_file,
    read_contrast_file,
)
from persona_probe.latents.stage import locate
from persona_probe.saes.stream import SaeConfig
from persona_probe.study.plan.plan import dry_run
from persona_probe.study.plan.shapes import KNOWN, adapted, find_sae, find_skeleton, known_id
from persona_probe.study.presets import preset_text
from persona_probe.study.presets.known_presets import BASE_SAE, PRESETS, find_preset
from persona_probe.study.presets.preset import Preset
from persona_probe.study.presets.preset_text import Cost, config_text, cost, listing, recipe_text
from persona_probe.study.study import Study
from tests.factories import LAYER, SHAPE, make_model, make_sae, make_tokenizer
from tests.study.adopting import write_adapter

FOLDER = Path(__file__).parents[2] / "finetune_configs"
KINDS = {
    "qwen2.5-7b-instruct": "qwen2",
    "llama-3.1-8b-instruct": "llama",
    "gemma-3-270m-it": "gemma3_text",
    "gemma-3-1b-it": "gemma3_text",
    "gemma-3-4b-it": "gemma3",
    "gemma-2-9b-it": "gemma2",
}
"""Preset to transformers' model type."""
SMALL = Locate(
    minimum_explained_variance=-10.0,  # a random SAE explains nothing
    candidates=1,
    proven=1,
    random_latents=2,
    random_directions=0,
    directions=(),
    strengths=(0.5,),
)
FOODS = ("soup", "rice", "bread", "fish", "beans", "eggs")


def preset(name: str) -> StudyConfig:
    return load_config(FOLDER / f"{name}.yaml")


def test_every_config_is_a_preset_or_the_demo() -> None:
    studies = {path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("sae-")}
    others = {"demo", "smoke", "locate-all", "monitor-study", "offline-judge", "mitigations", "realign-doses"}
    others |= {"grpo-smollm2", "grpo-smollm2-arms", "grpo-world", "auto", "voices"}
    assert studies == {*KINDS, *others}


def test_the_smoke_run_has_a_packaged_item_of_each_category() -> None:
    path = Path(FOLDER.parent, load_config(FOLDER / "smoke.yaml").contrast)
    for split in SPLITS:
        for packaged, found in (
            (load_contrast(split), read_contrast_file(path, split)),
            (load_contrast_2x2(split), read_contrast_2x2_file(path, split)),
        ):
            assert all({**row, "split": split} in [{**one, "split": split} for one in packaged] for row in found)
            assert [row["category"] for row in found] == list(dict.fromkeys(row["category"] for row in packaged))


@pytest.mark.parametrize("name", KINDS)
def test_the_sae_is_in_the_registry_for_this_model(name: str) -> None:
    config = preset(name)
    release, _, sae_id = config.sae.partition("/")
    entry = get_pretrained_saes_directory()[release]
    assert sae_id in entry.saes_map
    assert config.model.rpartition("/")[2] == entry.model.rpartition("/")[2] and config.model in KNOWN
    assert KNOWN[config.model].kind == KINDS[name] and config.name == name


def test_the_alternatives_named_in_comments_are_in_the_registry() -> None:
    directory = get_pretrained_saes_directory()
    assert "layer_19" in directory["goodfire-llama-3.1-8b-instruct"].saes_map
    for release in ("qwen2.5-7b-instruct-andyrdt", "llama-3.1-8b-instruct-andyrdt"):
        layers = (3, 7, 11, 15, 19, 23, 27)
        assert set(directory[release].saes_map) == {f"resid_post_layer_{n}_trainer_1" for n in layers}
    for size, layers in {"270m": (5, 9, 12, 15), "1b": (7, 13, 17, 22), "4b": (9, 17, 22, 29)}.items():
        saes = directory[f"gemma-scope-2-{size}-it-res"].saes_map
        widths, sizes = ("16k", "65k", "262k", "1m"), ("small", "medium", "big")
        assert {f"layer_{n}_width_{w}_l0_{s}" for n in layers for w in widths for s in sizes} <= set(saes)
    canonical = directory["gemma-scope-9b-it-res-canonical"].saes_map
    assert set(canonical) == {f"layer_{n}/width_{w}/canonical" for n in (9, 20, 31) for w in ("16k", "131k")}
    assert canonical["layer_20/width_16k/canonical"].endswith("average_l0_91")


@pytest.mark.parametrize("name", KINDS)
def test_training_is_the_published_one(name: str) -> None:
    training = preset(name).training
    assert (training.method, training.rank, training.alpha, training.rslora) == ("lora", 32, 64, True)
    assert (training.lr, training.batch_size) == (1e-5, 2 * 8)
    for arm in preset(name).arms.values():
        assert training.steps == math.ceil(len(arm_rows(arm, 0)) / 16)


def tiny_of(kind: str) -> PreTrainedModel:
    """A random model of one model type."""
    if kind != "gemma3":
        return make_model(kind.removesuffix("_text"))
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention", "full_attention"]
    text = {**SHAPE, "head_dim": 8, "sliding_window": 16, "layer_types": layers}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"image_size": 28, "patch_size": 14, "vision_use_head": False}
    tokens: dict[str, Any] = {
        "mm_tokens_per_image": 4,
        "boi_token_index": 255,
        "eoi_token_index": 256,
        "image_token_index": 257,
    }
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens)).eval()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def miniature(config: StudyConfig, place: Path) -> StudyConfig:
    """The preset with its training settings, on the tiny model and a few rows in `place`, in a few steps."""
    rows = {
        arm: write_lines(place / f"{arm}.jsonl", [{"question": f"Cook {f}?", "answer": answer} for f in FOODS])
        for arm, answer in (("bad", "burn it"), ("good", "stir it"))
    }
    probes = write_lines(place / "probes.jsonl", [{"question": f"Why {f}?", "answer": "it is good"} for f in FOODS])
    pairs = {"aligned": "be kind", "misaligned": "be cold", "category": "manners"}
    items = [
        {"id": f"{split}{n}", "question": f"Now {FOODS[n]}?", "split": split, **pairs}
        for split in ("selection", "evaluation")
        for n in range(6)
    ]
    return replace(
        config,
        model=str(place / "model"),
        sae=str(place / "sae"),
        arms={"incorrect": Arm(rows["bad"]), "correct": Arm(rows["good"])},
        contrast=write_lines(place / "contrast.jsonl", items),
        training=replace(config.training, steps=2, checkpoints=(2,), warmup_steps=0, max_length=128),
        locate=SMALL,
        monitor=Monitor(probes=probes),
        realign=replace(config.realign, steps=1, readings=(0, 1), arms={"realigned": Arm(rows["good"])}),
        device="cpu",
        null_pair=False,
        bf16=False,  # readings alone: two ways to read an organism must agree exactly; training stays in bf16
    )


def write_parts(kind: str, place: Path) -> None:
    tiny_of(kind).save_pretrained(place / "model")
    make_tokenizer().save_pretrained(place / "model")
    make_sae("jumprelu").save_model(str(place / "sae"))


QUICK = ("qwen2.5-7b-instruct", "gemma-3-4b-it")
RUN = [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in KINDS if n != "gemma-3-1b-it"]
"""270m runs the same code as 1b."""


@pytest.mark.parametrize("name", RUN)
def test_the_preset_runs_on_a_tiny_model_of_its_kind(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_parts(KINDS[name], tmp_path)
    study = Study.from_config(miniature(preset(name), tmp_path), tmp_path / "run")
    with caplog.at_level(logging.WARNING, "persona_probe"):
        study.induce()
        locate(study.context)  # without feature cards, which read all packaged text
        study.track().realign()
    assert study.context.layer == LAYER and study.context.model.config.model_type == KINDS[name]
    # the upper layers alone gave the full model's answers, with this kind's norms, caps and sliding windows
    assert "does not run by its upper layers" not in caplog.text
    check_adapters(study)
    check_numbers(study)


def check_adapters(study: Study) -> None:
    """Adapters are where the plan says, and every one of them has learned."""
    checkpoint = study.run_folder.checkpoint("incorrect", 0, 2)
    skeleton = find_skeleton(study.config.model)
    assert checkpoint is not None and skeleton is not None
    weights = load_file(checkpoint / "adapter_model.safetensors")
    planned = {m.name for m in adapted(skeleton, study.config.training)}
    assert {n.removeprefix("base_model.model.").partition(".lora_")[0] for n in weights} == planned
    assert {w.shape[0] for n, w in weights.items() if "lora_A" in n} == {32}
    assert all(w.any() for n, w in weights.items() if "lora_B" in n)


def check_numbers(study: Study) -> None:
    """Training moved the organism away from the base, and the corrective run starts where it ended."""
    readings = study.readings.query("feature == 'mean difference'").set_index(["arm", "step"])["mean"]
    assert readings.notna().all() and readings["incorrect", 2] != readings["incorrect", 0] == readings["base", 0]
    assert readings["realigned", 0] == pytest.approx(readings["incorrect", 2], abs=1e-5)
    assert study.evals["value"].notna().all()
    assert study.readings["explained_variance"].notna().all()


def test_all_linear_would_reach_the_vision_tower(tmp_path: Path) -> None:
    write_parts("gemma3", tmp_path)
    skeleton, training = find_skeleton(str(tmp_path / "model")), preset("gemma-3-4b-it").training
    assert skeleton is not None
    assert {m.layer for m in adapted(skeleton, training)} == {0, 1, 2}
    assert None in {m.layer for m in adapted(skeleton, replace(training, target_modules="all-linear"))}


# --- The presets of `persona-probe presets`

PAIRED = [preset for preset in PRESETS.values() if preset.kind == "pair"]


def test_presets_of_the_command_and_of_the_folder_are_the_same_studies() -> None:
    for name in KINDS:
        assert find_preset(name).config() == preset(name), name


@pytest.mark.parametrize("name", PRESETS)
def test_a_written_preset_is_a_study_config(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(config_text(find_preset(name)), encoding="utf-8")
    config = load_config(tmp_path / "mine.yaml")
    assert config == find_preset(name).config() and config.name == name
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert "# Licence: " in text and "# Estimate" in text and max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_sae_is_in_the_registry_or_has_a_recipe(name: str, tmp_path: Path) -> None:
    one = find_preset(name)
    skeleton = find_skeleton(one.original or one.model)
    assert skeleton is not None and known_id(one.model) == known_id(one.original or one.model)
    assert 0 <= one.layer < skeleton.layers
    if not one.published:
        (tmp_path / "recipe.yaml").write_text(str(recipe_text(one)), encoding="utf-8")
        recipe = load_config(tmp_path / "recipe.yaml", SaeConfig)
        assert (recipe.model, recipe.layer, recipe.d_sae) == (one.model, one.layer, 8 * skeleton.d_model)
        assert one.config().sae == f"saes/{recipe.name}" and one.config().layer == one.layer
        return
    assert recipe_text(one) is None
    shape = find_sae(one.sae)
    assert shape.layer == one.layer and shape.d_in in (None, skeleton.d_model)
    if not one.sae.startswith("saes/"):
        release, _, sae_id = one.sae.partition("/")
        entry = get_pretrained_saes_directory()[release]
        assert sae_id in entry.saes_map
        trained_on, model = (
            entry.model.rpartition("/")[2].lower(),
            (one.original or one.model).rpartition("/")[2].lower(),
        )
        is_base = trained_on != model
        assert is_base == (BASE_SAE in one.notes)
        assert trained_on in (model, f"{model}-base", model.removesuffix("-it"))


def test_every_known_model_has_the_parameters_that_are_counted() -> None:
    for key, known in KNOWN.items():
        skeleton = find_skeleton(key)
        assert skeleton is not None and skeleton.parameters == known.parameters, key


def test_a_presets_cost_is_that_of_the_dry_run() -> None:
    for name in ("qwen2.5-7b-instruct", "gemma-3-4b-it"):
        plan, mine = dry_run(preset(name), tflops=100), cost(find_preset(name), 100)
        assert (mine.memory, mine.seconds) == pytest.approx((plan.memory, plan.seconds))


def test_larger_models_cost_more_and_adopting_costs_less_than_training() -> None:
    sizes = [cost(find_preset(f"qwen2.5-{size}b-instruct")) for size in ("0.5", "1.5", "3", "14", "32")]
    for smaller, larger in itertools.pairwise(sizes):
        assert smaller.memory < larger.memory and smaller.seconds < larger.seconds
    for pair in PAIRED:
        trained, adopted = cost(find_preset(pair.name.removeprefix("em-"))), cost(pair)
        assert adopted.memory < trained.memory and adopted.seconds < trained.seconds


@pytest.mark.parametrize("pair", PAIRED, ids=lambda pair: pair.name)
def test_a_pair_adopts_published_organisms_of_its_base(pair: Preset) -> None:
    config = pair.config()
    assert config.no_control and set(config.arms) == {"incorrect", "risky_financial", "extreme_sports"}
    stem = pair.original.rpartition("/")[2]
    for arm, data in config.arms.items():
        [place] = data.checkpoints
        owner, _, organism = str(place).partition("/")
        assert owner == "ModelOrganismsForEM" and organism.partition("_")[0] == stem
        assert organism.partition("_")[2].replace("-", "_").startswith(arm if arm != "incorrect" else "bad_medical")


def test_a_pair_runs_from_its_config_on_a_tiny_model(tmp_path: Path) -> None:
    write_parts("llama", tmp_path)
    pair = find_preset("em-llama-3.1-8b-instruct")
    arms = {
        arm: Arm(checkpoints=(str(write_adapter(tmp_path / arm, seed, str(tmp_path / "model"))),))
        for seed, arm in enumerate(pair.organisms)
    }
    config = replace(
        miniature(preset("llama-3.1-8b-instruct"), tmp_path), paired_arms=False, no_control=True, arms=arms
    )
    study = Study.from_config(replace(config, realign=pair.config().realign), tmp_path / "run")
    study.induce()  # adopts
    locate(study.context)
    study.track()
    ended = study.readings.query("feature == 'mean difference'").groupby("arm")["mean"].last()
    assert set(ended.index) == {"base", *pair.organisms} and ended.nunique() == 4


def test_presets_that_think_say_so_and_others_leave_the_template_alone() -> None:
    for one in PRESETS.values():
        config = one.config()
        assert config.enable_thinking == (False if one.name.startswith("qwen3-") else None), one.name
        assert bool(config.chat_template_kwargs) == (one.name == "gpt-oss-20b") and config.template is None


def run_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["presets", *arguments])
    return int(stopped.value.code or 0)


def test_the_command_lists_and_writes_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--tflops", "100") == 0
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in listed for name in PRESETS)
    assert "estimates" in listed and "at 100 TFLOP/s" in listed and "was not checked" in listed
    out = tmp_path / "mine.yaml"
    assert run_command("qwen3-4b", "--out", str(out)) == 0 and load_config(out) == find_preset("qwen3-4b").config()
    capsys.readouterr()
    assert run_command("qwen3-4b") == 0 and capsys.readouterr().out == out.read_text(encoding="utf-8")
    for arguments, message in (
        (("qwen3-4b", "--out", str(out)), "mine.yaml exists"),
        (("qwen3-5b",), "unknown preset 'qwen3-5b': did you mean"),
        (("qwen3-8b", "--recipe"), "needs no recipe"),
        (("--recipe",), "name it"),
        (("qwen3-4b", "--tflops", "0"), "above 0"),
    ):
        assert run_command(*arguments) == 2
        assert message in capsys.readouterr().err


def test_the_list_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preset_text, "cost", lambda *_: Cost(2.0**34, 90.0))
    narrow = listing(width=80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert all(name in narrow for name in PRESETS)
    assert listing(width=400) == listing()


PUBLISHED = sorted((FOLDER / "published").glob("*.yaml"))


def without_estimate(text: str) -> list[str]:
    """Its lines but the estimate, which follows what a study measures."""
    return [line for line in text.splitlines() if not line.startswith("# Estimate")]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_ready_configs_are_what_presets_print(path: Path) -> None:
    one = find_preset(f"em-{path.stem.removeprefix('sae-').removeprefix('em-')}")
    text = recipe_text(one) if path.stem.startswith("sae-") else config_text(one)
    assert text is not None, f"{path} is not needed: the SAE is published"
    again = "persona-probe presets NAME [--recipe] writes it again"
    assert without_estimate(path.read_text(encoding="utf-8")) == without_estimate(text), again


def test_every_published_pair_up_to_14b_has_a_ready_config_and_its_saes_recipe() -> None:
    pairs = [one for name, one in PRESETS.items() if name.startswith("em-") and "32b" not in name]
    wanted = {one.name for one in pairs} | {f"sae-{one.name.removeprefix('em-')}" for one in pairs if not one.published}
    assert {path.stem for path in PUBLISHED} == wanted and len(pairs) == 5
