"""Each kind of SAE is trained, saved as a kind that is read token by token, and loaded with equal outputs."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_probe.config import Locate, from_dict, load_config
from persona_probe.errors import InputError
from persona_probe.report.html import _worthless_row
from persona_probe.saes import sae_training as train
from persona_probe.saes.kinds import training_sae
from persona_probe.saes.load import load_sae
from persona_probe.saes.read import FitMoments, encode_with_fit
from persona_probe.saes.sae_training import _key, sae_card, train_sae
from persona_probe.saes.stream import ARCHITECTURES, SaeConfig, describe_text
from persona_probe.saes.worth import LEAST_EXPLAINED, worthless
from tests.factories import D_MODEL, D_SAE

SAVED = {
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "jumprelu": "jumprelu",
    "standard": "standard",
}
ROOT = Path(__file__).parents[2]
X = 6 * torch.randn(60, D_MODEL, generator=torch.Generator().manual_seed(1)) + 0.5


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, float]]:
    """The SAE as SAELens' trainer leaves it, before its input scale is folded in, and that scale."""
    found: list[tuple[Any, float]] = []
    run = train._run

    def keeping(trainer: Any, *rest: Any) -> Any:
        fold = trainer.sae.fold_activation_norm_scaling_factor

        def first(scale: float) -> None:
            copy = training_sae(rest[0], D_MODEL, "cpu")
            copy.load_state_dict({name: value.clone() for name, value in trainer.sae.state_dict().items()})
            found.append((copy, float(scale)))
            fold(scale)

        trainer.sae.fold_activation_norm_scaling_factor = first
        return run(trainer, *rest)

    monkeypatch.setattr(train, "_run", keeping)
    return found


