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
