"""One thread that owns the model: takes waiting requests into the batch, reads every token, and hands answers over."""

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from persona_probe.data.tokens import answer_prompt
from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.decoding import (
    AnswerRequest,
    Decoder,
    by_generate,
    row_key,
    rows_can_join,
    telling_positions,
)
from persona_probe.evaluate.sampling.requests import Finish, SamplingConfig, answer_parts, check_room, stop_tokens
from persona_probe.models.adapters import organisms
from persona_probe.models.layers import autocast, evaluating
from persona_probe.monitor.generation.actions import AnswerUnderWay, Regenerate
from persona_probe.monitor.generation.following import Follower, WatchedAnswer
from persona_probe.monitor.generation.incidents import Incident, IncidentLog
from persona_probe.monitor.generation.monitor import GenerationMonitor
from persona_probe.monitor.generation.serving.adapters import Deployed, Deployment
from persona_probe.monitor.generation.serving.requests import ApiError, ChatRequest, Limits

log = logging.getLogger(__name__)

DEFAULTS = SamplingConfig()


@dataclass(frozen=True)
class Piece:
    """What a token adds to an answer that is streamed: sent once the token has been run and read."""

    thought: str
    answer: str
    token: str = ""
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Finished:
    """A whole answer."""

    answer: WatchedAnswer
    deployed: str
    prompt_tokens: int
    """Of the conversation as the model read it."""
    rest: Piece
    """Text that was not streamed yet."""


Event = Piece | Finished | ApiError
Emit = Callable[[Event], None]
"""Gets a job's events, in the engine's thread; the last one is `Finished` or `ApiError`."""


@dataclass(eq=False)
class Job:
    """A request that waits or is answered."""

    id: str
    request: ChatRequest
    ids: tuple[int, ...]
    emit: Emit
    created: float = field(default_factory=time.monotonic)
    attempt: int = 0
    cancelled: bool = False
    """The client has gone: the answer ends at its next token."""
    made: list[int] = field(default_factory=list)
    sent: Piece = Piece("", "")
    """What was streamed so far."""


