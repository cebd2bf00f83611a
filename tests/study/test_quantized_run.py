"""A study of a 4-bit model runs through the whole loop, and its SAE may be kept in bf16."""

import importlib.util
from pathlib import Path

import pytest
import torch

from persona_probe.config import StudyConfig, from_dict
from persona_probe.errors import InputError
from persona_probe.latents.stage import locate
from persona_probe.models.identity import model_key
from persona_probe.models.quantized import is_quantized
from persona_probe.saes.load import load_sae
from persona_probe.saes.read import encode
from persona_probe.study.study import Study
from tests.factories import D_MODEL, Row, changed, config_of

PLACEMENT = {"device_map": {"": "cpu"}, "attn_implementation": "eager"}


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra: quantization)"
)
def test_a_4_bit_study_runs_and_leaves_its_base(place: Path, tmp_path: Path) -> None:
    options = {
        "quantization": "4bit",
        "sae_dtype": "bfloat16",
        "device_map": {"": "cpu"},
        "attn_implementation": "eager",
    }
    raw = changed(config_of(place), seeds=[0], **options)
    study = Study.from_config(from_dict(StudyConfig, raw), tmp_path / "run")
    study.induce()
    ctx = study.context
    assert is_quantized(ctx.model) and ctx.model.config._attn_implementation == "eager"
    assert ctx.sae.dtype == torch.bfloat16 == ctx.sae.W_enc.dtype
    before = model_key(ctx.model)
    locate(ctx)  # without feature cards, which read all packaged text
    study.track().realign()
    assert model_key(ctx.model) == before
    readings = study.readings.query("feature == 'mean difference'").set_index(["arm", "step"])["mean"]
    assert readings.notna().all() and readings["incorrect", 4] != readings["incorrect", 0] == readings["base", 0]
    assert readings["realigned_in", 0] == pytest.approx(readings["incorrect", 4], abs=1e-5)
    again = Study.open(tmp_path / "run").config
    assert again == study.config and again.hash != from_dict(StudyConfig, changed(raw, quantization="none")).hash


def test_an_sae_in_bf16_reads_the_same_latents_roughly(place: Path) -> None:
    x = torch.randn(64, D_MODEL, generator=torch.Generator().manual_seed(0)) * 3
    wide, narrow = (encode(load_sae(place / "sae", dtype=dtype), x) for dtype in (None, "bfloat16"))
    assert narrow.dtype == torch.float32
    assert (wide - narrow).norm() < 0.1 * wide.norm()
    with pytest.raises(InputError, match="unknown dtype of an SAE 'float8'"):
        load_sae(place / "sae", dtype="float8")


def test_new_keys_at_their_defaults_leave_the_hash(raw: Row) -> None:
    plain = from_dict(StudyConfig, raw)
    said = {"quantization": "none", "device_map": None, "attn_implementation": None, "sae_dtype": None}
    assert from_dict(StudyConfig, raw | said).hash == plain.hash
    half = from_dict(StudyConfig, raw | {"torch_dtype": "bfloat16"})
    assert half == from_dict(StudyConfig, raw | {"weights": "bfloat16"}) and half.hash != plain.hash
    assert from_dict(StudyConfig, raw | {"torch_dtype": "float16"}).loading.dtype == "float16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "4bit", "training": {"method": "full"}}, "full needs weights: float32 without quantization"),
        ({"weights": "bfloat16", "training": {"method": "full"}}, "steps on bfloat16 weights would round to nothing"),
        ({"quantization": "3bit"}, "quantization must be one of none, 4bit, 8bit, not '3bit'"),
        ({"weights": "int8"}, "weights must be one of float32, bfloat16, float16, not 'int8'"),
        ({"weights": "bfloat16", "torch_dtype": "float16"}, "are one setting: leave one out"),
        ({"sae_dtype": "int8"}, "sae_dtype must be one of float32, bfloat16, not 'int8'"),
        ({"device_map": ""}, "device_map must not be empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(raw: Row, changes: Row, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        from_dict(StudyConfig, changed(raw, **changes))
    assert "\n" not in str(refused.value)
