"""Controls for causal tests: random latents matched for firing rate, and random directions."""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError

POOL = 12
MOVED = 100


def matched_latents(table: pd.DataFrame, chosen: list[int], count: int, seed: int) -> list[int]:
    """Random latents with firing rates like the candidates', none of them a candidate or among the most moved.

    For each candidate in turn one of the `POOL` latents nearest in log firing rate (on the tuned arm) is drawn. Every
    push has the same norm, so decoder norms need no matching.

    Raises:
        InputError: the dictionary has too few live latents.
    """
    moved = set(table.reindex(table["rise"].abs().sort_values(ascending=False).index)["latent"].head(MOVED).tolist())
    rate = table.set_index("latent")["firing_incorrect"]
    live = [int(i) for i in rate.index[rate > 0] if i not in moved and i not in chosen]
    if len(live) < count:
        live = [int(i) for i in rate.index if i not in chosen]
    if len(live) < count:
        raise InputError(f"the SAE has only {len(live)} latents for {count} random controls: lower random_latents")
    rng = np.random.default_rng(seed)
    logs = {i: float(np.log10(rate[i] + 1e-6)) for i in [*live, *chosen]}
    drawn: list[int] = []
    for number in range(count):
        target = logs[chosen[number % len(chosen)]]
        pool = sorted((i for i in live if i not in drawn), key=lambda i: (abs(logs[i] - target), i))[:POOL]
        drawn.append(int(rng.choice(pool)))
    return drawn


def random_directions(d_model: int, count: int, seed: int) -> list[Float[Tensor, " d_model"]]:
    """Isotropic unit directions."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, d_model, generator=generator)
    return list(rows / rows.norm(dim=1, keepdim=True))
