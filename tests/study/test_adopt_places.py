"""Every form in which checkpoints lie about is found with its steps, and what cannot be read is one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from persona_probe.errors import InputError
from persona_probe.study.adopt.checkpoint_places import find_checkpoints
from persona_probe.study.adopt.known_training import KnownTraining
from tests.study.adopting import copied, trainer_output, write_adapter, write_adapters, write_model


def steps(*places: object) -> list[int]:
    return [one.step for one in find_checkpoints([str(place) for place in places])]


@pytest.fixture(scope="module")
def output(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Trainer's output folder; read only."""
    return trainer_output(tmp_path_factory.mktemp("trainer") / "out", place / "model")


def test_a_trainers_output_is_its_checkpoints_in_order_and_its_final_save_counts_once(output: Path) -> None:
    found = find_checkpoints([str(output)])
    assert [(one.step, one.folder.name) for one in found] == [(2, "checkpoint-2"), (4, "checkpoint-4")]
    assert {one.source for one in found} == {"trainer_state.json"}


def test_a_final_save_of_its_own_has_the_step_that_its_trainer_noted(output: Path, tmp_path: Path) -> None:
    root = copied(output, tmp_path / "out")
    shutil.rmtree(root / "checkpoint-4")
    assert steps(root) == [2, 4]
    (root / "trainer_state.json").unlink()
    assert steps(root) == [2, 4]  # planned by checkpoint-2's state
    (root / "checkpoint-2/trainer_state.json").unlink()
    with pytest.raises(InputError, match=r"its step is not known: state it as .*#STEP"):
        steps(root)
    assert steps(f"{root}#9") == [2, 9]


def test_only_what_the_files_tell_is_known(output: Path, tmp_path: Path) -> None:
    known = KnownTraining.of("incorrect", find_checkpoints([str(output)]), data="")
    words = " ".join(known.sentences())
    for fact in (
        "LoRA, rank 4, alpha 8, on q_proj, v_proj",
        "4 optimizer steps",
        "peak learning rate 0.005",
        "per device",
    ):
        assert fact in words, words
    assert [step for step, _ in known.losses] == [1, 2, 3, 4]
    assert known.unknown == ["training data", "seed"] and "Training data: not known." in words
    bare = KnownTraining.of(
        "incorrect", find_checkpoints([str(write_adapter(tmp_path / "bare", 0))]), data="mine.jsonl"
    )
    assert bare.unknown == ["seed", "batch size", "learning rate", "losses"]
    assert "Training data: mine.jsonl." in bare.sentences() and "learning rate 0" not in " ".join(bare.sentences())
    assert str(tmp_path) not in bare.card("owner/base") and "2" not in bare.trainer


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("checkpoint-10", "checkpoint-9"), [9, 10]),
        (("step_20", "step_100"), [20, 100]),
        (("epoch-1", "epoch-2"), [1, 2]),
        (("first", "then"), [1, 2]),
        (("qwen2.5-7b-a", "qwen2.5-7b-b"), [1, 2]),
        (("step-2k", "step-10k"), [2000, 10000]),
    ],
)
def test_a_folder_of_adapters_is_read_by_the_numbers_in_its_names(
    names: tuple[str, ...], expected: list[int], tmp_path: Path
) -> None:
    for number, name in enumerate(names):
        write_adapter(tmp_path / name, number)
    assert steps(tmp_path) == expected


def test_names_that_only_end_in_numbers_are_in_their_order(tmp_path: Path) -> None:
    for number, name in enumerate(("model-v10", "model-v2")):
        write_adapter(tmp_path / name, number)
    assert [one.folder.name for one in find_checkpoints([str(tmp_path)])] == ["model-v2", "model-v10"]


