"""Write figures as files: a self-contained page, the numbers, and images for print."""

import html
import logging
import os
import re
import shutil
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from persona_probe import untrusted
from persona_probe.errors import InputError, unknown
from persona_probe.report.figures import FigureSpec, figures_of, spec_of
from persona_probe.report.page import render
from persona_probe.report.records import Records
from persona_probe.report.select import mapping
from persona_probe.report.theme import PNG_SCALE, TEMPLATES, Theme, Width, check_theme, for_print
from persona_probe.writing import write_text

logger = logging.getLogger(__name__)

# --- A figure as a page, its numbers and images

FORMATS = ("html", "csv", "svg")
"""The default formats."""
STATIC = ("svg", "pdf", "png")
"""Images."""
ALL_FORMATS = ("html", "csv", *STATIC)
DIGITS = 10
"""Of numbers in a CSV: further digits differ between processors, which add in another order."""


def export_figures(
    records: Records,
    folder: str | Path,
    only: Sequence[str] | None = None,
    formats: Sequence[str] = FORMATS,
    *,
    width: Width = "page",
    theme: Theme = "light",
) -> list[Path]:
    """Write figures into `folder` (made if need be), each file whole or not at all.

    Args:
        folder: where `<name>.<format>` goes; older files are replaced.
        only: names from `ALL_FIGURES`; None writes all that the records show.
        formats: some of html, csv, svg, pdf, png. The CSV is written always. Images need kaleido and a Chromium;
            without them they are skipped with one logged line.
        width: of images in print: "column" (89 mm) or "page" (183 mm).
        theme: "light" or "dark".

    Returns:
        The files written.

    Raises:
        InputError: an unknown figure, format, width or theme, or a browser that could not draw.
    """
    specs = list(figures_of(records).values()) if only is None else [spec_of(name) for name in only]
    for kind in formats:
        if kind not in ALL_FORMATS:
            raise unknown("figure format", kind, ALL_FORMATS)
    check_theme(theme)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = [write_text(target / f"{s.name}.csv", csv_text(s.data(records))) for s in specs]
    figures = [(s, s.draw(records)) for s in specs] if set(formats) - {"csv"} else []
    if "html" in formats:
        paths += [_write_page(target, spec, fig, records, theme) for spec, fig in figures]
    if images := [kind for kind in STATIC if kind in formats]:
        paths += _write_images(target, figures, images, records.manifest, width, theme)
    return paths


def csv_text(data: pd.DataFrame) -> str:
    """A figure's numbers as CSV, the same on every machine: ten decimals and significant digits, LF line ends."""
    floats = data.select_dtypes("float").columns
    # adding zero turns -0 into 0
    rounded = data.assign(**{name: data[name].round(DIGITS) + 0.0 for name in floats})
    return untrusted.csv_text(rounded, float_format=f"%.{DIGITS}g", lineterminator="\n")


def write_figure(folder: Path, name: str, records: Records) -> Path:
    """Write one figure next to the table that it draws, as `<name>.html` and, with all digits, `<name>.csv`.

    Returns:
        The page's path.

    Raises:
        InputError: an unknown figure.
    """
    spec = spec_of(name)
    write_text(folder / f"{name}.csv", untrusted.csv_text(spec.data(records)))
    return _write_page(folder, spec, spec.draw(records), records, "light")


def _write_page(folder: Path, spec: FigureSpec, fig: go.Figure, records: Records, theme: Theme) -> Path:
    context: dict[str, Any] = {
        "title": spec.title,
        "name": spec.name,
        "figure": go.Figure(fig).update_layout(template=TEMPLATES[theme]),
        "caption": caption(fig),
        "theme": theme,
    }
    if records.manifest:
        context |= {"provenance": provenance(records.manifest), "footer": provenance_line(records.manifest)}
    return write_text(folder / f"{spec.name}.html", render("figure.html.j2", context))


def caption(fig: go.Figure) -> str:
    """The caption that a figure carries."""
    return str(fig.layout.meta["caption"])  # pyright: ignore[reportAttributeAccessIssue]


# --- Where a figure's or a report's numbers come from: its footer and its file's metadata

PACKAGES = ("persona-probe", "torch", "transformers", "sae-lens", "trl", "peft")
"""Packages in the footer; the metadata has every package of the manifest."""
SHORT = 12
"""Digits of a hash in a page's footer."""
FOOTER = 8
"""The same in an image's footer, which is one column wide."""
UNKNOWN = "not recorded"


