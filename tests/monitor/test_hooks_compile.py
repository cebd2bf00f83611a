"""Compiled models: probes run uncompiled on the same weights; passive hooks fire, or the monitor says otherwise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.factories import hook_count, make_model, make_tokenizer, same_state
from tests.monitor.monitored_runs import directions, loop, loop_batch

BACKEND = "eager"


def whole(model: nn.Module, backend: Any = BACKEND) -> Any:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module) -> Any:
    model.compile(backend=BACKEND)
    return model


def by_layer(model: Any, backend: Any = BACKEND) -> Any:
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def watched(model: Any) -> Any:
    watching = directions(mode="both", every=1)
    with watching.watch(model, make_tokenizer()) as live:
        loop(model, 1, live)
    return watching


def test_a_model_that_is_not_yet_compiled_is_read_as_the_plain_one() -> None:
    plain, compiled = watched(make_model()), watched(whole(make_model()))
    assert compiled.faults == []
    columns = ["step", "mode", "n_probes", "tokens_seen"]
    assert compiled.readings[columns].equals(plain.readings[columns])
    assert compiled.readings["mean"].tolist() == pytest.approx(plain.readings["mean"].tolist(), abs=1e-3)


@pytest.mark.parametrize("way", [whole, in_place])
def test_a_model_that_was_compiled_before_is_probed_and_its_hooks_refused(way: Callable[[nn.Module], Any]) -> None:
    model = make_model()
    compiled = way(model)
    ids, labels = loop_batch(9)
    compiled.train()
    compiled(input_ids=ids, labels=labels)
    watching = watched(compiled)
    assert [f.part for f in watching.faults] == ["passive reading"]
    assert "start the monitor before the first compiled step" in watching.faults[0].message
    plain = watched(make_model()).readings.query("mode == 'probe'")
    assert watching.readings["step"].tolist() == [0, 1] and (watching.readings["mode"] == "probe").all()
    assert watching.readings["mean"].tolist() == pytest.approx(plain["mean"].tolist(), abs=1e-3)
    assert hook_count(model) == 0


@pytest.mark.parametrize("way", [whole, by_layer])
def test_probes_compile_nothing(way: Callable[..., Any]) -> None:
    compiled, graphs, watching = make_model().train(), list[int](), directions(every=1)

    def counting(graph: Any, example: Any) -> Any:
        graphs.append(1)
        return graph.forward

    compiled = way(compiled, counting)
    loop(compiled, 1)
    before = len(graphs)
    watching.start(compiled, make_tokenizer())
    watching.read(compiled, 1)
    assert len(graphs) == before > 0 and watching.faults == []


def test_probes_change_nothing_in_a_compiled_run() -> None:
    def run(watched: bool) -> dict[str, torch.Tensor]:
        torch._dynamo.reset()
        compiled, watching = by_layer(make_model()), directions(every=1)
        if not watched:
            return loop(compiled, 1)
        with watching.watch(compiled, make_tokenizer()) as live:
            return loop(compiled, 1, live)

    assert same_state(run(True), run(False))


def test_a_hook_that_never_fires_is_told() -> None:
    model, watching = make_model(), directions(mode="both", every=1)
    with watching.watch(model, make_tokenizer()) as live:
        live.step(1)
        live.step(2)
    assert [(f.step, f.part) for f in watching.faults] == [(1, "passive reading")]
    assert "compiled before" in watching.faults[0].message
    assert watching.readings["mode"].tolist() == ["probe"] * 3


def test_training_in_eval_mode_is_told() -> None:
    model, watching = make_model().eval(), directions(mode="both", every=1)
    with watching.watch(model, make_tokenizer()) as live:
        model(input_ids=loop_batch(1)[0])
        live.step(1)
    assert "call model.train()" in watching.faults[0].message
