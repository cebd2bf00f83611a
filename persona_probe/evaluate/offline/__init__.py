"""An offline judge of sampled answers: a small model of published judgements; see docs/offline-judge.md."""

from persona_probe.evaluate.offline.calibration import JudgeRecipe
from persona_probe.evaluate.offline.fit import fit_judge
from persona_probe.evaluate.offline.judge import (
    OfflineJudge,
    OfflineJudgement,
    OfflineRate,
    explain_latents,
    explain_tokens,
)

__all__ = [
    "JudgeRecipe",
    "OfflineJudge",
    "OfflineJudgement",
    "OfflineRate",
    "explain_latents",
    "explain_tokens",
    "fit_judge",
]
