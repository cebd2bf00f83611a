"""Open a page in headless Chromium and read back its DOM and its console."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--virtual-time-budget=15000", "--enable-logging=stderr", "--window-size=1200,900"),
)


@dataclass(frozen=True)
class Opened:
    """A page as the browser left it."""

    dom: str
    console: list[str]
    """Lines that the page logged, errors and violations of its content policy included."""


def open_page(browser: str, page: Path, profile: Path) -> Opened:
    """Load a local page, run its scripts, and return what came of it."""
    command = [browser, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=180, check=True)
    return Opened(done.stdout, re.findall(r"^.*CONSOLE.*$", done.stderr, re.MULTILINE))
