"""Figures as images: one page in Chromium draws the SVG, and prints that SVG as PDF and PNG.

plotly.py's Kaleido is not used: it prints a PDF with margins of a tenth of an inch, which shrinks the figure and cuts
its bottom, and with whatever fonts the machine has. Here the SVG carries the letters that it uses, the page has no
margins, and all three formats show the same drawing.
"""

import asyncio
import base64
import io
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import plotly
import plotly.graph_objects as go

from persona_probe.errors import InputError
from persona_probe.report.printing import PNG_SCALE, Font

logger = logging.getLogger(__name__)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 120.0
"""Seconds for one image, on a machine that is busy with other work."""
INCH = 96
"""CSS pixels."""
Result = TypeVar("Result")


def find_browser() -> str | None:
    """Path of a Chromium: `BROWSER_PATH` if set, else the first on the PATH."""
    if stated := os.environ.get("BROWSER_PATH"):
        return shutil.which(stated)
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def ready(formats: Sequence[str]) -> str | None:
    """The browser to draw with; None, with one logged line, if something is missing."""
    names = ", ".join(formats).upper()
    try:
        import choreographer  # noqa: F401
        import fontTools  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        logger.warning("%s figures skipped: install %s (pip install 'persona-probe[figures]')", names, error.name)
        return None
    if (browser := find_browser()) is None:
        logger.warning(
            "%s figures skipped: no Chromium found; install one (Debian package chromium) or set BROWSER_PATH", names
        )
    return browser


def draw_images(
    browser: str, figures: Sequence[tuple[go.Figure, Font]], formats: Sequence[str]
) -> list[dict[str, bytes]]:
    """Each figure, which has its width and height, in each format (svg, pdf, png); one browser for all.

    Raises:
        InputError: the browser could not draw.
    """
    return _wait_for(_draw(browser, figures, formats))


async def _draw(
    browser: str, figures: Sequence[tuple[go.Figure, Font]], formats: Sequence[str]
) -> list[dict[str, bytes]]:
    fonts = list(dict.fromkeys(font for _, font in figures))
    with _page(fonts) as page, _quiet():
        from choreographer import Browser

        try:
            async with Browser(path=browser, headless=True) as chromium:
                tab = Tab(await chromium.create_tab(page.as_uri()), browser)
                await tab.ready()
                return [await _images(tab, figure, font, formats) for figure, font in figures]
        except (OSError, RuntimeError, TimeoutError) as error:
            raise InputError(f"{browser} could not draw ({error or type(error).__name__}): leave out images") from error


async def _images(tab: "Tab", figure: go.Figure, font: Font, formats: Sequence[str]) -> dict[str, bytes]:
    svg, width, height = await tab.svg(figure)
    svg = with_font(svg, font)
    images = {"svg": svg.encode("utf-8")}
    if set(formats) - {"svg"}:
        await tab.show(svg, width, height)
    if "pdf" in formats:
        images["pdf"] = await tab.pdf(width, height)
    if "png" in formats:
        images["png"] = await tab.png()
    return {kind: images[kind] for kind in formats}


class Tab:
    """A tab of the browser with the drawing page in it."""

    def __init__(self, tab: Any, browser: str) -> None:
        self._tab, self._browser = tab, browser

    async def ready(self) -> None:
        """Wait until plotly.js and the fonts are there."""
        for _ in range(int(PATIENCE * 10)):
            if await self._call("function() { return String(window.state); }") == "ready":
                return
            await asyncio.sleep(0.1)
        raise TimeoutError("its page did not load")

    async def svg(self, figure: go.Figure) -> tuple[str, float, float]:
        """What plotly.js draws, with its width and height in CSS pixels."""
        told = await self._call("function(figure) { return draw(figure); }", json.loads(figure.to_json() or "{}"))
        return told["svg"], told["width"], told["height"]

    async def show(self, svg: str, width: float, height: float) -> None:
        """Put an image alone on the page, in its own size."""
        metrics = {"width": round(width), "height": round(height), "deviceScaleFactor": PNG_SCALE, "mobile": False}
        await self._send("Emulation.setDeviceMetricsOverride", metrics)
        await self._call("function(svg, size) { return show(svg, size); }", svg, [width, height])

    async def pdf(self, width: float, height: float) -> bytes:
        """The page as a PDF of one page without margins."""
        margins = {f"margin{side}": 0 for side in ("Top", "Bottom", "Left", "Right")}
        paper = {"paperWidth": width / INCH, "paperHeight": height / INCH, "preferCSSPageSize": True}
        told = await self._send("Page.printToPDF", {"printBackground": True, "pageRanges": "1", **margins, **paper})
        return base64.b64decode(told["data"])

    async def png(self) -> bytes:
        """The page as it is shown."""
        told = await self._send("Page.captureScreenshot", {"format": "png"})
        return base64.b64decode(told["data"])

    async def _call(self, function: str, *arguments: Any) -> Any:
        window = (await self._send("Runtime.evaluate", {"expression": "window"}))["result"]["objectId"]
        values = [{"value": value} for value in arguments]
        call = {"functionDeclaration": function, "objectId": window, "arguments": values}
        told = await self._send("Runtime.callFunctionOn", {**call, "awaitPromise": True, "returnByValue": True})
        if "exceptionDetails" in told:
            raise RuntimeError(str(told["exceptionDetails"].get("exception", {}).get("description", "script failed")))
        return told["result"].get("value")

    async def _send(self, name: str, parameters: dict[str, Any]) -> dict[str, Any]:
        told = await asyncio.wait_for(self._tab.send_command(name, params=parameters), PATIENCE)
        if "error" in told:
            raise RuntimeError(f"{name}: {told['error'].get('message', 'failed')}")
        return told.get("result", {})


PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><style id="size">body { margin: 0; }</style>
<script charset="utf-8" src="PLOTLY"></script></head><body><script>
  // Only plotly.js knows how many lines a legend takes: it gets that much room above the plot, as wide as the image.
  async function draw({ data, layout }) {
    const place = document.body.appendChild(document.createElement("div"));
    try {
      await Plotly.newPlot(place, data, layout, { staticPlot: true });
      const full = place._fullLayout, legend = full.legend, size = full._size;
      if (full.showlegend && legend && legend.orientation === "h") {
        await Plotly.relayout(place, { "legend.x": (4 - size.l) / size.w });
        const titles = (layout.meta || {}).titles || 0, plot = layout.height - layout.margin.t - layout.margin.b;
        const top = Math.ceil(legend._height + titles + 4);
        const height = Math.round(plot + top + layout.margin.b);
        await Plotly.relayout(place, { "margin.t": top, height, "legend.y": 1 + titles / plot });
      }
      const { width, height } = place._fullLayout;
      const svg = await Plotly.toImage(place, { format: "svg", width, height, imageDataOnly: true });
      return { svg: svg.startsWith("%3C") ? decodeURIComponent(svg) : svg, width, height };
    } finally { Plotly.purge(place); place.remove(); }
  }
  async function show(svg, [width, height]) {
    document.getElementById("size").textContent =
      `@page { size: ${width}px ${height}px; margin: 0; } html, body { margin: 0; padding: 0; overflow: hidden; }
       svg { display: block; }`;
    document.body.innerHTML = svg.slice(svg.indexOf("<svg"));
    await document.fonts.ready;
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  }
  (async function () {
    for (const [name, data] of FONTS) document.fonts.add(await new FontFace(name, `url(${data})`).load());
    window.state = "ready";
  })().catch((error) => { window.state = String(error); });
</script></body></html>
"""


@contextmanager
def _page(fonts: Sequence[Font]) -> Iterator[Path]:
    """The drawing page, which measures text in the fonts that the image will carry."""
    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    data = [[font.name, _data_url(font.path().read_bytes())] for font in fonts]
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "draw.html"
        page.write_text(PAGE.replace("PLOTLY", script.as_uri()).replace("FONTS", json.dumps(data)), encoding="utf-8")
        yield page


def with_font(svg: str, font: Font) -> str:
    """An SVG that carries the letters of its font that it uses."""
    letters = "".join(sorted({*re.sub(r"<[^>]*>", "", svg), *" 0123456789.,-−"} - {"\n"}))
    face = f"@font-face {{ font-family: '{font.name}'; src: url({_data_url(_subset(font, letters))}); }}"
    # a browser would draw bold letters itself from the plain ones, which a PDF keeps as Type 3
    face += " text { font-synthesis: none; }"
    end = svg.index(">", svg.index("<svg")) + 1
    return f"{svg[:end]}<style>{face}</style>{svg[end:]}"


@cache
def _subset(font: Font, letters: str) -> bytes:
    from fontTools import subset
    from fontTools.ttLib import TTFont

    options = subset.Options(hinting=False, layout_features=[], notdef_outline=True, drop_tables=["FFTM"])
    # the times of saving would make two drawings differ
    opened = TTFont(font.path(), recalcTimestamp=False)
    maker = subset.Subsetter(options)
    maker.populate(text=letters)
    maker.subset(opened)
    out = io.BytesIO()
    opened.save(out)
    return out.getvalue()


def _data_url(font: bytes) -> str:
    return f"data:font/ttf;base64,{base64.b64encode(font).decode('ascii')}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Choreographer logs every message of the browser that it then ignores; what fails comes back as an error."""
    log = logging.getLogger("choreographer")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _wait_for(work: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine, in a thread of its own: a notebook's own loop is already running in this one."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(work))
        except BaseException as error:  # it is raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="figures")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
