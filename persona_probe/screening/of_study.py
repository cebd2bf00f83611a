"""Screening by a located study: its model, SAE, persona latent, directions, and the organism that it induced."""

from collections.abc import Sequence
from pathlib import Path

from persona_probe.context import Context
from persona_probe.data.chat import Conversation
from persona_probe.screening.evidence import available
from persona_probe.screening.feature import LATENT, study_feature
from persona_probe.screening.inputs import check_rows
from persona_probe.screening.rankers import choose_rankers
from persona_probe.screening.screen import Screening, screening
from persona_probe.screening.settings import Settings
from persona_probe.screening.write import settings_for


def screen_by_study(
    ctx: Context,
    rows: Sequence[Conversation] | str | Path,
    direction: str | None = None,
    rankers: Sequence[str] | None = None,
    out: Path | None = None,
) -> Screening:
    """Screen rows for a study's persona feature; nothing is written to the run.

    Args:
        direction: see `study_feature`; None takes the persona latent's.
        out: folder in which own answers are kept; None keeps none.

    Raises:
        InputError: rows without answers, no such direction, a ranker that cannot be had, or locate has not run.
    """
    talks = check_rows(rows)
    feature, organism = study_feature(ctx, direction or LATENT), study_organism(ctx)
    choose_rankers(rankers, available(feature, organism is not None))  # before the model loads
    settings = Settings(mixed_precision=ctx.config.bf16) if out is None else settings_for(out, ctx.config.bf16)
    return screening(
        talks, ctx.model, feature, tokenizer=ctx.tokenizer, organism=organism, rankers=rankers, settings=settings
    )


def study_organism(ctx: Context) -> Path | None:
    """The last checkpoint of the arm that the study repairs, of its first seed; None where it was not trained."""
    arm, seed = ctx.config.realign.start, ctx.config.seeds[0]
    if not ctx.run.has(f"arms/{arm}-s{seed}"):
        return None
    return ctx.run.checkpoint(arm, seed, ctx.last_step(arm, seed))
