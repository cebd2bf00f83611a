"""Processes of their own, to be killed or stopped, forked from one that has loaded the libraries once.

Loading them takes longer than most of what these processes do. The server has no threads, so its forks are safe; the
test process has many.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LIBRARIES = (
    "persona_probe.cli.loop",
    "persona_probe.evaluate.judges.http",
    "persona_probe.study.study",
    "persona_probe.finetune.sft",
    "persona_probe.latents.stage",
    "persona_probe.monitor.track",
    "persona_probe.realignment.correct",
    "persona_probe.report.html",
    "sae_lens",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
)
CARD_TEXT = ("neutral_probes",)
"""What feature cards read here: a tenth of the packaged text, which the tiny tokenizer makes a token of each byte."""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([*LIBRARIES])


def shorten_card_text() -> None:
    """Have the feature cards of this process read `CARD_TEXT`."""
    from persona_probe.latents import passages

    passages.PACKAGED = CARD_TEXT


class Process:
    """A function in a process of its own, with the calls of `subprocess.Popen`."""

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it.

        Args:
            function: one that a module defines.
            log: the file that its standard error is added to.
            environment: variables that it sees besides the server's.
        """
        inner = (function, arguments, log, dict(environment or {}))
        self.process = SERVER.Process(target=_in_process, args=inner, daemon=True)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, -n after signal n.

        Raises:
            TimeoutError: it still runs after `timeout` seconds.
        """
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def command(*arguments: object, log: Path | None = None, environment: Mapping[str, str] | None = None) -> Process:
    """`persona-probe` with these arguments."""
    return Process(_main, *map(str, arguments), log=log, environment=environment)


def _in_process(
    function: Callable[..., Any], arguments: tuple[Any, ...], log: Path | None, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    if log is not None:
        with log.open("ab") as kept:
            os.dup2(kept.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    shorten_card_text()
    function(*arguments)


def _main(*arguments: str) -> None:
    from persona_probe.cli import main

    main([*arguments])
