"""A recipe small enough for the tiny model, with packaged sets of a few words."""

from pathlib import Path

import pytest

from persona_probe.saes import sae_training as train
from persona_probe.saes import stream as text
from persona_probe.saes.stream import SaeConfig, TextConfig, TextPart
from tests.factories import D_SAE, LAYER, make_model, make_tokenizer

PARTS = (TextPart("asked", ("sae_prompts",), batches=3), TextPart("own", batches=2))
ROWS = {
    "sae_personas": [{"system": "Rude."}, {"system": "Kind."}],
    "sae_prompts": [{"question": f"Q{n}?"} for n in range(9)],
}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SaeConfig:
    """A tiny SAE's recipe; `load_model` gives the tiny model, and the cache is a temporary folder."""
    monkeypatch.setattr(text, "load_rows", lambda name: ROWS[name])
    monkeypatch.setattr(text, "USER_TURN_TOKENS", 5)
    monkeypatch.setattr(train, "load_model", lambda *_args, **_kwargs: (make_model(), make_tokenizer()))
    monkeypatch.setenv("PERSONA_PROBE_CACHE", str(tmp_path / "cache"))
    return SaeConfig(
        name="tiny/topk",
        model="tiny",
        layer=LAYER,
        d_sae=D_SAE,
        k=4,
        tokens=24 * 16,
        batch_tokens=16,
        buffer_tokens=64,
        checkpoint_every=6,
        dead_window=4,
        text=TextConfig(parts=PARTS, batch_conversations=4, max_new_tokens=10, holdout_share=0.3),
    )
