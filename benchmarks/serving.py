"""`make bench-serve`: many clients at once on loopback, against a server of watched answers."""

import argparse
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import uvicorn

from benchmarks.generation import LATENT, MODEL, SAE
from persona_probe.cli.options import echo
from persona_probe.models.load import load_model
from persona_probe.models.quiet import quiet_libraries
from persona_probe.monitor.generation.monitor import GenerationMonitor
from persona_probe.monitor.generation.rules import AnswerRule
from persona_probe.monitor.generation.serving.app import make_app
from persona_probe.monitor.generation.serving.engine import Engine
from persona_probe.monitor.generation.serving.requests import Limits
from persona_probe.saes.load import load_sae


def ask(client: httpx.Client, number: int, tokens: int) -> tuple[str, float, int]:
    """One request: what became of it, seconds, and answer tokens. Every second one is streamed."""
    body: dict[str, Any] = {"model": MODEL, "max_tokens": tokens, "seed": number, "stream": bool(number % 2)}
    body["messages"] = [{"role": "user", "content": f"What should I cook for {number % 9 + 1} guests?"}]
    begin, made = time.perf_counter(), 0
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        text = response.read().decode()
    if response.status_code != 200:
        return response.json()["error"]["code"], time.perf_counter() - begin, 0
    whole = not body["stream"]
    made = response.json()["usage"]["completion_tokens"] if whole else text.count('"values"')
    ended = whole or text.rstrip().endswith("data: [DONE]")
    return "answered" if ended else "cut", time.perf_counter() - begin, made


def load_test(client: httpx.Client, clients: int, requests: int, tokens: int) -> None:
    """Many clients at once; prints what became of their requests, seconds and tokens a second."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda n: ask(client, n, tokens), range(requests)))
    wall = time.perf_counter() - begin
    states = Counter(state for state, _, _ in found)
    seconds = sorted(s for state, s, _ in found if state == "answered")
    told = ", ".join(f"{count} {state}" for state, count in states.most_common())
    echo(f"{requests} requests of {clients} clients: {told} in {wall:.1f} s")
    if seconds:
        made = sum(n for _, _, n in found)
        echo(
            f"seconds to a whole answer: median {statistics.median(seconds):.2f}, highest {seconds[-1]:.2f}; "
            f"{made / wall:.0f} answer tokens a second"
        )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    quiet_libraries()
    model, tokenizer = load_model(MODEL)
    rule = AnswerRule("persona", threshold=1e9)
    monitor = GenerationMonitor(model, load_sae(SAE), {"persona": LATENT}, rule, tokenizer=tokenizer)
    engine = Engine(model, monitor, Limits(queue=arguments.queue, batch=arguments.batch), name=MODEL).start()
    server = uvicorn.Server(uvicorn.Config(make_app(engine), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    limits = httpx.Limits(max_connections=arguments.clients)
    echo(f"{MODEL}, {vars(arguments)}")
    with httpx.Client(base_url=url, timeout=None, limits=limits) as client:
        ask(client, 0, 2)
        load_test(client, arguments.clients, arguments.requests, arguments.tokens)
    server.should_exit = True
    thread.join()


if __name__ == "__main__":
    main()
