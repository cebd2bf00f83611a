"""An SAE's folder with its weights stored in bfloat16: half the bytes; computing stays in float32."""

import shutil
from pathlib import Path

import torch

from persona_probe.errors import InputError
from persona_probe.files import read_json, read_tensors
from persona_probe.runs import file_sha256
from persona_probe.saes.load import QUALITY_FILE, WEIGHTS_FILE
from persona_probe.writing import whole_folder, write_json, write_tensors, write_text

CARD_FILE = "README.md"
STORED = "Weights are stored in bfloat16 and computed with in float32.\n"


def shrink(source: Path, out: Path) -> Path:
    """Copy a SAELens folder with its matrices rounded to bfloat16; biases and thresholds keep their precision.

    The sha256 in quality.json becomes that of the new file. Its measured quality stays that of the SAE as trained:
    measure again with `persona-probe sae check`.

    Raises:
        InputError: no SAELens folder there, or an `out` that exists.
    """
    if not (source / WEIGHTS_FILE).is_file():
        raise InputError(f"{source} is no SAELens folder: it has no {WEIGHTS_FILE}")
    if out.exists():
        raise InputError(f"{out} exists: give another folder")
    with whole_folder(out, "give another folder") as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        _round(folder)
    return out


def _round(folder: Path) -> None:
    weights = read_tensors(folder / WEIGHTS_FILE, (), "fetch the SAE again")
    stored = {k: v.to(torch.bfloat16) if v.ndim == 2 and v.dtype == torch.float32 else v for k, v in weights.items()}
    write_tensors(folder / WEIGHTS_FILE, stored)
    if (quality := folder / QUALITY_FILE).is_file():
        known = read_json(quality, dict, "fetch the SAE again")
        write_json(quality, {**known, "sha256": file_sha256(folder / WEIGHTS_FILE)})
    if (card := folder / CARD_FILE).is_file() and STORED not in (text := card.read_text(encoding="utf-8")):
        write_text(card, f"{text.rstrip()}\n\n{STORED}")
