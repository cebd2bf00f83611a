"""Figures for LaTeX: the same drawing in matplotlib, and from there as PGF, whose text the paper's own font sets."""

import html
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from persona_probe.errors import InputError
from persona_probe.report.printing import WIDTHS, Width, for_print, legend_names
from persona_probe.writing import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEX = ("xelatex", "lualatex", "pdflatex")
"""Any of them measures the text of a PGF file."""
INCH = 96
"""CSS pixels."""
POINTS = 0.75
"""Of a CSS pixel."""
SYMBOLS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "cross": "P",
    "x": "X",
    "x-thin": "x",
    "star": "*",
    "pentagon": "p",
    "hexagon": "h",
    "hourglass": "d",
    "bowtie": ">",
    "line-ns": "|",
    "triangle-left": "<",
    "triangle-right": ">",
}
"""Plotly's marks in matplotlib; others are circles."""
DASHES = {"dot": ":", "dash": "--", "dashdot": "-.", "longdash": (0, (8, 3)), "longdashdot": "-."}
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {letter: f"\\{letter}" for letter in "&%$#_{}"}


def check_tex() -> str:
    """The TeX that is on the PATH.

    Raises:
        InputError: there is none, or no matplotlib.
    """
    _matplotlib()
    for name in TEX:
        if shutil.which(name):
            return name
    raise InputError(
        f"pgf needs a TeX to measure its text, and {', '.join(TEX)} are not on the PATH: install one, or take pdf"
    )


def write_pgf(fig: go.Figure, path: Path, width: Width = "page") -> Path:
    r"""Write a figure as PGF, for `\input{...}` in a LaTeX document that uses the package pgf.

    Raises:
        InputError: no TeX on the PATH, or no matplotlib.
    """
    program = check_tex()
    import matplotlib

    with matplotlib.rc_context({"pgf.texsystem": program, "pgf.rcfonts": False, "text.usetex": False}):
        drawn = to_matplotlib(fig, width, escape=True)
        with whole_file(path) as scratch:
            drawn.savefig(scratch, format="pgf", backend="pgf")
    return path


def to_matplotlib(fig: go.Figure, width: Width = "page", *, escape: bool = False) -> "Figure":
    """A figure of the package as a matplotlib figure, to change further or to save with the fonts of a paper.

    Args:
        fig: from `pp.figures.NAME(records)`.
        width: as of `for_print`: "column", "page", or a preset such as "icml".
        escape: whether the text will be read by TeX, so that its special characters must be escaped.

    Raises:
        InputError: matplotlib is missing, or an unknown width.
    """
    _matplotlib()
    from matplotlib.figure import Figure

    printed: Any = for_print(fig, width)
    layout, size = printed.layout, WIDTHS[width]
    # PGF text is not ours to choose, but other backends take matplotlib's own copy of the font
    style = _Style(size.font * POINTS, size.font_face.name, escape)
    columns, rows = _legend_grid(printed, size.font)
    top = rows * 1.4 * size.font + layout.meta["titles"] + 6
    pixels = layout.height - layout.margin.t + top
    drawn = Figure(figsize=(layout.width / INCH, pixels / INCH))
    above, below = top / pixels, layout.margin.b / pixels
    left = _left(printed) * size.font / layout.width
    frame = left, below, 0.985 - left, 1 - above - below
    axes = {name: _axes(drawn, printed, name, frame, style) for name in _y_names(printed)}
    for order, trace in enumerate(printed.data):
        _draw(drawn, axes[trace.yaxis or "y"], trace, order, style)
    for shape in layout.shapes:
        _shape(axes, shape)
    for note in layout.annotations:
        _note(drawn, axes, note, frame, style)
    for name, one in axes.items():
        _finish(one, printed, name, style)
    for side in ("x", "y"):
        _match(axes, printed, side)
    if rows:
        _legend(drawn, printed, columns, style)
    return drawn