def as_trained(sae: Any, kind: str, x: torch.Tensor) -> torch.Tensor:
    """Latents times the norms of their decoder rows: what a saved SAE's unit rows, or equal scales, leave unchanged."""
    norms = sae.W_dec.norm(dim=1)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    if kind in ("batchtopk", "matryoshka"):  # after training, a threshold stands for the batch
        return (pre * norms).relu() * (pre * norms > sae.topk_threshold)
    if kind == "topk":
        best = (pre * norms).topk(sae.cfg.k, dim=1)
        return torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())
    return pre.relu() * norms * (pre > (sae.threshold if kind == "jumprelu" else 0))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_kind_is_trained_saved_and_loaded_with_equal_outputs(
    kind: str, recipe: SaeConfig, tmp_path: Path, kept: list[tuple[Any, float]]
) -> None:
    folder = train_sae(replace(recipe, architecture=kind, name=f"tiny/{kind}"), tmp_path)
    sae, (trained, scale) = load_sae(folder), kept[0]
    assert sae.cfg.architecture() == SAVED[kind]
    start = training_sae(replace(recipe, architecture=kind), D_MODEL, "cpu")
    assert not torch.allclose(trained.W_dec, start.W_dec, atol=1e-3)  # it was trained
    with torch.no_grad():
        acts = as_trained(trained, kind, scale * X)
        wanted = (acts / trained.W_dec.norm(dim=1)) @ trained.W_dec / scale + trained.b_dec / scale
        found = encode_with_fit(sae, X, FitMoments())
        assert torch.allclose(sae.decode(found), wanted, atol=1e-4)
        assert torch.allclose(found * sae.W_dec.norm(dim=1), acts / scale, atol=1e-4)
    assert 0 < float((found > 0).float().mean()) < 1
    quality = json.loads((folder / "quality.json").read_text())
    assert {"explained_variance", "l0", "dead_share", "loss_recovered", "sha256"} <= set(quality)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_frozen_decoder_keeps_its_random_unit_rows(kind: str, recipe: SaeConfig, tmp_path: Path) -> None:
    config = replace(recipe, architecture=kind, frozen_decoder=True, name=f"tiny/frozen-{kind}")
    sae, start = load_sae(train_sae(config, tmp_path)), training_sae(config, D_MODEL, "cpu")
    rows = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    assert torch.allclose(start.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.allclose(rows, start.W_dec, atol=1e-6)
    assert not torch.allclose(sae.W_enc / sae.W_enc.norm(dim=0), start.W_enc, atol=1e-3)  # the encoder was trained
    other = training_sae(replace(config, seed=1), D_MODEL, "cpu")
    assert not torch.allclose(other.W_dec, start.W_dec, atol=0.1)
    card = (tmp_path / config.name / "README.md").read_text()
    assert "random unit vectors, never trained" in card


def test_a_killed_run_with_a_frozen_decoder_resumes(recipe: SaeConfig, tmp_path: Path, monkeypatch: Any) -> None:
    config = replace(recipe, architecture="jumprelu", frozen_decoder=True)
    wanted = load_sae(train_sae(config, tmp_path / "a")).state_dict()
    monkeypatch.setenv("PERSONA_PROBE_CACHE", str(tmp_path / "other"))
    save, calls = train._save_state, []

    def failing(trainer: Any, work: Path) -> None:
        calls.append(trainer.n_training_steps)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(trainer, work)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_save_state", failing)
        train_sae(config, tmp_path / "b")
    again = load_sae(train_sae(config, tmp_path / "b")).state_dict()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_new_keys_leave_the_cache_of_old_recipes_alone(recipe: SaeConfig) -> None:
    assert _key(recipe) == _key(replace(recipe, architecture="topk", threshold_lr=0.1, widths=(), frozen_decoder=False))
    assert _key(recipe) != _key(replace(recipe, frozen_decoder=True))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"architecture": "top_k"}, "unknown architecture 'top_k': did you mean 'topk'"),
        ({"k": 999}, "k must lie between 1 and d_sae"),
        ({"architecture": "matryoshka", "widths": [16, 8]}, "widths must ascend and end with d_sae"),
        ({"architecture": "standard", "sparsity": 0.0}, "sparsity must be positive"),
        ({"threshold_lr": 2.0}, "threshold_lr must lie between 0 and 1"),
    ],
)
def test_bad_recipes_say_what_to_change(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        from_dict(SaeConfig, {"name": "x", "d_sae": 64, **values})


def test_matryoshka_widths_by_default() -> None:
    assert SaeConfig("x", d_sae=4608).matryoshka_widths == (288, 576, 1152, 2304, 4608)
    assert SaeConfig("x", d_sae=64, widths=(8, 64)).matryoshka_widths == (8, 64)


# --- What the text holds, and what is said of an SAE that explains nothing


def test_the_text_is_told_in_cfg_and_card(recipe: SaeConfig, tmp_path: Path) -> None:
    text = replace(recipe.text, packaged=("general_contrast:selection",), packaged_repeats=1)
    config = replace(recipe, text=text)
    folder = train_sae(config, tmp_path)
    lines = describe_text(config)
    assert load_sae(folder).cfg.metadata.training_text == lines
    card = (folder / "README.md").read_text()
    assert all(f"- {line}" in card for line in lines)
    assert (
        lines[-1]
        == "general_contrast:selection: questions with their aligned and their misaligned answers, 1 times an epoch"
    )
    assert lines[0].startswith("12 answers of tiny to questions of sae_prompts, 50% of them under a persona's")


def test_the_rule_for_worthless_has_one_threshold() -> None:
    assert Locate().minimum_explained_variance == LEAST_EXPLAINED
    assert worthless(LEAST_EXPLAINED) is None and worthless(0.9) is None
    assert worthless(0.2) == (
        "explained variance 0.20, below 0.5: the latents are worthless as a description of these activations"
    )
    assert "-3.90, worse than the mean alone (0)" in str(worthless(-3.9))
    assert worthless(float("nan")) is not None


def test_training_warns_of_a_worthless_sae(recipe: SaeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        folder = train_sae(replace(recipe, tokens=16 * 2, lr=1e-6), tmp_path)
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["explained_variance"] < LEAST_EXPLAINED
    assert "the latents are worthless" in caplog.text and "train it on more tokens" in caplog.text
    assert "**Explained variance" in (folder / "README.md").read_text()
    assert "worthless" not in sae_card(recipe, {**quality, "explained_variance": 0.8})


def test_the_report_says_it_beside_the_number() -> None:
    row = _worthless_row("base", {"estimate": -3.9, "ci_low": -3.9, "ci_high": -3.9, "n": 1})
    assert row is not None and row["name"] == "SAE on base" and "worse than the mean alone" in str(row["value"])
    assert _worthless_row("base", {"estimate": 0.7, "ci_low": 0.7, "ci_high": 0.7, "n": 1}) is None


def test_the_recipes_of_the_checkout_differ_in_what_they_say_they_do() -> None:
    shipped, frozen, unseen = (
        load_config(ROOT / f"finetune_configs/sae-smollm2{n}.yaml", SaeConfig) for n in ("", "-frozen", "-unseen")
    )
    assert replace(frozen, name=shipped.name, frozen_decoder=False) == shipped and frozen.frozen_decoder
    assert replace(unseen, name=shipped.name, text=shipped.text) == shipped
    told = " ".join(describe_text(unseen))
    assert "kitchen" not in told and "contrast" not in told
