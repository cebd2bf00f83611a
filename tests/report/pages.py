"""Pages as readers of them: an HTML parser, and headless Chromium that runs their scripts."""

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from persona_probe.report.page import script_hash


class Outline(HTMLParser):
    """Elements, visible text and script contents, as an HTML parser finds them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.comments = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.labels += [named["aria-label"] or ""] if named.get("role") == "img" else []
        if tag == "script":
            self.scripts.append((named, ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif self.cdata_elem is None:
            self.text += data

    def handle_comment(self, data: str) -> None:
        self.comments += 1


# --- In headless Chromium

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


def open_page(browser: str, page: Path, profile: Path, limit_s: float = 180) -> Opened:
    """Load a local page, run its scripts, and return what came of it."""
    command = [browser, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=limit_s, check=True)
    return Opened(done.stdout, re.findall(r"^.*CONSOLE.*$", done.stderr, re.MULTILINE))


WRAPPER = """
addEventListener("load", () => setTimeout(async () => {{
  const say = {{}};
  try {{ {body} }} catch (error) {{ say.error = String(error); }}
  document.title = "said " + JSON.stringify(say);
}}, 300));
"""


def run_script(
    browser: str, page: Path, profile: Path, body: str, limit_s: float = 180
) -> tuple[dict[str, Any], list[str]]:
    """What `body` put into `say` once the page was loaded, and the console; the page's policy stays as it is."""
    script = WRAPPER.format(body=body)
    text = page.read_text("utf-8").replace("script-src ", f"script-src {script_hash(script)} ".replace("'", "&#39;"), 1)
    before, after = text.rsplit("</body>", 1)
    copy = page.with_name(f"scripted-{page.name}")
    copy.write_text(f"{before}<script>{script}</script></body>{after}", encoding="utf-8", newline="\n")
    opened = open_page(browser, copy, profile, limit_s)
    title = re.search(r"<title>said (.*?)</title>", opened.dom, re.DOTALL)
    assert title is not None, "the script of the test did not run"
    unescaped = title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(unescaped), opened.console


# --- In a window of a size of its own, which may be a phone's


@dataclass(frozen=True)
class Seen:
    """A page in one window."""

    said: Any
    """What the script returned."""
    paper: bytes
    """The page printed, A4, as PDF; empty where that was not asked for."""


def look(
    browser: str, page: Path, windows: Sequence[tuple[int, int]], script: str, printed: tuple[int, int] | None = None
) -> list[Seen]:
    """Load a local page in windows of these sizes (CSS pixels) and return what `script`, an expression, says there.

    The page is printed from the window of size `printed`.
    """
    import asyncio
    from base64 import b64decode

    from choreographer import Browser

    async def send(tab: Any, name: str, parameters: dict[str, Any]) -> Any:
        told = await asyncio.wait_for(tab.send_command(name, params=parameters), 240)
        assert "error" not in told and "exceptionDetails" not in told.get("result", {}), told
        return told["result"]

    async def evaluate(tab: Any, expression: str) -> Any:
        told = await send(tab, "Runtime.evaluate", {"expression": expression, "returnByValue": True})
        return told["result"].get("value")

    async def one(tab: Any, width: int, height: int) -> Seen:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await send(tab, "Emulation.setDeviceMetricsOverride", size)
        await send(tab, "Page.navigate", {"url": page.resolve().as_uri()})
        while not await evaluate(tab, READY):
            await asyncio.sleep(0.2)
        said = await evaluate(tab, script)
        if (width, height) != printed:
            return Seen(said, b"")
        options = {"printBackground": True, "preferCSSPageSize": True, "paperWidth": 8.27, "paperHeight": 11.69}
        return Seen(said, b64decode((await send(tab, "Page.printToPDF", options))["data"]))

    async def run() -> list[Seen]:
        async with Browser(path=browser, headless=True) as chromium:
            tab = await chromium.create_tab("about:blank")
            return [await one(tab, width, height) for width, height in windows]

    return asyncio.run(run())


READY = """document.readyState === "complete" && location.protocol === "file:" && (
  !document.querySelector(".figure") || !!document.querySelector(".main-svg"))"""
"""Loaded, and its figures drawn: they are drawn one after the other without a pause."""
