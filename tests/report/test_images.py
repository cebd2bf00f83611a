"""Images of figures: PDF, PNG and SVG show the same ink, nothing is cut, and the letters travel with the file."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from persona_probe.report.export import export_figures
from persona_probe.report.figures import ALL_FIGURES
from persona_probe.report.images import draw_images, find_browser, with_font
from persona_probe.report.latex import to_matplotlib
from persona_probe.report.printing import PNG_SCALE, SANS, WIDTHS, Width, for_print, legend_names
from persona_probe.report.records import Records, load_records

BROWSER = find_browser()
DEMO = Path(__file__).parents[2] / "records" / "demo"
CASES: dict[str, Width] = {
    "arms": "icml",
    "categories": "page",
    "dose_response": "slides",
    "harm_register": "column",
    "passages": "nature",
    "rates": "neurips",
    "recovery": "column",
    "stress": "page",
    "trajectory": "nature-wide",
}
INK = 235
"""A pixel darker than this is ink: the lightest grid line is."""


def ink_box(picture: Image.Image) -> np.ndarray:
    """Left, top, right and bottom end of all ink, as shares of the picture."""
    dark = np.asarray(picture.convert("L")) < INK
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    height, width = dark.shape
    return np.array([columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height])


def pages(pdf: bytes) -> list[Image.Image]:
    pdfium = pytest.importorskip("pypdfium2")
    return [page.render(scale=3).to_pil() for page in pdfium.PdfDocument(pdf)]


@pytest.fixture(scope="module")
def demo() -> Records:
    """The shipped demo's; read only."""
    return load_records(DEMO)


@pytest.fixture(scope="module")
def drawn(demo: Records) -> dict[str, dict[str, bytes]]:
    """Figures of the shipped demo, each in another preset, by one browser."""
    if BROWSER is None:
        pytest.skip("no Chromium: install the Debian package chromium")
    figures = [
        (for_print(ALL_FIGURES[name].draw(demo), width, footer="origin"), WIDTHS[width].font_face)
        for name, width in CASES.items()
    ]
    return dict(zip(CASES, draw_images(BROWSER, figures, ("svg", "pdf", "png")), strict=True))


@pytest.mark.browser
@pytest.mark.parametrize("name", CASES)
def test_the_pdf_shows_what_the_svg_and_the_png_show(name: str, drawn: dict[str, dict[str, bytes]]) -> None:
    (page,) = pages(drawn[name]["pdf"])
    png = Image.open(io.BytesIO(drawn[name]["png"]))
    box = ink_box(page)
    assert box == pytest.approx(ink_box(png), abs=0.004)  # at 94.8% the right end was 0.05 away
    pixel = 1 / min(png.size) * PNG_SCALE
    assert box.min() > pixel / 4 and box.max() < 1 - pixel / 4, "ink touches the edge: something is cut"
    head = drawn[name]["svg"].decode()[:300]
    size = [float(found) for found in re.findall(r' (?:width|height)="([\d.]+)"', head)[:2]]
    assert [side / PNG_SCALE for side in png.size] == pytest.approx(size)
    assert round(size[0]) == WIDTHS[CASES[name]].pixels


@pytest.mark.browser
@pytest.mark.parametrize("name", CASES)
def test_fonts_are_embedded_and_none_is_of_type_3(name: str, drawn: dict[str, dict[str, bytes]]) -> None:
    pdf, face = drawn[name]["pdf"], WIDTHS[CASES[name]].font_face
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
    families = {one.removesuffix(b"-Regular") for one in re.findall(rb"/BaseFont /[A-Z]{6}\+([\w-]+)", pdf)}
    assert families == {face.name.replace(" ", "").encode()}, "a letter came from a font of this machine"
    assert f"font-family: '{face.name}'; src: url(data:font/ttf;base64," in drawn[name]["svg"].decode()


@pytest.mark.browser
def test_a_figure_without_footer_has_no_such_line(records: Records, tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("no Chromium: install the Debian package chromium")
    export_figures(records, tmp_path, only=["arms"], formats=("svg",), footer=False)
    image = (tmp_path / "arms.svg").read_text("utf-8")
    assert ">persona-probe" not in image and "<metadata>" in image  # test_export.py draws it with its footer


def test_an_svg_carries_the_letters_that_it_uses_and_no_others() -> None:
    from base64 import b64decode

    from fontTools.ttLib import TTFont

    svg = with_font('<svg width="1"><text>Wörter 7</text></svg>', SANS)
    data = re.findall(r"base64,([^)]+)\)", svg)[0]
    letters = {chr(code) for code in TTFont(io.BytesIO(b64decode(data)))["cmap"].getBestCmap()}  # pyright: ignore
    assert set("Wörter 7") <= letters <= set("Wörter 7") | set(" 0123456789.,-−")
    assert svg == with_font('<svg width="1"><text>Wörter 7</text></svg>', SANS)  # the same on every run


# --- The legend, and matplotlib


@pytest.mark.parametrize("width", ["column", "neurips", "page"])
@pytest.mark.parametrize("name", ["categories", "realignment", "coherence", "trajectory"])
def test_a_legend_takes_less_than_a_third_of_the_height(name: str, width: Width, demo: Records) -> None:
    figure: Any = for_print(ALL_FIGURES[name].draw(demo), width)
    assert len(legend_names(figure)) > 2
    above = figure.layout.margin.t - figure.layout.meta["titles"]
    assert above / figure.layout.height < 0.3


@pytest.mark.parametrize("name", ["arms", "categories", "latents", "ranker_agreement", "trajectory"])
def test_matplotlib_draws_the_same_numbers(name: str, demo: Records, tmp_path: Path) -> None:
    from matplotlib.collections import PathCollection

    figure: Any = ALL_FIGURES[name].draw(demo)
    drawn = to_matplotlib(figure, "icml")
    assert drawn.get_figwidth() == pytest.approx(3.25, abs=0.01)
    marks = [
        t
        for t in figure.data
        if t.type == "scatter" and "markers" in (t.mode or "") and t.x is not None and len(t.x) > 0  # pyright: ignore
    ]
    offsets = [c.get_offsets() for axes in drawn.axes for c in axes.collections if isinstance(c, PathCollection)]
    heights = np.sort(np.concatenate([np.asarray(o, float)[:, 1] for o in offsets])) if marks else np.array([])
    asked = [y for trace in marks for y in trace.y]
    if marks and all(isinstance(y, (int, float)) for y in asked):
        assert np.nan_to_num(heights) == pytest.approx(np.nan_to_num(np.sort(np.array(asked, float))))
    drawn.savefig(tmp_path / "figure.png", dpi=100)
    box = ink_box(Image.open(tmp_path / "figure.png"))
    assert box.min() > 0 and box.max() <= 1


def test_text_for_tex_has_its_special_characters_escaped() -> None:
    import plotly.graph_objects as go

    figure = go.Figure(go.Scatter(x=[1], y=[1], name="50% of a_b & <b>c</b>", showlegend=True), {"height": 300})
    figure.update_xaxes(title_text="share (%)")
    drawn = to_matplotlib(figure, escape=True)
    assert drawn.legends[0].get_texts()[0].get_text() == r"50\% of a\_b \& c"
    assert drawn.axes[0].get_xlabel() == r"share (\%)"
