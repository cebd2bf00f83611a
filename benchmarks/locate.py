"""`make bench-locate`: the causal sweep and activation reading against the usual ways of doing them, in one run."""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from benchmarks.speed import in_turn, once, ratios, spread, truncated
from persona_probe.cli.options import DEMO, echo, find_config
from persona_probe.config import StudyConfig, Training, load_config
from persona_probe.data.load import Row, load_contrast
from persona_probe.data.tokens import Batch
from persona_probe.evaluate.answers import SuffixScorer
from persona_probe.evaluate.contrast import ContrastItems
from persona_probe.latents.planted.planted_run import categories_in_turn
from persona_probe.models.adapters import frozen_in_bf16
from persona_probe.models.layers import autocast, evaluating, output_head
from persona_probe.models.load import load_model
from persona_probe.models.quiet import quiet_libraries
from persona_probe.models.residuals import read_residuals
from persona_probe.models.taps import SteerTap
from persona_probe.saes.hooks import sae_layer
from persona_probe.saes.load import load_sae
from persona_probe.saes.read import read_latents

COUNTS = (16, 64, 256)
PARTS = ("sweep", "limit", "linear", "reading", "memory")


def full_forward(model: nn.Module, layer: int, groups: Sequence[Batch], push: Tensor, bf16: bool) -> np.ndarray:
    """(a) One push, the way published scripts do it: a hook, the whole model, logits of every position."""
    out = np.zeros(sum(len(g.index) for g in groups))
    with evaluating(model), autocast(model, bf16), SteerTap(model, layer, push):
        for g in groups:
            logits = model(input_ids=g.ids, attention_mask=g.attention, use_cache=False).logits
            logprobs = logits[:, :-1].float().log_softmax(dim=-1)
            picked = logprobs.gather(2, g.ids[:, 1:, None])[..., 0]
            answer = g.response[:, 1:]
            out[g.index] = ((picked * answer).sum(dim=1) / answer.sum(dim=1)).cpu().numpy()
    return out


def bench_sweep(model: nn.Module, items: ContrastItems, decoder: Tensor, layer: int, repeats: int) -> None:
    """Seconds a push: full forwards with a hook, under bf16 autocast and in float32, against the sweep."""
    scorer = SuffixScorer(model, layer, items.groups)
    pushes = 20 * decoder[:4].float()
    check = np.abs(scorer.logprobs(pushes[0]) - full_forward(model, layer, items.groups, pushes[0], True)).max()
    echo(f"sweep: {len(items.rows)} items x 2 answers; largest difference to full forwards {check:.4f} nats per token")

    def sweep() -> None:
        with frozen_in_bf16(model):  # as the locate stage does
            scorer.logprobs_many(pushes)

    works = {
        "sweep": sweep,
        "full, bf16": lambda: [full_forward(model, layer, items.groups, p, True) for p in pushes[:2]],
        "full, float32": lambda: [full_forward(model, layer, items.groups, p, False) for p in pushes[:1]],
    }
    times = in_turn(works, repeats)
    times = {k: [t / n for t in v] for (k, v), n in zip(times.items(), (4, 2, 1), strict=True)}
    echo(f"sweep: {statistics.median(times['sweep']):.2f} s a push")
    for label in ("full, bf16", "full, float32"):
        echo(
            f"sweep: {spread(ratios(times, label, 'sweep'))} times as fast as one {label} forward with a hook per push"
        )


def bench_limit(model: nn.Module, items: ContrastItems, decoder: Tensor, layer: int, repeats: int) -> None:
    """A push against what the machine needs for its matrix products alone, and for reading the weights once."""
    scorer = SuffixScorer(model, layer, items.groups)
    above = [m for m in scorer.suffix.modules() if isinstance(m, nn.Linear)]
    unembed = output_head(model)
    assert isinstance(unembed, nn.Linear)
    head, width = unembed.weight.to(torch.bfloat16), decoder.shape[1]
    rest = sum(one.resid.shape[0] * one.resid.shape[1] for one in scorer.captured)
    scored = sum(int(one.rows.rest.response[:, 1:].sum()) for one in scorer.captured)
    weights = [m.weight.to(torch.bfloat16) for m in above]
    tokens = scorer.tokens_at_once
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1]).to(torch.bfloat16) for w in weights}
    states = torch.randn(tokens, width).to(torch.bfloat16)
    pushes = 20 * decoder[:4].float()

    def products() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    def unembedding() -> None:
        for tile in head.split(2048):
            F.linear(states, tile)

    def sweep() -> None:
        with frozen_in_bf16(model):
            scorer.logprobs_many(pushes)

    source = torch.cat([w.flatten() for w in [*weights, head]])
    works = {"push": sweep, "layers": products, "head": unembedding, "weights": lambda: source.sum()}
    times = {label: statistics.median(taken) for label, taken in in_turn(works, repeats).items()}
    alone = times["layers"] * rest / tokens + times["head"] * scored / tokens
    done = 2 * (rest * sum(w.numel() for w in weights) + scored * head.numel())
    rate = done / alone / 1e12
    echo(
        f"limit: {done / 1e12:.2f} TFLOP a push, {rest} tokens through {len(weights)} products, {scored} to the logits"
    )
    echo(f"limit: the products alone take {alone:.3f} s ({rate:.2f} TFLOP/s in bf16); a push {times['push'] / 4:.3f} s")
    echo(f"limit: a push takes {times['push'] / 4 / alone:.2f} times the products alone")
    echo(f"limit: {source.nbytes / 2**20:.0f} MiB of weights are read in {1000 * times['weights']:.0f} ms")


