from . import planted as planted
from .cards import card as card
from .cards import end_tokens as end_tokens
from .cards import logit_effect as logit_effect
from .cards import make_cards as make_cards
from .compare import locate as locate
from .persona_vectors import persona_vector as persona_vector
from .stage import mean_shift as mean_shift
