"""The table of hook names is TransformerLens' own: its bridge has the same values under the same names."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from persona_probe.models.load import make_bridge
from persona_probe.models.taps import read
from persona_probe.saes.hooks import hook_place
from tests.families import family_model

IDS = torch.arange(24).reshape(2, 12) + 60
NAMES = (
    "blocks.1.hook_resid_post",
    "blocks.1.hook_out",
    "blocks.1.hook_resid_pre",
    "blocks.1.hook_in",
    "blocks.1.hook_attn_out",
    "blocks.1.attn.hook_out",
    "blocks.1.attn.hook_z",
    "blocks.1.attn.o.hook_in",
    "blocks.1.hook_mlp_out",
    "blocks.1.mlp.hook_out",
    "blocks.1.mlp.hook_in",
    "blocks.1.ln1.hook_normalized",
    "blocks.1.ln2.hook_normalized",
)
POST_NORMS = ("blocks.1.ln1_post.hook_out", "blocks.1.ln2_post.hook_out")
AFTER = r"ln\d\.hook_normalized"
"""In OLMo 2 TransformerLens calls the norms after attention and MLP so; an SAE of it would read what they put out."""


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gpt2", "olmo2", "pythia", "qwen3"])
def test_every_name_has_the_bridges_values(family: str, tiny_folder: Path) -> None:
    model = family_model(family)
    model.config.architectures = [type(model).__name__]
    bridge = make_bridge(model, AutoTokenizer.from_pretrained(tiny_folder), None, "tiny")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(IDS, prepend_bos=False)
    names = [n for n in (*NAMES, *POST_NORMS) if n in NAMES or family == "gemma2"]
    for name in names:
        if family == "olmo2" and re.search(AFTER, name):
            continue
        place = hook_place(name)
        assert place is not None
        with torch.no_grad(), read(model, place) as tap:
            model(IDS)
        wanted = cache[name]
        assert torch.allclose(tap.value, wanted.reshape(tap.value.shape), atol=1e-4), (name, place)
