"""Training stays on the GPU that holds the model, and says what to set where several are visible."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from persona_probe.evaluate.answers import suffix_tokens
from persona_probe.finetune import sft
from persona_probe.finetune.sft import on_one_gpu
from tests.factories import make_model


class Elsewhere(nn.Module):
    """A model that says that it is on another device, and was split by a device map or not."""

    def __init__(self, device: str, places: dict[str, Any]) -> None:
        super().__init__()
        self.place, self.hf_device_map = device, places

    def parameters(self, recurse: bool = True) -> Any:
        yield SimpleNamespace(device=torch.device(self.place))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two GPUs are visible; the device that is made current is noted."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(sft, "causal_model", lambda model: model)
    return chosen


def arguments(processes: int = 1) -> Any:
    """What transformers makes of two visible GPUs: the first, wrapped by `nn.DataParallel` over both."""
    first = torch.device("cuda:0")
    return SimpleNamespace(_n_gpu=2, distributed_state=SimpleNamespace(num_processes=processes, device=first))


def test_a_model_on_the_second_gpu_is_trained_there(used: list[torch.device], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "persona_probe"):
        placed = on_one_gpu(arguments(), Elsewhere("cuda:1", {}))
    second = torch.device("cuda:1")
    assert placed._n_gpu == 1  # else TRL refuses
    assert placed.distributed_state.device == placed._setup_devices == second and used == [second]
    said = caplog.text
    assert all(way in said for way in ("2 GPUs are visible", "device: cuda:N", "device_map: auto", "accelerate launch"))


@pytest.mark.parametrize(
    ("device", "places", "processes"),
    [("cpu", {}, 1), ("cuda:0", {"a": 0, "b": 1}, 1), ("cuda:1", {}, 2)],
)
def test_other_trainings_are_left_alone(
    used: list[torch.device], device: str, places: dict[str, Any], processes: int
) -> None:
    placed = on_one_gpu(arguments(processes), Elsewhere(device, places))
    assert placed._n_gpu == 2 and not used


def test_transformers_takes_the_device_that_it_is_given(tmp_path: Any, used: list[torch.device]) -> None:
    from trl.trainer.sft_config import SFTConfig

    made = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    placed = on_one_gpu(made, Elsewhere("cuda:1", {}))
    assert placed.device == torch.device("cuda:1") and placed.n_gpu == 1


def test_pushes_share_a_forward_as_far_as_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gpu = make_model(), torch.device("cuda")
    counts = []
    for free in (0, 10 * 2**20, 10 * 2**30):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, free=free: (free, free))
        counts.append(suffix_tokens(model, gpu))
    assert counts == [2048, 10 * 2**20 // (2 * (16 * 32 + 6 * 48)), 65536]
    assert suffix_tokens(model, torch.device("cpu")) == 4800
