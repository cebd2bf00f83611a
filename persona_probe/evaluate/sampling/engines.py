"""Engines that answer requests: a transformers model in this process, vLLM, or any OpenAI-compatible endpoint."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.template import end_of_turn, thinks
from persona_probe.data.thoughts import REASONING_KEYS, split_thought
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.endpoint import OPENAI, ChatClient, Unanswered, in_threads
from persona_probe.evaluate.sampling.decoding import AnswerRequest, decode, model_identity, row_key
from persona_probe.evaluate.sampling.requests import (
    Engine,
    Finish,
    Request,
    Sample,
    SamplingConfig,
    answer_parts,
    check_room,
    prompt_ids,
    request_seed,
    stop_tokens,
)
from persona_probe.models.adapters import is_adapter
from persona_probe.models.load import resolve_source

ENGINES = ("transformers", "vllm", "openai")
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM makes room for."""


@dataclass(frozen=True)
class EngineChoice:
    """Which engine samples a study's answers.

    Raises:
        InputError: an unknown engine, or an address that is missing or belongs to no engine.
    """

    name: str = "transformers"
    """`transformers` runs in this process, `vllm` loads base and checkpoints with vLLM, `openai` asks an endpoint."""
    base_url: str | None = None
    """The endpoint's address, such as `http://127.0.0.1:8000/v1`."""
    key_variable: str | None = None
    """Environment variable with the endpoint's key; None for an endpoint that needs none."""
    concurrency: int = 8
    """Requests under way at once."""

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise unknown("engine", self.name, ENGINES)
        if (self.name == "openai") != (self.base_url is not None):
            raise InputError("the openai engine needs the address of an endpoint that serves the models, others none")


