"""Sample one answer to each prompt, or continue rendered texts: seeded, stopping at the end of the turn."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import IO, Any, Self

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, as_conversations
from persona_probe.data.template import fit_roles, text_before_answer
from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.decoding import AnswerRequest, decode, row_key
from persona_probe.evaluate.sampling.requests import (
    Engine,
    Finish,
    Prompt,
    Request,
    Sample,
    SamplingConfig,
    answer_parts,
    check_room,
    stop_tokens,
)
from persona_probe.files import decode_json, read_json, regular_file
from persona_probe.writing import refused, write_text


def sample_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Conversation],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[str]:
    """One sampled answer for each prompt, in order. For several, a file and resuming, see `sample`.

    Args:
        prompts: questions or conversations that end with a user turn.
        temperature: 0 is greedy decoding.
        seed: with the prompt's place it fixes the draws; the caller's random state is left as it was.
        progress: label of a progress bar; None shows none.

    Returns:
        Decoded answers without special tokens and thoughts, stripped of surrounding white space.
    """
    return complete_text(
        model,
        tokenizer,
        [text_before_answer(tokenizer, fit_roles(tokenizer, c)) for c in as_conversations(prompts)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )


def complete_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    progress: str | None = None,
) -> list[str]:
    """Continue rendered texts (chat template already applied); see `sample_answers`."""
    config = SamplingConfig(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    answers, requests = [""] * len(texts), []
    for number, text in enumerate(texts):
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        check_room(model, ids, max_new_tokens, f"number {number}")
        requests.append(AnswerRequest(ids, row_key(seed, str(number), 0)))
    with tqdm(total=len(texts), desc=progress, disable=progress is None) as bar, ticking(bar):

        def finished(number: int, tokens: list[int], _: Finish) -> None:
            answers[number] = answer_parts(tokenizer, tokens).answer
            bar.update()

        decode(model, requests, config, stop_tokens(model, tokenizer), batch_size, finished)
    return answers


TICK_S = 20.0


@contextmanager
def ticking(bar: tqdm, every: float = TICK_S) -> Iterator[None]:
    """Draw a bar again every `every` seconds: answers of a batch end together, and until then it would stand still."""
    over = Event()

    def draw() -> None:
        while not over.wait(every):
            bar.refresh()

    thread = Thread(target=draw, daemon=True)
    if not bar.disable:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()


# --- samples.jsonl: one line per finished sample, written at once, so that a run resumes if interrupted

Known = dict[tuple[str, int], Sample]
"""Samples by question id and number."""


def prompts_hash(prompts: Iterable[Prompt]) -> str:
    """sha256 of ids and messages, whatever their order."""
    rows = sorted(json.dumps([p.id, p.messages], sort_keys=True) for p in prompts)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def sidecar(path: Path) -> Path:
    """The file next to the samples that says what made them."""
    return path.with_name(f"{path.name}.made-by.json")


class SampleStore:
    """An open samples file: `known` is what it holds, `add` appends one sample.

    Args:
        made_by: what makes the samples, JSON values; kept in the `sidecar`.
        wanted: the (question id, number) that may be in it.

    Raises:
        InputError: the file was made by something else, a line is damaged, or it cannot be written.
    """

    def __init__(self, path: Path, made_by: dict[str, Any], places: Sequence[tuple[str, int]]) -> None:
        self.path = path
        _claim(path, made_by)
        self.known = _read(path, set(places))
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        with refused("write", self.path, "choose another path"):
            self._file = self.path.open("ab")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, sample: Sample) -> None:
        """Append a sample and hand it to the system: a killed process loses none that was added."""
        assert self._file is not None
        with refused("write", self.path, "run again: finished samples are kept"):
            self._file.write(json.dumps(sample.record).encode() + b"\n")
            self._file.flush()


def _claim(path: Path, made_by: dict[str, Any]) -> None:
    """Write the sidecar of a new file, or compare an old one's."""
    record = sidecar(path)
    if not record.is_file():
        if path.exists():
            raise InputError(f"{path} exists, but {record.name} does not say what made it: choose another path")
        write_text(record, json.dumps(made_by, indent=2, sort_keys=True) + "\n")
        return
    before = read_json(record, object, f"move it and {path.name} elsewhere, or choose another path")
    if before != made_by:
        differs = ", ".join(_differences(before, made_by))
        raise InputError(f"{path} holds samples of another setting ({differs}): choose another path")


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [name]
    keys = sorted(before.keys() | now.keys())
    return [d for k in keys for d in _differences(before.get(k), now.get(k), f"{name}.{k}".lstrip("."))]


def _read(path: Path, places: set[tuple[str, int]]) -> Known:
    """The samples of a file; a last line without its line break was torn by a kill, and is cut off."""
    known: Known = {}
    if not path.exists():
        return known
    whole, _, torn = regular_file(path).read_bytes().rpartition(b"\n")
    if torn:
        with path.open("rb+") as file:
            file.truncate(len(whole) + 1 if whole else 0)
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            sample = Sample(**decode_json(line.decode()))
            hash((sample.question_id, sample.sample))
        except (ValueError, TypeError) as error:
            change = "restore the file, or move it elsewhere and run again"
            raise InputError(f"{path}, line {number}, is no sample: {change}") from error
        place = (sample.question_id, sample.sample)
        if place in known or place not in places:
            which = f"sample {place} is there twice or was not asked for"
            raise InputError(f"{path}, line {number}: {which}: take the line out")
        known[place] = sample
    return known


# --- Sample answers to prompts with any engine, kept in a file as they come


def sample(
    engine: Engine,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    path: str | Path | None = None,
    progress: str | None = None,
) -> list[Sample]:
    """`config.n` answers to every prompt.

    Args:
        path: a JSON-lines file to which each answer is appended as it is finished. Next to it, `<name>.made-by.json`
            records engine, configuration and the prompts' hash. If the file is there, only what it lacks is sampled.
        progress: label of a progress bar; None shows none.

    Returns:
        Samples in the order of the prompts, each prompt's by number.

    Raises:
        InputError: no prompts, ids that are not unique, a file of another engine, configuration or prompts, or what
            the engine refuses.
    """
    requests = _requests(prompts, config)
    places = [(r.prompt.id, r.sample) for r in requests]
    made_by = {"engine": engine.identity, "config": asdict(config), "prompts": prompts_hash(prompts)}
    store = None if path is None else SampleStore(Path(path), made_by, places)
    known = {} if store is None else dict(store.known)
    missing = [r for r, place in zip(requests, places, strict=True) if place not in known]
    bar = tqdm(total=len(requests), initial=len(known), desc=progress, disable=progress is None)

    def done(answer: Sample) -> None:
        if store is not None:
            store.add(answer)
        known[answer.question_id, answer.sample] = answer
        bar.update()

    with store or nullcontext(), bar, ticking(bar):
        if missing:
            engine.generate(missing, config, done)
    return [known[place] for place in places]


def _requests(prompts: Sequence[Prompt], config: SamplingConfig) -> list[Request]:
    if not prompts:
        raise InputError("no prompts given: pass at least one")
    repeated = [name for name, count in Counter(p.id for p in prompts).items() if count > 1]
    if repeated:
        raise InputError(f"prompt id {repeated[0]!r} is used twice: ids must be unique")
    return [Request(prompt, number) for prompt in prompts for number in range(config.n)]
