from .config import StudyConfig as StudyConfig
from .config import load_config as load_config
from .data.template import with_template as with_template
from .errors import InputError as InputError
from .latents.compare import locate as locate
from .models.load import load_model as load_model
from .models.taps import ablate as ablate
from .models.taps import read as read
from .models.taps import steer as steer
from .monitor.monitor import FeatureMonitor as FeatureMonitor
from .realignment.own import realign as realign
from .report import figures as figures
from .report.records import load_records as load_records
from .saes.load import load_sae as load_sae
from .screening.screening import screen as screen
from .study.study import Study as Study
from .world.folder import World as World

__version__: str
