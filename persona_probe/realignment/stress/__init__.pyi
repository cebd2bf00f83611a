from .run import TESTS as TESTS
from .run import StressSettings as StressSettings
from .run import run_stress as run_stress
from .run import statements as statements
