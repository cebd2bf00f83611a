"""The endpoint: OpenAI's format, streams, limits, many clients at once, and going back from an adapter."""

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from peft import LoraConfig, get_peft_model

import persona_probe as pp
from persona_probe.errors import InputError
from persona_probe.monitor.generation.actions import Annotate, AnswerAction, CallWith, Regenerate, StopAnswer
from persona_probe.monitor.generation.incidents import IncidentLog, read_incidents
from persona_probe.monitor.generation.monitor import GenerationMonitor
from persona_probe.monitor.generation.rules import AnswerRule
from persona_probe.monitor.generation.serving.adapters import Deployment, RollbackRule
from persona_probe.monitor.generation.serving.app import make_app
from persona_probe.monitor.generation.serving.engine import Engine
from persona_probe.monitor.generation.serving.requests import Limits
from tests.factories import (
    D_MODEL,
    Refused,
    chat,
    make_family,
    make_model,
    make_sae,
    make_tokenizer,
    refusal,
    run_command,
    write_lines,
    write_model,
    write_sae,
)
from tests.families import plain

ALWAYS, NEVER = -1e6, 1e6
TOKENIZER = make_tokenizer()
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 6, "seed": 5}


def watched(threshold: float, actions: list[AnswerAction] | None = None, model: Any = None) -> GenerationMonitor:
    model, tokenizer = (make_model(), TOKENIZER) if model is None else model
    features = {"a": 3, "up": torch.linspace(-1, 1, D_MODEL)}
    rule = AnswerRule("up", window=1, threshold=threshold)
    return GenerationMonitor(model, make_sae("jumprelu"), features, rule, actions or [Annotate()], tokenizer=tokenizer)


@contextmanager
def served(
    monitor: GenerationMonitor, limits: Limits | None = None, deployment: Deployment | None = None, log: Any = None
) -> Iterator[tuple[httpx.Client, Engine]]:
    engine = Engine(monitor.model, monitor, limits, deployment, log, name="tiny", keep_text=True)  # pyright: ignore
    server = uvicorn.Server(uvicorn.Config(make_app(engine), host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    engine.start()
    thread.start()
    while not server.started:
        time.sleep(0.005)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client, engine
    finally:
        server.should_exit = True
        thread.join()


def ask(client: httpx.Client, **changes: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={**HELLO, **changes})


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.005)


def chunks(client: httpx.Client, **changes: Any) -> list[dict[str, Any]]:
    with client.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True, **changes}) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# --- Answers


def test_an_answer_is_that_of_generate_with_its_trace_and_a_stream_is_the_same_in_pieces(tmp_path: Path) -> None:
    log = IncidentLog(tmp_path / "incidents.jsonl")
    with served(watched(ALWAYS), log=log) as (client, _):
        whole = ask(client).json()
        pieces = chunks(client, stream_options={"include_usage": True})
    wanted = watched(ALWAYS).generate("Why?", max_new_tokens=6, seed=5)[0]
    text = pp.generate(make_model(), "Why?", tokenizer=TOKENIZER, max_new_tokens=6, seed=5)[0]
    choice, read = whole["choices"][0], whole["persona_probe"]
    assert choice["message"] == {"role": "assistant", "content": text} and choice["finish_reason"] in ("stop", "length")
    assert read["tokens"] == list(wanted.trace.tokens) and read["adapter"] == "base" and read["notes"]
    values = np.array([[np.nan if v is None else v for v in row] for row in read["values"]])
    np.testing.assert_allclose(values, wanted.trace.values, rtol=1e-3, atol=1e-4)
    assert [alarm["token"] for alarm in read["alarms"]] == [wanted.alarms[0].token]
    assert whole["usage"]["completion_tokens"] == len(wanted.trace.ids)
    streamed = "".join(p["choices"][0]["delta"].get("content", "") for p in pieces if p["choices"])
    assert streamed.strip() == text
    tokens = [p["persona_probe"]["values"] for p in pieces if "values" in p.get("persona_probe", {})]
    known = values[np.isfinite(values[:, 0])]
    np.testing.assert_allclose([[t["a"], t["up"]] for t in tokens], known, rtol=1e-3, atol=1e-4)
    assert pieces[-1]["usage"] == whole["usage"] and pieces[-2]["persona_probe"]["alarms"] == read["alarms"]
    rows = read_incidents(tmp_path / "incidents.jsonl")
    assert [row["rule"] for row in rows] == ["up", "up"] and rows[0]["answer"] == text and rows[0]["question"] == "Why?"
    assert rows[0]["request"] == whole["id"]
    alarmed = read["features"].index(rows[0]["feature"])
    assert rows[0]["trace"] == {"tokens": read["tokens"], "values": [row[alarmed] for row in read["values"]]}


