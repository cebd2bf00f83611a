"""Made-up judged answers with known rates."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from persona_probe.evaluate.judging import Ruled, Ruling, verdict
from persona_probe.evaluate.tables import judged_table


def judged(
    arm: str,
    values: Mapping[str, Sequence[float | None]],
    *,
    seed: int = 0,
    evaluation: str = "set-judge",
    why: str = "",
    errors: tuple[float, float] | None = None,
) -> pd.DataFrame:
    """Rows of one organism: by question, the values of its answers; None is an incoherent answer."""
    rows = [
        {"arm": arm, "seed": seed, "step": 4, "item": q, "category": "c", "pair": q, "prompt": q, "sample": n}
        for q, found in values.items()
        for n in range(len(found))
    ]
    answers = pd.DataFrame(rows).assign(variant="plain")
    rulings = tuple(_ruling(v, errors) for found in values.values() for v in found)
    return judged_table(
        answers, Ruled(rulings, why), evaluation=evaluation, questions="set", sampling="s", judge=evaluation
    )


def _ruling(value: float | None, errors: tuple[float, float] | None) -> Ruling:
    whole, single = errors or (None, None)
    if value is None:
        return Ruling(None, False, 50.0, 20.0, error_model=whole, error_question=single)
    return Ruling(value, True, 90.0 - 80.0 * value, 80.0, error_model=whole, error_question=single)


def drawn(rates: list[float], samples: int, seed: int) -> dict[str, list[float | None]]:
    """By question, answers drawn with that question's rate."""
    rng = np.random.default_rng(seed)
    return {f"q{n:02d}": [float(v) for v in rng.random(samples) < rate] for n, rate in enumerate(rates)}


def scored(alignment: float | None, coherence: float | None) -> Ruling:
    """The ruling that two scores give."""
    value, coherent = verdict(alignment, coherence)
    return Ruling(value, coherent, alignment, coherence)
