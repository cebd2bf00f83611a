"""When an SAE explains too little of what it reads for its latents to mean anything: one rule for the whole package."""

LEAST_EXPLAINED = 0.5
"""Share of the variance below which an SAE's latents are called worthless. 1 is a perfect reconstruction; 0 is what the
mean alone reaches; an SAE below 0 reconstructs worse than that."""


def worthless(explained_variance: float) -> str | None:
    """What to say of an SAE that explains less than `LEAST_EXPLAINED`, or NaN; None for a better one."""
    if explained_variance >= LEAST_EXPLAINED:
        return None
    worse = ", worse than the mean alone (0)" if explained_variance < 0 else ""
    return (
        f"explained variance {explained_variance:.2f}{worse}, below {LEAST_EXPLAINED:g}: the latents are worthless as "
        "a description of these activations"
    )
