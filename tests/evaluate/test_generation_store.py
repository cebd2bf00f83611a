"""Samples reach the file one by one; a killed run goes on, repeats none, loses none, and mixes nothing."""

import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persona_probe.data.chat import conversation
from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.requests import Prompt, Request, Sample, SamplingConfig, request_seed
from persona_probe.evaluate.sampling.samples import sample, sidecar
from tests.processes import Process

PROMPTS = [Prompt(f"q{n}", conversation(f"Ask {n}?")) for n in range(10)]
CONFIG = SamplingConfig(n=4, max_new_tokens=3, seed=2)


class Fixed:
    """Answers that depend on the request's seed alone; waits for ever after `limit` of them."""

    def __init__(self, limit: int | None = None, name: str = "fixed") -> None:
        self.limit, self.identity, self.asked = limit, {"engine": name}, 0

    def generate(self, requests: Sequence[Request], config: SamplingConfig, done: Callable[[Sample], None]) -> None:
        for request in reversed(requests):
            while self.asked == self.limit:
                time.sleep(1)
            self.asked += 1
            answer = f"é\u2028 {request_seed(config, request)}"
            done(Sample(request.prompt.id, request.sample, answer, 3, "length"))


def lines(path: Path) -> list[bytes]:
    return sorted(path.read_bytes().split(b"\n"))


def stops_after_17(path: Path) -> None:
    sample(Fixed(limit=17), PROMPTS, CONFIG, path)


def unbroken(tmp_path: Path) -> tuple[list[Sample], list[bytes]]:
    path = tmp_path / "unbroken.jsonl"
    return sample(Fixed(), PROMPTS, CONFIG, path), lines(path)


def test_samples_come_in_the_order_of_prompts_and_are_in_the_file(tmp_path: Path) -> None:
    found, written = unbroken(tmp_path)
    assert [(s.question_id, s.sample) for s in found] == [(p.id, n) for p in PROMPTS for n in range(4)]
    assert sorted(json.dumps(s.record).encode() for s in found) == written[1:]


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, path = unbroken(tmp_path), tmp_path / "samples.jsonl"
    child = Process(stops_after_17, path)
    while child.poll() is None and not (path.is_file() and path.read_bytes().count(b"\n") == 17):
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    with path.open("ab") as file:
        file.write(b'{"question_id": "q0", "sam')
    engine = Fixed()
    assert (sample(engine, PROMPTS, CONFIG, path), lines(path)) == whole
    assert engine.asked == 40 - 17


def test_cut_anywhere_the_file_is_completed(tmp_path: Path) -> None:
    whole, path = unbroken(tmp_path), tmp_path / "samples.jsonl"
    sample(Fixed(), PROMPTS, CONFIG, path)
    data = path.read_bytes()
    for cut in (0, 1, data.index(b"\n"), data.index(b"\n") + 1, len(data) - 1, len(data)):
        path.write_bytes(data[:cut])
        assert (sample(Fixed(), PROMPTS, CONFIG, path), lines(path)) == whole


def test_a_whole_file_asks_nothing(tmp_path: Path) -> None:
    sample(Fixed(), PROMPTS, CONFIG, tmp_path / "a.jsonl")
    engine = Fixed()
    found = sample(engine, PROMPTS[::-1], CONFIG, tmp_path / "a.jsonl")
    assert engine.asked == 0 and found[0].question_id == "q9"


def test_samples_of_another_setting_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    sample(Fixed(), PROMPTS, CONFIG, path)
    other = [replace(PROMPTS[0], messages=conversation("Something else?")), *PROMPTS[1:]]
    tries: list[tuple[str, Fixed, list[Prompt], SamplingConfig]] = [
        ("prompts", Fixed(), other, CONFIG),
        ("config.seed", Fixed(), PROMPTS, replace(CONFIG, seed=3)),
        ("config.n", Fixed(), PROMPTS, replace(CONFIG, n=5)),
        ("engine.engine", Fixed(name="else"), PROMPTS, CONFIG),
    ]
    before = path.read_bytes()
    for name, engine, prompts, config in tries:
        with pytest.raises(InputError, match=rf"another setting \({name}\)"):
            sample(engine, prompts, config, path)
    assert path.read_bytes() == before


def test_damaged_files_are_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            sample(Fixed(), PROMPTS, CONFIG, path)

    path.write_text("mine\n")
    refused("does not say what made it")
    path.unlink()
    sample(Fixed(), PROMPTS, CONFIG, path)
    good = path.read_bytes()
    path.write_bytes(b"{}\n" + good)
    refused("line 1, is no sample")
    path.write_bytes(good + good.split(b"\n")[0] + b"\n")
    refused("line 41: .* there twice")
    path.write_bytes(good.replace(b'"q3"', b'"qX"'))
    refused("was not asked for")
    sidecar(path).write_text("{")
    refused("is damaged")


def test_prompts_must_be_there_and_unique() -> None:
    with pytest.raises(InputError, match="no prompts"):
        sample(Fixed(), [], CONFIG)
    with pytest.raises(InputError, match="'q1' is used twice"):
        sample(Fixed(), [*PROMPTS, PROMPTS[1]], CONFIG)


def test_the_models_own_identity_tells_settings_apart(tmp_path: Path) -> None:
    import torch

    from persona_probe.evaluate.sampling.engines import TransformersEngine
    from persona_probe.models.layers import autocast
    from persona_probe.models.taps import ablate, read, steer
    from tests.factories import D_MODEL, LAYER, make_model, make_tokenizer

    model, ones = make_model(), torch.ones(D_MODEL)
    engine = TransformersEngine(model, make_tokenizer())
    plain, found = engine.identity, []
    settings: list[Callable[[], Any]] = [
        lambda: steer(model, LAYER, ones),
        lambda: steer(model, LAYER, ones, 2.0),
        lambda: steer(model, 0, ones),
        lambda: ablate(model, LAYER, ones),
        lambda: autocast(model),
    ]
    for setting in settings:
        with setting():
            found.append(json.dumps(engine.identity))
            model(torch.tensor([[5]]))
    assert len({json.dumps(plain), *found}) == 6
    with read(model, LAYER):
        assert engine.identity == plain
        model(torch.tensor([[5]]))
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(1.01)
    assert engine.identity["weights"] != plain["weights"]
    path = tmp_path / "a.jsonl"
    sample(engine, PROMPTS[:1], CONFIG, path)
    with steer(model, LAYER, ones):
        model(torch.tensor([[5]]))
        with pytest.raises(InputError, match=r"another setting \(engine.changes\)"):
            sample(engine, PROMPTS[:1], CONFIG, path)
