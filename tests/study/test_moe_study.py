"""Mixtures of experts: TRL asks them for router logits while it trains, and they must sample afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from persona_probe.config import StudyConfig, Training, from_dict
from persona_probe.data.chat import conversation
from persona_probe.errors import TrainingDiverged
from persona_probe.finetune.sft import fine_tune, stripping, with_adapter
from persona_probe.models.adapters import organism
from persona_probe.models.load import load_model
from persona_probe.study.study import Study
from tests.factories import SHAPE, Row, changed, make_tokenizer
from tests.models.adapter_kinds import state_hash

EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**{**SHAPE, **EXPERTS})).eval()


def write_mixtral(folder: Path) -> str:
    mixtral().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def study_of(raw: Row, folder: Path, **training: Any) -> Study:
    model = write_mixtral(folder / "model")
    config = changed(raw, model=model, seeds=[0], training={"checkpoints": [4], **training})
    return Study.from_config(from_dict(StudyConfig, config), folder / "run")


def test_a_study_of_a_mixture_of_experts_from_induce_to_samples(raw: Row, tmp_path: Path) -> None:
    study = study_of(raw, tmp_path)
    before = state_hash(study.context.model)
    study.induce().locate().track().realign().evaluate()
    assert state_hash(study.context.model) == before
    lines = (study.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["arm"] for line in lines} >= {"base", "incorrect"}


def test_whole_weights_of_a_mixture_of_experts_can_sample(raw: Row, tmp_path: Path) -> None:
    study = study_of(raw, tmp_path, method="full", lr=1e-3).induce()
    with study.context.organism("incorrect", 0) as tuned:
        assert tuned.generate(torch.arange(5, 10)[None], max_new_tokens=2).shape == (1, 7)  # pyright: ignore


@pytest.mark.parametrize("fails", [False, True])
def test_fine_tuning_leaves_a_mixtures_configuration(fails: bool, tmp_path: Path) -> None:
    model, tokenizer = mixtral(), make_tokenizer()
    before = state_hash(model)
    training = Training(
        rank=2, steps=1, checkpoints=(), batch_size=2, warmup_steps=0, bf16=False, lr=1e39 if fails else 1e-3
    )
    rows = [conversation(f"Ask {n}?", f"Say {n}") for n in range(4)]

    def tune() -> None:
        with stripping(with_adapter(model, training, 0)) as tuned:
            fine_tune(tuned, tokenizer, rows, training, seed=0, folder=tmp_path)

    if fails:
        with pytest.raises(TrainingDiverged):
            tune()
    else:
        tune()
    assert state_hash(model) == before


def test_a_checkpoint_that_asks_for_router_logits_can_sample(tmp_path: Path) -> None:
    other = mixtral()
    other.config.output_router_logits = True
    other.save_pretrained(tmp_path / "tuned")
    make_tokenizer().save_pretrained(tmp_path / "tuned")
    ids = torch.arange(5, 10)[None]
    with organism(mixtral(), tmp_path / "tuned") as tuned:
        assert tuned.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 7)  # pyright: ignore
    loaded, _ = load_model(str(tmp_path / "tuned"))
    assert loaded.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 7)  # pyright: ignore
