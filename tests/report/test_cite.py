"""`cite` says what was done and cites what was used, no more."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from persona_probe.cli import main
from persona_probe.config import Locate, StudyConfig, Training
from persona_probe.report.cite import DIRECTIONS, RANKERS, REFERENCES, cite, tex
from persona_probe.runs import first_manifest
from tests.report.run_records import write_run

ROOT = Path(__file__).parents[2]
CONFIG = StudyConfig("made-up", "release/sae_id", seeds=(0, 1), training=Training(lr=2e-4, steps=20, checkpoints=(10,)))


def run_of(folder: Path, config: StudyConfig, **more: object) -> Path:
    write_run(folder)
    (folder / "manifest.json").write_text(json.dumps({**first_manifest(config), **more}))
    for arm in ("incorrect", "realigned_in"):
        (folder / f"arms/{arm}-s0").mkdir(parents=True)
        (folder / f"arms/{arm}-s0/training.json").write_text('{"rows": 216}')
    return folder


def test_numbers_come_from_the_run(tmp_path: Path) -> None:
    said = cite(run_of(tmp_path / "run", CONFIG)).methods
    for words in (
        "incorrect: kitchen:toxic, 216 rows; correct: kitchen:correct; seeds 0 and 1",
        "LoRA (rank 32, alpha 64, rank-stabilised, on all-linear",
        "for 20 steps of 8 rows",
        "learning rate of 0.0002 (3 steps of linear warm-up, then constant; weight decay 0; bf16 autocast",
        "checkpoints at steps 10 and 20",
        "on 6 questions in 3 categories (general\\_contrast)",
        "5 candidates chosen by rise and cosine were steered next to 10 random latents",
        "2 random directions",
        "on 48 probes (neutral\\_probes, response tokens)",
        "realigned\\_in: kitchen\\_correct\\_holdout, 216 rows) for at most 35 steps of 4 rows",
        "95\\% percentile bootstrap",
        CONFIG.hash,
    ):
        assert words in said, words
    assert "judged" not in said and "realigned\\_out" not in said


def test_only_what_was_used_is_cited_and_all_of_it_is_defined(tmp_path: Path) -> None:
    found = cite(run_of(tmp_path / "run", CONFIG))
    keys = re.findall(r"@\w+\{(\w+),", found.bibtex)
    assert keys == sorted({k for group in re.findall(r"\\cite\{([^}]*)\}", found.methods) for k in group.split(",")})
    assert {"wang2025persona", "allal2025smollm2", "hu2021lora", "alain2016probes"} <= set(keys)
    assert not {"chen2025persona", "gao2024scaling", "dupre2025attribution"} & set(keys)
    located = Locate(rankers=("rise", "attribution"), choose_by=("rise",), directions=("persona_vector",))
    plain = replace(CONFIG, model="owner/model", training=Training(method="full"), locate=located)
    other = cite(run_of(tmp_path / "other", plain, evaluations={"a": {"judge": "offline", "questions": "mine"}})).bibtex
    assert "chen2025persona" in other and "dupre2025attribution" in other and "betley2025emergent" in other
    assert not any(key in other for key in ("hu2021lora", "allal2025smollm2", "alain2016probes", "arditi2025"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ("on narrow data",)),
        ({"weights": "bfloat16"}, ("(weights in bfloat16) on narrow data",)),
        ({"quantization": "4bit"}, ("linear layers in 4-bit NormalFloat", "dettmers2023qlora", "weights in float32")),
        ({"quantization": "8bit", "weights": "bfloat16"}, ("linear layers in 8 bits", "weights in bfloat16)")),
    ],
)
def test_the_precision_of_the_model_is_said(tmp_path: Path, changes: dict[str, str], words: tuple[str, ...]) -> None:
    said = cite(run_of(tmp_path / "run", replace(CONFIG, **changes))).methods
    assert all(word in said for word in words)
    assert ("weights in" in said) == bool(changes)


def test_a_run_that_has_only_begun_cites_its_training(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(first_manifest(CONFIG)))
    said = cite(tmp_path).methods
    assert "We fine-tuned" in said and "Latents" not in said and "re-alignment" not in said


def test_latex_is_escaped() -> None:
    assert tex("50% of a_b & {c} #1 $2") == r"50\% of a\_b \& \{c\} \#1 \$2"


def test_entries_are_whole() -> None:
    assert {*RANKERS.values(), *DIRECTIONS.values()} <= set(REFERENCES)
    for key, entry in REFERENCES.items():
        assert entry.split("{", 1)[1].startswith(f"{key},") and entry.count("{") == entry.count("}")
        for name in ("author", "title", "year"):
            assert f"\n  {name} = {{" in entry
        assert len(re.findall(r"eprint = \{\d{4}\.\d{5}\}|\\url\{https://|journal = ", entry)) == 1


def test_the_command_prints_or_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = run_of(tmp_path / "run", CONFIG), tmp_path / "methods.tex"
    for arguments in (["cite", str(run)], ["cite", str(run), "--out", str(out)]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(out.read_text()[:200])


def test_the_citation_file_agrees_with_the_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        citation["cff-version"] == "1.2.0"
        and citation["message"]
        and citation["title"]
        and citation["type"] == "software"
    )
    assert citation["version"] == project["version"] and citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
