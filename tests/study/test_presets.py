"""The presets in finetune_configs: what they name exists, and their settings run on tiny models of their kind."""

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

from persona_probe.config import Arm, Locate, Monitor, StudyConfig, load_config
from persona_probe.data.load import arm_rows
from persona_probe.latents.stage import locate
from persona_probe.study.plan.shapes import KNOWN, adapted, find_skeleton
from persona_probe.study.study import Study
from tests.factories import LAYER, SHAPE, make_model, make_sae, make_tokenizer

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
    strengths=(0.5,),
)
FOODS = ("soup", "rice", "bread", "fish", "beans", "eggs")


def preset(name: str) -> StudyConfig:
    return load_config(FOLDER / f"{name}.yaml")


def test_every_config_is_a_preset_or_the_demo() -> None:
    studies = {path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("sae-")}
    others = {"demo", "smoke", "locate-all", "monitor-study", "offline-judge", "mitigations", "realign-doses"}
    assert studies == {*KINDS, *others}


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
        bf16=False,  # readings alone: two ways to read an organism must agree exactly; training stays in bf16
    )


def write_parts(kind: str, place: Path) -> None:
    tiny_of(kind).save_pretrained(place / "model")
    make_tokenizer().save_pretrained(place / "model")
    make_sae("jumprelu").save_model(str(place / "sae"))


@pytest.mark.parametrize("name", [n for n in KINDS if n != "gemma-3-1b-it"])  # 270m runs the same code
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