def test_openais_client_reads_answers_streams_and_errors() -> None:
    import openai

    with served(watched(NEVER)) as (client, _):
        api = openai.OpenAI(base_url=str(client.base_url.join("/v1")), api_key="none", max_retries=0)
        settings: dict[str, Any] = {"model": "tiny", "messages": HELLO["messages"], "max_tokens": 5, "seed": 1}
        answer = api.chat.completions.create(**settings)
        assert answer.model_extra is not None and answer.model_extra["persona_probe"]["features"] == ["a", "up"]
        streamed = list(api.chat.completions.create(**settings, stream=True))
        text = "".join(c.choices[0].delta.content or "" for c in streamed if c.choices)
        assert text.strip() == answer.choices[0].message.content
        assert [model.id for model in api.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError, match="ask for 'tiny'"):
            api.chat.completions.create(**{**settings, "model": "other"})
        bare = api.chat.completions.create(**settings, extra_body={"persona_probe": {"trace": False}})
        assert "values" not in (bare.model_extra or {})["persona_probe"]


def test_a_model_whose_rows_cannot_join_is_served_by_its_own_generate() -> None:
    model, raw = make_family("lfm2")
    tokenizer = plain("lfm2", raw)
    with served(watched(ALWAYS, [StopAnswer()], (model, tokenizer))) as (client, _):
        answer = ask(client).json()
        pieces = chunks(client)
    assert answer["choices"][0]["finish_reason"] == "content_filter"
    assert answer["usage"]["completion_tokens"] == 1 and pieces[-1]["choices"][0]["finish_reason"] == "content_filter"


def test_an_answer_that_alarms_is_drawn_again_and_a_stream_of_it_waits_for_the_last_attempt(tmp_path: Path) -> None:
    log = IncidentLog(tmp_path / "incidents.jsonl")
    with served(watched(ALWAYS, [Regenerate(2)]), log=log) as (client, _):
        answer = ask(client).json()
        pieces = chunks(client)
    assert answer["persona_probe"]["attempts"] == 3 and answer["choices"][0]["finish_reason"] == "content_filter"
    text = "".join(p["choices"][0]["delta"].get("content", "") for p in pieces)
    assert text.strip() == answer["choices"][0]["message"]["content"]
    assert len(read_incidents(tmp_path / "incidents.jsonl")) == 6


# --- What is refused


def test_every_bad_request_is_answered_in_openais_shape() -> None:
    many = [{"role": "user", "content": "x"}] * 65
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"model": "other"}, 404, "model_not_found"),
        ({"model": None}, 400, "missing_required_parameter"),
        ({"messages": []}, 400, "missing_required_parameter"),
        ({"messages": many}, 400, "too_many_messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "invalid_value"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "invalid_value"),
        ({"messages": [{"role": "user", "content": "x" * 4000}]}, 400, "invalid_prompt"),
        ({"max_tokens": 5000}, 400, "invalid_value"),
        ({"max_tokens": 0}, 400, "invalid_value"),
        ({"max_tokens": True}, 400, "invalid_value"),
        ({"temperature": 3}, 400, "invalid_value"),
        ({"temperature": "1"}, 400, "invalid_value"),
        ({"top_p": 0}, 400, "invalid_value"),
        ({"n": 2}, 400, "unsupported_parameter"),
        ({"stop": ["x"]}, 400, "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter"),
        ({"temprature": 1}, 400, "unknown_parameter"),
        ({"stream": "yes"}, 400, "invalid_value"),
        ({"persona_probe": {"all": True}}, 400, "invalid_value"),
    ]
    with served(watched(NEVER), Limits(body_bytes=20_000)) as (client, _):
        for changes, status, code in cases:
            answer = ask(client, **changes)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (status, code), changes
            assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
        post = client.post
        for answer, status in (
            (post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}), 400),
            (post("/v1/chat/completions", content=b"\xff", headers={"content-type": "application/json"}), 400),
            (post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}), 415),
            (post("/v1/chat/completions", json={"x": "y" * 30_000}), 413),
            (client.get("/v1/models", headers={"host": "evil.example"}), 403),
            (client.get("/v1/embeddings"), 404),
            (client.get("/v1/chat/completions"), 405),
        ):
            assert answer.status_code == status and answer.json()["error"]["message"]
        assert ask(client, tools=[], stop=None, user="me", frequency_penalty=0).status_code == 200


