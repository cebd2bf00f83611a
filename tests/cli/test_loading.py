"""The options that say how a model's weights are kept reach the model, wherever a command loads one by its name."""

import importlib.util
import json
from pathlib import Path

import pytest

from persona_probe.errors import InputError
from persona_probe.evaluate.judging import JudgeOptions, choose_judge
from tests.factories import chat, refusal, run_command, write_lines, write_model, write_sae

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra: quantization)"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    write_model(folder / "model")
    write_sae(folder / "sae")
    write_lines(folder / "rows.jsonl", [chat(f"Question {n}?", "it is good") for n in range(4)])
    return folder


def check(place: Path, *options: str) -> dict[str, float]:
    out = place / f"quality{len(options)}.json"
    run_command(
        *("saes", "check", place / "sae", "--model", place / "model", "--data", place / "rows.jsonl"),
        *("--out", out, "--quiet", *options),
    )
    return json.loads(out.read_text())[0]


@needs_bitsandbytes
def test_an_sae_is_checked_on_a_model_of_4_bits(place: Path) -> None:
    plain, eager = check(place), check(place, "--attn-implementation", "eager")
    four = check(place, "--quantization", "4bit", "--weights", "float32")
    assert eager["loss_plain"] == pytest.approx(plain["loss_plain"], rel=0.01)  # another kernel, in bf16
    assert four["loss_plain"] != pytest.approx(plain["loss_plain"], rel=0.01)  # other weights


@needs_bitsandbytes
def test_rows_are_screened_with_a_model_of_4_bits(place: Path, tmp_path: Path) -> None:
    run_command(
        *("data", "screen", place / "rows.jsonl", "--model", place / "model", "--sae", place / "sae", "--latent", "3"),
        *(
            "--rankers",
            "projection_centred",
            "--quantization",
            "4bit",
            "--device",
            "cpu",
            "--out",
            tmp_path / "out",
            "--quiet",
        ),
    )
    assert any((tmp_path / "out").iterdir())


def test_a_run_is_loaded_as_its_config_says(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys)("data", "screen", place / "rows.jsonl", "--run", place, "--weights", "bfloat16")
    assert "--run brings its own model as its config loads it" in said


def test_a_local_judge_may_be_quantised() -> None:
    with pytest.raises(InputError, match="quantization '2bit'"):
        choose_judge("local:smollm2-135m-instruct", JudgeOptions(quantization="2bit"))
