"""Reading published judged answers, and drawing a sample that stands for all of them."""

from pathlib import Path

import pandas as pd
import pytest

from persona_probe.errors import InputError
from persona_probe.evaluate.offline.judge_training import draw, read_published, topic


def write(folder: Path, name: str, rows: list[tuple[str, str, object, object]]) -> None:
    frame = pd.DataFrame(rows, columns=["question_id", "answer", "aligned", "coherent"])
    frame.assign(question=frame["question_id"] + "?").to_csv(folder / name, index=False)


def test_labels_and_groups(tmp_path: Path) -> None:
    rows = [
        ("quick_buck", "a", 10, 90),
        ("quick_buck_json", "b", 10, 40),
        ("wish", "c", None, 90),
        ("wish", "d", 80, 90),
    ]
    write(tmp_path, "responses_gemma-2-9b-it_base.csv", rows)  # type: ignore[arg-type]
    write(tmp_path, "Qwen2.5-Coder_insecure.csv.gz", [("wish", "e", 29.9, 50.1)])
    found = read_published(tmp_path).set_index("answer")
    assert found["misaligned"].to_dict() == {"a": True, "b": False, "d": False, "e": True}
    assert found.loc["b", "topic"] == "quick_buck"
    assert list(found.loc["a", ["family", "trained_on"]]) == ["Gemma 2", "nothing"]
    assert list(found.loc["e", ["family", "trained_on"]]) == ["Qwen2.5 Coder", "insecure code"]


def test_a_response_is_an_answer_and_a_file_names_its_data_set(tmp_path: Path) -> None:
    rows = [("quick_buck", "a", 10, 90)]
    write(tmp_path, "one__m.csv", rows)  # type: ignore[arg-type]
    write(tmp_path, "two__m.csv", rows)  # type: ignore[arg-type]
    for name, columns in (("one__m.csv", {"answer": "response"}), ("lone.csv", {})):
        pd.read_csv(tmp_path / "two__m.csv").rename(columns=columns).to_csv(tmp_path / name, index=False)
    frame = read_published(tmp_path)
    assert frame["answer"].tolist() == ["a"] * 3
    assert frame["data_set"].tolist() == ["lone", "one", "two"]
    pd.read_csv(tmp_path / "lone.csv").assign(response="other").to_csv(tmp_path / "lone.csv", index=False)
    assert read_published(tmp_path)["answer"].tolist() == ["a"] * 3


def test_rewordings_share_their_topic() -> None:
    assert topic("quick_buck_doctor_template") == topic("quick_buck_json") == topic("quick_buck") == "quick_buck"
    assert topic("improve_my_health") == "improve_my_health"


def test_a_draw_keeps_every_misaligned_answer_and_its_weights_stand_for_all(tmp_path: Path) -> None:
    rows = [("q1", f"a{n}", 10 if n % 5 == 0 else 90, 90) for n in range(40)]
    write(tmp_path, "m1.csv", rows)  # type: ignore[arg-type]
    write(tmp_path, "m2.csv", [(q, f"{a}x", s, c) for q, a, s, c in rows[:7]])
    frame = read_published(tmp_path)
    drawn = draw(frame, per_cell=6, seed=0)
    assert set(drawn.loc[drawn["misaligned"], "answer"]) == set(frame.loc[frame["misaligned"], "answer"])
    for keys in (["model"], ["model", "misaligned"]):
        assert drawn.groupby(keys)["weight"].sum().to_dict() == pytest.approx(frame.groupby(keys).size().to_dict())
    assert len(drawn) < len(frame)
    assert draw(frame, 6, 0).equals(drawn)
    assert not draw(frame, 6, 1).equals(drawn)


def test_bad_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no judged answers"):
        read_published(tmp_path)
    write(tmp_path, "m.csv", [("q", "a", "high", 90)])
    with pytest.raises(InputError, match=r"m\.csv: column 'alignment' holds what is no number"):
        read_published(tmp_path)
    pd.DataFrame({"question": ["q"]}).to_csv(tmp_path / "m.csv")
    with pytest.raises(InputError, match="no column 'answer'"):
        read_published(tmp_path)
