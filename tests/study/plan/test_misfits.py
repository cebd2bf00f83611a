"""What does not fit is refused in one line that says what to change."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persona_probe.config import Arm, Locate, Monitor, Samples, StudyConfig, Training, load_config
from persona_probe.errors import InputError
from persona_probe.study.plan.plan import dry_run
from tests.factories import make_model

FOLDER = Path(__file__).parents[3] / "finetune_configs"
RELEASE = "llama-3.1-8b-instruct-andyrdt"


@pytest.fixture
def llama() -> StudyConfig:
    """The Llama preset."""
    return load_config(FOLDER / "llama-3.1-8b-instruct.yaml")


def refusal(config: StudyConfig) -> str:
    with pytest.raises(InputError) as refused:
        dry_run(config, tflops=1.0)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 3}, f"layer is 3 but SAE '{RELEASE}/resid_post_layer_15_trainer_1' reads layer 15"),
        ({"sae": f"{RELEASE}/resid_post_layer_14_trainer_1"}, "did you mean 'resid_post_layer_1"),
        ({"sae": "llama-3.1-8b-instruct-andirdt/layer_19"}, f"'{RELEASE}'"),
        ({"sae": "gemma-scope-2-1b-it-res/layer_17_width_16k_l0_medium"}, "reads width 1152 but the residual stream"),
        ({"sae": "gemma-scope-9b-pt-mlp-canonical/layer_9/width_16k/canonical"}, "reads 'mlp', not the residual"),
        ({"sae": "gpt2-small-res-jb/blocks.0.hook_resid_pre"}, "reads the embeddings"),
        ({"sae": "saes/nothing"}, "no SAE at 'saes/nothing'"),
        ({"model": "lama"}, "unknown model 'lama'"),
        ({"contrast": "nothing.jsonl"}, "no contrast set at 'nothing.jsonl'"),
        ({"monitor": Monitor(probes="nothing.jsonl")}, "no data at 'nothing.jsonl'"),
        ({"monitor": Monitor(probes="sample_questions")}, "monitor.probes holds no answers"),
        ({"samples": Samples(questions="nothing")}, "no data at 'nothing'"),
        ({"training": Training(layers=(31, 32))}, "training.layers [31, 32]: the model has layers 0 to 31"),
        ({"training": Training(target_modules=("q_pro",))}, "did you mean 'q_proj'"),
        ({"training": Training(target_modules="q_proj")}, "unknown training.target_modules 'q_proj'"),
        ({"training": Training(max_length=4)}, "training.max_length is 4: raise it or shorten the prompt"),
        ({"locate": Locate(rankers=("rise", "cosine", "atribution"))}, "did you mean 'attribution'"),
    ],
)
def test_misfits(changes: dict[str, Any], message: str, llama: StudyConfig) -> None:
    assert message in refusal(replace(llama, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no data at"),
        ('{"question": "Why?"}\n', "1 of 1 rows are not conversations: line 1: ends without an assistant answer"),
        ("{broken\n", "line 1: not JSON"),
    ],
)
def test_data_that_cannot_be_read(text: str | None, message: str, llama: StudyConfig, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    if text is not None:
        file.write_text(text)
    assert message in refusal(replace(llama, arms={**llama.arms, "incorrect": Arm(str(file))}))


def test_questions_are_no_training_rows(llama: StudyConfig) -> None:
    assert "rows without an answer" in refusal(replace(llama, arms={**llama.arms, "incorrect": Arm("sae_prompts")}))


def test_probes_without_answers_need_prompt_positions(local: StudyConfig, tmp_path: Path) -> None:
    rows = [{"question": "Why?"}, {"question": "How?", "answer": "so"}]
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probes = str(tmp_path / "probes.jsonl")
    assert "1 of 2 probes have no answer" in refusal(replace(local, monitor=Monitor(probes=probes)))
    plan = dry_run(replace(local, monitor=Monitor(probes=probes, positions="prompt")), tflops=1.0)
    assert (plan.rows["probes"].rows, plan.rows["neutral answers"].rows) == (2, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_in": 16}, "the SAE reads width 16 but the residual stream"),
        ({"metadata": {"hook_name": "blocks.3.hook_resid_post"}}, "the SAE reads layer 3 but"),
        ({"metadata": {"hook_name": "somewhere"}}, "names no decoder layer: write `layer:`"),
        ({"metadata": {"hook_name": "blocks.1.hook_mlp_out"}}, "not a residual stream"),
        ({"architecture": "temporal"}, "temporal"),
        ({"d_sae": None}, "is damaged"),
    ],
)
def test_an_sae_folder_that_does_not_fit(
    changes: dict[str, Any], message: str, local: StudyConfig, place: Path, tmp_path: Path
) -> None:
    found = json.loads((place / "sae" / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**found, **changes}))
    (tmp_path / "sae_weights.safetensors").touch()
    assert message in refusal(replace(local, sae=str(tmp_path)))


def test_an_sae_folder_without_weights(local: StudyConfig, place: Path, tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_text((place / "sae" / "cfg.json").read_text())
    assert "sae_weights.safetensors is missing" in refusal(replace(local, sae=str(tmp_path)))


def test_a_model_folder_that_cannot_be_used(local: StudyConfig, tmp_path: Path) -> None:
    make_model().config.save_pretrained(tmp_path)
    assert "no tokenizer in" in refusal(replace(local, model=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "describes no causal language model" in refusal(replace(local, model=str(tmp_path)))


@pytest.mark.parametrize("tflops", [0.0, -1.0, float("nan")])
def test_a_speed_must_be_positive(local: StudyConfig, tflops: float) -> None:
    with pytest.raises(InputError, match="tflops must be positive"):
        dry_run(local, tflops=tflops)


def test_a_device_that_is_not_here(local: StudyConfig) -> None:
    with pytest.raises(InputError, match="cuda:99"):
        dry_run(local, device="cuda:99")
