"""A wheel holds everything: installed in an empty folder, the README's lines work from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from persona_probe import shipped

ROOT = Path(__file__).parents[1]
SAE = "saes/smollm2-135m-instruct/layer20-topk32-4608"
LINES = f"""
import persona_probe as pp
from persona_probe import shipped
sae = pp.load_sae({SAE!r})
assert sae.cfg.d_sae == 4608
assert pp.load_config("finetune_configs/demo.yaml").sae == {SAE!r}
assert pp.load_records("records/demo").summary["headline"]
study = pp.Study.from_yaml("finetune_configs/smoke.yaml")
assert len(study.context.contrast_rows("evaluation")) > 4 and study.config.sae == {SAE!r}
print(shipped.top())
"""


def run(command: list[str], cwd: Path, folder: Path | None = None) -> str:
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    if folder is not None:
        env["PYTHONPATH"] = str(folder)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as its wheel has it; what it needs comes from this environment."""
    # Built from a copy of what is tracked or new, so that the checkout gets no build folder.
    copy, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "installed"))
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = run(listed, ROOT).split("\0")
    except (AssertionError, OSError):
        pytest.skip("not a git checkout")
    for name in names:
        packed = name.split("/")[0] in (*shipped.FOLDERS, "persona_probe") or "/" not in name
        if packed and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(wheels), str(copy)], copy)
    (wheel,) = wheels.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder in shipped.FOLDERS:
        files = [name for name in names if name.startswith(f"{folder}/") and (ROOT / name).is_file()]
        assert files and {f"persona_probe/shipped/{name}" for name in files} <= inside
    code = [name for name in names if name.startswith("persona_probe/") and (ROOT / name).is_file()]
    assert [name for name in code if name not in inside] == []
    run([*pip, "install", "--no-deps", "--no-compile", "-q", "--target", str(target), str(wheel)], target)
    return target


@pytest.mark.long
def test_the_lines_of_the_readme_work_from_any_folder(installed: Path, tmp_path: Path) -> None:
    found = run([sys.executable, "-c", LINES], tmp_path, installed).strip()
    assert found == str(installed / "persona_probe" / "shipped")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.long
def test_commands_find_what_ships(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "persona_probe.cli"]
    assert SAE in run([*command, "saes", "list"], tmp_path, installed)
    assert run([*command, "run", "finetune_configs/smoke.yaml", "--dry-run"], tmp_path, installed)


def test_setup_and_package_name_the_same_folders() -> None:
    assert f"FOLDERS = {shipped.FOLDERS}".replace("'", '"') in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_what_ships_is_found_only_where_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = Path("finetune_configs/demo.yaml")
    assert shipped.find(config) == ROOT / config
    for path in ("finetune_configs/none.yaml", "saes/../README.md", "README.md", "/saes", ""):
        assert shipped.find(path) == Path(path)
    config.parent.mkdir()
    config.write_text("mine", encoding="utf-8")
    assert shipped.find(config) == config
