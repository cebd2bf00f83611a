"""The package as a whole: its public names, what importing it loads, and what must not be in it."""

import importlib
import io
import pkgutil
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

import persona_probe as pp

ROOT = Path(__file__).parents[1]
PUBLIC = ("Study", "load_model", "load_sae", "locate", "FeatureMonitor", "steer", "ablate", "read", "InputError")
HEAVY = {"torch", "transformers", "trl", "peft", "sae_lens", "pandas", "plotly"}
DRAWING = {"pandas", "plotly"}
"""What the room of figures may load by itself."""
MIB = 2**20
ROOMS = sorted(module.name for module in pkgutil.iter_modules(pp.__path__) if module.ispkg)
OPTIONAL = {"lightning"}
"""Packages of extras: a name that needs one resolves only where it is installed."""


# --- Public names


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name: str) -> None:
    assert callable(getattr(pp, name)) and name in dir(pp) and getattr(pp, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Studdy"):
        getattr(pp, "Studdy")  # noqa: B009


def packages() -> Iterable[str]:
    """Every package with re-exported names, the whole one and its rooms at any depth."""
    yield "persona_probe"
    for module in pkgutil.walk_packages(pp.__path__, "persona_probe."):
        if module.ispkg:
            yield module.name


@pytest.mark.parametrize("name", packages())
def test_every_re_exported_name_resolves(name: str) -> None:
    package = importlib.import_module(name)
    for public in getattr(package, "__all__", ()):
        try:
            assert getattr(package, public) is not None
        except ModuleNotFoundError as error:
            assert (error.name or "").partition(".")[0] in OPTIONAL, f"{name}.{public}: {error}"


def test_no_package_is_called_like_a_public_function() -> None:
    # Importing persona_probe.locate as a package would put it in the place of the function pp.locate.
    functions = {name for name in vars(pp)["__all__"] if callable(getattr(pp, name))}
    modules = {module.name for module in pkgutil.iter_modules(pp.__path__)}
    assert len(functions) > 10 and functions & modules == set()


def test_study_has_the_stages_of_the_loop() -> None:
    stages = ("from_yaml", "open", "induce", "locate", "track", "realign", "report", "features", "readings", "bridge")
    assert [name for name in stages if not hasattr(pp.Study, name)] == []


def test_the_version_is_that_of_pyproject_and_of_the_citation() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert pp.__version__ == version, "install the checkout again: pip install --no-deps -e ."


# --- What an import loads


@pytest.mark.parametrize("name", ["persona_probe", *(f"persona_probe.{room}" for room in ROOMS)])
def test_importing_a_room_loads_nothing_heavy(name: str) -> None:
    script = f"import sys, {name}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    allowed = DRAWING if name == "persona_probe.report" else set()
    assert set(done.stdout.split()) & HEAVY <= allowed


# --- What must not be in the repository


def tracked() -> list[Path]:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_large_files() -> None:
    files = tracked()
    saes = [f for f in files if f.is_relative_to(ROOT / "saes")]
    weights = [f for f in files if f.is_relative_to(ROOT / "persona_probe" / "data" / "persona_world")]
    assert [str(f) for f in files if f not in (*saes, *weights) and f.stat().st_size > 2 * MIB] == []
    assert sum(f.stat().st_size for f in weights) < 5 * MIB
    assert sum(f.stat().st_size for f in saes) < 25 * MIB


UNSAFE = {("trust_remote_code", "=", "True"), ("weights_only", "=", "False"), ("allow_pickle", "=", "True")}
"""Arguments that run code of a file. Imports and calls (pickle, print, eval) are ruff's to find: see pyproject.toml."""


def unsafe(source: str) -> set[tuple[str, ...]]:
    """Unsafe arguments in code; strings and comments do not count."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    words = [token.string for token in tokens if token.type in (tokenize.NAME, tokenize.OP)]
    return set(zip(words, words[1:], words[2:], strict=False)) & UNSAFE


def test_no_source_asks_for_code_of_a_file() -> None:
    places = ("persona_probe", "benchmarks", "tools", "tests", "notebooks")
    sources = [path for place in places for path in (ROOT / place).rglob("*.py")]
    assert len(sources) > 200
    assert {str(path): bad for path in sources if (bad := unsafe(path.read_text(encoding="utf-8")))} == {}
    assert unsafe('x = "weights_only=False"  # weights_only=False\nload(trust_remote_code=True)\n') == {
        ("trust_remote_code", "=", "True")
    }
