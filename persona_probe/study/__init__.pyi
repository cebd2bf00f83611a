from .auto import AutoConfig as AutoConfig
from .auto import run_auto as run_auto
from .hashes import verify as verify
from .plan.plan import dry_run as dry_run
from .study import Study as Study
from .summary import summarise as summarise
