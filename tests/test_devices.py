"""The same numbers wherever model and SAE are, and few waits for a GPU; on pretended devices, see `pretend_device`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.device_checks import CASES, PLACES

ROOT = Path(__file__).parents[1]
MOST_WAITS = {
    # Two batches, each for the tokens, the fit and the sums; then maximum, squares and explained variance.
    "latents": 9,
    # One reading is one transfer.
    "monitor": 1,
}
CHECKED = [f"{c}, {p}" for c in CASES for p in PLACES if (c, p) != ("gradients", "spread over two")]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """What a process of its own finds: the pretended device would stay in this one."""
    command = [sys.executable, "-m", "tests.device_checks"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CHECKED)
def test_numbers_do_not_depend_on_where_model_and_sae_are(case: str, found: dict[str, dict[str, Any]]) -> None:
    assert "error" not in found[case], found[case]["error"]
    assert found[case]["apart"] < 1e-4


@pytest.mark.parametrize("case", MOST_WAITS)
def test_the_host_waits_for_the_device_once_for_each_thing_that_it_needs(
    case: str, found: dict[str, dict[str, Any]]
) -> None:
    assert found[f"{case}, together"]["waits"] <= MOST_WAITS[case]
