"""SAE training end to end on the tiny model; a killed run resumes to the same weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from persona_probe.errors import InputError
from persona_probe.runs import file_sha256
from persona_probe.saes import sae_training as train
from persona_probe.saes.hooks import sae_layer
from persona_probe.saes.load import HELD_OUT_FILE, WEIGHTS_FILE, load_sae
from persona_probe.saes.quality import check_quality
from persona_probe.saes.sae_training import train_sae, training_text
from persona_probe.saes.stream import SaeConfig
from tests.factories import D_MODEL, LAYER, make_model, make_sae, make_tokenizer, same_state, talks

FILES = ["README.md", "cfg.json", HELD_OUT_FILE, "quality.json", "recipe.json"]


class KilledError(Exception):
    """Stands for a kill."""


def killed_on(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the `call`-th save of a state fail after the others went well."""
    save, calls = train._save_state, []

    def failing(trainer: Any, work: Path) -> None:
        calls.append(trainer.n_training_steps)
        if len(calls) == call:
            raise KilledError
        save(trainer, work)

    monkeypatch.setattr(train, "_save_state", failing)


def test_a_killed_run_resumes_to_the_same_weights(
    recipe: SaeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train_sae(recipe, tmp_path / "unbroken")
    wanted = load_sae(folder)
    monkeypatch.setenv("PERSONA_PROBE_CACHE", str(tmp_path / "other-cache"))
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        killed_on(3, patch)
        train_sae(recipe, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    resumed = load_sae(train_sae(recipe, tmp_path / "resumed"))
    assert same_state(resumed.state_dict(), wanted.state_dict())
    assert not same_state(load_sae(train_sae(replace(recipe, seed=1), tmp_path)).state_dict(), wanted.state_dict())


def test_the_published_folder_is_whole(recipe: SaeConfig, tmp_path: Path) -> None:
    folder = train_sae(recipe, tmp_path)
    assert folder == tmp_path / "tiny" / "topk"
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, WEIGHTS_FILE])
    sae = load_sae(folder)
    assert (sae_layer(sae), sae.cfg.d_in, sae.cfg.architecture()) == (LAYER, D_MODEL, "topk")
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["sha256"] == file_sha256(folder / WEIGHTS_FILE)
    held_out = training_text(recipe)[1]
    again = check_quality(sae, make_model(), make_tokenizer(), held_out, LAYER)
    assert {k: quality[k] for k in again} == pytest.approx(again)
    assert 0 < quality["l0"] <= 4


def test_training_and_held_out_text_do_not_meet(recipe: SaeConfig) -> None:
    training, held_out = training_text(recipe)
    assert training and held_out
    asked = [{next(m["content"] for m in c if m["role"] == "user") for c in part} for part in (training, held_out)]
    assert not asked[0] & asked[1]


@pytest.mark.parametrize("spec", [f"general_contrast{split}" for split in ("", ":", ":all", ":evaluation")])
def test_the_evaluation_split_never_trains(recipe: SaeConfig, spec: str) -> None:
    with pytest.raises(InputError, match="evaluation split"):
        training_text(replace(recipe, text=replace(recipe.text, packaged=(spec,))))


def test_packaged_rows_only_train(recipe: SaeConfig) -> None:
    plain = training_text(recipe)
    packaged = replace(recipe.text, packaged=("general_contrast:selection",), packaged_repeats=2)
    mixed = training_text(replace(recipe, text=packaged))
    added = len(mixed[0]) + len(mixed[1]) - len(plain[0]) - len(plain[1])
    rows = train.load_conversations("general_contrast:selection")
    assert added == 2 * len(rows)
    assert not any(row in mixed[1] for row in rows)


def test_quality_of_the_identity() -> None:
    """An SAE that is the identity explains everything and loses nothing."""
    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=2 * D_MODEL, metadata=make_sae("standard").cfg.metadata))
    eye = torch.eye(D_MODEL)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    found = check_quality(sae, make_model(), make_tokenizer(), talks(), LAYER)
    assert found["explained_variance"] == pytest.approx(1.0, abs=1e-6)
    assert found["loss_recovered"] == pytest.approx(1.0, abs=0.02)
    assert found["loss_mean_ablated"] != pytest.approx(found["loss_plain"], abs=0.01)
    assert found["l0"] == pytest.approx(D_MODEL, abs=0.1)


# --- What is there already is not lost


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_existing_sae_is_kept_or_refused_but_never_lost(
    recipe: SaeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train_sae(recipe, tmp_path)
    before = files_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train, "_train", None)  # nothing is trained
        assert train_sae(recipe, tmp_path) == folder
        with pytest.raises(InputError, match=r"exists, and is the SAE of another recipe .*lr is .* pass --overwrite"):
            train_sae(replace(recipe, lr=1e-5), tmp_path)
        (tmp_path / "other" / "notes").mkdir(parents=True)
        with pytest.raises(InputError, match="no SAE that this package trained"):
            train_sae(replace(recipe, name="other"), tmp_path)
    assert files_of(tmp_path) == before

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.shutil, "copytree", full)
    other = replace(recipe, lr=1e-5)
    with pytest.raises(InputError, match=r"could not write .*: no space left on the disk; free space or choose"):
        train_sae(other, tmp_path, overwrite=True)
    # what was trained waits in the cache
    kept = {path: content for path, content in files_of(tmp_path).items() if not path.startswith("cache/")}
    assert kept == {path: content for path, content in before.items() if not path.startswith("cache/")}
    monkeypatch.undo()


def test_overwrite_replaces_an_sae_by_a_whole_one(recipe: SaeConfig, tmp_path: Path) -> None:
    folder = train_sae(recipe, tmp_path)
    before = load_sae(folder).state_dict()
    assert train_sae(replace(recipe, lr=1e-5), tmp_path, overwrite=True) == folder
    assert not same_state(load_sae(folder).state_dict(), before)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    with (folder / WEIGHTS_FILE).open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x7f")
    with pytest.raises(InputError, match="weights do not match their sha256"):
        train_sae(replace(recipe, lr=1e-5), tmp_path)
