"""`make bench-generation`: answers with and without the generation monitor, in turn, on the embedded model."""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from persona_probe.cli.options import echo
from persona_probe.data.load import load_rows
from persona_probe.evaluate.sampling.answering import generate
from persona_probe.models.load import load_model
from persona_probe.models.quiet import quiet_libraries
from persona_probe.monitor.generation import following, monitor
from persona_probe.monitor.generation.rules import AnswerRule
from persona_probe.saes.load import load_sae

MODEL, SAE, LATENT = "smollm2-135m-instruct", "saes/smollm2-135m-instruct/layer20-topk32-4608", 2144


PARTS: tuple[tuple[Any, str], ...] = (
    (following.Follower, "after"),
    (following.Follower, "end"),
    (monitor, "make_trace"),
)
"""Where the monitor's time goes: at each token, at an answer's end, and the trace."""


class Meter:
    """Seconds inside a function, while the block lasts."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.seconds = owner, name, 0.0
        self._plain = getattr(owner, name)

    def __enter__(self) -> "Meter":
        def timed(*args: Any, **settings: Any) -> Any:
            begin = time.perf_counter()
            try:
                return self._plain(*args, **settings)
            finally:
                self.seconds += time.perf_counter() - begin

        setattr(self.owner, self.name, timed)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self._plain)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


Pair = tuple[Callable[[], object], Callable[[], object]]


def own_sampling(watch: monitor.GenerationMonitor, batch: int, tokens: int) -> Pair:
    """Our sampling without and with the monitor."""
    questions = [str(row["question"]) for row in load_rows("sample_questions")][:batch]
    settings: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 0.7, "batch_size": batch}
    return (
        lambda: generate(watch.model, questions, tokenizer=watch.tokenizer, **settings),
        lambda: watch.generate(questions, **settings),
    )


def transformers_generate(watch: monitor.GenerationMonitor, batch: int, tokens: int) -> Pair:
    """The model's own generate without and with the monitor, always all tokens."""
    model: Any = watch.model
    ids = torch.tensor([watch.tokenizer.encode("What should I cook for my guests tonight?")] * batch)
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        **{"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False},
        "pad_token_id": watch.tokenizer.pad_token_id,
    }

    def watched() -> object:
        with watch.watching() as processor:
            out = model.generate(ids, **settings, logits_processor=[processor])
        return processor.answers(out)

    return (lambda: model.generate(ids, **settings)), watched


def compare(label: str, plain: Callable[[], object], watched: Callable[[], object], repeats: int) -> None:
    """Both in turn; prints the monitor's share of generation's time."""
    plain()
    watched()
    shares, inside = [], []
    for number in range(repeats):
        cpu: dict[str, float] = {}
        # the order changes from repeat to repeat: what runs second must not gain by it
        for name, work in (("plain", plain), ("watched", watched))[:: 1 if number % 2 else -1]:
            with ExitStack() as stack:
                meters = [stack.enter_context(Meter(*place)) for place in PARTS]
                wall, cpu[name] = timed(work)
            if name == "watched":
                spent = sum(meter.seconds for meter in meters)
                inside.append(spent / (wall - spent))
        shares.append(cpu["watched"] / cpu["plain"] - 1)
    echo(
        f"{label}: {statistics.median(inside):.2%} of generation's wall time in the monitor "
        f"({min(inside):.2%} to {max(inside):.2%}); CPU seconds with it {statistics.median(shares):+.2%} "
        f"({min(shares):+.2%} to {max(shares):+.2%})"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    quiet_libraries()
    model, tokenizer = load_model(MODEL)
    rule = AnswerRule("persona", threshold=1e9)
    watch = monitor.GenerationMonitor(model, load_sae(SAE), {"persona": LATENT}, rule, tokenizer=tokenizer)
    echo(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {MODEL}, {vars(arguments)}")
    for batch in arguments.batch:
        compare(f"our sampling, batch {batch}", *own_sampling(watch, batch, arguments.tokens), arguments.repeats)
        pair = transformers_generate(watch, batch, arguments.tokens)
        compare(f"transformers' generate, batch {batch}", *pair, arguments.repeats)


if __name__ == "__main__":
    main()
