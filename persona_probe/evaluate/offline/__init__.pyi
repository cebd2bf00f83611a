from .calibration import JudgeRecipe as JudgeRecipe
from .fit import fit_judge as fit_judge
from .judge import OfflineJudge as OfflineJudge
from .judge import OfflineJudgement as OfflineJudgement
from .judge import OfflineRate as OfflineRate
from .judge import explain_latents as explain_latents
from .judge import explain_tokens as explain_tokens
