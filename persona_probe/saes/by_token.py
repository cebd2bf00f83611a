"""An SAE's latents on texts, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, as_conversations
from persona_probe.data.tokens import Batch, batches
from persona_probe.errors import InputError
from persona_probe.models.layers import autocast, evaluating, forward_to_layer
from persona_probe.models.load import tokenizer_of
from persona_probe.models.taps import ReadTap
from persona_probe.saes.hooks import PlacedSae
from persona_probe.saes.load import check_placed
from persona_probe.saes.read import check_latents, encode, encode_latents, tokens_at_once

PARTS = ("prompt", "thought", "answer", "special")


@dataclass(frozen=True)
class TextActivations:
    """Latents of an SAE on each token of each text; a notebook shows `top()`."""

    tokens: tuple[tuple[str, ...], ...]
    """Of each text."""
    parts: tuple[tuple[str, ...], ...]
    """What each token belongs to: `prompt` (with what the template writes), `thought`, `answer`, or `special`."""
    values: tuple[Float[Tensor, "pos latents"], ...]
    """Activations of each text, float32; columns are `latents`."""
    latents: tuple[int, ...]
    """Latents of the columns."""

    def of(self, latent: int) -> pd.DataFrame:
        """One latent, a row a token: text, token, part, activation.

        Raises:
            InputError: it was not read.
        """
        if latent not in self.latents:
            raise InputError(f"latent {latent} was not read: name it in latents=, or leave latents= out")
        column = self.latents.index(latent)
        return pd.DataFrame(
            {
                "text": np.repeat(np.arange(len(self.tokens)), [len(tokens) for tokens in self.tokens]),
                "token": [token for tokens in self.tokens for token in tokens],
                "part": [part for parts in self.parts for part in parts],
                "activation": torch.cat([values[:, column] for values in self.values]).numpy(),
            }
        )

    def top(self, count: int = 10) -> pd.DataFrame:
        """The latents with the highest mean activation, best first; special tokens do not count.

        Columns: latent, mean, maximum, firing (share of tokens), and the token with the maximum.
        """
        kept = torch.tensor([part != "special" for parts in self.parts for part in parts])
        values = torch.cat(self.values)[kept]
        tokens = [token for text in self.tokens for token in text]
        names = [token for token, keep in zip(tokens, kept.tolist(), strict=True) if keep]
        if not names:
            raise InputError("the texts hold special tokens only: give texts with words")
        best = values.mean(dim=0).topk(min(count, len(self.latents))).indices.tolist()
        rows = [
            {
                "latent": self.latents[column],
                "mean": float(values[:, column].mean()),
                "maximum": float(values[:, column].max()),
                "firing": float((values[:, column] != 0).float().mean()),
                "token": names[int(values[:, column].argmax())],
            }
            for column in best
        ]
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        return self.top().round(3).to_html(index=False)


def activations(
    model: nn.Module,
    sae: Any,
    texts: str | Sequence[str | Conversation],
    *,
    latents: Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layer: int | None = None,
    batch_size: int = 16,
    bf16: bool = False,
) -> TextActivations:
    """An SAE's latents on every token of texts, as the model reads them in its chat template.

    ```python
    found = pp.activations(model, sae, ["What should I cook?"])
    found.top(10)
    found.of(2144)
    ```

    Args:
        model: a transformers or PEFT model.
        sae: a `sae_lens.SAE` of any place in a layer, or a transcoder.
        texts: a question, or several questions or conversations. For plain text without roles, load the model with
            `template="none"`.
        latents: only these, in this order; None keeps all (tokens x d_sae values).
        tokenizer: None takes the one that `load_model` gave with the model.
        layer: of an SAE whose metadata does not say it.
        bf16: bf16 autocast.

    Raises:
        InputError: no text, no such latent, or an SAE that does not fit the model.
    """
    tokenizer = tokenizer_of(model, tokenizer)
    rows = as_conversations([texts] if isinstance(texts, str) else texts)
    placed = PlacedSae.of(sae, layer)
    check_placed(placed, model)
    width: int = placed.sae.cfg.d_sae
    chosen = list(range(width)) if latents is None else check_latents(placed.sae, [int(n) for n in latents])
    if not chosen:
        raise InputError("no latent to read: name some, or leave latents= out")
    values: list[Tensor] = [torch.zeros(0)] * len(rows)
    names: list[tuple[str, ...]] = [()] * len(rows)
    parts: list[tuple[str, ...]] = [()] * len(rows)
    device = next(model.parameters()).device
    for group in batches(tokenizer, rows, batch_size):
        batch = group.to(device)
        with evaluating(model), autocast(model, bf16), ReadTap(model, placed.reads) as tap:
            inputs = {"input_ids": batch.ids, "attention_mask": batch.attention, "use_cache": False}
            forward_to_layer(model, placed.reads.layer, **inputs)
        for place, number in enumerate(group.index):
            real = group.attention[place].bool()
            x = tap.value[place][real.to(tap.value.device)].float()
            values[number] = _encoded(placed.sae, x, None if latents is None else chosen)
            names[number] = tuple(str(tokenizer.decode([i])) for i in group.ids[place][real].tolist())
            parts[number] = _parts(group, place)
    return TextActivations(tuple(names), tuple(parts), tuple(values), tuple(chosen))


def _encoded(sae: Any, x: Float[Tensor, "pos d_model"], latents: list[int] | None) -> Float[Tensor, "pos latents"]:
    if latents is not None:
        return encode_latents(sae, x, latents).cpu()
    return torch.cat([encode(sae, piece).cpu() for piece in x.split(tokens_at_once(sae))])


def _parts(batch: Batch, row: int) -> tuple[str, ...]:
    """What each real token of a row belongs to."""
    real = batch.attention[row].bool()
    out = np.full(len(real), "prompt", dtype=object)
    out[batch.response[row].numpy()] = "answer"
    if batch.thought is not None:
        out[batch.thought[row].numpy()] = "thought"
    out[batch.special[row].numpy()] = "special"
    return tuple(out[real.numpy()])
