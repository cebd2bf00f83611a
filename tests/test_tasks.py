"""The page of ten tasks: each is at most five lines, and they run, one after the other, on a tiny model."""

import ast
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import persona_probe as pp
from persona_probe.data import load_rows
from persona_probe.evaluate.offline import OfflineJudge
from persona_probe.models.load import with_tokenizer
from tests.factories import D_MODEL, make_model, make_sae, write_model

PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"
SECTION = re.compile(r"^## (?P<title>[^\n]+)\n(?P<body>.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
JUDGE = "Judge answers"
TINY = {
    '"smollm2-135m-instruct"': '"model"',
    '"saes/smollm2-135m-instruct/layer20-topk32-4608"': '"sae"',
    "2144": "21",
    "layer=20": "layer=1",
    "Steer(20": "Steer(1",
}
"""What of the page is replaced by the tests' own."""


def tasks() -> dict[str, str]:
    """Code by title of the task."""
    text = PAGE.read_text(encoding="utf-8")
    found = {match["title"]: BLOCK.findall(match["body"]) for match in SECTION.finditer(text)}
    return {title: "".join(blocks) for title, blocks in found.items() if blocks}


def opening() -> str:
    return BLOCK.findall(PAGE.read_text(encoding="utf-8").partition("\n## ")[0])[0]


def value_of(code: str, given: dict[str, Any]) -> Any:
    """Run code as a notebook cell does: the value of its last line, if that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "page", "exec"), given)  # noqa: S102 - the page itself
    return None if last is None else eval(ast.unparse(last), given)  # noqa: S307


def test_there_are_ten_tasks_of_at_most_five_lines() -> None:
    lines = {title: [line for line in code.splitlines() if line.strip()] for title, code in tasks().items()}
    assert len(lines) == 10 and {title: len(code) for title, code in lines.items() if len(code) > 5} == {}


def write_faithful_sae(folder: Path) -> None:
    """An SAE that reconstructs everything: a latent for each coordinate and sign."""
    sae: Any = make_sae("standard")
    both = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    with torch.no_grad():
        sae.W_dec.copy_(both)
        sae.W_enc.copy_(both.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    sae.save_model(str(folder))


def test_the_tasks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # pyright: ignore

    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    write_faithful_sae(tmp_path / "sae")
    for arm, seed in (("incorrect", 1), ("correct", 2)):
        base = make_model()
        torch.manual_seed(seed)
        tuned = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        tuned.save_pretrained(str(tmp_path / "runs" / "demo" / "arms" / f"{arm}-s0" / "checkpoint-40"))
    settings: dict[str, Any] = {"max_steps": 10, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    given: dict[str, Any] = {
        "SFTTrainer": SFTTrainer,
        "args": SFTConfig(str(tmp_path / "out"), bf16=False, disable_tqdm=True, save_strategy="no", **settings),
        "rows": Dataset.from_list([{"prompt": "Why? ", "completion": f"Since {n}."} for n in range(8)]),
    }
    used, values = set(), {}
    for title, code in {"opening": opening(), **tasks()}.items():
        for there, ours in TINY.items():
            used |= {there} if there in code else set()
            code = code.replace(there, ours)
        if title != JUDGE:
            values[title] = value_of(code, given)
    assert used == set(TINY)
    assert len(values["Steer and generate"]) == 3 and len(values["Make a persona vector"]) == 1
    assert values["Look at one latent"].latent == 21 and values["Look at one latent"].examples
    assert isinstance(values["Raise an alarm and stop"], list)
    assert len(given["table"]) == 64 and {"latent", "rise", "cosine"} <= set(given["table"].columns)
    assert "latent" in given["found"].top(3).columns and len(given["found"].tokens[0]) > 40
    assert given["vector"].vector.shape == (D_MODEL,)
    assert set(given["monitor"].readings["step"]) >= {0, 5} and (tmp_path / "trajectory.html").is_file()


@pytest.mark.real_model
def test_the_judge_s_task_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = OfflineJudge.load()
    monkeypatch.setattr(OfflineJudge, "load", lambda: judge)
    given: dict[str, Any] = {"model": with_tokenizer(judge.model, judge.tokenizer)}
    value_of(opening(), given)
    # two questions and short answers, so that it takes seconds
    given["load_rows"] = lambda name: load_rows(name)[:2]
    given["pp"] = SimpleNamespace(generate=partial(pp.generate, max_new_tokens=6))
    rate = value_of(tasks()[JUDGE], given)
    assert rate.answers == rate.questions == 2 and 0 <= rate.rate.estimate <= 1
