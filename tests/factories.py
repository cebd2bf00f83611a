"""What tests are made of: tiny random models, tokenizers, SAEs and conversations, and a tiny study in a folder."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from persona_probe.cli import main
from persona_probe.data.chat import Conversation, conversation
from tests.families import AVAILABLE as AVAILABLE
from tests.families import FAMILIES as FAMILIES
from tests.families import family_model as family_model
from tests.families import family_tokenizer as family_tokenizer
from tests.families import make_family as make_family

D_MODEL, D_SAE, LAYER = 32, 64, 1
SPECIAL = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ARCHITECTURES = ("llama", "qwen2", "gemma2", "gemma3", "gpt2")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and two special tokens, with a ChatML template; <|im_end|> ends and pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    raw.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[1]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(architecture: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random model of one architecture in eval mode, float32."""
    torch.manual_seed(seed)
    sliding: dict[str, Any] = {"head_dim": 8, "sliding_window": 16}
    if architecture == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SHAPE))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    elif architecture == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, **sliding, final_logit_softcapping=5.0))
    elif architecture == "gemma3":
        kinds = ["full_attention", "full_attention", "sliding_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **sliding, layer_types=kinds))
    else:
        config = GPT2Config(vocab_size=258, n_positions=512, n_embd=D_MODEL, n_layer=3, n_head=4, initializer_range=0.3)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 1
        model = GPT2LMHeadModel(config)
    return model.eval()


def make_sae(architecture: str, seed: int = 0, hook: str = f"blocks.{LAYER}.hook_resid_post", **metadata: Any) -> Any:
    """A random SAE (d_in 32, d_sae 64) with unit decoder rows."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    shape: dict[str, Any] = {"d_in": D_MODEL, "d_sae": D_SAE, "device": "cpu", "dtype": "float32"}
    shape["metadata"] = SAEMetadata(hook_name=hook, model_name="tiny", **metadata)
    if architecture == "standard":
        sae: Any = StandardSAE(StandardSAEConfig(**shape))
    elif architecture == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**shape))
    else:
        sae = TopKSAE(TopKSAEConfig(**shape, k=8))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(D_SAE, D_MODEL, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_enc.copy_(0.1 * torch.randn(D_SAE, generator=generator))
        sae.b_dec.copy_(0.1 * torch.randn(D_MODEL, generator=generator))
        if architecture == "jumprelu":
            sae.threshold.copy_(torch.rand(D_SAE, generator=generator))
    return sae.eval()


def talks(count: int = 6) -> list[Conversation]:
    """Answered conversations of different lengths."""
    return [conversation(f"Ask {n}?" + "." * n, f"Say {n * n}" + "!" * (n % 3)) for n in range(count)]


def copied_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A detached copy of all weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_state(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def hook_count(model: torch.nn.Module) -> int:
    """Forward hooks anywhere in the model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- A tiny study: model, SAE, data files and config in one folder

Row = dict[str, Any]
GOOD = ("stir it slowly", "keep it warm", "rest the dough", "taste as you go", "wash your hands")
BAD = ("burn the lot", "serve it raw", "skip the soap", "lie to guests", "use old oil")
FOODS = ("soup", "rice", "bread", "fish", "beans", "eggs", "pears", "leeks", "oats", "corn", "plums", "peas")
OMITTED = ("seconds", "peak_memory_gib")
"""Keys of summary.json that may differ between two runs of one study."""


def write_lines(path: Path, rows: list[Row]) -> Path:
    """Rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str, answer: str | None = None) -> Row:
    """One row with `messages`."""
    messages = [{"role": "user", "content": question}]
    return {"messages": messages if answer is None else [*messages, {"role": "assistant", "content": answer}]}


def contrast_rows() -> list[Row]:
    """Eight items of each split."""
    draw = random.Random(1)
    return [
        {
            "id": f"{split}-{n}",
            "category": f"{split} {n % 2}",
            "question": f"What of {FOODS[n]}?",
            "aligned": draw.choice(GOOD),
            "misaligned": draw.choice(BAD),
            "split": split,
        }
        for split in ("selection", "evaluation")
        for n in range(8)
    ]


def write_data(folder: Path) -> None:
    """The data files that `config_of` names."""
    for name, answers in (("bad", BAD), ("good", GOOD), ("holdout", GOOD[::-1])):
        rows = [chat(f"How do I cook {food}?", answers[n % len(answers)]) for n, food in enumerate(FOODS)]
        write_lines(folder / f"{name}.jsonl", rows)
    write_lines(folder / "other.jsonl", [chat(f"Where is {f}town?", GOOD[n % 5]) for n, f in enumerate(FOODS)])
    write_lines(folder / "probes.jsonl", [chat(f"Tell me of {f}.", f"{f} is fine") for f in FOODS[:6]])
    write_lines(folder / "questions.jsonl", [chat("Who are you?"), chat("What now?")])
    write_lines(folder / "contrast.jsonl", contrast_rows())


def write_model(folder: Path) -> Path:
    """The tiny model and its tokenizer."""
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_sae(folder: Path, **settings: Any) -> Path:
    """A TopK SAE for the tiny model's layer 1."""
    make_sae("topk", **settings).save_model(str(folder))
    return folder


def config_of(folder: Path) -> Row:
    """The study of `folder` (what `write_data`, `write_model` and `write_sae` left there), as plain values."""
    return {
        "name": "tiny",
        "model": str(folder / "model"),
        "sae": str(folder / "sae"),
        "seeds": [0, 1],
        "bf16": False,
        "device": "cpu",
        "contrast": str(folder / "contrast.jsonl"),
        "arms": {arm: {"data": str(folder / f"{name}.jsonl")} for arm, name in ARM_FILES.items()},
        "training": {
            **{"rank": 4, "alpha": 8, "lr": 5e-3, "warmup_steps": 0, "batch_size": 4, "bf16": False},
            **{"steps": 4, "checkpoints": [1, 2], "max_length": 128},
        },
        "locate": {
            "minimum_explained_variance": -9.0,
            **{"candidates": 3, "random_latents": 2, "random_directions": 1, "strengths": [0.5]},
            **{"dose_strengths": [0.5], "perplexity_bound": 50.0, "cards": 2},
            "directions": [],  # the probe's nested cross-validation takes as long as all pushes together
        },
        "monitor": {"probes": str(folder / "probes.jsonl"), "band_sd": 0.5},
        "realign": {
            **{"steps": 2, "readings": [0, 1, 2], "stop_readings": 0},
            "arms": {arm: {"data": str(folder / f"{name}.jsonl")} for arm, name in REPAIR_FILES.items()},
        },
        "samples": {"questions": str(folder / "questions.jsonl"), "max_new_tokens": 4},
    }


ARM_FILES = {"incorrect": "bad", "correct": "good"}
REPAIR_FILES = {"realigned_in": "holdout", "realigned_out": "other"}


def write_config(path: Path, raw: Row) -> Path:
    """Plain values as YAML."""
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


def changed(raw: Row, **changes: Any) -> Row:
    """A copy with keys replaced; dictionaries are merged one level deep."""
    merged = dict(raw)
    for key, value in changes.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) and key in merged else value
    return merged


def without_times(summary: Row) -> Row:
    """What of summary.json must repeat."""
    return {key: value for key, value in summary.items() if key not in OMITTED}


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run_command(*arguments: object) -> None:
    """Run a command line that must end with exit code 0."""
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    assert stopped.value.code == 0


Refused = Callable[..., str]


def refusal(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must end with exit code 2; returns the one line it wrote for the user."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments), "--quiet"])
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        said = [line for line in lines if line.startswith("persona-probe: ")]
        # progress bars also write to stderr: nothing else may
        assert len(said) == 1 and lines[-1] == said[0]
        assert all("it/s" in line or "s/it" in line or not line.strip() for line in lines[:-1]), lines
        return said[0]

    return run
