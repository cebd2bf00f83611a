from .organisms import induce as induce
from .sft import Fitted as Fitted
from .sft import fine_tune as fine_tune
from .sft import with_adapter as with_adapter
