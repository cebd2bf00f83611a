"""`make bench-busy`: the fair share that a time is held against, and the processes that keep the cores busy."""

import subprocess

import pytest

from benchmarks.busy import Spent, busy, share


@pytest.mark.parametrize(
    ("wall", "cpu", "others", "cores", "seconds"),
    [
        (10.0, 10.0, 0, 2, 10.0),  # nobody else: its own time
        (10.0, 10.0, 1, 2, 10.0),  # one thread and one other have a core each
        (10.0, 20.0, 2, 2, 20.0),  # two threads and two others: half of each core
        (10.0, 10.0, 4, 2, 25.0),  # one thread of five on two cores
        (10.0, 20.0, 4, 2, 30.0),
    ],
)
def test_a_run_is_held_against_its_share(wall: float, cpu: float, others: int, cores: int, seconds: float) -> None:
    assert share(Spent(wall, cpu), others, cores) == pytest.approx(seconds)


def test_the_others_compute_inside_the_block_and_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, command: list[str]) -> None:
            super().__init__(command)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with pytest.raises(ZeroDivisionError), busy(2):
        assert [process.poll() for process in started] == [None, None]
        raise ZeroDivisionError
    assert [process.poll() for process in started] == [-9, -9]
