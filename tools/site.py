"""The documentation of several versions in one folder: each in its own, with a list that the pages' menu reads.

python -m tools.site site-versions
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from packaging.version import InvalidVersion, Version

import persona_probe
from persona_probe.writing import write_text

LATEST = "latest"
REDIRECT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>persona_probe</title>
<meta http-equiv="refresh" content="0; url={version}/index.html"></head>
<body><a href="{version}/index.html">persona_probe {version}</a></body></html>
"""


def build(folder: Path, version: str) -> None:
    """Build this checkout's documentation into `folder/version`, and list it; other versions stay as they are."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PERSONA_PROBE_SITE_VERSIONS": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str((folder / version).resolve())]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[1])
    list_versions(folder)


def list_versions(folder: Path) -> list[str]:
    """Write `versions.json` and a first page that leads to the newest version.

    Returns:
        The versions whose pages the folder holds, newest first; a folder whose name is no version is left alone.
    """
    found = sorted((v for path in folder.glob("*/index.html") if (v := _version(path.parent.name))), reverse=True)
    names = [str(v) for v in found]
    entries = [{"version": name, "title": name, "aliases": [LATEST] if name == names[0] else []} for name in names]
    write_text(folder / "versions.json", json.dumps(entries, indent=2) + "\n")
    if names:
        write_text(folder / "index.html", REDIRECT.format(version=names[0]))
    return names


def _version(name: str) -> Version | None:
    try:
        return Version(name)
    except InvalidVersion:
        return None


def main() -> None:
    """Build this version into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", default=persona_probe.__version__)
    arguments = parser.parse_args()
    build(arguments.folder, arguments.version)


if __name__ == "__main__":
    main()
