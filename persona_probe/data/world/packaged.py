"""Where the world that comes with this package lies: its model, and its SAE."""

from pathlib import Path

from persona_probe.errors import InputError

NAME = "persona-world"
"""What `load_model` and `load_sae` call it."""
FOLDER = Path(__file__).parents[1] / "persona_world"
BASE = FOLDER / "base"
"""The model that helps, in bf16."""
SAE = FOLDER / "sae"
"""An SAE of that model, with its recipe and measured quality."""
ABOUT = FOLDER / "world.json"
"""How the world was made, and what it says."""


def check() -> None:
    """Refuse to go on without the packaged world.

    Raises:
        InputError: this installation lacks it.
    """
    if not ABOUT.is_file():
        raise InputError(f"this installation has no {NAME}: make it by `make world` in a checkout")
