"""Two processes with gloo: DDP by transformers' Trainer, and FSDP2 in a plain loop."""

import json
import socket
from typing import Any

import pytest

from tests.factories import make_model, make_tokenizer
from tests.monitor import two_ranks
from tests.monitor.monitored_runs import directions
from tests.processes import Process


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    running = []
    for rank in ("0", "1"):
        here = {**shared, "RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": ""}
        running.append(Process(two_ranks.main, folder, log=folder / f"log-{rank}", environment=here))
    try:
        codes = [process.wait(timeout=180) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 0], "\n".join((folder / f"log-{r}").read_text()[-3000:] for r in (0, 1))
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_ddp_first_process_reads_and_a_stop_reaches_all(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks[0]["ddp"], ranks[1]["ddp"]
    assert first["wrapped"] == "DistributedDataParallel"
    assert first["faults"] == second["faults"] == []
    assert [row[:3] for row in first["rows"]] == [[0, "probe", 4], *[[s, m, n] for s in (1, 2) for m, n in BOTH]]
    assert second["rows"] == [] and second["events"] == []
    assert first["events"].count("Alarm") == 2 and first["events"][-1] == "End"
    # The rule fired in the first process only, at both readings of step 2; both processes stopped.
    assert first["steps"] == second["steps"] == 2
    assert first["calls"] == [2, 2] and second["calls"] == []


BOTH = (("probe", 4), ("passive", 1))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_distributed_training_is_the_same(ranks: list[dict[str, Any]], kind: str) -> None:
    for rank in ranks:
        watched, plain = rank[kind], rank[f"{kind} plain"]
        assert watched["weights"] == plain["weights"] and watched["states"] == plain["states"]
        assert watched["hooks"] == 0
    assert ranks[0][kind]["weights"] == ranks[1][kind]["weights"]


def test_tokens_are_counted_in_all_processes(ranks: list[dict[str, Any]]) -> None:
    rows = [row for row in ranks[0]["fsdp"]["rows"] if row[1] == "passive"]
    # Two processes, each with 3 rows of 12 tokens a step; the first one's sequences are read.
    assert [(row[0], row[3], row[4]) for row in rows] == [(1, 3, 72), (2, 3, 144), (3, 3, 216)]
    assert ranks[1]["fsdp"]["rows"] == []


def test_fsdp_reads_what_one_process_reads_and_stays_sharded(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]["fsdp"]
    assert first["sharded"] and first["faults"] == []
    base = directions(every=1)
    base.start(make_model(), make_tokenizer())
    assert base.base is not None
    start = first["rows"][0]
    assert start[:2] == [0, "probe"] and start[2] == pytest.approx(float(base.base.values.mean()), abs=1e-4)
    assert [row[0] for row in first["rows"] if row[1] == "probe"] == [0, 1, 2, 3]