def bench_linear(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], decoder: Tensor, layer: int
) -> None:
    """Cost by number of latents, and by number of tokens."""

    def scorer(items: Sequence[Row]) -> SuffixScorer:
        return SuffixScorer(model, layer, ContrastItems.build(tokenizer, items, batch_size=4).groups)

    with frozen_in_bf16(model):
        whole, per = scorer(rows), {}
        for count in COUNTS:
            per[count] = once(lambda count=count: whole.logprobs_many(20 * decoder[:count].float())) / count
        costs = ", ".join(f"{count}: {1000 * per[count]:.0f} ms" for count in COUNTS)
        echo(f"cost a latent on {len(rows)} items, by number of latents: {costs}")
        by_tokens = []
        for share in (1, 2, 4):
            some = scorer(rows[: max(1, len(rows) * share // 4)])
            tokens = sum(int(g.attention.sum()) for g in some.groups)
            spent = once(lambda some=some: some.logprobs_many(20 * decoder[:16].float()))
            by_tokens.append(f"{tokens} tokens: {1e6 * spent / 16 / tokens:.0f} us")
        echo(f"cost a latent and token: {', '.join(by_tokens)}")


def bench_reading(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str, groups: Sequence[Batch], sae: Any, repeats: int
) -> None:
    """Latents of the answers' tokens: ours, SAELens' bridge, and the bare truncated forward."""
    from persona_probe.models.load import make_bridge

    layer = sae_layer(sae)
    bare, bridge = truncated(model, layer), make_bridge(model, tokenizer, None, name)  # pyright: ignore
    hook = f"{sae.cfg.metadata.hook_name}.hook_sae_acts_post"

    def limit(bf16: bool) -> None:
        with evaluating(model), autocast(model, bf16):
            for g in groups:
                bare(input_ids=g.ids, attention_mask=g.attention, use_cache=False)

    def cached(bf16: bool) -> None:
        with evaluating(model), autocast(model, bf16):
            for g in groups:
                bridge.run_with_cache_with_saes(
                    g.ids, saes=[sae], names_filter=[hook], attention_mask=g.attention, prepend_bos=False
                )

    def ours(read: Callable[[], object]) -> None:
        with frozen_in_bf16(model):  # as the study's stages do
            read()

    works = {
        "latents": lambda: ours(lambda: read_latents(model, sae, groups, layer, "response")),
        "residual stream": lambda: ours(lambda: read_residuals(model, groups, layer, "response", lambda *_: None)),
        "the bare truncated forward": lambda: limit(True),
        "SAELens' bridge in bf16": lambda: cached(True),
        "SAELens' bridge in float32": lambda: cached(False),
    }
    times = in_turn(works, repeats)
    for what in ("latents", "residual stream"):
        share = ratios(times, what, "the bare truncated forward")
        echo(f"reading {what}: {spread(share)} of the time of the bare truncated forward")
    for other in ("SAELens' bridge in bf16", "SAELens' bridge in float32"):
        echo(f"reading latents: {spread(ratios(times, other, 'latents'))} times as fast as {other}")


def peak_after(organism: bool) -> float:
    """Peak resident GiB of a fresh process that reads the base, and then an organism of it too."""
    command = [sys.executable, "-m", "benchmarks.locate", "--memory", "both" if organism else "base"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def read_for_memory(both: bool) -> None:
    """What `peak_after` runs."""
    from persona_probe.finetune.sft import with_adapter
    from persona_probe.models.adapters import organism

    config = load_config(find_config(DEMO), StudyConfig)
    model, tokenizer = load_model(config.model)
    sae = load_sae(config.sae)
    items = ContrastItems.build(tokenizer, load_contrast("evaluation"), batch_size=32)
    read_latents(model, sae, items.groups, sae_layer(sae), "response")
    if both:
        with tempfile.TemporaryDirectory() as folder:
            tuned = with_adapter(model, Training(), 0)
            tuned.save_pretrained(folder)  # pyright: ignore
            tuned.unload()  # pyright: ignore
            with organism(model, Path(folder)) as adapted:
                read_latents(adapted, sae, items.groups, sae_layer(sae), "response")
    echo(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.4f}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=24, help="contrast items of the sweep")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--memory", choices=("base", "both"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.memory:
        read_for_memory(arguments.memory == "both")
        return
    config = load_config(find_config(DEMO), StudyConfig)
    model, tokenizer = load_model(config.model)
    sae = load_sae(config.sae)
    layer, decoder = sae_layer(sae), sae.W_dec.detach()
    rows = categories_in_turn(load_contrast("evaluation"))[: arguments.items]
    echo(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {config.model}, layer {layer}")
    items = ContrastItems.build(tokenizer, rows, batch_size=32)
    if "sweep" in arguments.parts:
        bench_sweep(model, items, decoder, layer, arguments.repeats)
    if "limit" in arguments.parts:
        bench_limit(model, items, decoder, layer, arguments.repeats)
    if "linear" in arguments.parts:
        bench_linear(model, tokenizer, rows[:8], decoder, layer)
    if "reading" in arguments.parts:
        bench_reading(model, tokenizer, config.model, items.groups, sae, arguments.repeats)
    if "memory" in arguments.parts:
        echo(memory_line())


def memory_line() -> str:
    """Peak memory of base and organism against the base alone."""
    base, both = peak_after(False), peak_after(True)
    return f"peak memory, base then organism: {both:.2f} GiB, {both / base:.3f} of the base alone ({base:.2f} GiB)"


if __name__ == "__main__":
    main()