def test_a_full_queue_says_so_at_once_and_those_before_it_are_answered() -> None:
    goes_on = threading.Event()
    held: list[AnswerAction] = [CallWith(lambda *_: goes_on.wait(20))]
    with served(watched(ALWAYS, held), Limits(queue=2, batch=1)) as (client, engine), ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, client)
        until(lambda: len(engine.live) == 1)
        waiting = [pool.submit(ask, client, max_tokens=2) for _ in range(2)]
        until(lambda: engine.state["waiting"] == 2)
        refused = ask(client)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "queue_full"
        assert refused.headers["retry-after"] == "1" and client.get("/health").json()["answering"] == 1
        goes_on.set()
        assert [job.result().status_code for job in [first, *waiting]] == [200] * 3


def test_fifty_clients_at_once_get_the_answers_that_they_get_alone() -> None:
    def one(client: httpx.Client, number: int) -> str:
        changes = {"seed": number, "messages": [{"role": "user", "content": f"What of {number % 7}?"}]}
        if number % 2:
            return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks(client, **changes)).strip()
        return ask(client, **changes).json()["choices"][0]["message"]["content"]

    limits = httpx.Limits(max_connections=60)
    with served(watched(NEVER)) as (client, engine):
        with httpx.Client(base_url=client.base_url, timeout=60, limits=limits) as many, ThreadPoolExecutor(50) as pool:
            together = list(pool.map(lambda n: one(many, n), range(50)))
        alone = [one(client, n) for n in range(0, 50, 9)]
        until(lambda: engine.state["answers"] == 50 + len(alone) and not engine.live)
    assert together[::9] == alone


def test_a_client_that_goes_makes_room() -> None:
    with served(watched(NEVER), Limits(batch=1)) as (client, engine):
        body = {**HELLO, "stream": True, "max_tokens": 400}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
        assert ask(client, max_tokens=2).status_code == 200
        until(lambda: not engine.live)
        assert engine.state["answers"] <= 2


def test_a_batch_that_fails_is_an_error_for_its_clients_and_the_server_goes_on(monkeypatch: Any) -> None:
    monitor = watched(NEVER)
    with served(monitor) as (client, _):
        with monkeypatch.context() as broken:
            broken.setattr(monitor, "answer", lambda *_: 1 / 0)
            answer = ask(client)
            assert answer.status_code == 500 and answer.json()["error"]["code"] == "batch_failed"
        assert ask(client).status_code == 200


# --- Adapters