def _matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("matplotlib is not installed: pip install 'persona-probe[figures]'") from error


class _Style:
    """Text of a figure: its size in points, its font, and whether TeX reads it."""

    def __init__(self, points: float, family: str, escape: bool) -> None:
        self.points, self.escape = points, escape
        self.font: dict[str, Any] = {"size": points} if escape else {"size": points, "family": family}

    def text(self, words: object) -> str:
        """Plotly's text without its tags; lines stay."""
        plain = html.unescape(re.sub(r"<[^>]+>", "", str(words or "").replace("<br>", "\n")))
        if self.escape:
            return "".join(SPECIAL.get(letter, letter) for letter in plain)
        return plain.replace("$", r"\$")


# --- Axes


def _y_names(figure: Any) -> list[str]:
    """Each panel by its vertical axis: `y`, `y2`, ..."""
    return list(dict.fromkeys([*(trace.yaxis or "y" for trace in figure.data), *_layout_axes(figure)]))


def _layout_axes(figure: Any) -> list[str]:
    return [axis.plotly_name.replace("yaxis", "y") for axis in figure.select_yaxes()]


def _partners(figure: Any, name: str) -> tuple[Any, Any]:
    """The horizontal and the vertical axis of a panel, of plotly's layout."""
    vertical = figure.layout[name.replace("y", "yaxis", 1)]
    anchor = vertical.anchor or next((t.xaxis for t in figure.data if (t.yaxis or "y") == name), None) or "x"
    return figure.layout[anchor.replace("x", "xaxis", 1)], vertical


def _axes(drawn: "Figure", figure: Any, name: str, frame: Sequence[float], style: _Style) -> "Axes":
    across, up = _partners(figure, name)
    x0, x1 = across.domain or (0, 1)
    y0, y1 = up.domain or (0, 1)
    left, bottom, width, height = frame
    box = left + x0 * width, bottom + y0 * height, (x1 - x0) * width, (y1 - y0) * height
    axes = drawn.add_axes(box)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color="#8A8A8A", alpha=0.22, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=style.points, color="#8A8A8A", length=2.5, width=0.5)
    if up.categoryarray is not None:
        axes.yaxis.update_units([str(value) for value in up.categoryarray])
    for spine in axes.spines.values():
        spine.set_color("#8A8A8A")
        spine.set_linewidth(0.6)
    return axes


def _finish(axes: "Axes", figure: Any, name: str, style: _Style) -> None:
    """Titles, ticks and ranges, once everything is drawn."""
    for axis, side in zip(_partners(figure, name), ("x", "y"), strict=True):
        _range(axes, axis, side)
        if axis.tickvals is not None:
            _ticks(axes, axis, side, style)
        if axis.title.text and axis.showticklabels is not False:
            getattr(axes, f"set_{side}label")(style.text(axis.title.text), fontdict=style.font)
        if axis.showticklabels is False or (side == "x" and axis.matches and not axis.title.text):
            axes.tick_params(side, **{("labelbottom" if side == "x" else "labelleft"): False})
        if axis.visible is False:
            getattr(axes, f"get_{side}axis")().set_visible(False)
            axes.spines["bottom" if side == "x" else "left"].set_visible(False)
        if axis.showgrid is False:
            axes.grid(visible=False, axis=side)
        for label in getattr(axes, f"get_{side}ticklabels")():
            label.set(fontsize=style.points, **({} if style.escape else {"family": style.font["family"]}))


def _range(axes: "Axes", axis: Any, side: str) -> None:
    if axis.type == "log":
        getattr(axes, f"set_{side}scale")("log")
    if axis.range is not None:
        ends = [10.0**end for end in axis.range] if axis.type == "log" else axis.range
        getattr(axes, f"set_{side}lim")(*ends)
    elif axis.rangemode == "tozero":
        getattr(axes, f"set_{side}lim")(**{("left" if side == "x" else "bottom"): 0})
    if axis.autorange == "reversed":
        getattr(axes, f"invert_{side}axis")()


