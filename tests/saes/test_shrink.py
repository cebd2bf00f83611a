"""Weights stored in bfloat16: half the bytes, float32 when loaded, the same latents but for rounding."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from persona_probe.errors import InputError
from persona_probe.runs import file_sha256
from persona_probe.saes.load import WEIGHTS_FILE, load_sae
from persona_probe.saes.shrink import shrink
from tests.factories import make_sae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "full"
    make_sae("topk").save_model(str(path))
    quality = {"explained_variance": 0.8, "sha256": file_sha256(path / WEIGHTS_FILE)}
    (path / "quality.json").write_text(json.dumps(quality))
    (path / "README.md").write_text("# an SAE\n")
    return path


def test_the_stored_sae_loads_in_float32_and_reads_the_same(folder: Path, tmp_path: Path) -> None:
    small = shrink(folder, tmp_path / "small")
    assert (small / WEIGHTS_FILE).stat().st_size < 0.6 * (folder / WEIGHTS_FILE).stat().st_size
    assert load_file(small / WEIGHTS_FILE)["W_dec"].dtype == torch.bfloat16
    full, rounded = load_sae(folder), load_sae(small)
    assert rounded.W_dec.dtype == torch.float32
    x = torch.randn(50, full.cfg.d_in, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(full.decode(full.encode(x)), rounded.decode(rounded.encode(x)), atol=0.05)
    assert "bfloat16" in (small / "README.md").read_text()


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists"):
        shrink(folder, folder)
    with pytest.raises(InputError, match="no SAELens folder"):
        shrink(tmp_path / "nowhere", tmp_path / "small")
