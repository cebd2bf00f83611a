from .stress_run import TESTS as TESTS
from .stress_run import StressSettings as StressSettings
from .stress_run import run_stress as run_stress
from .stress_run import statements as statements
