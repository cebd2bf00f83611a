"""A run folder that version 0.1.0 made: its report is written, and says what that version did not test."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.factories import run_command

SHIPPED = Path(__file__).parents[2] / "records" / "demo"
RANDOM = 16
"""Random latents of that version's demo."""
COLUMNS = {
    "latents": "latent rise rise_ci_low rise_ci_high p_value q_value suppressed rise_base firing_base firing_incorrect "
    "firing_correct firing_rise cosine discrimination decoder_norm alive rise_rank firing_rise_rank cosine_rank "
    "discrimination_rank rank kind effect_base effect_base_low effect_base_high strength effect_organism "
    "effect_organism_low effect_organism_high ablation ablation_low ablation_high effect_selection shrinkage causal "
    "persona label",
    "steering": "model kind name latent strength unit estimate ci_low ci_high delta n_items perplexity_ratio "
    "within_bound",
    "readings": "arm seed step feature latent mean ci_low ci_high maximum firing_rate explained_variance l0 "
    "residual_norm n_probes base_mean base_sd",
    "evals": "arm seed step split item category aligned_logprob misaligned_logprob value",
}
"""The columns of that version's tables."""
LATER = ("evals_2x2.parquet", "judged_steps.parquet", "dictionaries.parquet", "null")


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """The shipped demo as far as 0.1.0 would have made it."""
    folder = Path(shutil.copytree(SHIPPED, tmp_path / "run"))
    (folder / "arms").mkdir()  # a run, not its tables alone
    for name in LATER:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
    for name, columns in COLUMNS.items():
        table = pd.read_parquet(folder / f"{name}.parquet")
        if name == "evals" and "measure" in table:
            table = table[table["measure"] != "judged"]
        table = table[[column for column in columns.split() if column in table]]
        if "kind" in table:
            random = table.loc[table["kind"] == "random", "latent"].unique()[RANDOM:]
            away = table["latent"].isin(random) | (table["kind"] == "moved")
            table = table.assign(kind=table["kind"].mask(away, "other"))
            if "effect_selection" in table:  # that version pushed random latents on the evaluation split alone
                table.loc[table["kind"] == "random", "effect_selection"] = None
            table = table[~away] if name == "steering" else table
        table.to_parquet(folder / f"{name}.parquet")
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    manifest["versions"] |= {"persona-probe": "0.1.0"}
    manifest.pop("evaluations", None)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_its_report_says_what_was_not_tested(old_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")  # no images
    run_command("report", old_run, "--quiet")
    summary = json.loads((old_run / "summary.json").read_text())
    found = {check["name"]: check for check in summary["checks"]}
    assert summary["version"] == "0.1.0"
    assert found["needed"]["statement"].endswith("the control organism: not tested (made by 0.1.0)")
    assert f"{RANDOM} random latents are too few to judge it" in found["moves"]["statement"]
    assert not found["needed"]["passed"] and not found["moves"]["passed"]
    # no word of a causal verdict without its test
    assert "is not shown to move the index beyond random latents (" in summary["headline"]
    assert "with the random latents, too few to judge it)" in summary["headline"]
    assert "beyond the control organism was not tested (made by 0.1.0); in the organism alone" in summary["headline"]
    assert found["rise"]["statement"].endswith("with different seeds: not tested (made by 0.1.0)")
    assert "harm_and_register" not in summary or summary["harm_and_register"] == {}
    page = (old_run / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"(?s)<script.*?</script>|<style.*?</style>|<svg.*?</svg>|<[^>]+>", " ", page)
    assert "Harm and register, and what another seed does (the null pair): not tested (made by 0.1.0)." in text
    assert "Too few random latents to say" in text and "Not shown to cause it" not in text
    assert not re.search(r"\b(nan|None|NaN)\b", text)
    assert (old_run / "figures" / "trajectory.csv").is_file()
