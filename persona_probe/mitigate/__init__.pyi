from .grid.grid_run import run_grid as run_grid
from .methods import MITIGATIONS as MITIGATIONS
from .methods import make_mitigation as make_mitigation
from .mitigated_training import train_mitigated as train_mitigated
from .mitigation import MitigatedFit as MitigatedFit
from .mitigation import MitigatedRun as MitigatedRun
from .mitigation import Mitigation as Mitigation
from .mitigation import MitigationInputs as MitigationInputs
