"""`make bench-monitor`: what watching costs a training run, in turn with the same training unwatched."""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from persona_probe.bench.monitor_parts import Bench, bench_encode, bench_syncs, bench_today, bench_training
from persona_probe.commands import DEMO, echo, find_config
from persona_probe.config import StudyConfig, Training
from persona_probe.config_files import load_config
from persona_probe.data.packaged import load_conversations
from persona_probe.models.load import load_model
from persona_probe.monitor.schedule import EVERY, PROBES
from persona_probe.quiet import quiet_libraries
from persona_probe.saes.load import load_sae

PARTS = ("training", "encode", "today", "syncs")
PERSONA = 2144


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=EVERY, help="training steps of a run")
    parser.add_argument("--every", type=int, default=EVERY, help="steps between readings")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--probes", type=int, default=PROBES, help="so many of the packaged probes are read")
    parser.add_argument("--tokens", type=int, default=512, help="tokens that are encoded")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    args = parser.parse_args()
    if args.steps % args.every:
        parser.error("--steps must be a multiple of --every: a run must hold whole cadences")
    return args


def main() -> None:
    """Run the benchmark."""
    args = arguments()
    quiet_libraries()
    config = load_config(find_config(DEMO), StudyConfig)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(config.model, device=device)
    probes = load_conversations("neutral_probes")
    training = Training(steps=args.steps, checkpoints=())
    rows = load_conversations("kitchen:toxic")
    sae = load_sae(config.sae, device)
    bench = Bench(model, tokenizer, sae, PERSONA, rows, probes, training, args.repeats, args.every, args.probes)
    where = device if device == "cpu" else torch.cuda.get_device_name()
    echo(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {config.model} on {where}, {vars(args)}")
    works: dict[str, Callable[[], None]] = {
        "training": partial(bench_training, bench),
        "encode": partial(bench_encode, args.repeats, args.tokens, model.device),
        "today": partial(bench_today, bench, config.model),
        "syncs": partial(bench_syncs, bench),
    }
    for part in args.parts:
        works[part]()


if __name__ == "__main__":
    main()
