"""Drive a page in headless Chromium: a script of the test is let in beside the page's own, by its hash."""

import json
import re
from pathlib import Path
from typing import Any

from persona_probe.report.page import script_hash
from tests.report.browser import open_page

WRAPPER = """
addEventListener("load", () => setTimeout(async () => {{
  const say = {{}};
  try {{ {body} }} catch (error) {{ say.error = String(error); }}
  document.title = "said " + JSON.stringify(say);
}}, 300));
"""


def driven(browser: str, page: Path, profile: Path, body: str) -> tuple[dict[str, Any], list[str]]:
    """What `body` put into `say` once the page was loaded, and the console; the page's policy stays as it is."""
    script = WRAPPER.format(body=body)
    text = page.read_text("utf-8").replace("script-src ", f"script-src {script_hash(script)} ".replace("'", "&#39;"), 1)
    before, after = text.rsplit("</body>", 1)
    copy = page.with_name(f"driven-{page.name}")
    copy.write_text(f"{before}<script>{script}</script></body>{after}", encoding="utf-8", newline="\n")
    opened = open_page(browser, copy, profile)
    title = re.search(r"<title>said (.*?)</title>", opened.dom, re.DOTALL)
    assert title is not None, "the script of the test did not run"
    unescaped = title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(unescaped), opened.console
