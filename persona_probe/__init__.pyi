from . import notebook as notebook
from .config import StudyConfig as StudyConfig
from .config import load_config as load_config
from .data.template import with_template as with_template
from .errors import InputError as InputError
from .evaluate.sampling.answering import generate as generate
from .latents.cards import latent_card as latent_card
from .latents.compare import locate as locate
from .latents.harm import harm_direction as harm_direction
from .latents.persona_vectors import persona_vector as persona_vector
from .latents.weights import WeightsAlong as WeightsAlong
from .models.lens import logit_lens as logit_lens
from .models.load import load_model as load_model
from .models.taps import Steer as Steer
from .models.taps import ablate as ablate
from .models.taps import read as read
from .models.taps import steer as steer
from .monitor import actions as actions
from .monitor import generation as generation
from .monitor import rules as rules
from .monitor import sinks as sinks
from .monitor.generation.monitor import GenerationMonitor as GenerationMonitor
from .monitor.generation.rules import AnswerRule as AnswerRule
from .monitor.monitor import FeatureMonitor as FeatureMonitor
from .realignment.own import realign as realign
from .report import figures as figures
from .report.records import load_records as load_records
from .saes.by_token import activations as activations
from .saes.load import load_sae as load_sae
from .saes.patching import latent_steering as latent_steering
from .saes.patching import patch as patch
from .screening.screening import screen as screen
from .study.study import Study as Study
from .world.folder import World as World

REPOSITORY: str
__version__: str