def engine_of(
    choice: EngineChoice,
    model: str,
    checkpoint: Path | None,
    served_as: str,
    *,
    revision: str | None = None,
    bf16: bool = True,
    rank: int = 16,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Engine:
    """The engine for one organism outside this process: with vLLM or an endpoint.

    Args:
        model: the base model: an alias, a folder or a hub id.
        checkpoint: folder of the organism's adapter or full weights; None samples from the base.
        served_as: the organism's name at an endpoint.
        revision: of the base model on the hub.
        bf16: the precision that vLLM computes in, else float32.
        rank: the largest LoRA rank of the study's adapters: vLLM makes room for it once.
        tokenizer: the study's, with its chat template: vLLM gets its token ids, and so the prompts that training saw.
        chat_template_kwargs: variables of the chat template, which an endpoint gets with each request.

    Raises:
        InputError: a GGUF file for vLLM, the transformers engine, or what the engine refuses.
    """
    if choice.name == "transformers":
        raise InputError("the transformers engine takes a loaded model: make a TransformersEngine")
    if choice.name == "openai":
        return OpenAIEngine(
            served_as,
            choice.base_url,
            key_variable=choice.key_variable,
            concurrency=choice.concurrency,
            chat_template_kwargs=chat_template_kwargs,
        )
    source = resolve_source(model, revision)
    if source.kind == "gguf":
        raise InputError(f"the vllm engine needs a model folder or hub id, {model!r} is a GGUF file: use transformers")
    options: dict[str, Any] = {"dtype": "bfloat16" if bf16 else "float32", "prompt_tokenizer": tokenizer}
    if checkpoint is not None and not is_adapter(checkpoint):
        return VllmEngine(str(checkpoint), tokenizer=source.location, **options)
    room = next(size for size in _LORA_RANKS if size >= min(rank, _LORA_RANKS[-1]))
    # The base gets the same options: one vLLM then serves it and all adapters.
    shared = {"enable_lora": True, "max_lora_rank": room, "revision": source.revision}
    return VllmEngine(source.location, None if checkpoint is None else str(checkpoint), **options, **shared)


class TransformersEngine:
    """Samples from a model in this process.

    The random draws of an answer belong to (seed, question id, sample) only. So the answer does not depend on the batch
    size, the order or the other rows of the batch, as far as the logits are the same: their last bits depend on the
    batch's shape. On the embedded model, of 48 answers of 24 tokens at batch sizes 7 and 48 none differs in float32
    and 17 in bf16, where logits are 0.1 apart. In bf16 an answer repeats for the same requests and batch size.

    Taps set by `steer` and `ablate` act as they do elsewhere. With positions `prompt` or `response` the engine tells
    them which tokens are the prompt's, whatever mask they were given.

    Args:
        model: a transformers model, or a PEFT model around one.
        batch_size: rows that are decoded side by side.
        name: what the samples' record calls the model; the default is its configuration's name.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32, name: str | None = None
    ) -> None:
        self.model, self.tokenizer, self.batch_size, self.name = model, tokenizer, batch_size, name

    @property
    def identity(self) -> dict[str, Any]:
        """Model, weights, taps, precision and chat template, as they are now."""
        return {"engine": "transformers", **model_identity(self.model, self.tokenizer, self.name)}

    def generate(self, requests: Sequence[Request], config: SamplingConfig, done: Callable[[Sample], None]) -> None:
        """Answer every request; see `Engine`.

        Raises:
            InputError: a prompt that does not end with the user's turn or is too long, or a model or tap that cannot
                be sampled from; see `decode`.
        """
        ids = {r.prompt.id: prompt_ids(self.tokenizer, r.prompt) for r in {r.prompt.id: r for r in requests}.values()}
        for name, prompt in ids.items():
            check_room(self.model, prompt, config.max_new_tokens, name)
        answer_requests = [
            AnswerRequest(ids[r.prompt.id], row_key(config.seed, r.prompt.id, r.sample)) for r in requests
        ]

        def finished(number: int, tokens: list[int], finish: Finish) -> None:
            request = requests[number]
            parts = answer_parts(self.tokenizer, tokens)
            thought = parts.thought or None
            done(Sample(request.prompt.id, request.sample, parts.answer, len(tokens), finish, thought))

        decode(self.model, answer_requests, config, stop_tokens(self.model, self.tokenizer), self.batch_size, finished)


# --- Sampling with vLLM, for models that fill a GPU


class VllmEngine:
    """Samples with vLLM's offline interface (`vllm.LLM.chat`, one `SamplingParams` with its own seed a request).

    vLLM batches and shares prefixes. Without `prompt_tokenizer` it applies the chat template itself. Taps cannot reach
    its workers: steered and ablated sampling is the transformers engine's. Its seeded draws repeat for one version and
    one kind of GPU.

    Not run in this project's tests, which have no vLLM: they use a stand-in with the signatures of `LLM(model=...)`,
    `LLM.chat(messages, sampling_params, use_tqdm, lora_request)`, `LLM.generate` with prompts of `prompt_token_ids`,
    `SamplingParams` and `LoRARequest`.

    Engines with the same model and options share one `LLM`; another model takes its place.

    Args:
        model: what `vllm.LLM` takes: a hub id or a folder.
        adapter: a folder with a LoRA adapter to sample with.
        block: requests handed over at once; finished samples are kept after each block.
        prompt_tokenizer: renders the prompts here, up to where training puts an answer (`text_before_answer`).
        options: passed on to `vllm.LLM` (`dtype`, `max_model_len`, `gpu_memory_utilization`, `max_lora_rank`...).

    Raises:
        InputError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        adapter: str | None = None,
        block: int = 512,
        prompt_tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        self._vllm = _vllm()
        self.prompt_tokenizer = prompt_tokenizer
        self.model, self.adapter, self.block, self.options = model, adapter, block, options
        lora = {} if adapter is None else {"enable_lora": True}
        self._llm = _loaded_llm(self._vllm.LLM, model, tuple(sorted((lora | options).items())))

    @property
    def identity(self) -> dict[str, Any]:
        """Model, adapter and options by name, and vLLM's version."""
        settings = {
            "model": self.model,
            "adapter": self.adapter,
            "options": {k: str(v) for k, v in self.options.items()},
        }
        return {"engine": "vllm", "version": str(self._vllm.__version__), **settings}

    def generate(self, requests: Sequence[Request], config: SamplingConfig, done: Callable[[Sample], None]) -> None:
        """Answer every request; see `Engine`."""
        for start in range(0, len(requests), self.block):
            block = requests[start : start + self.block]
            shared = {"use_tqdm": False, "lora_request": self._lora()}
            params = [self._params(request, config) for request in block]
            if self.prompt_tokenizer is None:
                outputs = self._llm.chat([r.prompt.messages for r in block], sampling_params=params, **shared)
            else:
                rows = [{"prompt_token_ids": list(prompt_ids(self.prompt_tokenizer, r.prompt))} for r in block]
                outputs = self._llm.generate(rows, sampling_params=params, **shared)
            for request, output in zip(block, outputs, strict=True):
                done(_sample(request, output.outputs[0], self.prompt_tokenizer))

    def _params(self, request: Request, config: SamplingConfig) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_new_tokens,
            seed=request_seed(config, request),
            **self._stops(),
        )

    def _stops(self) -> dict[str, Any]:
        """Its model's own ends are known to vLLM; the template's end of a turn may be another."""
        tokenizer = self.prompt_tokenizer
        ends = [] if tokenizer is None or thinks(tokenizer) else sorted(end_of_turn(tokenizer))
        return {"stop_token_ids": ends} if ends else {}

    def _lora(self) -> Any:
        if self.adapter is None:
            return None
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        # vLLM tells adapters apart by this number.
        number = 1 + int(hashlib.sha256(self.adapter.encode()).hexdigest()[:7], 16)
        return LoRARequest(self.adapter, number, self.adapter)