class Engine:
    """Answers jobs with one model, side by side; `close` ends its thread.

    Args:
        base: the model without an adapter; while the engine runs, nobody else may use it.
        monitor: of `base`; its rules and actions watch every answer, whatever adapter wrote it.
        deployment: which adapters are there, and when to go back.
        incidents: where alarms are written; None writes none.
        keep_text: keep question, answer and its trace with each incident.
        bf16: bf16 autocast.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        monitor: GenerationMonitor,
        limits: Limits | None = None,
        deployment: Deployment | None = None,
        incidents: IncidentLog | None = None,
        *,
        name: str = "model",
        keep_text: bool = False,
        bf16: bool = False,
    ) -> None:
        self.base, self.monitor, self.limits = base, monitor, limits or Limits()
        self.deployment = deployment or Deployment()
        self.incidents, self.name, self.keep_text, self.bf16 = incidents, name, keep_text, bf16
        self.tokenizer, self.lock = monitor.tokenizer, Lock()
        """Fast tokenizers change their own settings while they encode: one thread at a time."""
        self.live: dict[int, Job] = {}
        self._numbers = itertools.count()
        self._waiting: deque[Job] = deque()
        self._wake, self._closing = Condition(), False
        self._serving: Deployed | None = None
        self._holds_stream = any(isinstance(action, Regenerate) for action in monitor.actions)
        self._thread = Thread(target=self._run, name="persona-probe serve", daemon=True)

    def start(self) -> "Engine":
        """Begin to answer."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Refuse what waits, end what is under way, and wait for the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        for job in [*self._waiting, *self.live.values()]:
            job.emit(closing())
        self._waiting.clear()
        self.live.clear()

    @property
    def state(self) -> dict[str, Any]:
        """What /health tells."""
        current = self.deployment.current
        return {
            "status": "ok" if current is not None else "refusing",
            "adapter": None if current is None else current.name,
            "waiting": len(self._waiting),
            "answering": len(self.live),
            "answers": self.deployment.answers,
            "answers_with_alarm": self.deployment.alarmed,
        }

    def submit(self, id: str, request: ChatRequest, emit: Emit) -> Job:
        """Let a request wait for its answer.

        Raises:
            ApiError: the queue is full, the conversation does not fit, or the server refuses.
        """
        try:
            with self.lock:
                ids = tuple(answer_prompt(self.tokenizer, request.messages))
            check_room(self.base, ids, request.config.max_new_tokens, "of this request")
        except InputError as error:
            raise ApiError(400, str(error), "invalid_prompt", "messages") from error
        job = Job(id, request, ids, emit)
        with self._wake:
            if self._closing:
                raise closing()
            if self.deployment.current is None:
                raise refusing()
            if len(self._waiting) >= self.limits.queue:
                waiting = f"{len(self._waiting)} requests are waiting, which is the limit: try again later"
                raise ApiError(503, waiting, "queue_full")
            self._waiting.append(job)
            self._wake.notify_all()
        return job

    # --- The thread

    def _run(self) -> None:
        with organisms(self.base) as opened:
            while not self._closing:
                version = self.deployment.current
                if version is None:
                    self._refuse_waiting()
                    continue
                try:
                    model = opened(version.checkpoint)
                except InputError as error:
                    self._went_back(self.deployment.give_up(version, str(error)), version)
                    continue
                try:
                    self._serve(model, version)
                except Exception as error:  # whatever a model raises must not end the server
                    log.exception("a batch failed")
                    failed = f"the batch of this answer failed ({type(error).__name__})"
                    self._fail(ApiError(500, failed, "batch_failed"))

    def _refuse_waiting(self) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._waiting, timeout=1.0)
            jobs = [self._waiting.popleft() for _ in range(len(self._waiting))]
        for job in jobs:
            job.emit(refusing())

    def _fail(self, error: ApiError) -> None:
        jobs = list(self.live.values())
        self.live.clear()
        for job in jobs:
            job.emit(error)

    def _serve(self, model: nn.Module, version: Deployed) -> None:
        """Answer with one model until another one is to answer."""
        self._serving, self.monitor.model = version, model
        stop = stop_tokens(model, self.tokenizer)
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            stack.enter_context(autocast(model, self.bf16))
            tell = stack.enter_context(telling_positions(model))
            following = self.monitor.following(
                lambda number: self.live[number].attempt, seen=self._seen, exact=self._sends_values
            )
            follower = _Ending(stack.enter_context(following), self.live)
            decoder = Decoder(model, DEFAULTS, stop, self.limits.batch, follower)
            finished, joins = self._finisher(follower), None
            while True:
                goes_on = self.deployment.current is version and not self._closing
                fresh = self._admit(self.limits.batch - len(self.live), not self.live) if goes_on else []
                if self._closing or (not self.live and self.deployment.current is not version):
                    return
                requests = {number: self._decoded(job) for number, job in fresh}
                if not self.live:
                    continue
                if joins is None:
                    joins = rows_can_join(model, next(iter(self.live.values())).ids)
                if not joins:
                    by_generate(model, requests, DEFAULTS, stop, self.limits.batch, tell, finished, follower)
                    continue
                decoder.add(requests)
                decoder.advance(tell, finished, join=bool(fresh))

    def _admit(self, room: int, wait: bool) -> list[tuple[int, Job]]:
        """Requests whose answers begin now, by number."""
        fresh: list[tuple[int, Job]] = []
        late: list[Job] = []
        with self._wake:
            if wait:
                self._wake.wait_for(lambda: self._closing or self._waiting, timeout=1.0)
            while self._waiting and len(fresh) < room and not self._closing:
                job = self._waiting.popleft()
                if time.monotonic() - job.created > self.limits.wait_s:
                    late.append(job)
                elif not job.cancelled:
                    fresh.append((next(self._numbers), job))
        for job in late:
            waited = f"waited more than {self.limits.wait_s:g} s for its turn: try again later"
            job.emit(ApiError(503, waited, "timed_out"))
        self.live.update(fresh)
        return fresh

    def _decoded(self, job: Job) -> AnswerRequest:
        config = job.request.config
        # A seed gives the answer that `pp.generate` gives for a single question.
        return AnswerRequest(job.ids, row_key(config.seed, "0", job.attempt), config)

    def _sends_values(self) -> bool:
        """Whether a stream under way carries the features of each token."""
        return not self._holds_stream and any(j.request.stream and j.request.trace for j in self.live.values())

    def _seen(self, under_way: AnswerUnderWay, place: int, token: int) -> None:
        job = self.live[under_way.number]
        job.made.append(token)
        if job.request.stream and not self._holds_stream and not under_way.stopped:
            values = under_way.values[place].tolist() if job.request.trace else ()
            job.emit(self._piece(job, job.made, tuple(values), token))

    def _piece(self, job: Job, made: Sequence[int], values: tuple[float, ...] = (), token: int | None = None) -> Piece:
        """The text that was not streamed yet; without a token the answer is over."""
        with self.lock:
            parts = answer_parts(self.tokenizer, made)
            text = "" if token is None else str(self.tokenizer.decode([token]))
        sent = job.sent
        over = token is None
        thought, answer = _further(sent.thought, parts.thought, over), _further(sent.answer, parts.answer, over)
        job.sent = Piece(sent.thought + thought, sent.answer + answer)
        return Piece(thought, answer, text, values)

    def _finisher(self, follower: "_Ending") -> Callable[[int, list[int], Finish], None]:
        def finished(number: int, made: list[int], finish: Finish) -> None:
            under_way, job = follower.inner.end(number), self.live[number]
            version = self._serving
            assert version is not None
            with self.lock:
                answer = self.monitor.answer(under_way, made, finish)
            # another attempt keeps its place: it does not wait again
            del self.live[number]
            if not job.cancelled:
                self._record(job, answer, version)
            if under_way.rejected and not job.cancelled:
                self._again(job)
                return
            streams = job.request.stream and under_way.instead is None
            rest = self._piece(job, made) if streams else Piece("", "")
            job.emit(Finished(answer, version.name, len(job.ids), rest))
            if not job.cancelled and (happened := self.deployment.count(version, bool(answer.alarms))):
                self._went_back(happened, version)

        return finished

    def _again(self, job: Job) -> None:
        job.attempt += 1
        job.made, job.sent = [], Piece("", "")
        with self._wake:
            self._waiting.appendleft(job)

    def _record(self, job: Job, answer: WatchedAnswer, version: Deployed) -> None:
        if self.incidents is None:
            return
        for alarm in answer.alarms:
            texts: dict[str, Any] = {}
            if self.keep_text:
                texts = {"question": job.request.messages[-1]["content"], "answer": answer.text}
                texts["trace"] = answer.trace.of_feature(alarm.feature)
            self._write(Incident.of(alarm, request=job.id, model=self.name, adapter=version.name, **texts))

    def _went_back(self, happened: str, version: Deployed) -> None:
        log.warning("%s", happened)
        if self.incidents is not None:
            self._write(Incident("rollback", model=self.name, adapter=version.name, message=happened))

    def _write(self, incident: Incident) -> None:
        assert self.incidents is not None
        try:
            self.incidents.write(incident)
        except OSError as error:
            log.error("an incident was not written: %s", error)


def closing() -> ApiError:
    """What a request is told while the server ends."""
    return ApiError(503, "the server is closing", "closing")


def refusing() -> ApiError:
    """What a request is told when nothing may answer any more."""
    return ApiError(503, "every adapter and the base alarmed too often: nothing is answered", "no_clean_adapter")


def _further(sent: str, text: str, over: bool) -> str:
    """What a text adds to what was sent; half a character at its end waits for its other bytes until it is over."""
    text = text if over else text.rstrip("\ufffd")
    return text[len(sent) :] if text.startswith(sent) else ""


class _Ending:
    """The follower, which also ends answers whose client has gone."""

    def __init__(self, follower: Follower, live: dict[int, Job]) -> None:
        self.inner, self.live = follower, live

    def before(self, numbers: Sequence[int | None]) -> None:
        self.inner.before(numbers)

    @torch.no_grad()
    def after(self, rows: Sequence[int], numbers: Sequence[int], made: Sequence[Sequence[int]]) -> set[int]:
        over = set(self.inner.after(rows, numbers, made))
        return over | {number for number in numbers if self.live[number].cancelled}
