"""The list of the documentation's versions."""

import json
from pathlib import Path

from tools.site import list_versions


def test_the_newest_version_is_listed_first_and_opened(tmp_path: Path) -> None:
    for name in ("0.2.0", "0.10.0", "0.2.0rc1", "assets"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").write_text(name, encoding="utf-8")
    (tmp_path / "0.3.0").mkdir()  # not built
    assert list_versions(tmp_path) == ["0.10.0", "0.2.0", "0.2.0rc1"]
    entries = json.loads((tmp_path / "versions.json").read_text(encoding="utf-8"))
    assert [entry["aliases"] for entry in entries] == [["latest"], [], []]
    assert "url=0.10.0/index.html" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert (tmp_path / "assets" / "index.html").read_text(encoding="utf-8") == "assets"
