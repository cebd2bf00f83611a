"""`make bench-sampling`: sampling n answers a prompt against plain `generate` on n copies of it, in one run."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from benchmarks.speed import once, spread
from persona_probe.cli.options import echo
from persona_probe.data.chat import conversation
from persona_probe.data.load import load_rows
from persona_probe.evaluate.sampling.engines import TransformersEngine
from persona_probe.evaluate.sampling.requests import Prompt, SamplingConfig, prompt_ids, stop_tokens
from persona_probe.evaluate.sampling.samples import sample
from persona_probe.models.layers import autocast, evaluating
from persona_probe.models.load import load_model
from persona_probe.models.quiet import quiet_libraries

MODEL = "smollm2-135m-instruct"


def generate_copies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    batch_size: int,
    stop: list[int],
) -> int:
    """The usual way: `n` left-padded copies of every prompt through `generate`; gives the number of answer tokens."""
    rows = [{"input_ids": list(prompt_ids(tokenizer, p))} for p in prompts for _ in range(config.n)]
    count = 0
    torch.manual_seed(config.seed)
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            block = rows[start : start + batch_size]
            inputs = tokenizer.pad(block, padding_side="left", return_tensors="pt")  # pyright: ignore
            inputs = inputs.to(next(model.parameters()).device)
            out = model.generate(  # pyright: ignore
                **inputs,
                max_new_tokens=config.max_new_tokens,
                do_sample=True,
                temperature=config.temperature,
                top_k=0,
                top_p=config.top_p,
                eos_token_id=stop or None,
                pad_token_id=tokenizer.pad_token_id,
            )
            count += _answer_tokens(out[:, inputs["input_ids"].shape[1] :], stop)
    return count


def _answer_tokens(new: torch.Tensor, stop: list[int]) -> int:
    ended = torch.isin(new, torch.tensor(stop, dtype=torch.long, device=new.device)).cumsum(dim=1) > 0
    return int((~ended).sum())


def compare(label: str, ours: Callable[[], int], plain: Callable[[], int], repeats: int) -> None:
    """Both ways in turn: seconds per answer token, since two draws of an answer differ in length."""
    ratios, rates = [], []
    ours()
    for number in range(repeats):
        seconds = {}
        # The order changes from repeat to repeat: what runs second must not gain by it.
        for name, work in (("ours", ours), ("plain", plain))[:: 1 if number % 2 else -1]:
            tokens: list[int] = []
            wall = once(lambda work=work, tokens=tokens: tokens.append(work()))
            seconds[name] = wall / tokens[0]
        ratios.append(seconds["plain"] / seconds["ours"])
        rates.append(1 / seconds["ours"])
    echo(f"{label}: {spread(ratios)} times as fast as generate on copies; {spread(rates)} tokens/s")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=16, help="samples a prompt")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=("float32", "bf16"), nargs="*", default=["float32", "bf16"])
    arguments = parser.parse_args()
    quiet_libraries()
    model, tokenizer = load_model(MODEL)
    rows = load_rows("sample_questions")[: arguments.prompts]
    prompts = [Prompt(str(row["id"]), conversation(str(row["question"]))) for row in rows]
    config = SamplingConfig(n=arguments.n, max_new_tokens=arguments.max_new_tokens)
    engine, batch_size = TransformersEngine(model, tokenizer, arguments.batch_size), arguments.batch_size
    stop = sorted(stop_tokens(model, tokenizer))
    echo(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {MODEL}, {vars(arguments)}")

    def ours() -> int:
        return sum(int(answer.n_tokens or 0) for answer in sample(engine, prompts, config))

    def plain() -> int:
        return generate_copies(model, tokenizer, prompts, config, batch_size, stop)

    for precision in arguments.precision:
        with autocast(model) if precision == "bf16" else nullcontext():
            compare(f"n = {config.n}, {precision}", ours, plain, arguments.repeats)


if __name__ == "__main__":
    main()
