"""The quality of one SAE on several texts, as a table."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError
from persona_probe.finetune.data import load_data
from persona_probe.models.load import load_model
from persona_probe.saes.check import check_quality
from persona_probe.saes.load import HELD_OUT_FILE, find_folder, load_sae, sae_layer

UNSEEN = ("general_contrast:evaluation", "neutral_probes")


def quality_report(
    name: str,
    model_name: str = "smollm2-135m-instruct",
    data: Sequence[str] | None = None,
    layer: int | None = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """Quality on each text: text, explained_variance, l0, dead_share, loss_recovered, losses, tokens.

    Without `data`: the held-out samples in the SAE's folder, and two packaged sets that it was not trained on.

    Raises:
        InputError: unknown SAE, model or data, or they do not fit.
    """
    sae = load_sae(name, device=device)
    model, tokenizer = load_model(model_name, device=device)
    texts = _texts(name, data)
    at = sae_layer(sae) if layer is None else layer
    rows = [{"text": label, **check_quality(sae, model, tokenizer, talks, at)} for label, talks in texts.items()]
    return pd.DataFrame(rows)


def _texts(name: str, data: Sequence[str] | None) -> dict[str, list[Conversation]]:
    if data:
        return {spec: load_data(spec) for spec in data}
    held_out = Path(find_folder(name)) / HELD_OUT_FILE
    texts = {"held-out samples": load_data(str(held_out))} if held_out.is_file() else {}
    texts |= {spec: load_data(spec) for spec in UNSEEN}
    if not texts:
        raise InputError("no text to measure on: pass --data")
    return texts