def test_what_a_trainer_logged_without_a_number_is_left_out(tmp_path: Path) -> None:
    folder = write_adapters(tmp_path, 3) / "checkpoint-3"
    history = [{"loss": None, "step": 1}, {"loss": 2.0, "step": None}, "x", {"loss": 0.5, "step": 3}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": history}))
    assert KnownTraining.of("incorrect", find_checkpoints([str(tmp_path)]), data="").losses == ((3, 0.5),)


def test_lists_models_and_stated_steps(tmp_path: Path) -> None:
    a, b = write_adapter(tmp_path / "a", 0), write_model(tmp_path / "b")
    assert steps(a) == [1] and steps(a, b) == [1, 2] and steps(f"{a}#5", f"{b}#50") == [5, 50]
    named = write_adapter(tmp_path / "checkpoint-3/persona", 1)
    assert [one.folder for one in find_checkpoints([str(named.parent)])] == [named]
    assert steps(named.parent) == [3]


def test_hub_ids_with_revisions_are_downloaded_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {f"step-{n}": write_adapter(tmp_path / f"{n:040x}", n) for n in (100, 200)}
    asked: list[Any] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        if revision not in commits:
            raise OSError("revision not found")
        return str(commits[revision])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = find_checkpoints(["owner/model@step-100", "owner/model@step-200"])
    assert [(one.step, one.hub) for one in found] == [(100, "owner/model@step-100"), (200, "owner/model@step-200")]
    assert asked[0][:2] == ("owner/model", "step-100") and not any("bin" in pattern for pattern in asked[0][2])
    with pytest.raises(
        InputError, match="revision 'other' of 'owner/model' was not read from the hub: revision not found"
    ):
        find_checkpoints(["owner/model@other"])


def bad_pickle(folder: Path) -> None:
    write_adapter(folder, 0)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def bad_shards(folder: Path) -> None:
    (folder / "pytorch_model_fsdp_0").mkdir(parents=True)


def bad_unfinished(folder: Path) -> None:
    write_adapters(folder, 2)
    (folder / "checkpoint-4").mkdir()


def bad_state(folder: Path) -> None:
    write_adapters(folder, 2)
    (folder / "checkpoint-2/trainer_state.json").write_text(json.dumps({"global_step": 3}))


def bad_json(folder: Path) -> None:
    write_adapters(folder, 2)
    (folder / "checkpoint-2/trainer_state.json").write_text('{"global_step":')


def bad_names(folder: Path) -> None:
    for name in ("one", "two"):
        write_adapter(folder / "checkpoint-2" / name, 0)


def bad_link(folder: Path) -> None:
    write_adapters(folder, 2)
    (folder / "checkpoint-4").symlink_to(folder / "gone")


def bad_mixture(folder: Path) -> None:
    write_model(write_adapter(folder / "checkpoint-2", 0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad_link, "checkpoint-4 is a link to nothing"),
        (bad_mixture, "holds an adapter and whole weights"),
        (bad_pickle, "as a pickle, which may run code: save it again with safe_serialization=True"),
        (bad_shards, "pieces of a sharded run: join them first"),
        (bad_unfinished, "checkpoint-4 holds neither adapter nor weights .*it may be unfinished"),
        (bad_state, "says step 3 in its trainer_state.json: rename it"),
        (bad_json, "trainer_state.json is damaged"),
        (bad_names, r"several adapters \(one, two\): give the folder of one"),
        (Path.mkdir, "holds neither adapter nor weights"),
    ],
)
def test_what_cannot_be_read_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(InputError, match=message):
        steps(tmp_path / "out")


def test_contradictions_between_places_are_refused(tmp_path: Path) -> None:
    root = write_adapters(tmp_path / "out", 1, 5)
    one, five, other = root / "checkpoint-1", root / "checkpoint-5", write_adapter(tmp_path / "other", 9)
    for places, message in (
        ((one, one), "is given twice"),
        ((five, one), r"steps \[5, 1\] are not in order"),
        ((f"{one}#5", five), "are both of step 5"),
        ((five, other), "the step of .*other is not known, but that of others is: state it as .*#STEP"),
        ((f"{other}#0",), "step 0, which is the base model"),
        ((f"{root}#3",), "states one step, but .* holds 2 checkpoints"),
        ((tmp_path / "nowhere",), "no checkpoints at .*nowhere'"),
        ((one / "adapter_config.json",), "is a file: give the folder"),
    ):
        with pytest.raises(InputError, match=message):
            steps(*places)
