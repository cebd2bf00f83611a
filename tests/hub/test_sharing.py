"""A run goes to a hub and comes back; nothing leaves the machine that should not."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from persona_probe.context import Context
from persona_probe.errors import InputError
from persona_probe.hub.contents import contents
from persona_probe.hub.pull import pull
from persona_probe.hub.push import push
from persona_probe.report.html import write_report
from persona_probe.runs import RunFolder
from tests.factories import refusal, run_command, tree
from tests.hub.server import FakeHub, fake_hub

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "s3cret" * 6
REPO = "somebody/study"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's records, with adapters of a few bytes."""
    folder = tmp_path_factory.mktemp("shared") / "demo"
    shutil.copytree(ROOT / "records" / "demo", folder)
    for arm, steps in {"incorrect-s0": (5, 40), "correct-s0": (9, 10)}.items():
        for step in steps:
            place = folder / "arms" / arm / f"checkpoint-{step}"
            place.mkdir(parents=True)
            (place / "adapter_model.safetensors").write_bytes(b"weights of " + str(step).encode())
            (place / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "report.html").write_text("<script>steal()</script>", encoding="utf-8")
    (folder / ".locks").mkdir()
    (folder / ".locks" / "secret.json").write_text("{}", encoding="utf-8")
    (folder / "model.pkl").write_bytes(b"pickle")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that this process talks to."""
    with fake_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_a_run_comes_back_as_it_was(run: Path, hub: FakeHub, tmp_path: Path) -> None:
    pushed = push(run, REPO)
    assert pushed.private and hub.private[REPO] and pushed.url.endswith(f"{REPO}/commit/{'c' * 40}")
    assert hub.tokens == {f"Bearer {TOKEN}"}
    files = hub.repos[REPO]
    assert files.keys() == {item.place for item in pushed.contents.items}
    assert all(files[item.place] == item.read() for item in pushed.contents.items)
    assert {p for p in files if "checkpoint-" in p} == {
        f"arms/{arm}/{name}"
        for arm in ("incorrect-s0/checkpoint-40", "correct-s0/checkpoint-10")
        for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    sae = "sae/layer20-topk32-4608"
    shipped = ROOT / "saes" / "smollm2-135m-instruct" / "layer20-topk32-4608"
    assert f"{sae}-unseen/cfg.json" in files and not any(p.startswith("sae/") and p.endswith(".jsonl") for p in files)
    assert files[f"{sae}/sae_weights.safetensors"] == (shipped / "sae_weights.safetensors").read_bytes()

    mine = pull(REPO, tmp_path / "theirs")
    assert mine.config == RunFolder.open(run).config
    back = {name: data for name, data in tree(tmp_path / "theirs").items()}
    assert back == {name: data for name, data in files.items() if not name.endswith((".html", ".svg"))}
    assert "report.html" in files and not any(name.startswith(".cache") for name in back)
    with pytest.raises(InputError, match="exists: choose another --out"):
        pull(REPO, tmp_path / "theirs")


def test_the_card_says_what_it_is_and_how_to_load_it(run: Path) -> None:
    card = next(item for item in contents(run, repo=REPO).items if item.place == "README.md").read().decode()
    head, body = card.split("---\n")[1:]
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in head and "license: apache-2.0" in head
    assert "Do not deploy them" in body and f"persona-probe pull {REPO}" in body
    assert f'pp.load_sae("{REPO}/sae/layer20-topk32-4608' in body
    assert 'subfolder="arms/correct-s0/checkpoint-10"' in body
    headline = json.loads((run / "summary.json").read_text(encoding="utf-8"))["headline"]
    assert headline.split(";")[0][:60] in body


def test_parts_and_steps_choose(run: Path) -> None:
    everything = {item.place for item in contents(run, steps="all").items}
    assert {"arms/incorrect-s0/checkpoint-5/adapter_model.safetensors", "neuronpedia/batch-0.json"} <= everything
    assert not {place for place in everything if "pkl" in place or ".locks" in place}
    adapters = contents(run, ["adapters"])
    assert {item.part for item in adapters.items} == {"adapters", "card"}
    with pytest.raises(InputError, match=r"unknown part 'adapter'.*adapters"):
        contents(run, ["adapter"])


@pytest.mark.parametrize("name", ["summary.json", "parts/notes.jsonl", "report.html"])
def test_a_file_with_an_access_token_is_not_shared(run: Path, tmp_path: Path, name: str, hub: FakeHub) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / name).parent.mkdir(exist_ok=True)
    before = json.loads((copy / name).read_text("utf-8")) if name == "summary.json" else {}
    (copy / name).write_text(json.dumps({**before, "key": TOKEN}), encoding="utf-8")
    with pytest.raises(InputError, match="access token") as refused:
        push(copy, REPO)
    assert TOKEN not in str(refused.value) and hub.asked == []


def test_what_people_asked_a_server_is_not_shared(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    alarm = {"kind": "alarm", "time": "2026-11-29T10:00:00+00:00", "rule": "up", "feature": "persona", "token": 0}
    kept = {"question": "my own matter", "answer": "no", "trace": {"tokens": ["no"], "values": [3.0]}}
    (folder / "serve").mkdir()
    incidents = folder / "serve" / "incidents.jsonl"
    for texts, left_out in (({}, {"serve/incidents.jsonl"}), (kept, {"serve/incidents.jsonl", "report.html"})):
        incidents.write_text(json.dumps({**alarm, "value": 3.0, "threshold": 2.0, **texts}) + "\n", encoding="utf-8")
        write_report(folder)
        assert ("my own matter" in (folder / "report.html").read_text("utf-8")) == bool(texts)
        shared = contents(folder)
        assert not left_out & {item.place for item in shared.items} and any(i.part == "records" for i in shared.items)
        assert not any(b"my own matter" in item.read() for item in shared.items)
        assert {note.split(",")[0] for note in shared.notes if "people asked" in note} == {
            f"left out: {place}" for place in left_out
        }


def test_paths_of_this_machine_are_said(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    manifest["config"]["arms"]["incorrect"]["data"] = "/home/me/secret/rows.jsonl"
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert any("/home/me/secret/rows.jsonl" in note for note in contents(copy, ["records"]).notes)


def test_a_public_repository_needs_the_word(run: Path, hub: FakeHub) -> None:
    hub.repos[REPO], hub.private[REPO] = {}, False
    with pytest.raises(InputError, match=r"is public.*--public"):
        push(run, REPO, parts=["records"])
    assert hub.repos[REPO] == {}
    assert not push(run, REPO, parts=["records"], public=True).private and hub.repos[REPO]


@pytest.mark.parametrize(
    ("status", "words"), [(401, "log in"), (403, "log in"), (500, "try again later"), (404, "no access|refused")]
)
def test_what_the_hub_refuses_is_one_line(run: Path, hub: FakeHub, status: int, words: str) -> None:
    hub.refuse = status
    with pytest.raises(InputError, match=words) as refused:
        push(run, REPO, parts=["records"])
    assert "\n" not in str(refused.value) and TOKEN not in str(refused.value)


def test_a_hub_that_is_not_there_is_one_line(run: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"does not answer.*HF_ENDPOINT"):
        push(run, REPO, parts=["records"])


@pytest.mark.parametrize("name", ["../../home/x.json", "/etc/x.json", "a/../../x.json"])
def test_names_that_leave_the_folder_are_not_downloaded(name: str, hub: FakeHub, tmp_path: Path) -> None:
    hub.repos[REPO], hub.private[REPO] = {"manifest.json": b"{}", name: b"{}"}, True
    with pytest.raises(InputError, match="leave the run folder"):
        pull(REPO, tmp_path / "theirs")
    assert list(tmp_path.iterdir()) == [] and not any("resolve" in asked for asked in hub.asked)


@pytest.mark.parametrize(
    ("files", "words"),
    [({"README.md": b"x"}, "holds no run"), ({"manifest.json": b"{broken"}, "manifest.json"), (None, "no repository")],
)
def test_what_is_no_run_leaves_no_folder(
    files: dict[str, bytes] | None, words: str, hub: FakeHub, tmp_path: Path
) -> None:
    if files is not None:
        hub.repos[REPO], hub.private[REPO] = files, True
    with pytest.raises(InputError, match=words):
        pull(REPO, tmp_path / "theirs")
    assert list(tmp_path.iterdir()) == []


def test_commands_share_over_http_and_never_show_the_token(run: Path, tmp_path: Path) -> None:
    with fake_hub() as hub:
        environment = {
            **os.environ,
            **{"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")},
        }
        said = ""
        for line in (f"push {run} {REPO} --parts records sae", f"pull {REPO} --out {tmp_path / 'theirs'}"):
            command = [sys.executable, "-m", "persona_probe.cli", *line.split()]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            said += done.stdout + done.stderr
    assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN not in said
    assert f"private: {hub.url}/{REPO}/commit" in said and f"run: {tmp_path / 'theirs'}" in said
    assert not any(TOKEN.encode() in data for data in tree(tmp_path / "theirs").values())


def test_a_dry_run_lists_and_out_writes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command("push", run, "--dry-run", "--json")
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    run_command("push", run, "--out", tmp_path / "there", "--quiet")
    assert "nothing was uploaded" in capsys.readouterr().out
    written = tree(tmp_path / "there")
    assert {one["file"]: one["bytes"] for one in shown["files"]} == {name: len(data) for name, data in written.items()}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("push RUN", "where to"),
        ("push RUN a/b --wandb p", "two places"),
        ("push RUN --out OLD", "exists"),
        ("push RUN 'no id at all!'", "no repository's id"),
        ("pull a/b --out OLD", "exists"),
    ],
)
def test_bad_uses(
    line: str, words: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], hub: FakeHub
) -> None:

    (tmp_path / "old").mkdir()
    places = {"RUN": str(run), "OLD": str(tmp_path / "old")}
    run_refused = refusal(capsys)
    assert words in run_refused(*[places.get(word, word) for word in shlex.split(line)])
    assert list((tmp_path / "old").iterdir()) == [] and hub.repos == {}


def test_a_pulled_run_uses_the_sae_that_came_with_it(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    mine = copy / "sae" / "layer9-mine"
    mine.mkdir(parents=True)
    (mine / "cfg.json").write_text("{}", encoding="utf-8")
    context = Context.open(copy, "cpu")
    assert context.sae_place("saes/of-somebody-else/layer9-mine") == str(mine)
    assert context.sae_place("a-release/layer_9") == "a-release/layer_9"
    shipped = context.config.sae
    shutil.copytree(mine, copy / "sae" / Path(shipped).name)
    assert context.sae_place(shipped) == shipped  # it is here
