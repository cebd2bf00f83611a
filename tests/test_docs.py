"""The documentation: it builds strictly, fetches nothing, names commands that parse, and leaves no public name out."""

import html
import inspect
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import click
import pytest

import persona_probe as pp
from mkdocs_hooks import REPORT, as_github_reads
from persona_probe.errors import InputError
from persona_probe.report import figures
from persona_probe.report.images import find_browser
from tests.cli.parsing import commands, parse

ROOT = Path(__file__).parents[1]
WRITTEN = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "AGENTS.md")),
]
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)((?: {4}[^\n]*\n)+)")
REFERENCES = {"a": "href", "link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}


def command_lines() -> list[tuple[str, str]]:
    """Every line of a code block that starts with `persona-probe`, with the file that holds it."""
    lines = []
    for path in WRITTEN:
        text = path.read_text(encoding="utf-8")
        for block in [*FENCE.findall(text), *INDENTED.findall(text)]:
            joined = block.replace("\\\n", " ")
            lines += [(path.name, m) for m in re.findall(r"^\s*(?:\S*/bin/)?(persona-probe .*)$", joined, re.MULTILINE)]
    return lines


def test_code_blocks_name_commands_at_all() -> None:
    assert {"loop.md", "figures.md", "evaluate.md", "mitigations.md"} <= {name for name, _ in command_lines()}


@pytest.mark.parametrize(("name", "line"), command_lines())
def test_a_command_in_a_code_block_parses(name: str, line: str) -> None:
    try:
        parse(shlex.split(line, comments=True)[1:])
    except (click.UsageError, InputError) as error:
        pytest.fail(f"{name}: {line}\n{error}")


def linked(path: Path) -> list[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not urlsplit(target).scheme and not target.startswith("#")]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_links_of_written_pages_lead_to_files(path: Path) -> None:
    made = {f"{REPORT}/report.html"}  # by mkdocs_hooks; the built site is tested below
    assert [t for t in linked(path) if not (path.parent / t.partition("#")[0]).exists() and t not in made] == []


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f": {p.name}\n" not in config] == []