def _ticks(axes: "Axes", axis: Any, side: str, style: _Style) -> None:
    labels = axis.ticktext if axis.ticktext is not None else [f"{value:g}" for value in axis.tickvals]
    words = [style.text(label) for label in labels]
    getattr(axes, f"set_{side}ticks")(list(axis.tickvals), words, fontdict=style.font, minor=False)
    getattr(axes, f"{side}axis").minorticks_off()
    if axis.tickangle:
        axes.tick_params(side, rotation=-axis.tickangle)  # pyright: ignore


def _match(axes: Mapping[str, "Axes"], figure: Any, side: str) -> None:
    """Panels whose axes match in plotly have one range."""
    matching = [name for name in axes if _partners(figure, name)[side == "y"].matches]
    if not matching:
        return
    shared = {_partners(figure, name)[side == "y"].matches for name in matching}
    group = [axes[name] for name in axes if name in matching or _key(figure, name, side) in shared]
    ends = [getattr(one, f"get_{side}lim")() for one in group]
    for one in group:
        getattr(one, f"set_{side}lim")(min(low for low, _ in ends), max(high for _, high in ends))


def _key(figure: Any, name: str, side: str) -> str:
    return str(_partners(figure, name)[side == "y"].plotly_name).replace("axis", "")


def _left(figure: Any) -> float:
    """Room left of the panels for labels and titles, in font sizes."""
    titles = [str(axis.title.text).count("<br>") + 1 for axis in figure.select_yaxes() if axis.title.text]
    return _widest(figure) * 0.56 + max(titles, default=0) * 1.35 + 1.0


def _widest(figure: Any) -> int:
    """Letters of the longest label left of a panel."""
    texts = [line for axis in figure.select_yaxes() for text in axis.ticktext or () for line in str(text).split("<br>")]
    texts += [str(y) for trace in figure.data for y in (trace.y if trace.y is not None else ()) if isinstance(y, str)]
    return max(map(len, texts), default=6)


# --- Traces


def _colour(value: Any) -> Any:
    """Plotly's `rgba(r,g,b,a)` as numbers; other colours as they are."""
    found = re.fullmatch(r"rgba?\(([^)]+)\)", str(value))
    if found is None:
        return value
    parts = [float(part) for part in found[1].split(",")]
    return (*(part / 255 for part in parts[:3]), parts[3] if len(parts) == 4 else 1.0)


def _list(values: Any) -> list[Any]:
    return [] if values is None else list(values)


def _draw(drawn: "Figure", axes: "Axes", trace: Any, order: int, style: _Style) -> None:
    if trace.type == "heatmap":
        _heatmap(drawn, axes, trace, style)
        return
    x, y = _list(trace.x), _list(trace.y)
    mode = trace.mode or "lines+markers"
    alpha = trace.opacity if trace.opacity is not None else 1.0
    if trace.fill == "toself":
        axes.fill(x, y, color=_colour(trace.fillcolor), linewidth=0, zorder=1)
        return
    colour = _colour(trace.line.color if trace.line.color else trace.marker.color)
    line = _line(trace.line) if "lines" in mode and (trace.line.width is None or trace.line.width > 0) else None
    if line is not None:
        axes.plot(x, y, color=colour, alpha=alpha, zorder=2 + order / 1000, **line)
    if "markers" in mode and x:
        _marks(axes, x, y, trace, alpha, order)
    if "text" in mode:
        _texts(axes, x, y, trace, style)
    for side in ("x", "y"):
        bars = trace[f"error_{side}"]
        if bars.array is not None and x:
            ends = np.array([_list(bars.arrayminus if bars.arrayminus is not None else bars.array), _list(bars.array)])
            kept = np.clip(np.nan_to_num(ends.astype(float)), 0, None)
            looks = {"ecolor": _colour(bars.color or colour), "elinewidth": 1.0, "capsize": 1.6, "fmt": "none"}
            axes.errorbar(x, y, **{f"{side}err": kept}, **looks, zorder=2.5)


