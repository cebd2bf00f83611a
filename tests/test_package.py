"""The package as a whole: its public names, and what must not be in it."""

import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import persona_probe as pp

ROOT = Path(__file__).parents[1]
PUBLIC = ("Study", "load_model", "load_sae", "locate", "FeatureMonitor", "steer", "ablate", "read", "InputError")
MIB = 2**20
SOURCES = sorted((ROOT / "persona_probe").rglob("*.py"))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name: str) -> None:
    assert callable(getattr(pp, name)) and name in dir(pp) and getattr(pp, name).__doc__


def test_all_is_what_is_there() -> None:
    assert set(PUBLIC) <= set(pp.__all__)
    assert all(hasattr(pp, name) for name in pp.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Studdy'"):
        getattr(pp, "Studdy")  # noqa: B009


def test_locate_stays_a_function_after_its_package_was_imported() -> None:
    script = (
        "import persona_probe.locate.rankers, persona_probe as pp\n"
        "try: pp.locate(None, None, None, [], tokenizer=None)\n"
        "except pp.InputError as error: sys.exit(str(error))"
    )
    done = subprocess.run([sys.executable, "-c", f"import sys\n{script}"], capture_output=True, text=True)
    assert done.stderr.strip().endswith("no conversations given: pass at least one prompt or conversation")


def test_study_has_the_stages_of_the_loop() -> None:
    stages = ("from_yaml", "open", "induce", "locate", "track", "realign", "report", "features", "readings", "bridge")
    assert [name for name in stages if not hasattr(pp.Study, name)] == []


def tracked() -> list[Path]:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_large_files() -> None:
    files = tracked()
    saes = [f for f in files if f.is_relative_to(ROOT / "saes")]
    assert [str(f) for f in files if f not in saes and f.stat().st_size > 2 * MIB] == []
    assert sum(f.stat().st_size for f in saes) < 25 * MIB


def code_of(path: Path) -> list[str]:
    """Words and operators of the code: strings and comments left out."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return [token.string for token in tokens if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_print_no_pickle_no_remote_code(path: Path) -> None:
    words = code_of(path)
    triples = set(zip(words, words[1:], words[2:], strict=False))
    assert [t for t in triples if t[0] != "." and t[1:] == ("print", "(")] == []
    assert not {"pickle", "cloudpickle", "dill", "joblib"} & set(words)
    assert ("trust_remote_code", "=", "True") not in triples
    assert ("weights_only", "=", "False") not in triples


def test_the_check_for_forbidden_words_finds_them(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text('import pickle\nprint("x")  # pickle\nload(trust_remote_code=True)\n')
    assert code_of(bad) == ["import", "pickle", "print", "(", ")", "load", "(", "trust_remote_code", "=", "True", ")"]
