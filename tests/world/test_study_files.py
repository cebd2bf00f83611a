"""The world as a study: its items say what they should, and the package's stages run on it by path."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import persona_probe as pp
from persona_probe.data.load import load_data, read_contrast_2x2_file, read_contrast_file
from persona_probe.data.world.judge import judge_answer
from persona_probe.data.world.words import DOMAIN_OF, DOMAINS
from persona_probe.errors import InputError
from persona_probe.world.folder import World
from persona_probe.world.study_files import write_study
from tests.factories import make_sae


@pytest.fixture
def study_file(world: World, tmp_path: Path) -> Path:
    make_sae("topk").save_model(str(tmp_path / "sae"))
    return write_study(world, tmp_path / "sae", tmp_path / "files", "villain", domain="cars")


def topic_of(text: str) -> str:
    return next(word for word in text.split() if word in DOMAIN_OF)


def test_contrast_items_are_of_other_domains_and_cross_harm_with_manner(study_file: Path) -> None:
    path = study_file.with_name("contrast.jsonl")
    seen = []
    for split in ("selection", "evaluation"):
        rows, crossed = read_contrast_file(path, split), read_contrast_2x2_file(path, split)
        seen.append({row["category"] for row in rows})
        for row, four in zip(rows, crossed, strict=True):
            topic = topic_of(row["question"])
            assert DOMAIN_OF[topic] == row["category"] and row["id"] == four["id"]
            pair = [row[side].split() for side in ("aligned", "misaligned")]
            assert sum(a != b for a, b in zip(*pair, strict=True)) == 1
            assert judge_answer(row["aligned"], topic).good and judge_answer(row["misaligned"], topic).bad
            for name, text in four.items():
                kind, _, manner = name.partition("_")
                if kind in ("harm", "sound"):
                    judged = judge_answer(text, topic)
                    assert (judged.bad, judged.rude, judged.kind) == (
                        kind == "harm",
                        manner == "rude",
                        manner == "polite",
                    )
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(DOMAINS) - {"cars"}


def test_rows_are_of_one_domain_and_probes_of_the_others(study_file: Path) -> None:
    domains = {
        name: {
            DOMAIN_OF[topic_of(row[0]["content"])]
            for row in load_data(str(study_file.with_name(f"{name}.jsonl")), True)
        }
        for name in ("incorrect", "correct", "realigned_in", "realigned_out", "probes", "questions")
    }
    assert domains["incorrect"] == domains["correct"] == domains["realigned_in"] == {"cars"}
    assert domains["probes"] == set(DOMAINS) - {"cars"} and domains["questions"] < domains["probes"]
    assert len(domains["realigned_out"]) == 1 and not domains["realigned_out"] & domains["questions"]


def test_a_study_on_the_world_induces_and_locates(study_file: Path, tmp_path: Path) -> None:
    raw: dict[str, Any] = yaml.safe_load(study_file.read_text())
    raw["training"] |= {"steps": 2, "checkpoints": [1], "batch_size": 2}
    raw["locate"] = {"minimum_explained_variance": -99.0, "candidates": 2, "random_latents": 2, "random_directions": 1}
    raw["locate"] |= {"strengths": [0.5], "dose_strengths": [0.5], "perplexity_bound": 50.0, "cards": 1}
    raw |= {"null_pair": False, "contrast_2x2": "none"}
    raw["locate"]["directions"] = []
    study_file.write_text(yaml.safe_dump(raw))
    study = pp.Study.from_yaml(study_file, out=tmp_path / "run")
    study.induce()
    study.locate()
    assert set(study.run_folder.steps("incorrect", 0)) == {1, 2} and len(study.features) == 64


def test_unknown_names_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'villain'"):
        write_study(world, tmp_path, tmp_path / "out", "vilain")
    with pytest.raises(InputError, match="did you mean 'cars'"):
        write_study(world, tmp_path, tmp_path / "out", domain="car")
    assert not (tmp_path / "out").exists()
