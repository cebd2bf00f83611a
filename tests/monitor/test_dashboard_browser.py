"""The page follows a run that is really in progress, through its death and its restart, and asks nobody else."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from persona_probe.cli.runs import make_server
from persona_probe.monitor.events import Reading
from persona_probe.monitor.sinks.files import read_events
from persona_probe.report.images import find_browser
from tests.monitor.events import HOSTILE, reading, start, write
from tests.monitor.watch_page import Page, opened

BROWSER = find_browser()
HERE = Path(__file__).parent
CURVE = "Array.from(document.querySelector('.js-plotly-plot').data.find(t => t.mode === 'lines+markers').%s)"
STATUS = "document.querySelector('.status').innerText"


@contextmanager
def ready(path: Path, slope: float) -> Iterator[subprocess.Popen[bytes]]:
    """A run in another process that waits for its sign to begin; killed at the end, as a crash would."""
    command = [sys.executable, HERE / "slow_run.py", path, str(slope)]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield run
    finally:
        run.kill()
        run.communicate()


def begin(run: subprocess.Popen[bytes]) -> None:
    assert run.stdin is not None
    run.stdin.write(b"begin\n")
    run.stdin.flush()


@contextmanager
def served(run: Path) -> Iterator[str]:
    server = make_server(str(run), 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.port}/"
    server.shutdown()
    server.server_close()


async def points(page: Page) -> dict[int, float]:
    """The first feature's curve as the browser has it."""
    return dict(zip(await page.ask(CURVE % "x"), await page.ask(CURVE % "y"), strict=True))


async def follow(url: str, path: Path) -> Page:
    assert BROWSER is not None
    with ready(path, 4.0) as first, ready(path, -4.0) as second:
        async with opened(BROWSER, url) as page:
            await page.until("document.querySelector('.status')?.innerText.includes('waiting')")
            begin(first)
            await page.until("document.querySelector('.js-plotly-plot')?.data?.length > 3")
            early = max(await page.ask(CURVE % "x"))
            await page.until(f"Math.max(...{CURVE % 'x'}) > {early + 5}")
            assert first.poll() is None  # what the page shows came while the run was going
            first.kill()
            first.wait()
            with path.open("ab") as handle:
                handle.write(b'{"event": "reading", "step": 99')  # what a kill in the middle of a line leaves
            await check_first_run(page, path)
            begin(second)
            await page.until(f"{STATUS}.includes('started 2 times')")
            await page.until(f"{CURVE % 'x'}.length > 3 && {CURVE % 'y'}[3] < 0")
            assert all(value < 0 for step, value in (await points(page)).items() if step)
            assert second.poll() is None
            second.kill()
            second.wait()
            path.unlink()
            write(path, start(["another"]), reading(0, names=["another"]), reading(700, 3.0, names=["another"]))
            await page.until(f"{STATUS}.includes('step 700')")
            await page.until("document.body.innerText.includes('no alarm')")
            assert await points(page) == {0: 1.0, 700: 3.0}
            return page


async def check_first_run(page: Page, path: Path) -> None:
    """The page has every reading that stands in the file, its alarm, and its names as text."""
    written = {e.step: e.features[0].mean for e in read_events(path) if isinstance(e, Reading)}
    await page.until(f"{STATUS}.includes('step {max(written)}')")
    await page.until(f"{CURVE % 'x'}.length === {len(written)}")
    assert await points(page) == pytest.approx(written)
    text = await page.ask("document.body.innerText")
    assert f"step 5: outside band, {HOSTILE}: 1.5 over 1.25" in text and "no fault" in text
    assert text.count(HOSTILE) == 3  # the panel's label, the alarm and the table
    assert HOSTILE in await page.ask("document.querySelector('.js-plotly-plot').textContent")
    assert await page.ask("String(window.pwned)") == "undefined"
    assert await page.ask("document.querySelectorAll('.modebar-btn').length") == 2  # picture, reset: no upload


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium: install the Debian package chromium")
def test_the_page_follows_a_run_through_kill_restart_and_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_probe.monitor.dashboard.app.TICK", 250)
    with served(tmp_path) as url:
        page = asyncio.run(follow(url, tmp_path / "arms" / "toxic-s0" / "readings.jsonl"))
    assert page.console == []
    assert {urlsplit(u).netloc for u in page.requests if not u.startswith(("data:", "blob:"))} == {urlsplit(url).netloc}