class Page(HTMLParser):
    """Anchors and references of one built page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.references: list[tuple[str, str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given["id"] or ""} if "id" in given else set()
        if value := given.get(REFERENCES.get(tag, "")):
            self.references.append((tag, given.get("rel") or "", value))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


@pytest.mark.long
def test_every_internal_link_of_the_site_resolves(site: Path, pages: dict[Path, Page]) -> None:
    broken, checked = [], 0
    for path, page in pages.items():
        if path.name == "404.html":  # its links are those of a server's root
            continue
        for tag, _, reference in page.references:
            parts = urlsplit(reference)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages[target].anchors if target in pages else set()
            fine = target.exists() and (not parts.fragment or tag != "a" or unquote(parts.fragment) in known)
            broken += [] if fine else [(path.name, reference)]
            checked += 1
    assert broken == [] and checked > 500


@pytest.mark.long
def test_built_pages_fetch_nothing_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    fetched = [
        (path.name, tag, reference)
        for path, page in pages.items()
        for tag, rel, reference in page.references
        if tag != "a" and rel != "canonical" and urlsplit(reference).netloc
    ]
    styles = [
        path for path in site.rglob("*.css") if re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text())
    ]
    assert fetched == [] and styles == []


@pytest.mark.long
def test_the_list_for_language_models_leads_to_files_and_in_the_site_to_pages(site: Path) -> None:
    text = (ROOT / "llms.txt").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 20 and [target for target in targets if not (ROOT / target).is_file()] == []
    built = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8"))
    assert len(built) == len(targets) - 1 and [target for target in built if not (site / target).is_file()] == []


@pytest.mark.long
def test_notebooks_are_pages_with_their_outputs(pages: dict[Path, Page], site: Path) -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page = site / "notebooks" / f"{path.stem}.html"
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))
        first = next("".join(c["source"]).splitlines()[-1] for c in cells if c["cell_type"] == "code")
        assert first.replace(" ", "") in text.replace(" ", ""), path
        svgs = sum("image/svg+xml" in output.get("data", {}) for cell in cells for output in cell.get("outputs", ()))
        assert svgs == sum(tag == "img" and ref.endswith(".svg") for tag, _, ref in pages[page].references)


@pytest.mark.long
def test_the_first_page_leads_to_a_finished_report_of_the_demo(pages: dict[Path, Page], site: Path) -> None:
    assert f"{REPORT}/report.html" in [reference for _, _, reference in pages[site / "index.html"].references]
    place = site / REPORT / "report.html"
    text = place.read_text(encoding="utf-8")
    assert len(text) < 2_000_000 and (site / REPORT / "plotly.min.js").stat().st_size > 1_000_000
    summary = json.loads((ROOT / "records" / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert html.escape(summary["headline"].split(":")[0], quote=False) in html.unescape(text)
    assert {"cards.html", "figures/trajectory.csv"} <= {reference for _, _, reference in pages[place].references}


@pytest.mark.long
@pytest.mark.browser
@pytest.mark.skipif(find_browser() is None, reason="no Chromium: install the Debian package chromium")
def test_the_sites_report_draws_its_figures_from_disk(site: Path) -> None:
    page = (site / REPORT / "report.html").as_uri()
    command = [str(find_browser()), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000"]
    done = subprocess.run([*command, "--dump-dom", page], capture_output=True, text=True, timeout=120)
    assert done.stdout.count('class="main-svg"') > 10


@pytest.mark.long
@pytest.mark.browser
@pytest.mark.skipif(find_browser() is None, reason="no Chromium: install the Debian package chromium")
def test_search_finds_pages_from_disk(site: Path) -> None:
    command = [str(find_browser()), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=15000"]
    page = (site / "index.html").as_uri() + "?q=persona"
    done = subprocess.run([*command, "--dump-dom", page], capture_output=True, text=True, timeout=180)
    found = re.search(r"(\d+) matching documents", done.stdout)
    assert found is not None and int(found[1]) > 5


@pytest.mark.long
def test_the_page_of_commands_has_every_command_with_its_example(pages: dict[Path, Page], site: Path) -> None:
    text = html.unescape((site / "cli.html").read_text(encoding="utf-8"))
    anchors = pages[site / "cli.html"].anchors
    for name, command in commands():
        assert f"persona-probe-{name.replace(' ', '-')}" in anchors and command.example in text


def places(public: Any) -> set[str]:
    """The dotted names under which the reference may list something: its module, or a room that re-exports it."""
    parts = public.__module__.split(".")
    return {".".join([*parts[:n], public.__name__]) for n in range(1, len(parts) + 1)}


@pytest.mark.long
def test_every_public_name_is_in_the_reference(pages: dict[Path, Page], site: Path) -> None:
    anchors = {anchor for path, page in pages.items() if path.name.startswith("api") for anchor in page.anchors}
    named = {name: getattr(pp, name) for name in vars(pp)["__all__"]}
    missing = [name for name, what in named.items() if not inspect.ismodule(what) and not places(what) & anchors]
    assert missing == []
    headings = (site / "api.html").read_text(encoding="utf-8")
    assert [name for name in figures.__all__ if not re.search(rf"pp\.figures\.{name}\s*<", headings)] == []


def test_lists_and_tables_after_a_paragraph_get_the_blank_line_that_they_need() -> None:
    assert as_github_reads("Text:\n- one\n  more\n- two\n") == "Text:\n\n- one\n  more\n- two\n"
    assert as_github_reads("Text\n| a |\n|---|\n") == "Text\n\n| a |\n|---|\n"
    code = "```yaml\nkey:\n- one\n```\n"
    assert as_github_reads(code) == code
