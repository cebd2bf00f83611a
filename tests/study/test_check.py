"""What any stage would refuse is refused before the first training step."""

from pathlib import Path
from typing import Any

import pytest

from persona_probe.config import StudyConfig, from_dict
from persona_probe.errors import InputError
from persona_probe.latents import stage
from persona_probe.study.study import Study
from tests.factories import Row, changed, copied_state, hook_count, same_state, write_sae


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training": {"layers": [9]}}, "the model has layers 0 to 2"),
        ({"training": {"target_modules": ["nothing_like_this"]}}, "could not add LoRA to this model"),
        ({"locate": {"rankers": ["rise", "cosine", "luck"]}}, "unknown ranker 'luck'"),
        ({"locate": {"candidates": 63}}, "locate.candidates (63) leaves no random ones of 64"),
        ({"locate": {"minimum_explained_variance": 0.99}}, "or lower minimum_explained_variance"),
        ({"locate": {"positions": "thought"}}, "no token at positions 'thought'"),
        ({"locate": {"dictionaries": ["/nowhere/sae"]}}, "no SAE at '/nowhere/sae'"),
        ({"monitor": {"positions": "thought"}}, "monitor.probes: a probe has no token at positions 'thought'"),
        ({"samples": {"max_new_tokens": 5000}}, "more than the model's 512 positions"),
    ],
)
def test_a_setting_that_a_later_stage_refuses(changes: Row, says: str, raw: Row, tmp_path: Path) -> None:
    study = Study.from_config(from_dict(StudyConfig, changed(raw, **changes)), tmp_path / "run", device="cpu")
    with pytest.raises(InputError) as refused:
        study.check()
    assert says in str(refused.value) and not study.run_folder.has("arms")


def test_a_dictionary_of_another_layer(raw: Row, tmp_path: Path) -> None:
    other = write_sae(tmp_path / "sae", hook="blocks.0.hook_resid_post")
    config = from_dict(StudyConfig, changed(raw, locate={"dictionaries": [str(other)]}))
    with pytest.raises(InputError, match="reads layer 0, the study's reads 1: name one of the same layer"):
        Study.from_config(config, tmp_path / "run", device="cpu").check()


def test_a_check_leaves_the_model_as_it_was_and_reads_the_base_once(
    raw: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.from_config(from_dict(StudyConfig, raw), tmp_path / "run", device="cpu")
    model = study.context.model
    before, hooks, reads = copied_state(model), hook_count(model), list[str]()
    read = stage._read

    def counted(ctx: Any, saes: Any, arm: str, *rest: Any) -> Any:
        reads.append(arm)
        return read(ctx, saes, arm, *rest)

    monkeypatch.setattr(stage, "_read", counted)
    study.check()
    assert same_state(before, model.state_dict()) and hook_count(model) == hooks
    stage.read_base(study.context, study.context.saes)
    assert reads == ["base"]
