from .judge_calibration import JudgeRecipe as JudgeRecipe
from .judge_fit import fit_judge as fit_judge
from .judge_fit import validate_judge as validate_judge
from .offline_judge import OfflineJudge as OfflineJudge
from .offline_judge import OfflineJudgement as OfflineJudgement
from .offline_judge import OfflineRate as OfflineRate
from .offline_judge import explain_latents as explain_latents
from .offline_judge import explain_tokens as explain_tokens
