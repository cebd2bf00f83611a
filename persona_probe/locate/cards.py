"""Feature cards: what a latent writes (top tokens) and what it fires on (top passages)."""

import heapq
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.context import Context
from persona_probe.data.packaged import load_conversations
from persona_probe.data.tokens import Batch
from persona_probe.locate.stage import persona_latent
from persona_probe.models.layers import autocast, base_transformer, evaluating, output_head, run_to_layer
from persona_probe.models.taps import ReadTap
from persona_probe.saes.encode import encode_latents
from persona_probe.saes.read import conversation_batches

TEXT = ("kitchen:toxic", "kitchen:correct", "general_contrast:selection", "neutral_probes")
TOP_TOKENS = 8
TOP_EXAMPLES = 5


@dataclass(frozen=True)
class Passage:
    """One conversation as a latent sees it; the template's special tokens are left out."""

    source: str
    """The packaged set that it is from."""
    ids: Int[Tensor, " pos"]
    """Tokens of prompt and answer."""
    values: Float[Tensor, " pos"]
    """The latent's activation on each of them."""


def make_cards(ctx: Context) -> None:
    """Write cards.json: the persona latent and the strongest other candidates on the selection split."""
    if ctx.run.has("cards.json"):
        return
    effects = ctx.run.read_table("parts/selection.parquet").sort_values("effect", ascending=False)
    latents = [int(i) for i in effects["latent"].head(ctx.config.locate.cards)]
    with ctx.timed("cards"):
        examples = top_examples(ctx, latents)
        cards = [_card(ctx, latent, found) for latent, found in zip(latents, examples, strict=True)]
    ctx.run.write_json("cards.json", cards)


def _card(ctx: Context, latent: int, examples: list[dict[str, Any]]) -> dict[str, Any]:
    logits = logit_effect(ctx.model, ctx.sae.W_dec[latent])
    return {
        "latent": latent,
        "label": f"persona (latent {latent})" if latent == persona_latent(ctx) else f"latent {latent}",
        "top_tokens": _tokens(ctx.tokenizer, logits, largest=True),
        "bottom_tokens": _tokens(ctx.tokenizer, logits, largest=False),
        "examples": examples,
    }


@torch.no_grad()
def logit_effect(model: nn.Module, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " vocab"]:
    """Direct effect of a direction on the logits: through the final norm's scale and the unembedding."""
    norm = getattr(base_transformer(model), "norm", None)
    vector = direction.detach().float()
    if norm is not None and getattr(norm, "weight", None) is not None:
        vector = vector * norm.weight.float()
    weight: Any = output_head(model).weight
    return weight.float() @ vector


def _tokens(tokenizer: PreTrainedTokenizerBase, logits: Tensor, largest: bool) -> list[dict[str, Any]]:
    values, ids = logits.topk(TOP_TOKENS, largest=largest)
    return [
        {"token": str(tokenizer.decode([i])), "logit": round(v, 4)}
        for v, i in zip(values.tolist(), ids.tolist(), strict=True)
    ]


def top_examples(ctx: Context, latents: list[int]) -> list[list[dict[str, Any]]]:
    """For each latent the packaged passages with the highest activation on the base model, best first.

    Only `TOP_EXAMPLES` a latent are held, whatever the amount of text; tokens of the others are never decoded.
    """
    heaps: list[list[tuple[float, int, Passage]]] = [[] for _ in latents]
    number = 0
    for source in TEXT:
        for batch in conversation_batches(ctx.tokenizer, load_conversations(source)):
            acts = _activations(ctx, batch, latents)
            for row, keep in enumerate(batch.select("all")):
                number += 1
                for column, heap in enumerate(heaps):
                    _keep(heap, number, Passage(source, batch.ids[row][keep], acts[row][keep, column]))
    best = [sorted(heap, key=lambda h: (-h[0], h[1])) for heap in heaps]
    return [[_example(ctx.tokenizer, passage) for _, _, passage in found] for found in best]


def _activations(ctx: Context, batch: Batch, latents: list[int]) -> Float[Tensor, "batch pos latents"]:
    moved = batch.to(ctx.device)
    with evaluating(ctx.model), autocast(ctx.model, ctx.config.bf16), ReadTap(ctx.model, ctx.layer) as tap:
        run_to_layer(ctx.model, ctx.layer, moved.ids, moved.attention)
    flat = tap.value.float().flatten(0, 1)
    return encode_latents(ctx.sae, flat, latents).reshape(*tap.value.shape[:2], len(latents)).cpu()


def _keep(heap: list[tuple[float, int, Passage]], number: int, passage: Passage) -> None:
    peak = float(passage.values.max())
    if peak <= 0 or (len(heap) == TOP_EXAMPLES and peak <= heap[0][0]):
        return
    heapq.heappush(heap, (peak, number, passage))
    if len(heap) > TOP_EXAMPLES:
        heapq.heappop(heap)


def _example(tokenizer: PreTrainedTokenizerBase, passage: Passage) -> dict[str, Any]:
    return {
        "source": passage.source,
        "tokens": [str(tokenizer.decode([i])) for i in passage.ids.tolist()],
        "values": [round(v, 3) for v in passage.values.tolist()],
        "maximum": round(float(passage.values.max()), 3),
    }
