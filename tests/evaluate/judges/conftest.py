"""Fixtures: the fake endpoint, a cache of the test's own, and a key."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from persona_probe.evaluate.endpoint import Budget
from persona_probe.evaluate.judges.cache import JudgementCache
from persona_probe.evaluate.judges.http import Endpoint, HttpBackend
from persona_probe.evaluate.judges.judge import CachedJudge
from persona_probe.evaluate.judges.protocols import Criterion
from tests.evaluate.judges.fake_judge_server import FakeServer
from tests.evaluate.judges.judging_items import CRITERION, KEY, RETRIES


@pytest.fixture(autouse=True)
def own_default_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the user's cache, not even by mistake."""
    monkeypatch.setenv("PERSONA_PROBE_CACHE", str(tmp_path / "default"))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second before a first retry, and between looks at other processes' claims, is long for a test."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("persona_probe.evaluate.judges.judge.POLL", 0.02)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with FakeServer(KEY) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> JudgementCache:
    return JudgementCache(tmp_path / "judgements.sqlite")


@pytest.fixture
def make_judge(server: FakeServer, cache: JudgementCache) -> Callable[..., CachedJudge]:
    """A judge at the fake endpoint; keywords go to `Endpoint`, but for `criterion` and `budget`."""

    def make(criterion: Criterion = CRITERION, budget: Budget | None = None, **settings: Any) -> CachedJudge:
        endpoint = Endpoint(
            **{
                "model": "judge",
                "base_url": server.url,
                "key_variable": "JUDGE_KEY",
                "max_retries": RETRIES,
                **settings,
            }
        )
        return CachedJudge(criterion, HttpBackend(endpoint, budget), cache)

    return make
