"""What happens at an alarm: small objects that the monitor calls."""

from persona_probe.monitor.actions.actions import (
    Action,
    ActionContext,
    CallBack,
    LogAlarm,
    LowerLearningRate,
    SaveCheckpoint,
    StopTraining,
    check_actions,
)
from persona_probe.monitor.actions.rollback import RollBack

__all__ = [
    "Action",
    "ActionContext",
    "CallBack",
    "LogAlarm",
    "LowerLearningRate",
    "RollBack",
    "SaveCheckpoint",
    "StopTraining",
    "check_actions",
]
