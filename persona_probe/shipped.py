"""SAEs, configs and records that come with the package: from a checkout's top folder, or from inside a wheel."""

from pathlib import Path

FOLDERS = ("saes", "finetune_configs", "records")
"""What ships; `setup.py` copies the same folders into the wheel."""
_PACKAGE = Path(__file__).parent


def top() -> Path:
    """The folder that holds `FOLDERS`."""
    checkout = _PACKAGE.parent
    return checkout if (checkout / "pyproject.toml").is_file() else _PACKAGE / "shipped"


def find(path: str | Path) -> Path:
    """A path as it is; where nothing is there and it begins with one of `FOLDERS`, that of the file that ships."""
    given = Path(path)
    if given.is_absolute() or not given.parts or given.parts[0] not in FOLDERS or given.exists():
        return given
    shipped = top() / given
    return shipped if ".." not in given.parts and shipped.exists() else given