def _line(line: Any) -> dict[str, Any]:
    return {"linewidth": (line.width or 2) * POINTS, "linestyle": DASHES.get(line.dash or "", "-")}


def _marks(axes: "Axes", x: list[Any], y: list[Any], trace: Any, alpha: float, order: int) -> None:
    marker = trace.marker
    symbols = [marker.symbol] * len(x) if isinstance(marker.symbol, (str, type(None))) else list(marker.symbol)
    colours = [marker.color or trace.line.color or "C0"] * len(x) if not _many(marker.color) else list(marker.color)
    sizes = [marker.size or 6] * len(x) if not _many(marker.size) else list(marker.size)
    fade = alpha * (marker.opacity if isinstance(marker.opacity, (int, float)) else 1.0)
    for symbol in dict.fromkeys(symbols):
        rows = [i for i, one in enumerate(symbols) if one == symbol]
        name, hollow = re.sub(r"-(open|dot|thin-open)$", "", symbol or "circle"), "open" in (symbol or "")
        shown = [_colour(colours[i]) for i in rows]
        face: Any = "none" if hollow else shown
        looks = {"marker": SYMBOLS.get(name, "o"), "s": [(sizes[i] * POINTS) ** 2 * 0.8 for i in rows], "alpha": fade}
        edges = {"edgecolors": shown, "linewidths": 0.9} if hollow else {"linewidths": 0.9 if "thin" in name else 0}
        if name in ("x-thin", "line-ns"):
            face, edges = None, {"c": shown, "linewidths": 0.9}
        spots = [x[i] for i in rows], [y[i] for i in rows]
        faces = {} if face is None else {"facecolors": face}
        settings: dict[str, Any] = {**faces, **looks, **edges, "zorder": 3 + order / 1000}
        axes.scatter(*spots, **settings)


def _many(value: Any) -> bool:
    return value is not None and not isinstance(value, (str, int, float))


def _texts(axes: "Axes", x: list[Any], y: list[Any], trace: Any, style: _Style) -> None:
    vertical, _, horizontal = str(trace.textposition or "middle center").partition(" ")
    place = {"va": {"top": "bottom", "bottom": "top"}.get(vertical, "center")}
    place["ha"] = {"left": "right", "right": "left"}.get(horizontal, "center")
    words = list(trace.text) if _many(trace.text) else [trace.text] * len(x)
    colours = list(trace.textfont.color) if _many(trace.textfont.color) else [trace.textfont.color] * len(x)
    for left, height, word, colour in zip(x, y, words, colours, strict=True):
        axes.text(left, height, style.text(word), color=_colour(colour or "#1b1f24"), **place, **style.font)


def _heatmap(drawn: "Figure", axes: "Axes", trace: Any, style: _Style) -> None:
    z = np.array(trace.z, dtype=float)
    ends = {"vmin": trace.zmin, "vmax": trace.zmax}
    scale = [(at, _colour(colour)) for at, colour in trace.colorscale or ()]
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("plotly", scale) if scale else "cividis"
    mesh = axes.pcolormesh(np.ma.masked_invalid(z), cmap=colours, **ends)
    for side, values in (("x", trace.x), ("y", trace.y)):
        words = [style.text(value) for value in _list(values)]
        getattr(axes, f"set_{side}ticks")([i + 0.5 for i in range(len(words))], words, fontdict=style.font)
    if trace.showscale is not False:
        bar = drawn.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02)
        bar.ax.tick_params(labelsize=style.points)
        bar.set_label(style.text(trace.colorbar.title.text), **style.font)


# --- Lines, bands and notes of the layout


