"""Mitigations: ways to fine-tune on narrow data without misaligning the model, and a grid that compares them.

`MITIGATIONS` names them; `train_mitigated` trains with one; `run_grid` trains and measures many on the same data.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
