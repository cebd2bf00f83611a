"""Endpoints and vLLM: what is asked, what is read, how failures end, and that a key stays a secret."""

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from persona_probe.data.chat import conversation
from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.engines import EngineChoice, OpenAIEngine, VllmEngine, engine_of
from persona_probe.evaluate.sampling.requests import Prompt, Sample, SamplingConfig, prompt_ids
from persona_probe.evaluate.sampling.samples import sample
from tests.families import family_tokenizer

QWEN = family_tokenizer("qwen3")  # before a stand-in takes the name of vLLM
KEY = "sk-very-secret-0123456789"
PROMPTS = [Prompt(f"q{n}", conversation(f"Ask {n}?", system="Be brief.")) for n in range(4)]
CONFIG = SamplingConfig(n=3, temperature=0.7, top_p=0.9, max_new_tokens=11, seed=4)


@dataclass
class Server:
    """An endpoint whose model names say how it behaves."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    busy: set[int] = field(default_factory=set)
    now: int = 0
    peak: int = 0

    def answer(self, body: dict[str, Any], key: str) -> Response:
        self.bodies.append(body)
        self.keys.add(key)
        model, seed = body["model"], body["seed"]
        if model == "busy-once" and seed not in self.busy:
            self.busy.add(seed)
            return JSONResponse({"error": "slow down"}, 429, {"retry-after-ms": "1"})
        if model == "denied":
            return JSONResponse({"error": {"message": f"wrong key {key}"}}, 401)
        if model == "html":
            return HTMLResponse("<html>a login page</html>")
        if model == "torn":
            return Response('{"id": "x", "choi', media_type="application/json")
        if model == "empty" or (model == "fails-later" and body["messages"][-1]["content"] == "Ask 3?"):
            return JSONResponse({"choices": []})
        return JSONResponse(self.completion(body))

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        text = None if body["model"] == "refusing" else f" {body['messages'][-1]['content']} {body['seed']}\n"
        message = {"role": "assistant", "content": text, "refusal": "No." if text is None else None}
        if body["model"] == "thinking":
            message |= {"reasoning_content": "Hm.", "content": str(body.get("chat_template_kwargs"))}
        if body["model"] == "thinking-inline":
            message["content"] = "<think>\nHm.\n</think>\n\nBoil it."
        finish = "length" if body["model"] == "cut" else "stop"
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        reply["choices"] = [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}]
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        return reply if body["model"] == "uncounted" else reply | {"usage": usage}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state, app = Server(), FastAPI()
    lock = threading.Lock()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        body = await request.json()
        with lock:
            state.now += 1
            state.peak = max(state.peak, state.now)
        await asyncio.sleep(0.005)
        with lock:
            state.now -= 1
        return state.answer(body, request.headers["authorization"].removeprefix("Bearer "))

    http = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    state.url = f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}/v1"
    monkeypatch.setenv("TEST_KEY", KEY)
    yield state
    http.should_exit = True
    thread.join()


def engine(server: Server, model: str = "plain", **options: Any) -> OpenAIEngine:
    return OpenAIEngine(model, server.url, key_variable="TEST_KEY", **options)


def test_each_sample_is_one_request_with_its_own_seed(server: Server) -> None:
    found = sample(engine(server, concurrency=3), PROMPTS, CONFIG)
    assert [(s.question_id, s.sample) for s in found] == [(p.id, n) for p in PROMPTS for n in range(3)]
    seeds = {b["seed"] for b in server.bodies}
    assert len(server.bodies) == len(seeds) == 12
    wanted = {"model": "plain", "temperature": 0.7, "top_p": 0.9, "max_tokens": 11}
    assert all(wanted.items() <= b.items() for b in server.bodies)
    assert {tuple(m["role"] for m in b["messages"]) for b in server.bodies} == {("system", "user")}
    text, seed = found[4].answer.rsplit(" ", 1)
    assert (text, int(seed) in seeds, found[4].n_tokens, found[4].finish) == ("Ask 1?", True, 7, "stop")
    assert sample(engine(server, concurrency=1), PROMPTS, CONFIG) == found
    assert server.keys == {KEY} and server.peak == 3


def test_what_the_reply_says_is_kept(server: Server) -> None:
    def only(model: str) -> Sample:
        return sample(engine(server, model), PROMPTS[:1], SamplingConfig())[0]

    assert only("cut").finish == "length"
    assert only("uncounted").n_tokens is None
    assert only("refusing").answer == "No."


def test_a_busy_endpoint_is_asked_again(server: Server) -> None:
    assert len(sample(engine(server, "busy-once"), PROMPTS, CONFIG)) == 12
    assert len(server.bodies) == 24
    server.busy.clear()
    with pytest.raises(InputError, match=r"HTTP 429: slow down; .*lower concurrency"):
        sample(engine(server, "busy-once", max_retries=0), PROMPTS, CONFIG)


@pytest.mark.parametrize("model", ["html", "torn", "empty"])
def test_what_is_no_completion_is_one_clear_line(server: Server, model: str) -> None:
    with pytest.raises(InputError, match="check base_url") as caught:
        sample(engine(server, model, max_retries=0), PROMPTS[:1], CONFIG)
    assert server.url in str(caught.value) and "\n" not in str(caught.value)


def test_an_endpoint_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    away = OpenAIEngine("m", "http://user:pass@127.0.0.1:9/v1", key_variable=None, max_retries=0)
    assert away.identity == {"engine": "openai", "endpoint": "http://127.0.0.1:9/v1/", "model": "m"}
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9/v1/: connection refused or cut off .*check base_url"):
        sample(away, PROMPTS[:1], CONFIG)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="set OPENAI_API_KEY"):
        OpenAIEngine("m")
    with pytest.raises(InputError, match="concurrency must be at least 1"):
        OpenAIEngine("m", key_variable=None, concurrency=0)


def test_the_key_is_in_no_message_log_or_file(server: Server, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(InputError, match=r"HTTP 401: wrong key \*\*\*\): check the key in TEST_KEY") as caught:
        sample(engine(server, "denied"), PROMPTS, CONFIG, tmp_path / "denied.jsonl")
    sample(engine(server), PROMPTS, CONFIG, tmp_path / "plain.jsonl")
    assert "openai" in caplog.text  # the client does log at this level
    said = "".join(traceback.format_exception(caught.value)) + caplog.text
    files = "".join(p.read_text() for p in tmp_path.iterdir())
    assert KEY not in said + files and len(list(tmp_path.iterdir())) == 4


def test_thoughts_are_split_and_template_settings_are_sent(server: Server) -> None:
    settings = {"enable_thinking": True}
    (first,) = sample(engine(server, "thinking", chat_template_kwargs=settings), PROMPTS[:1], SamplingConfig())
    assert (first.answer, first.thought) == (str(settings), "Hm.")
    (second,) = sample(engine(server, "thinking-inline"), PROMPTS[:1], SamplingConfig())
    assert (second.answer, second.thought) == ("Boil it.", "Hm.")
    assert "chat_template_kwargs" not in server.bodies[-1]


def test_samples_before_a_failure_are_kept(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(InputError, match="JSON that is no chat completion"):
        sample(engine(server, "fails-later", concurrency=1, max_retries=0), PROMPTS, CONFIG, path)
    assert path.read_text().count("\n") == 9


class FakeLLM:
    """`vllm.LLM` as far as it is used."""

    def __init__(self, model: str, *, enable_lora: bool = False, dtype: str = "auto", **options: Any) -> None:
        self.made, self.options = (model, enable_lora, dtype), options
        self.calls: list[int] = []
        self.tokens: list[int] = []

    def chat(
        self, messages: list[Any], sampling_params: list[Any], use_tqdm: bool = True, lora_request: Any = None
    ) -> list[Any]:
        self.calls.append(len(messages))
        assert not use_tqdm and (lora_request is None or self.made[1])
        return [self._output(m, p) for m, p in zip(messages, sampling_params, strict=True)]

    def generate(
        self, prompts: list[Any], sampling_params: list[Any], use_tqdm: bool = True, lora_request: Any = None
    ) -> list[Any]:
        self.prompts = [prompt["prompt_token_ids"] for prompt in prompts]
        ids = self.tokens
        done = SimpleNamespace(text="not read", token_ids=ids, finish_reason="stop")
        self.stops = {tuple(params.stop_token_ids) for params in sampling_params}
        return [SimpleNamespace(outputs=[done]) for _ in prompts]

    def _output(self, messages: list[dict[str, str]], params: Any) -> Any:
        finish = "length" if params.seed % 2 else "stop"
        done = SimpleNamespace(text=f" {messages[-1]['content']} {params}", token_ids=(1, 2), finish_reason=finish)
        return SimpleNamespace(outputs=[done])


@dataclass(kw_only=True)
class FakeParams:
    n: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None
    stop_token_ids: list[int] | None = None

    def __str__(self) -> str:
        return f"{self.n}, {self.temperature}, {self.top_p}, {self.max_tokens}, {self.seed}"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vars(fake).update(LLM=FakeLLM, SamplingParams=FakeParams, __version__="0.0")
    vars(request).update(LoRARequest=lambda lora_name, lora_int_id, lora_path: (lora_name, lora_int_id, lora_path))
    for module in (fake, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_vllm_gets_blocks_of_seeded_requests(vllm: None) -> None:
    local = VllmEngine("some/model", block=5, dtype="bfloat16")
    found = sample(local, PROMPTS, CONFIG)
    assert local._llm.made == ("some/model", False, "bfloat16") and local._llm.calls == [5, 5, 2]
    assert [(s.question_id, s.sample) for s in found] == [(p.id, n) for p in PROMPTS for n in range(3)]
    assert found[3].answer.startswith("Ask 1? 1, 0.7, 0.9, 11, ")
    assert len({s.answer for s in found}) == 12 and {s.finish for s in found} == {"stop", "length"}
    assert local.identity["options"] == {"dtype": "bfloat16"} and local.identity["version"] == "0.0"


def test_vllm_continues_the_prompt_that_training_saw(vllm: None) -> None:
    tokenizer = QWEN
    local = VllmEngine("another/model", prompt_tokenizer=tokenizer)
    local._llm.tokens = tokenizer.encode("<think>\nHm.\n</think>\n\nBoil it.<|im_end|>")
    found = sample(local, PROMPTS[:1], SamplingConfig())
    assert local._llm.prompts == [list(prompt_ids(tokenizer, PROMPTS[0]))]
    assert local._llm.stops == {(tokenizer.convert_tokens_to_ids("<|im_end|>"),)}
    assert (found[0].answer, found[0].thought) == ("Boil it.", "Hm.")


def test_vllm_samples_from_an_adapter(vllm: None) -> None:
    tuned = VllmEngine("some/model", adapter="runs/x/checkpoint-40")
    assert len(sample(tuned, PROMPTS, CONFIG)) == 12
    assert tuned.identity["adapter"] == "runs/x/checkpoint-40"
    name, number, path = tuned._lora()
    assert name == path == "runs/x/checkpoint-40"
    other = VllmEngine("some/model", adapter="runs/y/checkpoint-40")
    assert other._llm is tuned._llm and other._lora()[1] != number  # one model in memory, two adapters


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="pip install vllm"):
        VllmEngine("some/model")


def test_an_organism_is_sampled_by_the_engine_that_is_named(vllm: None, tmp_path: Path) -> None:
    adapter, full = tmp_path / "adapter", tmp_path / "full"
    adapter.mkdir()
    full.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    choice = EngineChoice("vllm")
    engines = [engine_of(choice, "some/model", folder, "x", rank=24) for folder in (None, adapter, full)]
    base, tuned, whole = (e for e in engines if isinstance(e, VllmEngine))
    assert base.adapter is None and tuned.adapter == str(adapter) and base._llm is tuned._llm
    assert (base._llm.made, base._llm.options["max_lora_rank"]) == (("some/model", True, "bfloat16"), 32)
    assert whole.model == str(full) and whole._llm.options["tokenizer"] == "some/model"
    served = engine_of(EngineChoice("openai", "http://127.0.0.1:9/v1"), "some/model", adapter, "incorrect-s0")
    assert served.identity == {"engine": "openai", "endpoint": "http://127.0.0.1:9/v1/", "model": "incorrect-s0"}


@pytest.mark.parametrize(
    ("name", "url", "message"),
    [
        ("vlm", None, "did you mean 'vllm'"),
        ("openai", None, "needs the address"),
        ("vllm", "http://x/v1", "others none"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(name: str, url: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EngineChoice(name, url)
