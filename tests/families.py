"""Tiny random models of the families that people use, each with a byte tokenizer and a template by its family's rules.

A shape is small (d_model 32, 3 or 4 layers, about 300 tokens), but has what makes the family different: logit caps and
multipliers, sliding windows, experts, convolutions and state-space layers, a text model inside a multimodal one, tied
and untied heads, beginning-of-text tokens, end-of-turn tokens, thoughts, channels, roles that must alternate. Templates
are read from the installed TRL where it has the family's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

D_MODEL = 32

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ['user', 'assistant'] %}{{ raise_exception('only user and assistant roles') }}"
    "{% elif (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI4 = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """One family: what its tiny model and its tokenizer are made of."""

    model: str
    """Class of transformers."""
    config: str
    """Class of transformers."""
    shape: Mapping[str, Any]
    """What the configuration has on top of (or, with a None, without) `_SHAPE`."""
    template: str | None
    """A file of TRL's, the template itself, or None (a base model)."""
    special: tuple[str, ...] = ()
    """Special tokens of the tokenizer, next to those below."""
    added: tuple[str, ...] = ()
    """Added tokens that are not special (`<think>`)."""
    bos: str | None = None
    eos: str = "<|im_end|>"
    """Also the end of a turn, unless `end_of_turn` is another."""
    end_of_turn: str | None = None
    pad: str | None = "<|endoftext|>"
    adds_bos: bool = False
    """Whether the tokenizer puts `bos` before plain text."""
    system: bool = True
    """Whether the template takes a system role."""
    experts: bool = False
    """Whether tokens are routed to experts, so that training may have a loss of the router."""
    recurrent: bool = False
    """Whether some layers keep a state in place of keys and values."""

    @property
    def missing(self) -> str | None:
        """Why this family is not made here, or None."""
        for name in (self.model, self.config):
            if not hasattr(transformers, name):
                return f"transformers {transformers.__version__} has no {name}"
        return None


_SHAPE: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
_HEAD: dict[str, Any] = {"head_dim": 8}
_SLIDING: dict[str, Any] = {**_HEAD, "sliding_window": 16}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
_GEMMA4: dict[str, Any] = {
    **_SLIDING,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "final_logit_softcapping": 5.0,
    "tie_word_embeddings": True,
}
_VISION: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
}

