"""Write figures as files: a self-contained page, the numbers, and images for print."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from persona_probe import untrusted
from persona_probe.errors import unknown
from persona_probe.report.figures import FigureSpec, figures_of, spec_of
from persona_probe.report.images import draw_images, ready
from persona_probe.report.latex import check_tex, write_pgf
from persona_probe.report.metadata import tag
from persona_probe.report.page import render
from persona_probe.report.printing import WIDTHS, Width, for_print
from persona_probe.report.records import Records
from persona_probe.report.select import mapping
from persona_probe.report.theme import TEMPLATES, Theme, check_theme
from persona_probe.writing import write_bytes, write_text

# --- A figure as a page, its numbers and images

FORMATS = ("html", "csv", "svg")
"""The default formats."""
STATIC = ("svg", "pdf", "png")
"""Images."""
ALL_FORMATS = ("html", "csv", *STATIC, "pgf")
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
    footer: bool = True,
) -> list[Path]:
    """Write figures into `folder` (made if need be), each file whole or not at all.

    Args:
        folder: where `<name>.<format>` goes; older files are replaced.
        only: names from `ALL_FIGURES`; None writes all that the records show.
        formats: some of html, csv, svg, pdf, png, pgf. The CSV is written always. Images need the extra `figures` and a
            Chromium; without them they are skipped with one logged line. pgf needs the extra, and a TeX on the PATH.
        width: of images in print: "column" (89 mm), "page" (183 mm), or a preset of `printing.WIDTHS`.
        theme: "light" or "dark".
        footer: whether images have a line at the bottom that says where they come from. Their metadata always does.

    Returns:
        The files written.

    Raises:
        InputError: an unknown figure, format, width or theme, a browser that could not draw, or no TeX for pgf.
    """
    specs = list(figures_of(records).values()) if only is None else [spec_of(name) for name in only]
    for kind in formats:
        if kind not in ALL_FORMATS:
            raise unknown("figure format", kind, ALL_FORMATS)
    check_theme(theme)
    if width not in WIDTHS:
        raise unknown("figure width", width, WIDTHS)
    if "pgf" in formats:
        check_tex()
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = [write_text(target / f"{s.name}.csv", csv_text(s.data(records))) for s in specs]
    figures = [(s, s.draw(records)) for s in specs] if set(formats) - {"csv"} else []
    if "html" in formats:
        paths += [_write_page(target, spec, fig, records, theme) for spec, fig in figures]
    if images := [kind for kind in STATIC if kind in formats]:
        paths += _write_images(target, figures, images, records.manifest, width, theme, footer)
    if "pgf" in formats:
        paths += [write_pgf(fig, target / f"{spec.name}.pgf", width) for spec, fig in figures]
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


# --- Figures as images


def _write_images(
    folder: Path,
    figures: Sequence[tuple[FigureSpec, go.Figure]],
    formats: Sequence[str],
    manifest: Mapping[str, Any],
    width: Width,
    theme: Theme,
    footer: bool,
) -> list[Path]:
    """Write `<name>.<format>` of every figure, tagged with its origin; nothing if Chromium or the extra is missing.

    Raises:
        InputError: the browser could not draw.
    """
    if (browser := ready(formats)) is None:
        return []
    line = short_provenance(manifest) if footer else ""
    printed = [(for_print(fig, width, theme, line), WIDTHS[width].font_face) for _, fig in figures]
    facts = provenance(manifest)
    paths = []
    for (spec, fig), images in zip(figures, draw_images(browser, printed, formats), strict=True):
        for kind, image in images.items():
            path = folder / f"{spec.name}.{kind}"
            paths.append(write_bytes(path, tag(image, kind, facts, spec.title, caption(fig))))
    return paths