def provenance(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Everything that a manifest records of a run's origin: name to text; `not recorded` if it is missing.

    Keys: run, config, revision, model, SAE, data, seeds, versions, and `hash <file>` for every hash on record.
    """
    config = mapping(manifest.get("config"))
    versions = mapping(manifest.get("versions"))
    facts = {
        "run": config.get("name"),
        "config": manifest.get("config_hash"),
        "revision": manifest.get("git_revision"),
        "model": config.get("model"),
        "SAE": config.get("sae"),
        "data": ", ".join(_data(config)),
        "seeds": ", ".join(str(seed) for seed in _seeds(manifest, config)),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return {name: str(value or UNKNOWN) for name, value in facts.items()} | _hashes(manifest)


def _hashes(manifest: Mapping[str, Any]) -> dict[str, str]:
    """`hash <input or file>` to sha256: what the run was made from first, then what it wrote."""
    parts = (mapping(manifest.get(key)) for key in ("input_hashes", "table_hashes", "hashes"))
    return {f"hash {name}": str(value) for part in parts for name, value in sorted(part.items())}


def provenance_line(manifest: Mapping[str, Any]) -> str:
    """One line for a footer: run, config hash, revision, model, SAE, data with their hashes, seeds, main packages."""
    full = provenance(manifest)
    versions = mapping(manifest.get("versions"))
    packages = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions)
    inputs = [f"{name} {str(value)[:8]}" for name, value in mapping(manifest.get("input_hashes")).items()]
    parts = [
        f"run {full['run']}",
        f"config {full['config'][:SHORT]}",
        f"revision {full['revision'][:SHORT]}",
        f"model {full['model']}",
        f"SAE {full['SAE']}",
        f"data {full['data']}",
        f"hashes of inputs: {', '.join(inputs) or UNKNOWN}",
        f"seeds {full['seeds']}",
        packages or f"versions {UNKNOWN}",
    ]
    return "; ".join(parts)


def short_provenance(manifest: Mapping[str, Any]) -> str:
    """The footer of an image one column wide: run, config hash, revision, version; the rest is in its metadata."""
    full = provenance(manifest)
    version = mapping(manifest.get("versions")).get("persona-probe")
    parts = [f"persona-probe {version}" if version else "persona-probe"]
    facts = {"run": full["run"], "config": full["config"][:FOOTER], "revision": full["revision"][:FOOTER]}
    parts += [f"{key} {value}" for key, value in facts.items() if full[key] != UNKNOWN]
    return "; ".join(parts)


def _data(config: Mapping[str, Any]) -> list[str]:
    """Names of the data sets of a config, each once."""
    parts = (config.get("arms"), mapping(config.get("realign")).get("arms"))
    arms = [mapping(arm) for part in parts for arm in mapping(part).values()]
    names = [str(arm[key]) for arm in arms for key in ("data", "mix_with") if arm.get(key)]
    return list(dict.fromkeys([*names, *(str(config[key]) for key in ("contrast", "probes") if config.get(key))]))


def _seeds(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> list[Any]:
    """The manifest's seeds, or those of its runs if it is a study of many."""
    if stated := manifest.get("seeds"):
        return list(stated)
    return sorted({mapping(run).get("seed", 0) for run in mapping(config.get("runs")).values()})


# --- Write where a figure's numbers come from into its file: SVG, PNG and PDF each have a place for it

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
IHDR_END = len(PNG_SIGNATURE) + 25
"""The header chunk always comes first and is 25 bytes long."""
SOFTWARE = "persona_probe"


def tag(image: bytes, kind: str, facts: Mapping[str, str], title: str, description: str) -> bytes:
    """An image (svg, png or pdf) with title, description and `facts` (one `name: text` line each) as metadata."""
    writers = {"svg": _tag_svg, "png": _tag_png, "pdf": _tag_pdf}
    text = "\n".join(f"{name}: {value}" for name, value in facts.items())
    return writers[kind](image, text, title, description)


def _tag_svg(image: bytes, text: str, title: str, description: str) -> bytes:
    """`<title>` and `<desc>` are for screen readers; `<metadata>` has the rest."""
    svg = image.decode("utf-8")
    parts = (("title", title), ("desc", description), ("metadata", text))
    inside = "".join(f"<{name}>{html.escape(value)}</{name}>" for name, value in parts)
    end = svg.index(">", svg.index("<svg")) + 1
    return (svg[:end] + inside + svg[end:]).encode("utf-8")


def _tag_png(image: bytes, text: str, title: str, description: str) -> bytes:
    """Chunks `iTXt` (PNG specification, 11.3.3.4) after the header."""
    entries = {"Title": title, "Description": description, "Comment": text, "Software": SOFTWARE}
    chunks = b"".join(_text_chunk(name, value) for name, value in entries.items())
    return image[:IHDR_END] + chunks + image[IHDR_END:]


def _text_chunk(name: str, value: str) -> bytes:
    # keyword, no compression, no language, no translated keyword, text
    body = b"iTXt" + name.encode("latin-1") + b"\0\0\0\0\0" + value.encode("utf-8")
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def _tag_pdf(image: bytes, text: str, title: str, description: str) -> bytes:
    """An incremental update (ISO 32000-1, 7.5.6) that replaces the document information dictionary.

    An image whose trailer is not of the classic kind comes back as it was.
    """
    trailers = re.findall(rb"trailer\s*<<(.*?)>>\s*startxref\s*(\d+)", image, re.DOTALL)
    size, root = (re.search(p, trailers[-1][0]) if trailers else None for p in (rb"/Size (\d+)", rb"/Root (\d+ \d+ R)"))
    if size is None or root is None:
        return image
    number, before = int(size.group(1)), trailers[-1][1]
    pairs = {"Title": title, "Subject": description, "Keywords": text, "Creator": SOFTWARE}
    entries = " ".join(f"/{name} <{_hex(value)}>" for name, value in pairs.items())
    image = image if image.endswith(b"\n") else image + b"\n"
    body = f"{number} 0 obj\n<< {entries} >>\nendobj\n".encode("ascii")
    table = f"xref\n{number} 1\n{len(image):010d} 00000 n \n".encode("ascii")
    trailer = b"trailer\n<< /Size %d /Root %s /Info %d 0 R /Prev %s >>\n" % (number + 1, root.group(1), number, before)
    return image + body + table + trailer + b"startxref\n%d\n%%%%EOF\n" % (len(image) + len(body))


def _hex(value: str) -> str:
    """A PDF text string in UTF-16, written in hexadecimal."""
    return (b"\xfe\xff" + value.encode("utf-16-be")).hex().upper()


# --- Figures as images, drawn by kaleido and a Chromium; if one is missing, one logged line says how to install it

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """Path of a Chromium: `BROWSER_PATH` if set, else the first on the PATH."""
    if stated := os.environ.get("BROWSER_PATH"):
        return shutil.which(stated)
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def _write_images(
    folder: Path,
    figures: Sequence[tuple[FigureSpec, go.Figure]],
    formats: Sequence[str],
    manifest: Mapping[str, Any],
    width: Width,
    theme: Theme,
) -> list[Path]:
    """Write `<name>.<format>` of every figure, tagged with its origin; nothing if kaleido or Chromium is missing.

    Raises:
        InputError: the browser could not draw.
    """
    if (browser := _ready(formats)) is None:
        return []
    import kaleido

    # It logs, with its stack, every message of the browser that it then ignores; what fails comes back below.
    logging.getLogger("choreographer").setLevel(logging.CRITICAL)
    footer = short_provenance(manifest)
    printed = [(spec, fig, for_print(fig, width, theme, footer)) for spec, fig in figures]
    names = [(spec, fig, print_fig, kind) for kind in formats for spec, fig, print_fig in printed]
    jobs = [_job(folder / f".{spec.name}.tmp.{kind}", print_fig, kind) for spec, _, print_fig, kind in names]
    # one browser for all of them; mathjax would be fetched from the network
    failures = kaleido.write_fig_from_object_sync(jobs, kopts={"path": browser, "mathjax": False, "timeout": 120})
    if failures:
        raise InputError(f"{browser} could not draw {len(failures)} figures ({failures[0]}): leave out its format")
    paths = []
    for (spec, fig, _, kind), job in zip(names, jobs, strict=True):
        scratch: Path = job["path"]
        image = tag(scratch.read_bytes(), kind, provenance(manifest), spec.title, caption(fig))
        scratch.write_bytes(image)
        scratch.replace(path := folder / f"{spec.name}.{kind}")
        paths.append(path)
    return paths


def _ready(formats: Sequence[str]) -> str | None:
    """The browser to draw with; None, with one logged line, if something is missing."""
    names = ", ".join(formats).upper()
    try:
        import kaleido  # noqa: F401
    except ImportError:
        logger.warning("%s figures skipped: install kaleido (pip install 'persona-probe[figures]')", names)
        return None
    if (browser := find_browser()) is None:
        logger.warning(
            "%s figures skipped: no Chromium found; install one (Debian package chromium) or set BROWSER_PATH", names
        )
    return browser


def _job(path: Path, fig: go.Figure, kind: str) -> dict[str, Any]:
    size: Any = fig.layout
    scale = PNG_SCALE if kind == "png" else 1
    return {
        "fig": fig,
        "path": path,
        "opts": {"format": kind, "width": size.width, "height": size.height, "scale": scale},
    }
