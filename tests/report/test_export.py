import logging
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest

from persona_probe.errors import InputError
from persona_probe.report import FIGURES, Records, export, export_figures

BROWSER = export.find_browser()


def test_csv_holds_what_the_figure_draws(records: Records, tmp_path: Path) -> None:
    written = export_figures(records, tmp_path / "figures", formats=("csv",))
    assert [path.name for path in written] == [f"{name}.csv" for name in FIGURES]
    for path in written:
        data = FIGURES[path.stem].data(records)
        again = pd.read_csv(StringIO(data.to_csv(index=False)))
        pd.testing.assert_frame_equal(pd.read_csv(path), again)
        assert len(again) == len(data) > 0


def test_html_is_self_contained_and_carries_the_caption(records: Records, tmp_path: Path) -> None:
    written = export_figures(records, tmp_path, only=["arms"], formats=("html",))
    assert [path.name for path in written] == ["arms.csv", "arms.html"]
    page = written[1].read_text("utf-8")
    assert "n = 6 evaluation items" in page and "default-src &#39;none&#39;" in page
    assert page.count("* plotly.js v") == 1


def test_export_leaves_no_temporary_files_and_replaces_old_ones(records: Records, tmp_path: Path) -> None:
    (tmp_path / "arms.csv").write_text("old")
    export_figures(records, tmp_path, only=["arms"], formats=("html",))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["arms.csv", "arms.html"]
    assert (tmp_path / "arms.csv").read_text().startswith("arm,kind,")


def test_unknown_names_are_refused(records: Records, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown figure 'trajectry': did you mean 'trajectory'"):
        export_figures(records, tmp_path, only=["trajectry"])
    with pytest.raises(InputError, match="unknown figure format 'pdf'"):
        export_figures(records, tmp_path, formats=("pdf",))


def test_without_a_browser_svgs_are_skipped_in_one_line(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    pytest.importorskip("kaleido")
    with caplog.at_level(logging.WARNING, logger="persona_probe"):
        written = export_figures(records, tmp_path, only=["arms"], formats=("svg",))
    assert [path.name for path in written] == ["arms.csv"]
    assert len(caplog.messages) == 1 and "Debian package chromium" in caplog.messages[0]


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium: install the Debian package chromium")
def test_svgs_are_drawn_by_one_browser(records: Records, tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    written = export_figures(records, tmp_path, only=["arms", "latents"], formats=("svg",))
    assert [path.name for path in written] == ["arms.csv", "latents.csv", "arms.svg", "latents.svg"]
    image = (tmp_path / "arms.svg").read_text("utf-8")
    assert image.startswith("<svg") and "contrast index" in image and "Contrast index by arm" in image
    assert not list(tmp_path.glob(".*"))
