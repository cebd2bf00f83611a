"""Tiny random models, tokenizer, SAEs and conversations: fast, seeded, with weights large enough to matter."""

from typing import Any

import torch
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

from persona_probe.data.chat import Conversation, conversation

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
