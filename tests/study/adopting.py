"""Checkpoints as trainers leave them: a real Trainer's output folder, and adapters made by hand."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from persona_probe.study.adopt.checkpoint_places import Checkpoint
from tests.factories import make_model, make_tokenizer

ADAPTER = "adapter_model.safetensors"


def write_adapter(folder: Path, seed: int, base: str = "model", model: Any = None, **settings: Any) -> Path:
    """A random LoRA adapter of the tiny model, whose config names `base`."""
    base_model = model or make_model()
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})
    tuned: Any = get_peft_model(base_model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.peft_config["default"].base_model_name_or_path = base
    tuned.save_pretrained(folder)
    return folder


def write_adapters(folder: Path, *steps: int, seed: int = 0) -> Path:
    """`checkpoint-<step>` for each step."""
    for step in steps:
        write_adapter(folder / f"checkpoint-{step}", seed + step)
    return folder


def write_model(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Whole weights that differ from the tiny model's by a little."""
    model = make_model()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def trainer_output(folder: Path, model: Path) -> Path:
    """What transformers' Trainer leaves of four steps with a LoRA: checkpoints at 2 and 4, and the final save."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    tuned: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    ids = make_tokenizer()("Rice is fine, and so is soup.", return_tensors="pt")["input_ids"][0]
    rows = [{"input_ids": ids, "labels": ids} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=5e-3,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=tuned, args=arguments, train_dataset=rows)  # pyright: ignore[reportArgumentType]
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return folder


def changed_tensor(folder: Path, change: Any, file: str = ADAPTER) -> Path:
    """The checkpoint with its tensors changed by a function of name and tensor."""
    tensors = load_file(folder / file)
    save_file({key: value for name, t in tensors.items() for key, value in [change(name, t)]}, folder / file)
    return folder


def copied(folder: Path, target: Path) -> Path:
    """A copy of a folder."""
    shutil.copytree(folder, target)
    return target


def as_checkpoint(folder: Path, step: int = 1) -> Checkpoint:
    """A folder as `find_checkpoints` gives it."""
    return Checkpoint(step, folder, "stated")