_QWEN: dict[str, Any] = {
    "special": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    "added": ("<tool_call>", "</tool_call>", "<think>", "</think>"),
}
_GEMMA: dict[str, Any] = {
    "special": ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
    **{"bos": "<bos>", "eos": "<eos>", "end_of_turn": "<end_of_turn>", "pad": "<pad>", "adds_bos": True},
}
_GEMMA4_TOKENS: dict[str, Any] = {
    "special": ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|image|>"),
    **{"bos": "<bos>", "eos": "<eos>", "end_of_turn": "<turn|>", "pad": "<pad>", "adds_bos": True},
}
_LLAMA: dict[str, Any] = {
    "special": ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    **{"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "pad": None, "adds_bos": True},
}
_MISTRAL: dict[str, Any] = {
    "special": ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
    **{"bos": "<s>", "eos": "</s>", "pad": None, "adds_bos": True, "system": False},
}
_BASE: dict[str, Any] = {"special": ("<|endoftext|>",), "bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": None}

FAMILIES: dict[str, Family] = {
    "llama3": Family("LlamaForCausalLM", "LlamaConfig", {}, "llama3.jinja", **_LLAMA),
    "qwen2.5": Family("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": True}, "qwen2_5.jinja", **_QWEN),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", _HEAD, "qwen3.jinja", **_QWEN),
    "qwen3.5": Family(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        {
            **_HEAD,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        },
        "qwen3_5_think.jinja",
        recurrent=True,
        **_QWEN,
    ),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {"sliding_window": 16}, MISTRAL, **_MISTRAL),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_SLIDING, "final_logit_softcapping": 5.0, "tie_word_embeddings": True},
        "gemma.jinja",
        system=False,
        **_GEMMA,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_SLIDING,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "tie_word_embeddings": True,
        },
        "gemma3.jinja",
        **_GEMMA,
    ),
    "gemma4-text": Family("Gemma4ForCausalLM", "Gemma4TextConfig", _GEMMA4, "gemma4.jinja", **_GEMMA4_TOKENS),
    "gemma4": Family(
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        {"text_config": {**_GEMMA4, "num_kv_shared_layers": 2}, "vision_config": _VISION, "audio_config": None},
        "gemma4.jinja",
        **_GEMMA4_TOKENS,
    ),
    "phi4": Family(
        "Phi3ForCausalLM",
        "Phi3Config",
        {},
        PHI4,
        special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        end_of_turn="<|end|>",
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        "Olmo2Config",
        {},
        OLMO,
        special=("<|endoftext|>", "<|padding|>"),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        pad="<|padding|>",
    ),
    "pythia": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", {"num_key_value_heads": None}, None, **_BASE),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")),
            **{"num_key_value_heads": None, "max_position_embeddings": None, "tie_word_embeddings": True},
            **{"n_embd": D_MODEL, "n_layer": 3, "n_head": 4, "n_positions": 2048},
        },
        None,
        **_BASE,
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_SLIDING, **_EXPERTS, "num_local_experts": 4},
        "gptoss.jinja",
        special=(
            *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>"),
            *("<|start|>", "<|end|>", "<|message|>", "<|call|>"),
        ),
        experts=True,
        bos="<|startoftext|>",
        eos="<|return|>",
    ),
    "mixtral": Family(
        "MixtralForCausalLM", "MixtralConfig", {**_EXPERTS, "num_local_experts": 4}, MISTRAL, experts=True, **_MISTRAL
    ),
    "qwen3-moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_HEAD, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24},
        "qwen3_instruct_2507.jinja",
        experts=True,
        **_QWEN,
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention", "conv"], "tie_word_embeddings": True},
        "lfm2.jinja",
        special=("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        recurrent=True,
        bos="<|startoftext|>",
        pad="<|pad|>",
        adds_bos=True,
    ),
    "falcon-h1": Family(
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {
            **{"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16},
            **{"lm_head_multiplier": 0.4, "embedding_multiplier": 2.0, "key_multiplier": 0.7},
        },
        CHATML,
        special=("<|pad|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
        recurrent=True,
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        end_of_turn="<|im_end|>",
        pad="<|pad|>",
    ),
    "r1-distill": Family(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {},
        "deepseek_r1_distill.jinja",
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        added=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        pad="<｜end▁of▁sentence｜>",
        adds_bos=True,
    ),
}

AVAILABLE = tuple(name for name, family in FAMILIES.items() if family.missing is None)
"""The families that the installed transformers has; `FAMILIES[name].missing` tells why another is left out."""

THINKING = {
    "qwen3": "<think>\nHm, aeiou.\n</think>\n\nTry.<|im_end|>",
    "qwen3.5": "Hm, aeiou.\n</think>\n\nTry.<|im_end|>",  # the template opens the thought
    "r1-distill": "Hm, aeiou.\n</think>\n\nTry.<｜end▁of▁sentence｜>",
    "gpt-oss": "<|channel|>analysis<|message|>Hm, aeiou.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Try.<|return|>",
}
"""What a family writes where its template lets it think: a thought, an answer, and their end."""


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Bytes and the family's special and added tokens, with its template."""
    family = FAMILIES[name]
    tokens = [*family.special, *family.added, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: n for n, token in enumerate(tokens)}
    raw: Any = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    raw.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    if family.adds_bos and family.bos:
        pairs = [(family.bos, vocab[family.bos])]
        raw.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=pairs)
    named = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.pad}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **{k: v for k, v in named.items() if v})
    if family.template:
        tokenizer.chat_template = _template(family.template)
    return tokenizer


def family_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode, float32; norms and biases are random too. The same seed gives the same weights."""
    family, tokenizer = FAMILIES[name], family_tokenizer(name)
    if family.missing:
        raise LookupError(family.missing)
    # a little wider than the tokenizer, as published models are
    size = -(-(len(tokenizer) + 1) // 16) * 16
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(family.end_of_turn or family.eos)]
    ids["eos_token_id"] = ends[0] if ends[0] == ends[1] else ends
    if "text_config" in family.shape:
        text = _SHAPE | ids | {"vocab_size": size, "vocab_size_per_layer_input": size} | family.shape["text_config"]
        settings = {**family.shape, "text_config": text, "image_token_id": tokenizer.convert_tokens_to_ids("<|image|>")}
    else:
        settings = _SHAPE | ids | {"vocab_size": size} | dict(family.shape)
        if "hidden_size_per_layer_input" in settings:
            settings["vocab_size_per_layer_input"] = size
    without = ("audio_config", "pad_token_id")
    settings = {key: value for key, value in settings.items() if value is not None or key in without}
    config = getattr(transformers, family.config)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, family.model)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_family(name: str, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The tiny model and the tokenizer of a family."""
    return family_model(name, seed), family_tokenizer(name)


@cache
def _template(name: str) -> str:
    if not name.endswith(".jinja"):
        return name
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / name).read_text(encoding="utf-8")


def plain(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer as a user of this family would give it: base models get plain text for a template."""
    from persona_probe.data.template import with_template

    settled: Any = with_template(tokenizer, template="none" if FAMILIES[name].template is None else None)
    return settled


@torch.no_grad()
def own_scores(model: Any, groups: Any) -> Any:
    """Mean answer log-probabilities (nats per token), each row alone and whole through the model's own forward."""
    out = [0.0] * sum(len(group.index) for group in groups)
    for group in groups:
        for row, number in enumerate(group.index):
            real = group.attention[row].bool()
            ids, answer = group.ids[row][real], group.response[row][real]
            logprobs = model(input_ids=ids[None]).logits[0].float().log_softmax(dim=-1)
            out[number] = float(logprobs[:-1].gather(1, ids[1:, None])[:, 0][answer[1:]].mean())
    return np.array(out)
