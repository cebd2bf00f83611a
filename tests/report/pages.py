"""Pages as readers of them: an HTML parser, and headless Chromium that runs their scripts."""

import json
import re
import subprocess
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


def open_page(browser: str, page: Path, profile: Path) -> Opened:
    """Load a local page, run its scripts, and return what came of it."""
    command = [browser, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=180, check=True)
    return Opened(done.stdout, re.findall(r"^.*CONSOLE.*$", done.stderr, re.MULTILINE))


WRAPPER = """
addEventListener("load", () => setTimeout(async () => {{
  const say = {{}};
  try {{ {body} }} catch (error) {{ say.error = String(error); }}
  document.title = "said " + JSON.stringify(say);
}}, 300));
"""


def run_script(browser: str, page: Path, profile: Path, body: str) -> tuple[dict[str, Any], list[str]]:
    """What `body` put into `say` once the page was loaded, and the console; the page's policy stays as it is."""
    script = WRAPPER.format(body=body)
    text = page.read_text("utf-8").replace("script-src ", f"script-src {script_hash(script)} ".replace("'", "&#39;"), 1)
    before, after = text.rsplit("</body>", 1)
    copy = page.with_name(f"scripted-{page.name}")
    copy.write_text(f"{before}<script>{script}</script></body>{after}", encoding="utf-8", newline="\n")
    opened = open_page(browser, copy, profile)
    title = re.search(r"<title>said (.*?)</title>", opened.dom, re.DOTALL)
    assert title is not None, "the script of the test did not run"
    unescaped = title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(unescaped), opened.console