@lru_cache(maxsize=1)
def _loaded_llm(llm: Any, model: str, options: tuple[tuple[str, Any], ...]) -> Any:
    return llm(model=model, **dict(options))


def _vllm() -> Any:
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("the vllm engine needs vLLM: pip install vllm, in an environment with its torch") from error
    return vllm


def _sample(request: Request, completion: Any, tokenizer: PreTrainedTokenizerBase | None) -> Sample:
    finish = "length" if completion.finish_reason == "length" else "stop"
    tokens = list(completion.token_ids)
    parts = split_thought(completion.text) if tokenizer is None else answer_parts(tokenizer, tokens)
    return Sample(request.prompt.id, request.sample, parts.answer.strip(), len(tokens), finish, parts.thought or None)


# --- Sampling from any endpoint that speaks the OpenAI chat-completions format


class OpenAIEngine:
    """One chat completion per sample, several at once, retried as `ChatClient` says.

    Every request carries its own seed. Whether a server repeats itself for a seed is up to the server.

    Args:
        model: the model's name at the endpoint.
        base_url: where the endpoint is (`http://127.0.0.1:8000/v1`); None is OpenAI's.
        key_variable: the environment variable that holds the key; None sends none, for local servers.
        concurrency: requests under way at once.
        max_retries: how often a request is sent again after 408, 409, 429, 5xx and lost connections.
        timeout: seconds without a byte from the endpoint.
        chat_template_kwargs: sent with each request; vLLM and SGLang hand them to the chat template.

    Raises:
        InputError: the `openai` package or the key is missing.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        key_variable: str | None = "OPENAI_API_KEY",
        concurrency: int = 8,
        max_retries: int = 5,
        timeout: float = 120.0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if concurrency < 1:
            raise InputError(f"concurrency must be at least 1, not {concurrency}")
        self.model, self.concurrency = model, concurrency
        settings = dict(chat_template_kwargs or {})
        self._body: dict[str, Any] = {"extra_body": {"chat_template_kwargs": settings}} if settings else {}
        self._client = ChatClient(base_url or OPENAI, key_variable, max_retries, timeout)

    @property
    def identity(self) -> dict[str, Any]:
        """The endpoint, without a user name or password that its address may hold, and the model's name there."""
        return {"engine": "openai", "endpoint": self._client.address, "model": self.model, **self._body}

    def generate(self, requests: Sequence[Request], config: SamplingConfig, done: Callable[[Sample], None]) -> None:
        """Answer every request; see `Engine`. Answers that came before a failure have been handed over.

        Raises:
            InputError: the endpoint cannot be reached, refuses, or answers in another format.
        """
        try:
            with closing(in_threads(partial(self._answer, config), requests, self.concurrency)) as answers:
                for _, answer in answers:
                    done(answer)
        except Unanswered as error:
            cure = "finished samples are kept; run again, or lower concurrency"
            raise InputError(f"{self.model} at {self._client.address}: {error}; {cure}") from None
        except InputError as error:
            raise InputError(f"{self.model} at {self._client.address}: {error}") from None

    def _answer(self, config: SamplingConfig, request: Request) -> Sample:
        completion = self._client.complete(
            model=self.model,
            messages=request.prompt.messages,
            max_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=request_seed(config, request),
            **self._body,
        )
        parts = split_thought(completion.text or completion.message_text("refusal"))
        thought = completion.message_text(*REASONING_KEYS) or parts.thought
        return Sample(
            request.prompt.id,
            request.sample,
            parts.answer.strip(),
            completion.completion_tokens,
            "length" if completion.finish == "length" else "stop",
            thought.strip() or None,
        )
