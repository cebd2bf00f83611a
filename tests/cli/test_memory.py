"""What a process does before it loads a model: the allocator, and threads that sleep while they wait."""

import os
import platform
import subprocess
import sys

import pytest

from persona_probe.cli import process as memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's mallopt")
def test_glibc_takes_the_setting() -> None:
    assert memory.keep_freed_memory() is True


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("musl", "1.2"))
    assert memory.keep_freed_memory() is False


def test_a_function_that_loads_models_is_called_after_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: order.append("memory"))
    monkeypatch.setattr("persona_probe.models.quiet.quiet_libraries", lambda: order.append("quiet"))

    @memory.loads_models
    def load(name: str) -> str:
        """Load it."""
        order.append(name)
        return name

    assert load("model") == "model" and order == ["memory", "quiet", "model"]
    assert load.__doc__ == "Load it."


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "5000"), ({"GOMP_SPINCOUNT": "9"}, "9"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_threads_soon_sleep_unless_the_user_says_otherwise(given: dict[str, str], spins: str) -> None:
    code = "import os; from persona_probe.cli import process as p"
    code += "; print(p.wait_passively(), os.environ.get('GOMP_SPINCOUNT'))"
    environment = {k: v for k, v in os.environ.items() if k not in {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}} | given
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", spins]


def test_the_setting_comes_too_late_where_torch_is_loaded() -> None:
    assert "torch" in sys.modules or __import__("torch")
    assert memory.wait_passively() is False


@pytest.mark.parametrize(("load", "says"), [(0.3, ""), (64.0, "the machine is busy (load 64.0 on")])
def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch, load: float, says: str) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert says in memory.busy_line() and bool(memory.busy_line()) == bool(says)