def _shape(axes: Mapping[str, "Axes"], shape: Any) -> None:
    name = str(shape.yref or "y").split(" ")[0]
    panels = axes.values() if name == "paper" else [axes[name]] if name in axes else []
    for one in panels:
        spans = "domain" in str(shape.xref) or shape.xref == "paper"
        stands = "domain" in str(shape.yref) or shape.yref == "paper"
        colour = _colour(shape.line.color or "#8A8A8A")
        if shape.type == "line":
            looks = {"color": colour, **_line(shape.line)}
            if spans:
                one.axhline(shape.y0, zorder=1, **looks)
            elif stands:
                one.axvline(shape.x0, zorder=1, **looks)
            else:
                one.plot([shape.x0, shape.x1], [shape.y0, shape.y1], zorder=1, **looks)
        elif shape.type == "rect":
            fill = {"color": _colour(shape.fillcolor), "alpha": shape.opacity or 1, "linewidth": 0, "zorder": 0.5}
            one.axhspan(shape.y0, shape.y1, **fill) if spans else one.axvspan(shape.x0, shape.x1, **fill)


def _note(drawn: "Figure", axes: Mapping[str, "Axes"], note: Any, frame: Sequence[float], style: _Style) -> None:
    words = style.text(note.text)
    place: dict[str, Any] = {"ha": {"auto": "center", None: "center"}.get(note.xanchor, note.xanchor)}
    place["va"] = {"middle": "center", "auto": "center", None: "center"}.get(note.yanchor, note.yanchor)
    if note.font.color:
        place["color"] = _colour(note.font.color)
    if note.yref == "paper" and note.xref == "paper":
        left, bottom, width, height = frame
        drawn.text(left + note.x * width, bottom + note.y * height, words, **place, **style.font)
        return
    name = str(note.yref or "y").split(" ")[0]
    one = axes.get(name, next(iter(axes.values())))
    one.annotate(words, (note.x, note.y), **place, **style.font)


def _legend_grid(figure: Any, font: float) -> tuple[int, int]:
    """Columns, and lines of text, of the legend above the panels; no lines without a legend."""
    names = legend_names(figure)
    if len(names) < 2 and not any(t.showlegend for t in figure.data if t.name):
        return 1, 0
    letters = max(len(line) for name in names for line in name.split("<br>"))
    columns = max(1, min(len(names), int(figure.layout.width / font / (letters * 0.56 + 4.5))))
    tallest = max(name.count("<br>") + 1 for name in names)
    return columns, -(-len(names) // columns) * tallest


def _legend(drawn: "Figure", figure: Any, columns: int, style: _Style) -> None:
    """The entries that plotly would show, in rows above the panels."""
    from matplotlib.lines import Line2D

    shown = [t for t in figure.data if t.showlegend is not False and t.name and t.type != "heatmap"]
    handles = []
    for name in legend_names(figure):
        trace = next(t for t in shown if str(t.name) == name)
        colour = trace.marker.color if isinstance(trace.marker.color, str) else trace.line.color
        symbol = trace.marker.symbol if isinstance(trace.marker.symbol, str) else "circle"
        mark = SYMBOLS.get(re.sub(r"-open$", "", symbol), "o") if "markers" in (trace.mode or "") else ""
        looks = _line(trace.line) if "lines" in (trace.mode or "lines") else {"linestyle": ""}
        hollow = {"markerfacecolor": "none"} if "open" in symbol else {}
        label, size = style.text(name), {"marker": mark, "markersize": 3.6, **hollow}
        handles.append(Line2D([], [], color=_colour(colour or "#1b1f24"), label=label, **looks, **size))
    place = {"loc": "upper left", "bbox_to_anchor": (0.0, 1.0), "ncols": columns, "frameon": False}
    space = {"columnspacing": 1.2, "handlelength": 1.8, "borderaxespad": 0.3, "labelspacing": 0.3}
    drawn.legend(handles=handles, **place, **space, prop=dict(style.font))  # pyright: ignore
