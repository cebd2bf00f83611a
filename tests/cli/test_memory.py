"""The allocator's setting is accepted where glibc is, and left alone elsewhere."""

import platform

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
