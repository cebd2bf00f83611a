"""`make bench-gpu` runs every part in a tiny form on a CPU, and is a test of the numbers too."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import values
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.shapes import FEW, SHAPES, TINY
from persona_probe.data.load import load_contrast
from tests.factories import make_tokenizer

CPU = torch.device("cpu")
RATES = {
    "reading": "tokens/s",
    "sweep": "pushes/s",
    "attribution": "answers/s",
    "monitor": "readings/s",
    "training": "tokens/s, alone",
    "sampling": "tokens/s",
}


def test_every_part_runs_on_the_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_tokenizer", lambda _name: make_tokenizer())
    out = tmp_path / "gpu.json"
    command.main(["--device", "cpu", "--out", str(out)])
    record = json.loads(out.read_text())
    found = record["shapes"]["tiny"]
    assert list(found) == list(PARTS) and set(RATES) == set(PARTS)
    assert all(found[part][rate] > 0 for part, rate in RATES.items())
    assert found["sweep"]["largest difference, nats"] < 0.05  # bf16
    assert 0 <= max(record["values"].values()) <= values.TOLERANCE
    assert found["reading"]["waits of the host"] is None  # counted on a GPU alone


def test_other_numbers_than_the_cpus_stop_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "differences", lambda *_: {"latents": 2 * values.TOLERANCE})
    with pytest.raises(RuntimeError, match="other numbers than the CPU: latents"):
        command.measured([TINY], FEW, make_tokenizer(), CPU, ["reading"])


def test_the_comparison_with_the_cpu_sees_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    right = values.read_latents

    def wrong(model: object, sae: object, groups: object, layer: int, positions: str, *, bf16: bool) -> object:
        moved = len(groups) == 1  # pyright: ignore[reportArgumentType]
        return right(model, sae, groups, layer, "all" if moved else positions, bf16=bf16)  # pyright: ignore

    monkeypatch.setattr(values, "read_latents", wrong)
    apart = values.differences(make_tokenizer(), load_contrast("evaluation")[:3], CPU)
    assert apart.pop("latents") > 10 * values.TOLERANCE > 10 * max(apart.values())


def test_no_part_begins_after_the_seconds_are_over(capsys: pytest.CaptureFixture[str]) -> None:
    record = command.measured([TINY], FEW, make_tokenizer(), CPU, ["reading"], seconds=0.0)
    assert record["shapes"] == {"tiny": {}} and "left out" in capsys.readouterr().out


def test_the_shapes_are_those_of_the_published_models() -> None:
    weights = {"0.5b": 494_032_768, "7b": 7_615_616_512}
    for name, shape in SHAPES.items():
        width = shape.hidden // shape.heads * shape.kv_heads
        attention = 2 * shape.hidden * (shape.hidden + width) + shape.hidden + 2 * width
        layer = attention + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
        heads = 1 if shape.tied else 2
        assert heads * shape.vocabulary * shape.hidden + shape.layers * layer + shape.hidden == weights[name]
