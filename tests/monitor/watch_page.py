"""A page that stays open in headless Chromium, driven over its DevTools pipe; requests and console are recorded."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from choreographer import Browser, Tab


@dataclass
class Page:
    """An open page."""

    tab: Tab
    requests: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    """Errors and warnings that the page logged, violations of its policy included."""

    async def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = await self.tab.send_command(
            "Runtime.evaluate", {"expression": f"JSON.stringify({expression})", "awaitPromise": True}
        )
        result: dict[str, Any] = answer["result"]
        assert "exceptionDetails" not in result, f"{expression}: {result['exceptionDetails']}"
        return json.loads(result["result"].get("value") or "null")

    async def until(self, expression: str, seconds: float = 15) -> Any:
        """Wait until a JavaScript expression is true (or not empty), and return it."""
        ends = time.monotonic() + seconds
        while not (value := await self.ask(expression)):
            assert time.monotonic() < ends, f"still not: {expression}; {await self.ask('document.body.innerText')}"
            await asyncio.sleep(0.1)
        return value

    async def _note(self, message: Any) -> None:
        parameters = message["params"]
        if message["method"] == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif message["method"] == "Log.entryAdded":
            self.console.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        elif parameters["type"] in ("error", "warning", "assert"):
            self.console.append(" ".join(str(a.get("value", a.get("description"))) for a in parameters["args"]))


@asynccontextmanager
async def opened(browser: str, url: str) -> AsyncIterator[Page]:
    """Open a page and keep it open."""
    async with Browser(path=browser, headless=True, enable_sandbox=False, enable_gpu=False) as chromium:
        tab = await chromium.create_tab("about:blank")
        page = Page(tab)
        for domain, event in (("Network", "requestWillBeSent"), ("Log", "entryAdded"), ("Runtime", "consoleAPICalled")):
            tab.subscribe(f"{domain}.{event}", page._note)
            await tab.send_command(f"{domain}.enable")
        size = {"width": 1200, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        await tab.send_command("Emulation.setDeviceMetricsOverride", size)
        await tab.send_command("Page.navigate", {"url": url})
        yield page
