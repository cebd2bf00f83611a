from .labelled_config import MonitorStudy as MonitorStudy
from .results import run_study as run_study
