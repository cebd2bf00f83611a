"""Puts the folders of SAEs, configs and records into a wheel: in a checkout they lie outside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("saes", "finetune_configs", "records")
"""As in persona_probe/shipped.py; the package cannot be imported before what it needs is installed."""


class BuildWithFolders(build_py):
    """`build_py`, and the folders that ship, in persona_probe/shipped."""

    def run(self) -> None:
        """Build the package, then copy; an editable install finds the folders in the checkout."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "persona_probe" / "shipped"
        for folder in FOLDERS:
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    place = target / file
                    place.parent.mkdir(parents=True, exist_ok=True)
                    self.copy_file(str(file), str(place))


setup(cmdclass={"build_py": BuildWithFolders})
