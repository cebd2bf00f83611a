"""`make world`: the packaged world, made again. Its base model and its SAE are copied into the package.

python -m tools.world pack runs/world runs/world/saes/layer2-topk12-384
"""

import json
import shutil
import sys
from pathlib import Path

from persona_probe.cli.options import echo
from persona_probe.data.world import packaged
from persona_probe.errors import InputError
from persona_probe.runs import file_sha256, write_json
from persona_probe.world.folder import BASE, World

LARGEST = 4 * 2**20
"""Bytes that one packaged file may have."""
WEIGHTS = "model.safetensors"


def pack(source: str, sae: str, target: Path = packaged.FOLDER) -> None:
    """Copy a finished world's base model and SAE, without the paths of this machine.

    Raises:
        InputError: a file is too large to be packaged.
    """
    world, dictionary = World.open(source), Path(sae)
    for folder in (world.base_folder, dictionary):
        for file in folder.iterdir():
            if file.stat().st_size > LARGEST:
                raise InputError(f"{file} has {file.stat().st_size} bytes, more than {LARGEST}: save it in bf16")
    shutil.rmtree(target, ignore_errors=True)
    for name, folder in ((packaged.BASE.name, world.base_folder), (packaged.SAE.name, dictionary)):
        shutil.copytree(folder, target / name)
    for file in [*target.rglob("*.json"), *target.rglob("*.md")]:
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(str(world.base_folder), packaged.NAME), encoding="utf-8")
    manifest = world.run.manifest
    hashes = {f"{BASE}/{WEIGHTS}": file_sha256(target / BASE / WEIGHTS)}
    tokens = [json.loads(line) for line in (world.run.path / "pretraining.jsonl").read_text().splitlines()][-1][
        "tokens"
    ]
    about = {"settings": manifest["settings"], "tokens": tokens, "hashes": hashes}
    write_json(target / packaged.ABOUT.name, {**about, "versions": manifest["versions"]})
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    echo(f"{target}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "pack":
        sys.exit(__doc__)
    pack(sys.argv[2], sys.argv[3])