def adapter(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    tuned = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tuned.save_pretrained(str(folder))
    return folder


def test_an_adapter_whose_answers_alarm_is_given_up_for_the_last_clean_one(tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "first", 1), adapter(tmp_path / "second", 2)
    log, monitor = IncidentLog(tmp_path / "incidents.jsonl"), watched(ALWAYS)
    deployment = Deployment([first, second], RollbackRule(0.2, block=10))
    needed = deployment.rule.alarms if deployment.rule else 0
    with served(monitor, Limits(batch=1), deployment, log) as (client, _):
        names = [ask(client).json()["persona_probe"]["adapter"] for _ in range(needed + 1)]
        assert names == ["second"] * needed + ["first"]
        plainly = pp.generate(make_model(), "Why?", tokenizer=TOKENIZER, max_new_tokens=6, seed=5)[0]
        for _ in range(needed - 1):
            ask(client)
        answer = ask(client).json()
        assert answer["persona_probe"]["adapter"] == "base"
        assert answer["choices"][0]["message"]["content"] == plainly
        for _ in range(needed - 1):
            ask(client)
        refused = ask(client)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "no_clean_adapter"
        assert client.get("/health").json()["status"] == "refusing"
    rows = read_incidents(tmp_path / "incidents.jsonl")
    assert [row["adapter"] for row in rows if row["kind"] == "rollback"] == ["second", "first", "base"]


def test_a_roll_back_needs_more_alarms_than_chance() -> None:
    rule = RollbackRule(0.1, block=50, risk=0.01)
    from scipy.stats import binom

    assert binom.sf(rule.alarms - 1, 50, 0.1) <= 0.01 < binom.sf(rule.alarms - 2, 50, 0.1)
    deployment = Deployment([Path("one")], rule)
    draw, current = np.random.default_rng(0), deployment.versions[-1]
    for _ in range(300):
        assert deployment.count(current, bool(draw.random() < 0.04)) is None
    assert deployment.current is current
    with pytest.raises(InputError, match="between"):
        RollbackRule(0.0)
    with pytest.raises(InputError, match="longer blocks"):
        RollbackRule(0.9, block=5)
    with pytest.raises(InputError, match="twice"):
        Deployment([Path("a"), Path("a")])


# --- The commands


def test_the_commands_refuse_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused: Refused = refusal(capsys)
    assert "--sae" in refused("serve", "tiny")
    sae = ("--sae", "x")
    assert "NAME=LATENT" in refused("serve", "tiny", *sae, "--features", "persona")
    assert "twice" in refused("serve", "tiny", *sae, "--features", "a=1", "a=2")
    assert "holds no adapter" in refused("serve", "tiny", *sae, "--features", "a=1", "--adapters", tmp_path)
    assert "port" in refused("serve", "tiny", *sae, "--features", "a=1", "--port", "99999")
    assert "does not exist" in refused("incidents", tmp_path / "none.jsonl")
    assert "at least 1" in refused("incidents", tmp_path, "--last", "0")


def test_serve_calibrates_once_answers_and_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = write_lines(tmp_path / "clean.jsonl", [chat(f"What of {n}?", "well") for n in range(6)])
    answers: list[dict[str, Any]] = []

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        """The real server, until one request is answered."""
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets)))
        thread.start()
        url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/v1/chat/completions"
        answers.append(httpx.post(url, json={**HELLO, "model": "model"}, timeout=60).json())
        server.should_exit = True
        thread.join()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    sae, model = write_sae(tmp_path / "sae"), write_model(tmp_path / "model")
    out = tmp_path / "serve"
    arguments = (
        "serve",
        model,
        "--sae",
        sae,
        "--features",
        "a=3",
        "b=5",
        "--clean",
        questions,
        "--port",
        0,
        "--out",
        out,
    )
    for told in ("the base answers 6 clean questions", "thresholds of"):
        run_command(*arguments, "--max-tokens", 8, "--rate", 0.4, "--device", "cpu", "--quiet")
        said = capsys.readouterr().out
        assert told in said and "any rule: " in said and "stopped after 1 answers" in said
    assert answers[0]["persona_probe"]["features"] == ["a", "b"] and answers[0]["choices"] == answers[1]["choices"]
    assert (out / "incidents.jsonl").is_file()
    refused: Refused = refusal(capsys)
    assert "calibrate again" in refused(*arguments, "--window", 3, "--device", "cpu")


def test_incidents_are_listed_as_a_table_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = IncidentLog(tmp_path / "incidents.jsonl")
    with served(watched(ALWAYS), log=log) as (client, _):
        ask(client)
    run_command("incidents", tmp_path)
    out = capsys.readouterr().out
    assert "1 incidents: 1 of up with base" in out and "annotated" in out
    (tmp_path / "run" / "serve").mkdir(parents=True)
    shutil.copy(tmp_path / "incidents.jsonl", tmp_path / "run" / "serve")
    run_command("incidents", tmp_path / "run")
    assert capsys.readouterr().out == out
    run_command("incidents", tmp_path, "--json")
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["rule"] == "up" and rows[0]["threshold"] == ALWAYS
