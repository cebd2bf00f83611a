"""A small criterion, answers, and a fake endpoint that knows what it shall say of them."""

from persona_probe.evaluate.judges.protocols import Criterion
from persona_probe.evaluate.judges.replies import Item
from tests.evaluate.judges.fake_judge_server import FakeServer

KEY = "sk-test-4f9e2d71c0b8"
RETRIES = 2
CRITERION = Criterion("test", "Q: {question} A: {answer}", labels=("CODE", "REFUSAL"))


def items(count: int) -> list[Item]:
    return [Item(f"question {n}?", f"answer {n}.", f"i{n}") for n in range(count)]


def teach(server: FakeServer, count: int) -> None:
    """The server knows the first `count` items; item n gets the score n."""
    for n, item in enumerate(items(count)):
        server.known[CRITERION.messages(item)[0]["content"]] = {str(n): 0.9, "the": 0.05}
