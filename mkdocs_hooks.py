"""What mkdocs needs in addition to mkdocs.yml: pages from the repository's root, and Markdown as GitHub reads it."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
STARTS = re.compile(r"([-*] |\d+\. |\|)")
"""A list item or a table row: GitHub starts one after a paragraph's line, Python-Markdown only after a blank line."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages; their links into docs/ become links between pages."""
    for name in ROOT_PAGES:
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    return files


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
