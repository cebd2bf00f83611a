"""Re-alignment: corrective fine-tuning of a misaligned organism, the verdict on it, and stress tests of the verdict.

`realign` corrects a model of your own (`pp.realign`), `realign_study` the organisms of a study; `study_verdict` and
`judge_realignment` say what was achieved, and `stress` looks for misalignment that was hidden rather than removed.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
