"""What mkdocs needs in addition to mkdocs.yml: pages from the repository's root, and Markdown as GitHub reads it."""

import json
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from plotly.offline import get_plotlyjs

import persona_probe
from persona_probe.report.export import export_figures
from persona_probe.report.html import write_report
from persona_probe.report.page import BESIDE, script_beside
from persona_probe.report.records import load_records

ROOT = Path(__file__).parent
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
AGENTS = "llms.txt"
"""The list of pages for language models; in the site its links lead to the built pages."""
STARTS = re.compile(r"([-*] |\d+\. |\|)")
"""A list item or a table row: GitHub starts one after a paragraph's line, Python-Markdown only after a blank line."""


REPORT = "demo-report"
"""The site's folder of one finished report, which index.md links to."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link to the repository, where it has an address; a site of several versions gets their menu."""
    config.repo_url = persona_probe.REPOSITORY or None
    if os.environ.get("PERSONA_PROBE_SITE_VERSIONS"):  # set by tools/site.py
        config.extra["version"] = {"provider": "mike"}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages, whose links into docs/ become links between pages, the notebooks, and the demo's report."""
    for name in ROOT_PAGES:
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    files.append(File.generated(config, AGENTS, content=for_site((ROOT / AGENTS).read_text(encoding="utf-8"))))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, images = notebook_page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, image in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=image))
    for name, text in demo_report().items():
        files.append(File.generated(config, f"{REPORT}/{name}", content=text))
    return files


def for_site(text: str) -> str:
    """llms.txt with links between built pages: `docs/loop.md` is `loop.html` there."""
    text = text.replace("](README.md)", "](index.html)")
    text = re.sub(r"^- \[AGENTS\].*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"\]\(docs/([\w-]+)\.md\)", r"](\1.html)", text)


# --- The notebooks as pages


def notebook_page(path: Path) -> tuple[str, dict[str, str]]:
    """A notebook as Markdown, and the images that it shows by file name.

    Text, code and outputs; of an output that comes in several forms the image, else the table, else the text.
    """
    images: dict[str, str] = {}
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = _joined(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](../docs/", "](../").replace("](docs/", "](../"))
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [shown for output in cell.get("outputs", ()) if (shown := _output(output, path.stem, images))]
    note = f"*This page is `notebooks/{path.name}`, with the outputs that it ships with.*"
    return "\n\n".join([parts[0], note, *parts[1:]]) + "\n", images


def _output(output: dict[str, Any], name: str, images: dict[str, str]) -> str:
    data = output.get("data") or {"text/plain": output.get("text", "")}
    if "image/svg+xml" in data:
        file = f"{name}-{len(images) + 1}.svg"
        images[file] = _joined(data["image/svg+xml"])
        return f"![figure {len(images)} of {name}]({file})"
    if "text/markdown" in data:
        return _joined(data["text/markdown"])
    if "text/html" in data:
        return re.sub(r"\n\s*", " ", _joined(data["text/html"]))  # a blank line would end a block of HTML
    text = _joined(data.get("text/plain", ""))
    return f"```\n{text}\n```" if text.strip() else ""


def _joined(lines: str | list[str]) -> str:
    return (lines if isinstance(lines, str) else "".join(lines)).rstrip("\n")


# --- The demo's report


def demo_report() -> dict[str, str]:
    """The report of records/demo as files of a folder: its page, cards and the figures' numbers.

    plotly.js is a file of its own, so that the page opens fast.
    """
    with TemporaryDirectory() as scratch:
        place = Path(scratch)
        records = load_records(ROOT / "records" / "demo")
        export_figures(records, place / "figures", formats=("csv",))
        page = write_report(ROOT / "records" / "demo", records, place)
        page.write_text(script_beside(page.read_text(encoding="utf-8")), encoding="utf-8")
        made = {str(file.relative_to(place)): file for file in sorted(place.rglob("*")) if file.is_file()}
        return {BESIDE: get_plotlyjs(), **{name: file.read_text(encoding="utf-8") for name, file in made.items()}}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Set a blank line before lists and tables that follow a paragraph."""
    return as_github_reads(markdown)


def as_github_reads(markdown: str) -> str:
    """The text with a blank line before each list or table that follows a paragraph; code blocks stay as they are."""
    lines: list[str] = []
    fenced = block = False
    for line in markdown.splitlines():
        fence = line.lstrip().startswith("```")
        start = STARTS.match(line) is not None
        if start and not fenced and not block and lines and lines[-1].strip():
            lines.append("")
        lines.append(line)
        fenced ^= fence
        # A list or table goes on until a blank line: its wrapped lines and further items belong to it.
        block = not fence and bool(line.strip()) and (block or start)
    return "\n".join(lines) + "\n"
