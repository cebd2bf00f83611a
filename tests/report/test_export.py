import logging
import struct
import sys
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest

from persona_probe.errors import InputError
from persona_probe.report.export import csv_text, export_figures
from persona_probe.report.figures import ALL_FIGURES, figures_of
from persona_probe.report.images import find_browser
from persona_probe.report.printing import PNG_SCALE
from persona_probe.report.records import Records

BROWSER = find_browser()


def test_csv_holds_what_the_figure_draws(records: Records, tmp_path: Path) -> None:
    written = export_figures(records, tmp_path / "figures", formats=("csv",))
    assert [path.name for path in written] == [f"{name}.csv" for name in figures_of(records)]
    for path in written:
        data = ALL_FIGURES[path.stem].data(records)
        again = pd.read_csv(StringIO(data.to_csv(index=False)))
        pd.testing.assert_frame_equal(pd.read_csv(path), again, rtol=1e-9, atol=1e-9, check_dtype=False)
        assert len(again) == len(data) > 0


def test_html_is_self_contained_and_carries_the_caption(records: Records, tmp_path: Path) -> None:
    written = export_figures(records, tmp_path, only=["arms"], formats=("html",))
    assert [path.name for path in written] == ["arms.csv", "arms.html"]
    page = written[1].read_text("utf-8")
    assert "n = 6 evaluation items" in page and "default-src &#39;none&#39;" in page
    assert page.count("* plotly.js v") == 1
    assert '<meta name="provenance revision" content="' + "0" * 40 in page and "<small>run not recorded;" in page


def test_export_leaves_no_temporary_files_and_replaces_old_ones(records: Records, tmp_path: Path) -> None:
    (tmp_path / "arms.csv").write_text("old")
    export_figures(records, tmp_path, only=["arms"], formats=("html",))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["arms.csv", "arms.html"]
    assert (tmp_path / "arms.csv").read_text().startswith("arm,kind,")


def test_unknown_names_are_refused(records: Records, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown figure 'trajectry': did you mean 'trajectory'"):
        export_figures(records, tmp_path, only=["trajectry"])
    with pytest.raises(InputError, match="unknown figure format 'pfd': did you mean 'pgf' or 'pdf'"):
        export_figures(records, tmp_path, formats=("pfd",))


def test_without_a_browser_svgs_are_skipped_in_one_line(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    pytest.importorskip("matplotlib")
    with caplog.at_level(logging.WARNING, logger="persona_probe"):
        written = export_figures(records, tmp_path, only=["arms"], formats=("svg", "png"))
    assert [path.name for path in written] == ["arms.csv"]
    assert len(caplog.messages) == 1 and "Debian package chromium" in caplog.messages[0]
    assert caplog.messages[0].startswith("SVG, PNG figures skipped")


def test_without_the_extra_one_line_says_how_to_get_it(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "choreographer", None)
    with caplog.at_level(logging.WARNING, logger="persona_probe"):
        written = export_figures(records, tmp_path, only=["arms"], formats=("pdf",))
    assert [path.name for path in written] == ["arms.csv"]
    assert caplog.messages == ["PDF figures skipped: install choreographer (pip install 'persona-probe[figures]')"]


def test_numbers_in_a_csv_are_the_same_on_every_machine() -> None:
    frame = pd.DataFrame({"a": [1 / 3, -1e-17, float("nan")], "b": pd.array([1, None, 3], dtype="Int64")})
    assert csv_text(frame) == "a,b\n0.3333333333,1\n0,\n,3\n"


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium: install the Debian package chromium")
def test_images_are_drawn_by_one_browser(records: Records, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = export_figures(records, tmp_path, only=["arms"], formats=("svg", "pdf", "png"), width="column")
    assert [path.name for path in written] == ["arms.csv", "arms.svg", "arms.pdf", "arms.png"]
    image = (tmp_path / "arms.svg").read_text("utf-8")
    assert image.startswith("<svg") and "contrast index" in image and "<title>Contrast index by arm</title>" in image
    assert "n = 6 evaluation items" in image and f"revision: {'0' * 40}" in image and 'width="336"' in image
    assert ">persona-probe" in image  # the line of its origin
    width, _ = struct.unpack(">II", (tmp_path / "arms.png").read_bytes()[16:24])
    assert width == 336 * PNG_SCALE
    page = (tmp_path / "arms.pdf").read_bytes()
    assert page.startswith(b"%PDF") and page.count(b"/Keywords <FEFF") == 1
    assert not list(tmp_path.glob(".*"))
