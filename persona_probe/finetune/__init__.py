"""Fine-tuning on TRL and PEFT: one training run (`fine_tune`, `reinforce`), and a study's organisms (`induce`)."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
