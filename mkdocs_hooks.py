"""What mkdocs needs in addition to mkdocs.yml: pages from the repository's root, and Markdown as GitHub reads it."""

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
STARTS = re.compile(r"([-*] |\d+\. |\|)")
"""A list item or a table row: GitHub starts one after a paragraph's line, Python-Markdown only after a blank line."""


REPORT = "demo-report"
"""The site's folder of one finished report, which index.md links to."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link to the repository, where it has an address."""
    config.repo_url = persona_probe.REPOSITORY or None
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages, whose links into docs/ become links between pages, and the demo's report."""
    for name in ROOT_PAGES:
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    for name, text in demo_report().items():
        files.append(File.generated(config, f"{REPORT}/{name}", content=text))
    return files


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
