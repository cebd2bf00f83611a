"""Sample answers from a model: left-padded batches, seeded, stopping at the end of the turn."""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, as_conversations
from persona_probe.models.layers import evaluating


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Conversation],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[str]:
    """One sampled answer for each prompt, in order.

    Args:
        prompts: questions or conversations that end with a user turn.
        temperature: 0 is greedy decoding.
        seed: seeds every batch; the caller's random state is left as it was.
        progress: label of a progress bar; None shows none.

    Returns:
        Decoded answers without special tokens, stripped of surrounding white space.
    """
    rendered = [
        tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in as_conversations(prompts)
    ]
    return complete_text(
        model,
        tokenizer,
        [str(r) for r in rendered],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )


@torch.no_grad()
def complete_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    progress: str | None = None,
) -> list[str]:
    """Continue rendered texts (chat template already applied); see `sample_answers`."""
    answers: list[str] = []
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    starts = range(0, len(texts), batch_size)
    with evaluating(model):
        for number, start in enumerate(tqdm(starts, desc=progress, disable=progress is None)):
            torch.manual_seed(seed * 1_000_003 + number)
            block = list(texts[start : start + batch_size])
            inputs = tokenizer(block, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
            inputs = {k: v.to(model.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
            out = model.generate(  # pyright: ignore[reportCallIssue]
                **inputs,
                max_new_tokens=max_new_tokens,
                top_k=0,
                top_p=1.0,
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
            new = out[:, inputs["input_ids"].shape[1] :]
            answers += [t.strip() for t in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers
