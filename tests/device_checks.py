"""Readings, pushes and gradients with model and SAE on different devices; run as `python -m tests.device_checks`.

Prints one JSON object: by case and place, the largest difference to the CPU, and how often the host waited.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona_probe.data.chat import conversation
from persona_probe.data.tokens import batches
from persona_probe.evaluate.answers import SuffixScorer, answer_batches, answer_logprobs
from persona_probe.latents.attribution import gradient_scores
from persona_probe.latents.cards import latent_card
from persona_probe.latents.persona_vectors import response_means
from persona_probe.mitigate.losses import latent_excess
from persona_probe.models.lens import logit_lens
from persona_probe.models.taps import Steer, ablate, orthonormal, project_out, steer
from persona_probe.monitor.reading import FeatureReader
from persona_probe.saes.by_token import activations
from persona_probe.saes.patching import patch
from persona_probe.saes.quality import SpliceTap
from persona_probe.saes.read import read_latents
from persona_probe.screening.reading import Reader
from tests.factories import LAYER, make_model, make_sae, make_tokenizer, talks
from tests.pretend_device import NAME, pretending, register, spread

TOKENIZER = make_tokenizer()
GROUPS = list(batches(TOKENIZER, talks(), 3))
ANSWERED = [conversation(f"Why {n}?", f"because {n}") for n in range(4)]
DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(0))
FLAGS = np.array([True, False] * 3)


def latents(model: Any, sae: Any) -> Any:
    found = read_latents(model, sae, GROUPS, LAYER, "response", bf16=False)
    return found.mean, found.firing, found.maximum, found.resid, found.square, found.fit.explained_variance


def gradients(model: Any, sae: Any) -> Any:
    found = gradient_scores(model, sae, GROUPS, FLAGS, LAYER, bf16=False)
    return found.attribution, found.slope


def pushes(model: Any, sae: Any) -> Any:
    scorer = SuffixScorer(model, LAYER, answer_batches(TOKENIZER, ANSWERED), bf16=False)
    assert scorer.exact
    edit = partial(project_out, basis=orthonormal(sae.W_dec[3].detach()))
    return scorer.logprobs_many(torch.stack([DIRECTION, -DIRECTION])), scorer.edited(edit)


def taps(model: Any, sae: Any) -> Any:
    with steer(model, LAYER, DIRECTION, 2.0), ablate(model, LAYER, sae.W_dec[3].detach()):
        return answer_logprobs(model, GROUPS, bf16=False)


def splice(model: Any, sae: Any) -> Any:
    with SpliceTap(model, LAYER, sae):
        return answer_logprobs(model, GROUPS, bf16=False)


def patched(model: Any, sae: Any) -> Any:
    source: Any = make_model(seed=3)
    with patch(model, source.to(next(model.parameters()).device), sae=sae, latents=[1, 2]):
        return answer_logprobs(model, GROUPS, bf16=False)


def by_token(model: Any, sae: Any) -> Any:
    few = activations(model, sae, ["hello", "you there"], latents=[1, 2], tokenizer=TOKENIZER)
    return *few.values, *activations(model, sae, ["hello", "you there"], tokenizer=TOKENIZER).values


def card(model: Any, sae: Any) -> Any:
    made = latent_card(model, sae, 3, texts=["hello", "you there"], tokenizer=TOKENIZER)
    return [example.values for example in made.examples], [token.logit for token in made.top_tokens]


def lens(model: Any, sae: Any) -> Any:
    push = Steer(LAYER, sae.W_dec[3].detach(), 5.0)
    seen = logit_lens(model, ANSWERED, tokenizer=TOKENIZER, steer=push)
    return seen.logits, seen.states


def monitor(model: Any, sae: Any) -> Any:
    reader = FeatureReader(sae, {"latent": 3, "direction": DIRECTION}, GROUPS, LAYER, bf16=False)
    reader.read(model)  # prepares the probes
    WAITS.clear()
    return reader.read(model).values


def screening(model: Any, sae: Any) -> Any:
    found = Reader(LAYER, sae, (1, 2), bf16=False).read(model, TOKENIZER, ANSWERED)
    return found.resid, found.latents, found.nats


def excess(model: Any, sae: Any) -> Any:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).device)
    return latent_excess(sae, x, x * 0.5, [1, 2]).detach().cpu()


def means(model: Any, sae: Any) -> Any:
    return response_means(model, TOKENIZER, ANSWERED, LAYER, bf16=False)


WORKS = (latents, gradients, pushes, taps, splice, patched, by_token, card, lens, monitor, screening, excess, means)
CASES: dict[str, Callable[[Any, Any], Any]] = {work.__name__: work for work in WORKS}
PLACES = ("together", "sae on the host", "spread over two")
WAITS: Any = {}


def numbers(value: Any) -> list[np.ndarray]:
    """All arrays and numbers in a result."""
    if isinstance(value, (list, tuple)):
        return [array for part in value for array in numbers(part)]
    return [np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=float)]


def placed(where: str) -> tuple[Any, Any]:
    """Model and SAE, each on its device."""
    model: Any = make_model()
    sae = make_sae("topk")
    if where == "spread over two":
        return spread(model, LAYER), sae.to(f"{NAME}:1")
    return model.to(f"{NAME}:0"), sae if where == "sae on the host" else sae.to(f"{NAME}:0")


@cache
def on_the_cpu(case: str) -> list[np.ndarray]:
    """The numbers to be met."""
    return numbers(CASES[case](make_model(), make_sae("topk")))


def check(case: str, where: str) -> dict[str, Any]:
    """One case, or what it raised."""
    global WAITS
    expected = on_the_cpu(case)
    with pretending() as device:
        model, sae = placed(where)
        WAITS = device.waits
        device.waits.clear()
        try:
            found = numbers(CASES[case](model, sae))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            return {"error": str(error)}
    apart = max(float(np.nanmax(np.abs(a - b), initial=0.0)) for a, b in zip(expected, found, strict=True))
    return {"apart": apart, "waits": sum(device.waits.values())}


def main() -> None:
    """All cases in all places."""
    torch.set_num_threads(1)
    register()
    # Autograd knows one pretended device only.
    pairs = [(c, p) for c in CASES for p in PLACES if (c, p) != ("gradients", "spread over two")]
    print(json.dumps({f"{case}, {where}": check(case, where) for case, where in pairs}))  # noqa: T201


if __name__ == "__main__":
    main()
